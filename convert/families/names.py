"""The GGUF name of a Hugging Face tensor, and the order of its rows.

Converting a folder, merging a LoRA onto a GGUF and writing an adapter as a GGUF all use these rules.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from models.gguf.header import Header

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.([a-z_.]+)")

ATTENTION: MappingProxyType[str, str] = MappingProxyType(
    {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
)
MLP: MappingProxyType[str, str] = MappingProxyType(
    {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
)
QK_NORMS: MappingProxyType[str, str] = MappingProxyType(
    {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
)
PRE_NORMS: MappingProxyType[str, str] = MappingProxyType(
    {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
)
OUTER: MappingProxyType[str, str] = MappingProxyType(
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
)


class Names:
    """The names of one family's tensors and the order of their rows."""

    architecture: ClassVar[str]
    """`general.architecture`"""
    layer_modules: ClassVar[Mapping[str, str]] = ATTENTION | MLP | PRE_NORMS
    """A layer's module -> its part of the GGUF tensor's name."""
    permutes_qk: ClassVar[bool] = False
    """q and k are reordered: llama.cpp rotates neighbouring rows in this family, Hugging Face the halves of a head."""
    norm_offset: ClassVar[float] = 0.0
    """Added to the folder's norm weights on their way into the GGUF."""

    def tensor_name(self, module: str, kind: str = "weight") -> str | None:
        """The GGUF tensor of a module such as `model.layers.0.self_attn.q_proj`; None for an unknown module.

        `kind` is "weight" or "bias".
        """
        if module in OUTER:
            return f"{OUTER[module]}.{kind}"
        match = _LAYER.fullmatch(module)
        part = self.layer_modules.get(match[2]) if match else None
        return f"blk.{match[1]}.{part}.{kind}" if match and part else None

    def permuted_heads(self, module: str, n_head: int, n_head_kv: int) -> int | None:
        """The number of heads for `interleave_halves` to reorder the rows of `module`; None: rows stay in place."""
        if not self.permutes_qk or not module.endswith((".q_proj", ".k_proj")):
            return None
        return n_head if module.endswith(".q_proj") else n_head_kv

    def repack_rows(self, module: str, rows: np.ndarray, header: Header) -> np.ndarray:
        """The output rows of `module`, shape (n_out, …), in the GGUF's order."""
        n_head = header.integer(f"{self.architecture}.attention.head_count")
        key = f"{self.architecture}.attention.head_count_kv"
        n_head_kv = header.integer(key) if key in header.fields else n_head
        heads = self.permuted_heads(module, n_head, n_head_kv)
        return rows if heads is None else interleave_halves(rows, heads)

    def offset(self, module: str) -> float:
        """The number added to every value of `module`'s weight in the GGUF: 1 for Gemma's norms, else 0."""
        return self.norm_offset if module.endswith("norm") else 0.0


def interleave_halves(rows: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder each head's rows from (first half, second half) to neighbouring pairs; shape (n_out, …) stays."""
    halves = rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
