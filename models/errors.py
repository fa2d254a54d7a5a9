"""The errors of `models`, and the exit codes of every command.

Each message names the thing, the value found and, where there is one, the fix.

ModelError
├── ModelNotFound      no model of that name or path
├── BadManifest        model.toml is missing, malformed or contradicts the files beside it
├── BadGguf            a file is not GGUF, its head is damaged, or it lacks a field
├── BadCatalog         catalog.toml is malformed
├── BadExamples        a file of examples is damaged, a line is not a chat record, or there are too few
├── HashMismatch       a file's sha256 is not the expected one
├── DownloadFailed     no source could deliver the file
└── StoreError         the store cannot be written, or the name is taken or not allowed
"""

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


class HashMismatch(ModelError):
    """A file's sha256 is not the expected one."""


class DownloadFailed(ModelError):
    """No source could deliver the file."""


class StoreError(ModelError):
    """The store cannot be written, or the name is taken or not allowed."""
