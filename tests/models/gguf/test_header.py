"""The header reader: it agrees with the gguf library on good files and answers every bad one with BadGguf."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import BadGguf
from models.gguf.fields import Field
from models.gguf.header import read_header
from tests.support.convert.tiny import END, TOKENS, write_model
from tests.support.models.gguf_heads import text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("header") / "tiny.gguf", template="{{ messages }}")


def head(n_tensors: int = 0, n_fields: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_fields)


def tensor(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_it_reads_what_the_gguf_library_reads(model: Path) -> None:
    ours, theirs = read_header(model), gguf.GGUFReader(model)
    assert set(ours.fields) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert {name: (t.offset, t.n_bytes, t.kind) for name, t in ours.tensors.items()} == {
        t.name: (t.data_offset, t.n_bytes, t.tensor_type) for t in theirs.tensors
    }
    assert {name: t.shape for name, t in ours.tensors.items()} == {
        t.name: tuple(int(size) for size in reversed(t.shape)) for t in theirs.tensors
    }
    for key in ("general.architecture", "gemma3.block_count", "tokenizer.chat_template"):
        assert ours.fields[key].value == theirs.fields[key].contents()


def test_arrays_are_decoded_when_asked_for(model: Path) -> None:
    fields, theirs = read_header(model).fields, gguf.GGUFReader(model).fields
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    assert tokens.strings == list(TOKENS)
    assert list(scores.numbers or ()) == theirs["tokenizer.ggml.scores"].contents()
    assert (tokens.numbers, scores.strings, tokens.value, scores.length) == (None, None, None, len(TOKENS))
    assert (Field.uint32(2).numbers, Field.uint32(2).strings, Field.uint32(2).length) == (None, None, None)


def test_single_strings_of_an_array_are_decoded_alone() -> None:
    field = Field.string_array([b"a", b"", "▁b".encode(), b"c"])
    assert field.strings_at([3, 0, 2, 0]) == {0: b"a", 2: "▁b".encode(), 3: b"c"}
    assert field.strings_at([]) == {}
    for other, place in ((field, 4), (field, -1), (Field.uint32(2), 0), (Field.int32_array([1]), 0)):
        with pytest.raises(IndexError):
            other.strings_at([place])


def test_the_vocabulary_finds_tokens_by_their_spelling(model: Path) -> None:
    header = read_header(model)
    assert header.n_vocab == len(TOKENS)
    assert header.token_id("<end_of_turn>") == END
    assert [header.token_id(text) for text in ("end_of_turn", "<end_of_turn", "")] == [None, None, None]


def test_a_string_is_found_at_its_first_place_only_as_a_whole() -> None:
    inner = b"\x01\0\0\0\0\0\0\0a"  # spells "a" with its length, inside another string
    assert Field.string_array([b"x" + inner, b"b", b"a", b"a"]).find(b"a") == 2
    assert Field.string_array([b"x" + inner]).find(b"a") is None
    assert Field.uint32(2).find(b"a") is None


def test_fields_keep_the_bytes_of_the_file(model: Path) -> None:
    header, data = read_header(model), model.read_bytes()
    for key, field in header.fields.items():
        assert text(key) + field.raw in data
    assert header.fields["gemma3.block_count"] == Field.uint32(2)
    assert header.fields["general.architecture"] == Field.string("gemma3")


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "short": (b"GG", "truncated"),
    "magic": (head(magic=b"GGML"), "starts with b'GGML'"),
    "version": (head(version=1), "GGUF version 1"),
    "big-endian": (head(version=3 << 24), "GGUF version 50331648"),
    "fields": (head(n_fields=1 << 60), "field count 1152921504606846976, the limit is 65536"),
    "tensors": (head(n_tensors=1 << 60), "tensor count"),
    "fewer fields than said": (head(n_fields=1), "truncated"),
    "key length": (head(n_fields=1) + struct.pack("<Q", 1 << 62), "length of a field name 4611686018427387904"),
    "key bytes": (head(n_fields=1) + struct.pack("<Q", 2) + b"\xff\xff" + struct.pack("<II", 4, 0), "not UTF-8"),
    "value type": (head(n_fields=1) + text("a") + struct.pack("<I", 99), "unknown type 99 for 'a'"),
    "string length": (head(n_fields=1) + text("a") + struct.pack("<IQ", 8, 1 << 63), "needs 9223372036854775808 bytes"),
    "array length": (head(n_fields=1) + text("a") + struct.pack("<IIQ", 9, 4, 1 << 61), "array 'a'"),
    "string in an array": (
        head(n_fields=1) + text("a") + struct.pack("<IIQQQ", 9, 8, 2, 1 << 62, 0),
        "string 1 of 2 in array 'a' is past its end",
    ),
    "last string in an array": (
        head(n_fields=1) + text("a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 62),
        "array 'a' at byte 49 needs 4611686018427387912 bytes, 8 are left",
    ),
    "string array length": (head(n_fields=1) + text("a") + struct.pack("<IIQ", 9, 8, 1 << 61), "claims 23058"),
    "nested array": (head(n_fields=1) + text("a") + struct.pack("<IIQ", 9, 9, 1), "array 'a' of type 9"),
    "twice": (head(n_fields=2) + (text("a") + struct.pack("<II", 4, 0)) * 2, "field 'a' twice"),
    "alignment": (head(n_fields=1) + text("general.alignment") + struct.pack("<II", 4, 3), "alignment 3"),
    "dimensions": (head(n_tensors=1) + text("a") + struct.pack("<I", 5), "with 5 dimensions"),
    "no dimensions": (head(n_tensors=1) + text("a") + struct.pack("<I", 0), "with 0 dimensions"),
    "tensor type": (head(n_tensors=1) + tensor(kind=999), "unknown type 999"),
    "zero rows": (head(n_tensors=1) + tensor(shape=(32, 0)), "shape (0, 32)"),
    "odd block": (head(n_tensors=1) + tensor(shape=(33,), kind=8), "Q8_0 come in multiples of 32"),
    "offset": (head(n_tensors=1) + tensor(offset=64), "at offset 64, expected 0"),
    "tensor twice": (head(n_tensors=2) + tensor() + tensor(offset=128), "tensor 'a' twice"),
    "beyond the end": (head(n_tensors=1) + tensor(shape=(1 << 40,)), "is truncated: tensor 'a' ends at byte"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    data, reason = BAD[name]
    file = tmp_path / "bad.gguf"
    file.write_bytes(data)
    with pytest.raises(BadGguf) as caught:
        read_header(file)
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["folder", "missing"])
def test_a_folder_or_missing_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.gguf")
    with pytest.raises(BadGguf, match="cannot be read"):
        read_header(tmp_path / "x.gguf")


def test_every_truncation_is_noticed(tmp_path: Path, model: Path) -> None:
    data, file = model.read_bytes(), tmp_path / "cut.gguf"
    last = max(info.offset + info.n_bytes for info in read_header(model).tensors.values())
    for size in [*range(0, last, 997), last - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(BadGguf):
            read_header(file)


@settings(max_examples=150)
@given(position=st.integers(0, 12_000), value=st.binary(min_size=1, max_size=8))
def test_changed_bytes_are_read_or_refused_never_worse(
    tmp_path_factory: pytest.TempPathFactory, model: Path, position: int, value: bytes
) -> None:
    data = bytearray(model.read_bytes())
    position %= read_header(model).tensors["token_embd.weight"].offset
    data[position : position + len(value)] = value
    file = tmp_path_factory.mktemp("fuzz") / "f.gguf"
    file.write_bytes(data)
    try:
        header = read_header(file)
    except BadGguf:
        return
    for field in header.fields.values():
        assert (field.value is None) == (field.length is not None)
        assert len(field.numbers or field.strings or ()) == (field.length or 0)
    assert all(info.offset + info.n_bytes <= len(data) for info in header.tensors.values())
