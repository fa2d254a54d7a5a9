"""The forward pass of a decoder in JAX, layer by layer, with low-rank adapters. Reference: Hugging Face's models.

Rows of a batch are aligned at their ends, so that every answer has the same columns: the last layer is computed for
those alone. RoPE depends on distances only, so a row's first column need not be position 0.

Layers are compiled one at a time: all layers of a model share one compilation for each shape of a batch, which takes a
fifth of the time of compiling them together.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .base import DecoderShape

LayerArrays = Mapping[str, Array]
"""A layer's arrays by name, as in `base.LayerWeights`."""
LayerAdapters = Mapping[str, tuple[Array, Array]]
"""Group -> (A, B): A has the rows of all modules of the group, B all their columns."""
MASKED = -1e30


class Geometry(NamedTuple):
    """The positions of a batch: cosines and sines (T, head_dim / 2), and pairs (B, 1, 1, T, T) that may attend."""

    cos: Array
    sin: Array
    visible: Array


def geometry(
    frequencies: np.ndarray, positions: np.ndarray, structure: np.ndarray, lengths: np.ndarray, window: int
) -> Geometry:
    """The geometry of rows with `lengths` tokens at their ends; `structure` (T, T) says which columns see which."""
    width = len(positions)
    angles = positions[:, None] * frequencies
    if window:
        structure = structure & (positions[:, None] - positions < window)
    real = np.arange(width) >= width - lengths[:, None]
    # A column before the row's first token sees itself, so that no softmax is over nothing.
    visible = (structure & real[:, None]) | np.eye(width, dtype=bool)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Geometry(jnp.asarray(cos), jnp.asarray(sin), jnp.asarray(visible[:, None, None]))


def group_mask(shape: DecoderShape, group: str, rank: int, targets: tuple[str, ...]) -> np.ndarray:
    """1 where a group's B may have numbers: each module has its own columns, and others than `targets` have none."""
    modules = shape.rows(group)
    mask = np.zeros((sum(modules.values()), rank * len(modules)), np.float32)
    start = 0
    for index, (module, rows) in enumerate(modules.items()):
        if module.rpartition(".")[2] in targets:
            mask[start : start + rows, index * rank : (index + 1) * rank] = 1
        start += rows
    return mask


def block(
    shape: DecoderShape,
    x: Array,
    weights: LayerArrays,
    adapters: LayerAdapters,
    place: Geometry,
    n_last: int | None = None,
) -> Array:
    """One layer: hidden states (B, T, n_embd) to the next ones. With `n_last`, only those last columns are computed."""
    head_dim, n_kv = shape.head_dim, shape.n_head_kv
    n_q = shape.n_head * head_dim
    hidden = _norm(shape, x, weights["attn_norm"])
    if n_last is None:
        n_last = x.shape[1]
        query, key_value = _split(_linear(hidden, "qkv", weights, adapters), n_q)
    else:
        query = _linear(hidden[:, -n_last:], "qkv", weights, adapters, slice(None, n_q))
        key_value = _linear(hidden, "qkv", weights, adapters, slice(n_q, None))
    key, value = _split(key_value, n_kv * head_dim)
    cos, sin, visible = place
    query = _rotate(_head_norm(shape, query, weights, "attn_q_norm"), cos[-n_last:], sin[-n_last:]) * shape.scale
    key = _rotate(_head_norm(shape, key, weights, "attn_k_norm"), cos, sin)
    attended = _attend(shape, query, key, value, visible[..., -n_last:, :])
    out = _linear(attended, "o", weights, adapters)
    x = x[:, -n_last:] + _optional_norm(shape, out, weights, "post_attention_norm")
    hidden = _norm(shape, x, weights["ffn_norm"])
    gate, up = _split(_linear(hidden, "gate_up", weights, adapters), shape.n_ff)
    active = jax.nn.gelu(gate, approximate=True) if shape.is_gelu else jax.nn.silu(gate)
    out = _linear(active * up, "down", weights, adapters)
    return x + _optional_norm(shape, out, weights, "post_ffw_norm")


def logits(shape: DecoderShape, x: Array, output_norm: Array, head: Array) -> Array:
    """The logits after hidden states (…, n_embd)."""
    raw = _norm(shape, x, output_norm) @ head.T
    return shape.final_cap * jnp.tanh(raw / shape.final_cap) if shape.final_cap else raw


def _attend(shape: DecoderShape, query: Array, key: Array, value: Array, visible: Array) -> Array:
    """Attention of (B, Q, heads, head_dim) to (B, T, kv heads, head_dim): (B, Q, heads * head_dim)."""
    rows, n_last, n_head, head_dim = query.shape
    n_kv, width = shape.n_head_kv, key.shape[1]
    share = n_head // n_kv
    # the heads that share a key are rows of one product
    queries = query.reshape(rows, n_last, n_kv, share, head_dim).transpose(0, 2, 3, 1, 4)
    flat = queries.reshape(rows * n_kv, share * n_last, head_dim)
    keys = key.transpose(0, 2, 1, 3).reshape(rows * n_kv, width, head_dim)
    values = value.reshape(rows, width, n_kv, head_dim).transpose(0, 2, 1, 3).reshape(rows * n_kv, width, head_dim)
    scores = jnp.einsum("bqd,btd->bqt", flat, keys).reshape(rows, n_kv, share, n_last, width)
    if shape.attention_cap:
        scores = shape.attention_cap * jnp.tanh(scores / shape.attention_cap)
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
    mixed = jnp.einsum("bqt,btd->bqd", weights.reshape(rows * n_kv, share * n_last, width), values)
    split = mixed.reshape(rows, n_kv, share, n_last, head_dim).transpose(0, 3, 1, 2, 4)
    return split.reshape(rows, n_last, n_head * head_dim)


def _linear(x: Array, group: str, weights: LayerArrays, adapters: LayerAdapters, rows: slice = slice(None)) -> Array:
    """Return x · W, plus its bias and its adapter; `rows` of the outputs only."""
    out = x @ weights[group][rows].T
    if f"{group}_bias" in weights:
        out = out + weights[f"{group}_bias"][rows]
    if group in adapters:
        a, b = adapters[group]
        out = out + (x @ a.T) @ b[rows].T
    return out


def _norm(shape: DecoderShape, x: Array, weight: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + shape.eps) * weight


def _optional_norm(shape: DecoderShape, x: Array, weights: LayerArrays, name: str) -> Array:
    return _norm(shape, x, weights[name]) if name in weights else x


def _head_norm(shape: DecoderShape, x: Array, weights: LayerArrays, name: str) -> Array:
    """(B, T, n) as heads, normed where the family norms them."""
    heads = x.reshape(*x.shape[:2], -1, shape.head_dim)
    return _optional_norm(shape, heads, weights, name)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _split(x: Array, at: int) -> tuple[Array, Array]:
    return x[..., :at], x[..., at:]
