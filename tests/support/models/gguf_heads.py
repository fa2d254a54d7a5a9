"""Heads of GGUF files, made byte by byte for tests."""

import struct
from collections.abc import Mapping

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str) -> bytes:
    """A string as GGUF stores it."""
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _field(value: object) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    assert isinstance(value, list)
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))
    return struct.pack("<IIQ", ARRAY, U32, len(value)) + struct.pack(f"<{len(value)}I", *value)


def head(fields: Mapping[str, object], version: int = 3) -> bytes:
    """A file of these fields and no tensors; lists are arrays of texts or of whole numbers."""
    start = b"GGUF" + struct.pack("<IQQ", version, 0, len(fields))
    return start + b"".join(text(key) + _field(value) for key, value in fields.items())


GEMMA: Mapping[str, object] = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 18,
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}
LORA: Mapping[str, object] = {"general.architecture": "gemma3", "general.type": "adapter", "adapter.type": "lora"}
