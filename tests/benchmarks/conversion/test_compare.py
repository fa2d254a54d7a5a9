"""The comparison of converters: what its figures are made of, and that its checkpoint is the model it was made from."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.conversion import needs as convert_needs
from benchmarks.conversion.checkpoint import USER_DEFINED, make_checkpoint, read_vocabulary, write_vocabulary
from benchmarks.conversion.record import ConverterSample, ConvertRun, judge
from benchmarks.errors import BadWorkload
from benchmarks.record import this_machine
from convert.checkpoint.source import open_checkpoint
from models.gguf.header import read_header
from tests.support.convert.tiny import TOKENS, weights, write_model

MIB = 1 << 20


def run_of(*conversions: ConverterSample, loaded: tuple[int, int] = (10, 100)) -> ConvertRun:
    needs = [
        {"converter": name, "versions": {}, "loaded_bytes": n_mib * MIB, "installed_bytes": (n_mib + 20) * MIB}
        for name, n_mib in zip(("deskside", "llama.cpp"), loaded, strict=True)
    ]
    return ConvertRun.model_validate(
        {
            "started_at": "2026-11-22T19:00:00+00:00",
            "machine": this_machine(),
            "checkpoint": "toy",
            "parameters": 1,
            "checkpoint_bytes": 2,
            "commands": {},
            "needs": needs,
            "tensors": 1,
            "equal_tensors": 1,
            "conversions": conversions,
        }
    )


def conversion(converter: str, wall_s: float, peak_mib: int = 100) -> ConverterSample:
    return ConverterSample.model_validate(
        {"converter": converter, "wall_s": wall_s, "cpu_s": 1.0, "peak_bytes": peak_mib * MIB}
    )


def test_each_figure_is_a_ratio_of_medians_beside_its_aim() -> None:
    ours = [conversion("deskside", wall, 30) for wall in (9.0, 4.0, 3.0)]
    theirs = [conversion("llama.cpp", wall, 50) for wall in (10.0, 8.0, 1.0)]
    wall, memory, loaded, installed = judge(run_of(*ours, *theirs))
    assert (wall.deskside, wall.llama_cpp, wall.ratio, wall.reached) == (4.0, 8.0, 0.5, True)
    assert (memory.ratio, memory.reached) == (0.6, False)
    assert (loaded.ratio, loaded.reached) == (0.1, True)
    assert (installed.ratio, installed.reached) == (0.25, False)


def test_what_an_environment_holds_for_a_distribution() -> None:
    found = convert_needs.required(["httpx"])
    assert {"httpx", "httpcore", "h11"} <= found.keys(), "its requirements are found, and theirs"
    assert not {"pytest", "trio"} & found.keys()
    provided = convert_needs.providers(["httpx._client", "json", "no_such_module"])
    assert provided.keys() == {"httpx"}
    assert 10_000 < convert_needs.n_bytes(provided) < convert_needs.n_bytes(found)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A Gemma 3 of two layers, with all that a real one's file says."""
    path = write_model(tmp_path / "toy.gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "gemma3")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    writer.add_pad_token_id(0)
    for name, array in weights().items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "whole.gguf"


def test_the_checkpoint_converts_to_the_file_it_was_made_from(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    n_parameters = make_checkpoint(toy, folder)
    original = weights()
    assert n_parameters == sum(array.size for array in original.values())
    source = open_checkpoint(folder)
    try:
        read = {
            name: np.concatenate([rows for _, rows in source.slabs(tensor)]).reshape(tensor.shape)
            for name, tensor in source.header.tensors.items()
        }
        tokens = source.header.fields["tokenizer.ggml.tokens"].strings
    finally:
        source.close()
    assert read.keys() == original.keys()
    assert all(np.array_equal(read[name], original[name]) for name in original), "multiples of 1/64 are exact in bf16"
    assert tokens == TOKENS


def test_tokens_that_hold_white_space_are_spelled_as_sentencepiece_does(toy: Path, tmp_path: Path) -> None:
    pieces = read_vocabulary(read_header(toy))
    pieces.texts[-1], pieces.kinds[-1] = "▁▁", USER_DEFINED
    write_vocabulary(tmp_path, pieces)
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert [token["content"] for token in raw["added_tokens"] if not token["special"]] == ["▁▁"]
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [processor.id_to_piece(index) for index in range(processor.vocab_size())] == pieces.texts
    assert (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id()) == (2, 1, 3, 0)


def test_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadWorkload, match="architecture 'llama'"):
        make_checkpoint(write_model(tmp_path / "llama.gguf", "llama"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
