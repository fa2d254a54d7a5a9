"""Protocols of a loaded model and its tokenizer, the part of llama.cpp that the engine uses, and the load's settings.

`runtime/llama/model.py` implements them with the real library, `tests/support/runtime/fakes.py` with a toy model of
predictable answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The settings to load a model with.

    `n_ctx` cells are shared by at most `n_seq_max` sequences, or each has as many (`streams`); a decode
    computes at most `n_batch` tokens and gives at most `n_outputs` rows of logits (at least one for each sequence), for
    which memory is reserved. `n_threads` None is the physical cores; `gpu_layers` None is all of them if llama.cpp was
    built with a GPU backend, else none.
    `repack` lets llama.cpp copy weights into the form its fast kernels want. `long_prompts` lets it choose the rotary
    embeddings for long prompts where a model has two sets (see `handle`). `adapters` are LoRA GGUF files for this
    model, by the name under which requests ask for them. `prefill` chooses the matrix products of prompts: llama.cpp's
    ("stock"), Deskside's ("own", with attention), or those that win a race ("auto"). Streams that are not `exact` use
    flash attention in any case, which is faster.
    """

    n_ctx: int = 8192
    n_batch: int = 512
    n_seq_max: int = 32
    n_outputs: int | None = None
    n_threads: int | None = None
    gpu_layers: int | None = None
    use_mmap: bool = True
    repack: bool = True
    long_prompts: bool = False
    adapters: Mapping[str, Path] = field(default_factory=dict)
    prefill: Literal["auto", "stock", "own"] = "stock"
    streams: bool = False
    exact: bool = True


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model and its bounds. Sizes in tokens, except where a name gives another unit.

    `n_ctx` counts the cells of the KV cache: all sequences together hold no more tokens than that.
    `n_seq_max` bounds sequence ids (0 … n_seq_max-1), `n_batch` the tokens of one decode. `gpu_layers` -1 is all.
    The `embed_…` fields bound `LlamaLike.embed` alike; a text of at most `embed_n_ctx` tokens can be embedded.
    `pooling` says which of a text's rows, each `n_embd` wide, make up its vector.
    `adapters` are the names of the LoRA adapters that are loaded with it.
    A chunk of several tokens has the same bits however it is cut if it is filled up to a multiple of `row_group`. So
    has a row of an answer beside any others, also of its own sequence, while they are `rows_alike` at most.
    A snapshot of at most `cut_limit` tokens can be restored cut shorter, a longer one at its own length only (None:
    there are no snapshots).
    """

    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_seq_max: int
    n_batch: int
    n_params: int
    size_bytes: int
    description: str
    architecture: str
    backend: str
    n_threads: int
    gpu_layers: int
    chat_template: str | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    n_embd: int = 0
    embed_n_ctx: int = 0
    embed_n_seq_max: int = 0
    embed_n_batch: int = 0
    pooling: Pooling = "mean"
    adapters: tuple[str, ...] = ()
    cut_limit: int | None = None
    row_group: int = 1
    rows_alike: int = 1


class TokenizerLike(Protocol):
    """Text ↔ token ids. Reads an immutable vocabulary: any thread may use it."""

    @property
    def n_vocab(self) -> int:
        """The number of token ids."""

    @property
    def bos(self) -> int | None:
        """The token that begins a text, if the model has one."""

    @property
    def eos(self) -> int | None:
        """The token that ends a text, if the model has one."""

    @property
    def adds_bos(self) -> bool:
        """True if the model wants `bos` in front of every text."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Every token that ends an answer (end of text, end of turn …), ascending."""

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The texts that `encode(parse_special=True)` reads as control tokens."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. `add_special` adds BOS as the model wants it; `parse_special` reads control tokens.

        Raises InvalidRequest if the text is not valid Unicode, TokenizeFailed if it cannot be tokenised.
        """

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes: maybe half a character. Control tokens are empty unless `special`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens left out, invalid UTF-8 as U+FFFD."""

    def is_end(self, token: int) -> bool:
        """True if `token` ends an answer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The arrays of one `llama_decode`, all of shape (n_tokens,): token ids, positions, sequence ids, logits wanted.

    `rows`: each token is computed as an answer's next one, also several of a sequence (drafts); else as a prompt's.
    """

    tokens: np.ndarray
    positions: np.ndarray
    seq_ids: np.ndarray
    wants_logits: np.ndarray
    rows: bool = False


class LlamaLike(Protocol):
    """One loaded model with one KV cache. Not thread-safe: one thread owns it."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model and its bounds."""

    @property
    def tokenizer(self) -> TokenizerLike:
        """The model's tokenizer."""

    def decode(self, batch: Batch) -> np.ndarray:
        """Compute `batch`; the logits, float32 of shape (rows that want logits, n_vocab), valid until the next decode.

        Raises NoKvSlot and BatchInvalid (nothing was changed), DecodeAborted and DecodeFailed (part of the batch may
        lie in the cache).
        """

    def embed(self, batch: Batch, adapter: str | None = None) -> np.ndarray:
        """Compute `batch` beside the KV cache, under `adapter` of `info.adapters` (None: with none).

        Returns the last layer's rows, float32 of shape (tokens, n_embd). Sequence ids are a space of their own: a
        sequence continues from the call before, or begins again at position 0; one that is not in the batch is
        forgotten. Raises EngineError, after which every sequence is forgotten.
        """

    def use_adapter(self, name: str | None) -> None:
        """Compute with adapter `name` of `info.adapters` from the next decode on; None: with none.

        Costs nothing if it is applied already. Cells in the cache stay as they were computed.
        """

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give `target`, an empty sequence, the first `length` tokens of `source`; `is_whole` tells if it has them."""

    def remove(self, seq_id: int, start: int = 0, end: int = -1) -> None:
        """Take `seq_id` out of its cells at positions start … end-1 (-1: to the end)."""

    def is_whole(self, seq_id: int, length: int) -> bool:
        """True if `seq_id` holds the first `length` tokens, so that the next can be computed.

        Cells that no later token looks at, since they left the window, may be overwritten; they are missed when the
        sequence is cut shorter.
        """

    def save(self, seq_id: int) -> np.ndarray:
        """A snapshot of a sequence: bytes, as uint8. Raises EngineError, or MemoryError."""

    def restore(self, seq_id: int, data: np.ndarray, length: int) -> bool:
        """Fill `seq_id`, an empty sequence, from a snapshot cut to `length`. False, and still empty, if it is refused.

        Takes free cells for the whole snapshot.
        """

    def clear(self) -> None:
        """Empty the KV cache."""

    def close(self) -> None:
        """Free the model. Closing twice is harmless; nothing else may be called afterwards."""
