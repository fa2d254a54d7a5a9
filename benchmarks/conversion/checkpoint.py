"""A checkpoint of realistic size to convert: the installed Gemma 3 as a Hugging Face folder.

Its weights are dequantized, so they differ from Google's in the last bits; both converters get the same ones.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from benchmarks.errors import BadWorkload, ExtraMissing
from models.common.files import write_atomic
from models.gguf.header import Header, TensorInfo, read_header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
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
# Rows dequantized at a time.
_SLAB_ROWS = 8192
_WINDOW_ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """A vocabulary in SentencePiece's terms, by token id."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    bos: int
    eos: int
    unknown: int
    pad: int

    def named(self, *ids: int) -> list[str]:
        """The texts of these tokens."""
        return [self.texts[index] for index in ids]


def make_checkpoint(gguf: Path, folder: Path) -> int:
    """Write `folder` from the Gemma 3 GGUF unless it is there; returns the number of parameters. Raises BadWorkload."""
    header = read_header(gguf)
    if header.architecture != _ARCHITECTURE:
        raise BadWorkload(f"{str(gguf)!r} is of architecture {header.architecture!r}; the checkpoint needs a Gemma 3")
    if not (folder / "config.json").is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        write_vocabulary(folder, read_vocabulary(header))
        _write_weights(gguf, header, folder / "model.safetensors")
        write_atomic(folder / "config.json", json.dumps(_config(header), indent=2))
    return sum(tensor.n_elements for tensor in header.tensors.values())


def read_vocabulary(header: Header) -> SentencePieceVocabulary:
    """Read a GGUF file's vocabulary. Raises BadWorkload when it is not SentencePiece's."""
    fields = header.fields
    if header.text("tokenizer.ggml.model") != "llama":
        raise BadWorkload(f"{str(header.path)!r} has no SentencePiece vocabulary")
    texts = [text.decode() for text in fields["tokenizer.ggml.tokens"].strings or []]
    kinds = [int(kind) for kind in fields["tokenizer.ggml.token_type"].numbers or ()]
    # GGUF keeps the spaces of user-defined tokens as they are
    texts = [text.replace(" ", "▁") if kind == USER_DEFINED else text for text, kind in zip(texts, kinds, strict=True)]
    ids = [header.integer(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "unknown", "padding")]
    return SentencePieceVocabulary(
        texts, [float(score) for score in fields["tokenizer.ggml.scores"].numbers or ()], kinds, *ids
    )


def write_vocabulary(folder: Path, vocabulary: SentencePieceVocabulary) -> None:
    """Write the tokenizer's three files into `folder`."""
    (folder / "tokenizer.json").write_text(
        json.dumps(_tokenizer_json(vocabulary), ensure_ascii=False), encoding="utf-8"
    )
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model(vocabulary))
    bos, eos, unknown, pad = vocabulary.named(vocabulary.bos, vocabulary.eos, vocabulary.unknown, vocabulary.pad)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unknown,
        "tokenizer_class": "GemmaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def merges(vocabulary: SentencePieceVocabulary) -> Iterator[tuple[str, str]]:
    """Every way to merge two pieces into a third, in SentencePiece's order: the best score first.

    User-defined pieces (runs of white space in Gemma) come before all others: SentencePiece never splits them.
    """
    kinds = vocabulary.kinds
    ids = {text: index for index, text in enumerate(vocabulary.texts) if kinds[index] in (NORMAL, USER_DEFINED)}
    found = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                own = kinds[index] == USER_DEFINED
                found.append((0.0 if own else -vocabulary.scores[index], left, right))
    for _, left, right in sorted(found):
        yield vocabulary.texts[left], vocabulary.texts[right]


def _tokenizer_json(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    added = [
        {"id": index, "content": text, "special": kind != USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    bos, unknown = vocabulary.named(vocabulary.bos, vocabulary.unknown)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, one],
            "pair": [start, one, {"SpecialToken": {"id": bos, "type_id": 1}}, two],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(vocabulary.texts)},
            "merges": [[left, right] for left, right in merges(vocabulary)],
        },
    }


def _sentencepiece_model(vocabulary: SentencePieceVocabulary) -> bytes:
    """The ModelProto of a byte-fallback BPE model without dummy prefix, white space kept and escaped."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            "protobuf is not installed; in Deskside's folder: .venv/bin/pip install -e '.[bench]'"
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(vocabulary.texts, vocabulary.scores, vocabulary.kinds, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(vocabulary.texts), True
    special = {"unk": vocabulary.unknown, "bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad}
    for role, index in special.items():
        setattr(trainer, f"{role}_id", index)
        setattr(trainer, f"{role}_piece", vocabulary.texts[index])
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())


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
    """Write a safetensors file: eight bytes of length, JSON, then the data. Norms are stored without GGUF's added 1."""
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
    """The upper halves of float32, rounded to nearest even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, "<u2")
