"""The model families an adapter can be merged into: which GGUF tensor a Hugging Face module became, and how repacked.

Only what merging onto a GGUF needs. llama.cpp stores the q and k projections of the llama family with their rows
reordered (its rotary embedding pairs neighbours, Hugging Face's pairs halves), so a LoRA's B has to be reordered too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.gguf_header import Header

from .errors import ArchitectureUnknown

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.([a-z_.]+)")
_DENSE: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Family:
    """One architecture as `general.architecture` spells it. `permutes_qk`: its q and k rows are reordered."""

    architecture: str
    permutes_qk: bool = False

    def tensor_name(self, module: str) -> str | None:
        """The GGUF tensor a module such as `model.layers.0.self_attn.q_proj` became; None if it is not known."""
        if module == "lm_head":
            return "output.weight"
        match = _LAYER.fullmatch(module)
        part = _DENSE.get(match[2]) if match else None
        return f"blk.{match[1]}.{part}.weight" if match and part else None

    def repack_rows(self, module: str, rows: np.ndarray, header: Header) -> np.ndarray:
        """Bring the output rows of `module`, shape (n_out, …), into the order the GGUF has them in."""
        if not self.permutes_qk or not module.endswith((".q_proj", ".k_proj")):
            return rows
        n_head = header.integer(f"{self.architecture}.attention.head_count")
        if module.endswith(".k_proj") and f"{self.architecture}.attention.head_count_kv" in header.fields:
            n_head = header.integer(f"{self.architecture}.attention.head_count_kv")
        return interleave_halves(rows, n_head)


def interleave_halves(rows: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder each head's rows from (first half, second half) to neighbouring pairs; shape (n_out, …) stays."""
    halves = rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("gemma"),
        Family("gemma2"),
        Family("gemma3"),
        Family("llama", permutes_qk=True),
        Family("qwen2"),
        Family("qwen3"),
    )
}


def family_of(header: Header) -> Family:
    """The family of a checkpoint. Raises ArchitectureUnknown naming it and the known ones."""
    family = FAMILIES.get(header.architecture)
    if family is None:
        raise ArchitectureUnknown(
            f"no adapter can be merged into architecture {header.architecture!r} ({str(header.path)!r}); "
            f"known are {', '.join(sorted(FAMILIES))}"
        )
    return family
