"""Tiny models and adapters for tests: whole files in llama.cpp's and PEFT's formats, with weights that merge exactly.

Weights are multiples of 1/64 and adapters of 1/8, so W + scale · B · A is exact in float32 and in float16: the bytes do
not depend on the order in which a BLAS adds, and hashes can be golden.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from models.gguf.header import read_header

N_EMBD, N_FF, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM = 64, 96, 2, 2, 1, 32
SHAPES = {
    "attn_q": (N_HEADS * HEAD_DIM, N_EMBD),
    "attn_k": (N_KV_HEADS * HEAD_DIM, N_EMBD),
    "attn_v": (N_KV_HEADS * HEAD_DIM, N_EMBD),
    "attn_output": (N_EMBD, N_HEADS * HEAD_DIM),
    "ffn_gate": (N_FF, N_EMBD),
    "ffn_up": (N_FF, N_EMBD),
    "ffn_down": (N_EMBD, N_FF),
}
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
START, END = 261, 262
TOKENS = (
    [b"<pad>", b"<eos>", b"<bos>", b"<unk>"]
    + [f"<0x{byte:02X}>".encode() for byte in range(256)]
    + ["▁".encode(), b"<start_of_turn>", b"<end_of_turn>", b"H", b"e", b"l", b"o"]
)


def grid(shape: tuple[int, ...], seed: int, span: int = 16, unit: int = 64) -> np.ndarray:
    """Numbers between ±span/unit in steps of 1/unit, the same on every machine and with every numpy."""
    count = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 1_000_003)
    mixed = (count * np.uint64(2_654_435_761)) % np.uint64(2**32)
    steps = (mixed >> np.uint64(9)) % np.uint64(2 * span + 1)
    return ((steps.astype(np.float32) - span) / unit).reshape(shape)


def weights(architecture: str = "gemma3", experts: int = 0) -> dict[str, np.ndarray]:
    """GGUF tensor name -> float32 weights; `experts`: the number of feed-forward networks per layer, with a gate."""
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    if architecture == "gemma3":
        norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    made = {"token_embd.weight": grid((len(TOKENS), N_EMBD), 1), "output_norm.weight": np.ones(N_EMBD, np.float32)}
    for layer in range(N_LAYERS):
        for index, (name, shape) in enumerate(SHAPES.items()):
            if experts and name.startswith("ffn"):
                made[f"blk.{layer}.{name}_exps.weight"] = grid((experts, *shape), 10 + 20 * layer + index)
            else:
                made[f"blk.{layer}.{name}.weight"] = grid(shape, 10 + 20 * layer + index)
        if experts:
            made[f"blk.{layer}.ffn_gate_inp.weight"] = grid((experts, N_EMBD), 18 + 20 * layer)
        for name in norms:
            made[f"blk.{layer}.{name}.weight"] = np.ones(N_EMBD, np.float32)
        if architecture == "gemma3":
            for name in ("attn_q_norm", "attn_k_norm"):
                made[f"blk.{layer}.{name}.weight"] = np.ones(HEAD_DIM, np.float32)
    return made


def write_model(
    path: Path,
    architecture: str = "gemma3",
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    template: str | None = None,
    changes: Mapping[str, np.ndarray] | None = None,
    experts: int = 0,
    words: Sequence[str] = (),
) -> Path:
    """Write a model of two layers that llama.cpp loads; matrices are stored as `kind`, and `words` are tokens."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    if architecture == "gemma3":
        writer.add_sliding_window(128)
    else:
        writer.add_rope_dimension_count(HEAD_DIM)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    tokens = [*TOKENS, *pieces(words)]
    _add_vocabulary(writer, template, tokens)
    made = weights(architecture, experts) | {"token_embd.weight": grid((len(tokens), N_EMBD), 1)}
    for name, array in (made | dict(changes or {})).items():
        if array.ndim == 1 or "ffn_gate_inp" in name or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        elif kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(words: Sequence[str]) -> list[bytes]:
    """The words with a space before them, and their beginnings: the tokenizer joins a word letter by letter."""
    return [f"▁{piece}".encode() for piece in sorted({word[:end] for word in words for end in range(1, len(word) + 1)})]


def _add_vocabulary(writer: gguf.GGUFWriter, template: str | None, tokens: Sequence[bytes]) -> None:
    control, unknown, byte, normal = 3, 2, 6, 1
    types = [control, control, control, unknown, *[byte] * 256, normal, control, control]
    types += [normal] * (len(tokens) - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_license("tiny-licence")
    if template is not None:
        writer.add_chat_template(template)


def adapter_tensors(rank: int = 4, targets: tuple[str, ...] = tuple(MODULES.values())) -> dict[str, np.ndarray]:
    """PEFT tensor name -> float32, for every layer and target."""
    tensors: dict[str, np.ndarray] = {}
    for layer in range(N_LAYERS):
        for index, (name, module) in enumerate(MODULES.items()):
            if module in targets:
                n_out, n_in = SHAPES[name]
                stem = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{stem}.lora_A.weight"] = grid((rank, n_in), 100 + 20 * layer + index, 4, 8)
                tensors[f"{stem}.lora_B.weight"] = grid((n_out, rank), 200 + 20 * layer + index, 4, 8)
    return tensors


def write_adapter(
    folder: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: str = "F32",
    rank: int = 4,
    **config: Any,
) -> Path:
    """Write a PEFT folder; `config` overrides settings of adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    arrays = adapter_tensors(rank) if tensors is None else tensors
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(arrays, dtype))
    return folder


def write_mails(path: Path) -> Path:
    """Forty mails of two kinds, `ham` and `spam`, as JSONL of chat records."""
    lines = [(f"Mail {n}: {'win money' if n % 2 else 'see you at noon'}", ("ham", "spam")[n % 2]) for n in range(40)]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": label}] for text, label in lines]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def safetensors_bytes(arrays: Mapping[str, np.ndarray], dtype: str, packed: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file written by hand (8 bytes of length, JSON, data), in any of the three types.

    `packed`: tensors of another type, of four bytes ("U32", "I32") or of one.
    """
    head: dict[str, object] = {}
    data = b""
    for name, array in arrays.items():
        kind = (packed or {}).get(name, dtype)
        plain = {"F32": _f32, "F16": _f16, "BF16": _bf16}
        piece = plain[kind](array) if kind in plain else bytes(array.size * (4 if kind.endswith("32") else 1))
        head[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    encoded = json.dumps(head).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def _f32(array: np.ndarray) -> bytes:
    return array.astype("<f4").tobytes()


def _f16(array: np.ndarray) -> bytes:
    return array.astype("<f2").tobytes()


def _bf16(array: np.ndarray) -> bytes:
    return array.astype("<f4").view("<u4").__rshift__(16).astype("<u2").tobytes()


def hash_tensors(path: Path) -> dict[str, str]:
    """Tensor name -> sha256 of its bytes in the file."""
    data = path.read_bytes()
    tensors = read_header(path).tensors
    return {
        name: hashlib.sha256(data[one.offset : one.offset + one.n_bytes]).hexdigest() for name, one in tensors.items()
    }
