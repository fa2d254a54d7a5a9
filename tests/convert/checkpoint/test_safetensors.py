"""The safetensors reader: rows as float32 from each type, every damaged or hostile header refused with its reason."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.checkpoint.safetensors import SafetensorsFile
from convert.errors import SourceInvalid
from tests.support.convert.tiny import grid, safetensors_bytes


def write(path: Path, head: Any, data: bytes = b"", length: int | None = None) -> Path:
    encoded = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0.0), ("F16", 5e-4), ("BF16", 4e-3)])
def test_rows_come_as_float32(tmp_path: Path, dtype: str, tolerance: float) -> None:
    arrays = {"b": grid((5, 8), 1, 500, 1000), "a": grid((6,), 2)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(arrays, dtype))
    file = SafetensorsFile(path)
    assert list(file.tensors) == ["a", "b"]
    rows = file.rows(file.tensors["b"], 1, 3)
    vector = file.rows(file.tensors["a"], 0, 1)
    file.close()  # what was read does not need the map any more
    assert rows.dtype == np.float32
    assert rows.shape == (3, 8)
    np.testing.assert_allclose(rows, arrays["b"][1:4], atol=tolerance)
    np.testing.assert_allclose(vector, arrays["a"][None], atol=tolerance)


def test_bfloat16_is_widened_bit_by_bit(tmp_path: Path) -> None:
    bits = np.array([0x0000, 0x8000, 0x3F80, 0xC2F7, 0x0001, 0x7F7F], dtype="<u2")
    path = write(tmp_path / "x", {"a": entry([6], 0, 12, "BF16")}, bits.tobytes())
    file = SafetensorsFile(path)
    wide = file.rows(file.tensors["a"], 0, 1)
    assert wide.view(np.uint32).tolist() == [[int(value) << 16 for value in bits]]
    file.close()


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    array = grid((3, 4), 1)
    path = tmp_path / "x.safetensors"
    save_file({"w": array}, path, {"format": "pt"})
    file = SafetensorsFile(path)
    np.testing.assert_array_equal(file.rows(file.tensors["w"], 0, 3), array)
    file.close()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, dtype: str, value: float, word: str) -> None:
    array = grid((4, 8), 1)
    array[2, 3] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"blk.weight": array}, dtype))
    file = SafetensorsFile(path)
    file.rows(file.tensors["blk.weight"], 0, 2)
    with pytest.raises(SourceInvalid, match=rf"1 values in tensor 'blk\.weight' that are not finite \({word}\)"):
        file.rows(file.tensors["blk.weight"], 2, 2)
    file.close()


def test_the_largest_finite_numbers_pass(tmp_path: Path) -> None:
    array = np.array([[65504.0, -65504.0, 6e-8, 0.0]], dtype=np.float32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"w": array}, "F16"))
    file = SafetensorsFile(path)
    assert file.rows(file.tensors["w"], 0, 1)[0, 0] == 65504
    file.close()


def test_a_tensor_of_an_integer_type_is_refused_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"ids": entry([2], 0, 16, "I64")}, bytes(16))
    file = SafetensorsFile(path)
    with pytest.raises(SourceInvalid, match="tensor 'ids' of type I64; known are F32, F16, BF16"):
        file.rows(file.tensors["ids"], 0, 1)
    file.close()


DEEP = b"[" * 100_000
BAD = {
    "empty": (b"", None, "it is empty"),
    "short": (b"abc", None, "is not a safetensors file|truncated"),
    "huge header": (struct.pack("<Q", 1 << 40) + b"{}", None, f"header has {1 << 40} bytes, the limit is {64 << 20}"),
    "header past the end": (struct.pack("<Q", 999) + b"{}", None, "truncated: its header ends at byte 1007"),
    "no JSON": (b"", b"{not json", "its header is not valid JSON"),
    "too deep": (b"", DEEP, "its header is not valid JSON"),
    "no UTF-8": (b"", b'{"\xff": 1}', "its header is not valid JSON"),
    "a list": (b"", b"[]", "its header is a list"),
    "a name twice": (b"", b'{"a": {}, "a": {}}', "'a' is there twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused(tmp_path: Path, case: str) -> None:
    whole, head, message = BAD[case]
    path = tmp_path / "x.safetensors"
    if head is None:
        path.write_bytes(whole)
    else:
        write(path, head)
    with pytest.raises(SourceInvalid, match=message):
        SafetensorsFile(path)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "entry is no table": ({"a": 3}, "unknown type None"),
    "type": ({"a": entry([2], 0, 8, "Q4")}, "'a' of the unknown type 'Q4'"),
    "shape is no list": ({"a": {**entry([2], 0, 8), "shape": "2"}}, "impossible shape '2'"),
    "negative": ({"a": entry([-2], 0, 8)}, "impossible shape"),
    "truth for a number": ({"a": entry([True], 0, 4)}, "impossible shape"),
    "many dimensions": ({"a": entry([1] * 9, 0, 4)}, "impossible shape"),
    "overflow": ({"a": entry([1 << 40, 1 << 40], 0, 8)}, "impossible shape"),
    "one offset": ({"a": {**entry([2], 0, 8), "data_offsets": [0]}}, r"impossible place \[0\]"),
    "backwards": ({"a": entry([2], 8, 0)}, "in -8 bytes"),
    "too few bytes": ({"a": entry([3], 0, 8)}, r"in 8 bytes; F32 of shape \(3,\) has 12"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, "'b' at byte .* neither overlap nor leave holes"),
    "hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, "'b' at byte .* neither overlap nor leave holes"),
    "past the end": ({"a": entry([5], 0, 20)}, "truncated: its tensors end at byte"),
    "left over": ({"a": entry([2], 0, 8)}, "has 4 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_header_that_does_not_fit_the_file_is_refused(tmp_path: Path, case: str) -> None:
    head, message = WRONG[case]
    data = bytes({"overlap": 12, "hole": 20, "left over": 12}.get(case, 8))
    path = write(tmp_path / "x.safetensors", head, data)
    with pytest.raises(SourceInvalid, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_folder_or_nothing_at_all_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(SourceInvalid, match="cannot be read"):
            SafetensorsFile(path)


def test_reading_works_without_madvise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mmap.MADV_DONTNEED", raising=False)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"w": grid((2, 2), 1)}, "F32"))
    file = SafetensorsFile(path)
    np.testing.assert_array_equal(file.rows(file.tensors["w"], 0, 2), grid((2, 2), 1))
    file.close()


def test_any_wrong_byte_of_the_header_gives_our_error(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": grid((3, 4), 1), "b": grid((4,), 2)}, "F32")
    path = tmp_path / "x.safetensors"
    for at in range(whole.index(b"}}") + 2):
        for value in (0x00, 0x22, 0x39, 0x7D, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(SourceInvalid):
                file = SafetensorsFile(path)
                for tensor in file.tensors.values():
                    file.rows(tensor, 0, 1)
                file.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of resident pages")
def test_pages_are_released_after_reading(tmp_path: Path) -> None:
    def mapped_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    rows, width = 4096, 4096
    path = write(tmp_path / "x", {"w": entry([rows, width], 0, rows * width * 2, "BF16")}, bytes(rows * width * 2))
    file = SafetensorsFile(path)
    before = mapped_kib()
    for first in range(0, rows, 512):
        file.rows(file.tensors["w"], first, 512)
    grown = mapped_kib() - before
    file.close()
    assert grown < 8 << 10  # of 32 MiB
