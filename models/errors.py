"""The errors of `models`, suggestions for a mistyped name, and the exit codes of every command.

Each message names the thing, the value found and, where there is one, the fix.

ModelError
├── ModelNotFound      no model of that name or path
├── BadManifest        model.toml is missing, malformed or contradicts the files beside it
├── BadGguf            a file is not GGUF, its head is damaged, or it lacks a field
├── BadCatalog         catalog.toml is malformed
├── BadExamples        a file of examples is damaged, a line is not a chat record, or there are too few
├── BadTable           a file of rows cannot be read, lacks a column, or its rows do not fit its header
├── BadTask            a task's folder is missing, malformed, or its files contradict each other
├── HashMismatch       a file's sha256 is not the expected one
├── DownloadFailed     no source could deliver the file
└── StoreError         the store cannot be written, or the name is taken or not allowed
"""

import difflib
from collections.abc import Iterable

DONE, FAILED, USAGE, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


class ModelError(Exception):
    """Base of the errors of `models`."""


class ModelNotFound(ModelError):
    """No model of that name or path."""


class BadManifest(ModelError):
    """`model.toml` is missing, malformed or contradicts the files beside it."""


class BadGguf(ModelError):
    """A file is not GGUF, its head is damaged, or it lacks a field that is needed."""


class BadCatalog(ModelError):
    """`catalog.toml` is malformed."""


class BadExamples(ModelError):
    """A file of examples is damaged, a line is not a chat record, or there are too few."""


class BadTable(ModelError):
    """A file of rows cannot be read, lacks a column, or its rows do not fit its header."""


class BadTask(ModelError):
    """A task's folder is missing or malformed, or its files contradict each other."""


class HashMismatch(ModelError):
    """A file's sha256 is not the expected one."""


class DownloadFailed(ModelError):
    """No source could deliver the file."""


class StoreError(ModelError):
    """The store cannot be written, or the name is taken or not allowed."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name in `known` that `name` is nearest to; None if none is near. Case, hyphens and the like do not count."""
    by_letters = {_letters(one): one for one in known}
    letters = _letters(name[:64])
    if not letters:
        return None
    if near := difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.7):
        return by_letters[near[0]]
    # The beginning of one name only: `gemma` for gemma-3-270m.
    begun = [one for one in by_letters if len(letters) >= 3 and (one.startswith(letters) or letters.startswith(one))]
    return by_letters[begun[0]] if len(begun) == 1 else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a question, or nothing."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near is not None else ""


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
