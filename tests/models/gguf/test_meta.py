"""The head of a GGUF file: what it says is read, and a damaged one is refused rather than followed."""

import struct
from pathlib import Path

import pytest

from models.errors import BadGguf
from models.gguf.header import MAX_KEPT, GgufMeta, read_meta
from tests.support.models.gguf_heads import GEMMA, LORA, head, text


def read(folder: Path, content: bytes) -> GgufMeta:
    (folder / "x.gguf").write_bytes(content)
    return read_meta(folder / "x.gguf")


def test_scalars_and_arrays_are_read(tmp_path: Path) -> None:
    many = list(range(MAX_KEPT + 1))
    fields = {**GEMMA, "a.bool": True, "a.float": 1.5, "a.few": [3, 2, 1], "a.many": many, "a.last": "end"}
    meta = read(tmp_path, head(fields))
    assert (meta.architecture, meta.n_vocab, meta.is_adapter) == ("gemma3", 3, False)
    assert meta.number("gemma3.block_count") == 18
    assert (meta.numbers("gemma3.block_count", 3), meta.numbers("a.few", 3)) == ((18,) * 3, (3, 2, 1))
    assert (meta.values["a.many"], meta.lengths["a.many"]) == (None, len(many))
    assert (meta.values["a.bool"], meta.values["a.float"], meta.text("a.last")) == (True, 1.5, "end")
    assert (meta.text("nothing"), meta.number("nothing"), meta.numbers("nothing", 2)) == ("", 0, (0, 0))


def test_an_adapter_is_distinguished_from_a_model(tmp_path: Path) -> None:
    assert read(tmp_path, head(LORA)).is_adapter


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot"),
        (b"GG", "magic at byte 0 needs 4 bytes, 2 are left"),
        (b"PK\x03\x04" + bytes(40), "starts with"),
        (head({}, version=9), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "the limit is 65536"),
        (head(GEMMA)[:-1], "'tokenizer.ggml.tokens' .* are left"),
        (head({"a": 1})[:-8] + struct.pack("<II", 77, 1), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "of type 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 60), "'k' .* 0 are left"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 60),
            "claims 1152921504606846976",
        ),
    ],
)
def test_an_incomplete_head_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(BadGguf, match=said) as caught:
        read(tmp_path, content)
    assert "x.gguf" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadGguf, match="No such file"):
        read_meta(tmp_path / "none.gguf")
