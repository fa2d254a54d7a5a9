"""An estimate, before anything is loaded, of the memory that a model needs. Sizes in bytes.

It decides which models may be loaded side by side.
"""

from dataclasses import dataclass

from models.common.machine import mebibytes
from models.gguf.header import GgufMeta

# llama.cpp's compute buffers, the engine's own tables and those of the grammars, as measured on models below 1 GiB.
OVERHEAD_BYTES = 256 << 20
CACHE_BYTES_PER_VALUE = 2
LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Memory of a loaded model: its files, the KV cache of `n_ctx` tokens, `n_rows` rows of logits, and the rest.

    `prefixes` is the most that prefixes take which left the KV cache, `panels` the second form of its weights that
    Deskside's own products of prompts read.
    """

    files: int
    n_ctx: int
    cache: int
    n_rows: int
    logits: int
    prefixes: int = 0
    overhead: int = OVERHEAD_BYTES
    panels: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.files + self.cache + self.logits + self.prefixes + self.overhead + self.panels

    def __str__(self) -> str:
        return (
            f"about {mebibytes(self.total)}: {mebibytes(self.files)} of files, {mebibytes(self.cache)} of KV cache for "
            f"{self.n_ctx} tokens, {mebibytes(self.logits)} for {self.n_rows} rows of logits, "
            f"{mebibytes(self.prefixes)} for prefixes, "
            f"{mebibytes(self.overhead)} for the engine"
            + (f", {mebibytes(self.panels)} for the products of prompts (--prefill)" if self.panels else "")
        )


def model_need(
    meta: GgufMeta, files_bytes: int, *, n_ctx: int, n_rows: int, prefixes: int = 0, panels: int = 0
) -> MemoryNeed:
    """Estimate the memory of the model described by `meta`. A file without its shape counts by its size alone."""
    # llama.cpp holds the logits twice: as the graph computes them, and as they are handed out.
    logits = 2 * n_rows * meta.n_vocab * LOGIT_BYTES
    cache = n_ctx * _cache_bytes_per_token(meta)
    return MemoryNeed(files_bytes, n_ctx, cache, n_rows, logits, prefixes, panels=panels)


def _cache_bytes_per_token(meta: GgufMeta) -> int:
    """Keys and values of one token in all layers; sliding-window layers keep every token here, like the others."""
    family = meta.architecture
    n_layers = meta.number(f"{family}.block_count")
    n_heads = meta.number(f"{family}.attention.head_count")
    width = meta.number(f"{family}.embedding_length") // max(n_heads, 1)
    key = meta.number(f"{family}.attention.key_length") or width
    value = meta.number(f"{family}.attention.value_length") or width
    kv_heads = meta.numbers(f"{family}.attention.head_count_kv", n_layers)
    n_kv_heads = sum(kv_heads) or n_heads * n_layers
    return n_kv_heads * (key + value) * CACHE_BYTES_PER_VALUE
