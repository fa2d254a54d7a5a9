"""Rotary position embeddings: read from config.json in each of its forms, and written as GGUF fields.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, for some families one set per
kind of layer. transformers' `modeling_rope_utils` defines their meaning.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.errors import SourceInvalid
from models.gguf.fields import Field

from .config import MAX_CONTEXT, Config, is_number

FULL, SLIDING = "full_attention", "sliding_attention"
_NEEDS_ORIGINAL = {"llama3", "yarn", "longrope"}
# Kind of scaling -> the settings that a GGUF can express.
_KNOWN: Mapping[str, Collection[str]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "extrapolation_factor", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "short_factor", "long_factor"),
}
# llama.cpp ignores a GGUF's values of these for the known families and computes with the numbers here.
_YARN_FIXED: Mapping[str, float] = {"beta_fast": 32.0, "beta_slow": 1.0, "extrapolation_factor": 1.0}
_EVERYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Rope:
    """The rotary embeddings of one kind of layer. `original`: the context length before scaling, 0 where unused."""

    config: Config
    key: str
    kind: str
    theta: float
    partial: float
    original: int
    values: Mapping[str, Any]

    def number(self, name: str) -> float:
        """A positive number among the settings."""
        value = self.values.get(name)
        if not is_number(value) or value <= 0:
            raise self.bad(f"{name!r} of the {self.kind!r} scaling must be a positive number, not {value!r}")
        return float(value)

    def bad(self, why: str) -> SourceInvalid:
        """The error for these settings."""
        return self.config.bad(self.key, why)


def read_rope(config: Config, kinds: Collection[str], layer: str = FULL) -> Rope:
    """Read the embeddings of layers of kind `layer`; their scaling must be one of `kinds`. Raises SourceInvalid."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(key) or {}
    if isinstance(values, dict) and (FULL in values or SLIDING in values):
        values = values.get(layer) or {}
    if not isinstance(values, dict):
        raise config.bad(key, "it must be a table")
    kind = str(values.get("rope_type", values.get("type", "default")))
    kind = "longrope" if kind == "su" else kind
    if kind not in kinds:
        raise config.bad(key, f"the RoPE scaling {kind!r} is not supported for this family; {', '.join(kinds)} are")
    rope = Rope(
        config,
        key,
        kind,
        _positive(config, "rope_theta", values.get("rope_theta", config.get("rope_theta"))),
        _positive(config, "partial_rotary_factor", values.get("partial_rotary_factor", _partial(config))),
        _original(config, values) if kind in _NEEDS_ORIGINAL else 0,
        values,
    )
    _check_known(rope)
    return rope


def scaling_fields(rope: Rope) -> dict[str, Field]:
    """The fields below `{arch}.rope.` that every family has: the base, and linear or YaRN scaling."""
    fields: dict[str, Field] = {}
    if rope.kind in {"linear", "yarn"}:
        fields["scaling.type"] = Field.string(rope.kind)
        fields["scaling.factor"] = Field.float32(rope.number("factor"))
    if rope.kind == "yarn":
        fields["scaling.original_context_length"] = Field.uint32(rope.original)
        for name, key in (
            ("extrapolation_factor", "yarn_ext_factor"),
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if rope.values.get(name) is not None:
                fields[f"scaling.{key}"] = Field.float32(rope.number(name))
    return {**fields, "freq_base": Field.float32(rope.theta)}


def llama3_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """The divisor of each frequency, float32 of shape (head_dim / 2,).

    Llama 3.1's rule (https://arxiv.org/abs/2407.21783), computed as in transformers: long wavelengths are stretched by
    `factor`, short ones stay, those between are blended.
    """
    factor, low, high = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise rope.bad(f"'low_freq_factor' {low:g} must be smaller than 'high_freq_factor' {high:g}")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float32(rope.theta), exponents)
    lengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(rope.original) / lengths - np.float32(low)) / np.float32(high - low)
    blended = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    factors = np.where(lengths > rope.original / low, np.float32(factor), blended)
    return np.where(lengths < rope.original / high, np.float32(1), factors).astype(np.float32)


def _check_known(rope: Rope) -> None:
    for name, value in rope.values.items():
        if value is not None and name not in _EVERYWHERE and name not in _KNOWN[rope.kind]:
            raise rope.bad(f"{name!r} of the {rope.kind!r} scaling is not supported")
    if rope.values.get("truncate") is False:
        raise rope.bad("'truncate' false is not supported: llama.cpp rounds YaRN's bounds")
    if rope.kind == "yarn":
        _check_yarn(rope)


def _check_yarn(rope: Rope) -> None:
    fixed = {**_YARN_FIXED, "attention_factor": 0.1 * math.log(max(1.0, rope.number("factor"))) + 1.0}
    for name, value in fixed.items():
        if rope.values.get(name) is not None and not math.isclose(rope.number(name), value, rel_tol=1e-6):
            found = rope.values[name]
            raise rope.bad(f"{name!r} is {found!r}, which llama.cpp ignores: it computes with {value:g}")


def _original(config: Config, values: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    found = next((value for value in (config.get(key), values.get(key)) if value is not None), None)
    if found is None:
        return config.integer("max_position_embeddings", MAX_CONTEXT)
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= MAX_CONTEXT:
        raise config.bad(key, f"it must be a whole number between 1 and {MAX_CONTEXT}, not {found!r}")
    return found


def _partial(config: Config) -> Any:
    return next((config.get(key) for key in ("partial_rotary_factor", "rope_pct") if config.get(key) is not None), 1.0)


def _positive(config: Config, key: str, value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise config.bad(key, f"it must be a positive number, not {value!r}")
    return float(value)
