"""Suggestions for a mistyped name."""

import difflib
from collections.abc import Iterable


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
