"""A vocabulary without its model: what a GGUF makes of a text, known in a moment and without reading the weights."""

from pathlib import Path

from .llama_handle import ModelHandle
from .llama_tokenizer import Tokenizer


def load_vocabulary(path: Path) -> Tokenizer:
    """The tokenizer of the GGUF at `path`. Raises LoadFailed with llama.cpp's reason."""
    return Tokenizer(ModelHandle(path, vocab_only=True))
