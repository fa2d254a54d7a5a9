"""`deskside task`, with an installed model's tokenizer for its check."""

from typing import TYPE_CHECKING

import typer

from models.task.cli import create_app as create_task_app

if TYPE_CHECKING:
    from models.task.check.texts import CountTokens

DEFAULT_BASE = "gemma-3-270m"


def create_app() -> typer.Typer:
    """The verbs of `deskside task`."""
    return create_task_app(tokens_of)


def tokens_of(base: str | None) -> "CountTokens | None":
    """Count tokens as the installed model `base` does; without a name as the default base, None if it is missing.

    Raises ModelNotFound or LoadFailed.
    """
    from models.store.store import Store
    from runtime.llama.model import load_tokenizer

    store = Store()
    if base is None and DEFAULT_BASE not in store.names():
        return None
    tokenizer = load_tokenizer(store.resolve(base or DEFAULT_BASE).gguf)
    return lambda text: len(tokenizer.encode(text, add_special=False, parse_special=False))
