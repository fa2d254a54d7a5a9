"""Golden hashes of each family's tiny folder, tensor by tensor, equal to those of llama.cpp's own converter.

`golden.json` was made from these folders and compared, byte by byte, with what convert_hf_to_gguf.py of
llama-cpp-python 0.3.36 writes with --outtype f16 (of StableLM without norms on q and k, which it loses).
"""

import hashlib
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint.folder import HfCheckpoint
from convert.planning.plan import half_precision_kind
from tests.support.convert.hf_tiny import CLASSES, open_tiny, write_folder, write_shards

GOLDEN: dict[str, dict[str, dict[str, str]]] = json.loads((Path(__file__).parent / "golden.json").read_text())
# It holds {family: {"fields": …, "tensors": …}}. Powers of a real base: the last bit is the machine's.
COMPUTED = {"rope_freqs.weight"}


def described(source: HfCheckpoint) -> dict[str, str]:
    """Each field with the number of its type: 4 u32, 5 i32, 6 f32, 7 bool, 8 string, 9 array."""
    return {
        key: f"{field.raw[0]}: {field.value if field.length is None else field.numbers or field.strings}"
        for key, field in source.header.fields.items()
    }


def hashes(source: HfCheckpoint) -> dict[str, str]:
    found = {}
    for name, tensor in source.header.tensors.items():
        digest = hashlib.sha256(repr(tensor.shape).encode())
        kind = np.float16 if half_precision_kind(tensor).name == "F16" else np.float32
        for _, rows in source.slabs(tensor):
            digest.update(rows.astype(kind).tobytes())
        found[name] = digest.hexdigest()[:16]
    return found


@pytest.mark.parametrize("family", CLASSES)
def test_tensors_have_their_golden_hashes(tmp_path: Path, family: str) -> None:
    with closing(open_tiny(write_folder(tmp_path / "folder", family))) as source:
        found = hashes(source)
    assert list(found) == list(GOLDEN[family]["tensors"])
    assert {k: v for k, v in found.items() if k not in COMPUTED} == {
        k: v for k, v in GOLDEN[family]["tensors"].items() if k not in COMPUTED
    }


@pytest.mark.parametrize("family", CLASSES)
def test_fields_have_their_golden_values(tmp_path: Path, family: str) -> None:
    with closing(open_tiny(write_folder(tmp_path / "folder", family))) as source:
        assert described(source) == GOLDEN[family]["fields"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_shards_hold_what_one_file_does(tmp_path: Path, family: str) -> None:
    with closing(open_tiny(write_shards(tmp_path / "shards", family))) as source:
        found = hashes(source)
    assert {k: v for k, v in found.items() if k not in COMPUTED} == {
        k: v for k, v in GOLDEN[family]["tensors"].items() if k not in COMPUTED
    }


def test_small_slabs_hold_what_large_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.checkpoint.folder.CACHED_SLAB_ELEMENTS", 3 * 64)
    with closing(open_tiny(write_folder(tmp_path / "folder", "mistral"))) as source:
        assert hashes(source) == GOLDEN["mistral"]["tensors"]
        query = source.header.tensors["blk.0.attn_q.weight"]
        assert [len(rows) for _, rows in source.slabs(query)] == [32] * 4  # whole heads, or they could not be reordered
