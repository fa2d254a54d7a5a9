"""Values at which llama.cpp would end the process: each is refused, by the strict reader and by the lenient one."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.gguf_writer import write_head
from models.errors import BadGguf
from models.gguf.fields import Field, check_fields, check_vocabulary
from models.gguf.header import Header, read_header, read_meta
from tests.support.convert.tiny import write_model
from tests.support.models.gguf_heads import ARRAY, STRING, text

HERE = Path("x.gguf")
BYTE = 0


def model(**fields: Field) -> dict[str, Field]:
    return {"general.architecture": Field.string("tiny"), **{f"tiny.{key}": field for key, field in fields.items()}}


BAD: dict[str, tuple[dict[str, Field], str]] = {
    "no layers": ({"block_count": Field.uint32(0)}, "'tiny.block_count' = 0; allowed are 1 to 512"),
    "layers": ({"block_count": Field.uint32(513)}, "'tiny.block_count' = 513; allowed are 1 to 512"),
    "heads": (
        {"attention.head_count_kv": Field.uint32(0x2000_0001)},
        "'tiny.attention.head_count_kv' = 536870913; allowed are 0 to 16384",
    ),
    "heads of a layer": ({"attention.head_count": Field.int32_array([4, -1])}, "= -1; allowed are 0 to 16384"),
    "window": ({"attention.sliding_window": Field.uint32(0xFF00_0080)}, "= 4278190208; allowed are -1073741824 to"),
    "epsilon": ({"attention.layer_norm_rms_epsilon": Field.float32(-1e-6)}, "an epsilon not negative"),
    "sparsity": ({"activation_sparsity_scale": Field.float32_array([float("inf")])}, "= inf; it must be finite"),
    "nan": ({"rope.freq_base": Field.float32(float("nan"))}, "'tiny.rope.freq_base' = nan; it must be finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_size_is_refused_with_the_limit(tmp_path: Path, name: str) -> None:
    fields, reason = BAD[name]
    file = tmp_path / "bad.gguf"
    write_head(file, model(**fields), 32)
    for read in (read_header, read_meta):
        with pytest.raises(BadGguf) as caught:
            read(file)
        assert reason in str(caught.value)
        assert repr(str(file)) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"block_count": Field.uint32(512), "attention.head_count": Field.int32_array([0, 4])},
        {"rope.freq_base": Field.float32(1e6), "context_length": Field.uint32(10_485_760)},
        {"sign": Field.float32(-1), "attention.layer_norm_epsilon": Field.float32(0)},
        {"activation_sparsity_scale": Field.float32_array([1.6, float("-inf")])},
    ],
)
def test_sizes_of_real_models_are_accepted(fields: Mapping[str, Field]) -> None:
    check_fields(HERE, model(**fields))
    check_fields(HERE, {"other.block_count": Field.uint32(0)})


def test_a_token_that_is_listed_twice_is_refused() -> None:
    def check(*tokens: bytes) -> None:
        check_vocabulary(HERE, {"tokenizer.ggml.tokens": Field.string_array(tokens)})

    check(b"a", b"", b"b", b"")
    with pytest.raises(BadGguf, match="the token b'b' twice: as 1 and as 3"):
        check(b"a", b"b", b"c", b"b")
    with pytest.raises(BadGguf, match=r"the token b'\[EMPTY_1\]' twice: as 0 and as 1"):
        check(b"[EMPTY_1]", b"")
    check(b"a", b"\0", b"\0b", b"b\0")
    with pytest.raises(BadGguf, match="the token b'a' twice: as 0 and as 1"):
        check(b"a", b"a\0b")
    check_vocabulary(HERE, {})
    check_vocabulary(HERE, {"tokenizer.ggml.tokens": Field.string("no array")})


@pytest.mark.parametrize(
    "field",
    [
        struct.pack("<IIQ", ARRAY, BYTE, 1 << 40),
        struct.pack("<IIQ", ARRAY, STRING, 1 << 37),
        struct.pack("<IQ", STRING, 1 << 40),
    ],
    ids=["bytes", "strings", "string"],
)
def test_a_huge_empty_file_is_not_read_into_memory(tmp_path: Path, field: bytes) -> None:
    """A sparse file: two terabytes that take no room on the disk, and hold all that is claimed."""
    file = tmp_path / "sparse.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + field)
    try:
        os.truncate(file, 1 << 41)
    except OSError:
        pytest.skip("this file system has no such large files")
    with pytest.raises(BadGguf, match="the head's limit is 268435456"):
        read_header(file)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Header]:
    path = write_model(tmp_path_factory.mktemp("fuzz") / "tiny.gguf", template="{{ messages }}")
    return path.read_bytes(), read_header(path)


@settings(max_examples=100)
@given(flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), max_size=4), cut=st.none() | st.integers(0))
def test_flipped_bits_and_cuts_are_refused_or_change_what_they_hit_only(
    tmp_path_factory: pytest.TempPathFactory, tiny: tuple[bytes, Header], flips: list[tuple[int, int]], cut: int | None
) -> None:
    data, before = bytearray(tiny[0]), tiny[1]
    start = min(info.offset for info in before.tensors.values())
    for position, bit in flips:
        data[position % start] ^= 1 << bit
    end = max(info.offset + info.n_bytes for info in before.tensors.values())
    size = len(data) if cut is None else cut % (len(data) + 1)
    file = tmp_path_factory.mktemp("flips") / "f.gguf"
    file.write_bytes(data[:size])
    try:
        after = read_header(file)
    except BadGguf:
        return
    assert size >= end
    changed = sum(after.fields.get(key) != field for key, field in before.fields.items())
    changed += sum(after.tensors.get(name) != info for name, info in before.tensors.items())
    assert changed <= len(flips)
