"""A checkpoint to convert, of a size that tells something: the installed Gemma 3 as a Hugging Face folder.

Its weights come from a quantized file, so they are not Google's to the last bit; both converters get the same ones.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from models.common.files import write_atomic
from models.gguf.header import Header, TensorInfo, read_header

from .convert_vocabulary import read_pieces, write_vocabulary
from .errors import BadWorkload

_ARCHITECTURE = "gemma3"
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SLAB_ROWS = 8192
_WINDOW_ROPE_BASE = 10_000.0


def make_checkpoint(gguf: Path, folder: Path) -> int:
    """Write `folder` from the Gemma 3 GGUF unless it is there; how many parameters it has. Raises BadWorkload."""
    header = read_header(gguf)
    if header.architecture != _ARCHITECTURE:
        raise BadWorkload(
            f"{str(gguf)!r} is of architecture {header.architecture!r}; the checkpoint is made of a Gemma 3"
        )
    if not (folder / "config.json").is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        write_vocabulary(folder, read_pieces(header))
        _write_weights(gguf, header, folder / "model.safetensors")
        write_atomic(folder / "config.json", json.dumps(_config(header), indent=2))
    return sum(tensor.n_elements for tensor in header.tensors.values())


def _config(header: Header) -> dict[str, Any]:
    def number(key: str) -> int:
        return header.integer(f"{_ARCHITECTURE}.{key}")

    def real(key: str) -> object:
        return header.fields[f"{_ARCHITECTURE}.{key}"].value

    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("attention.key_length"),
        "query_pre_attn_scalar": number("attention.key_length"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": round(float(str(real("attention.layer_norm_rms_epsilon"))), 9),
        "rope_theta": real("rope.freq_base"),
        "rope_local_base_freq": _WINDOW_ROPE_BASE,
        "rope_scaling": None,
        "sliding_window": number("attention.sliding_window"),
        "_sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "bos_token_id": header.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.integer("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _write_weights(gguf: Path, header: Header, target: Path) -> None:
    """The safetensors format: eight bytes of length, JSON, then the data."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in header.tensors.values():
        n_bytes = tensor.n_elements * 2
        head[_name(tensor)] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    encoded = json.dumps(head).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = np.memmap(gguf, np.uint8, "r")
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in header.tensors.values():
            for rows in _slabs(data, tensor):
                file.write(_bfloat16(rows - np.float32(tensor.name.endswith("norm.weight"))).tobytes())


def _name(tensor: TensorInfo) -> str:
    stem = tensor.name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


def _slabs(data: np.ndarray, tensor: TensorInfo) -> Iterator[np.ndarray]:
    n_rows = tensor.n_elements // tensor.shape[-1]
    row_bytes = tensor.n_bytes // n_rows
    raw = data[tensor.offset : tensor.offset + tensor.n_bytes].reshape(n_rows, row_bytes)
    for start in range(0, n_rows, _SLAB_ROWS):
        yield np.asarray(dequantize(raw[start : start + _SLAB_ROWS], tensor.kind), np.float32)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to the nearest, to even in between."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, "<u2")
