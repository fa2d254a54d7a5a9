"""Every file of the benchmarks is read as it was written; a file of another kind is refused with its first fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison.evaluate import Evaluation, Prediction, load_evaluation, save_evaluation
from benchmarks.comparison.figures import derive
from benchmarks.conversion.record import ConverterSample, ConvertRun, InstallSize, load_convert_run
from benchmarks.conversion.trim import TrimFile, TrimRun, load_trim_run
from benchmarks.cost import Assumptions
from benchmarks.errors import BadRecord
from benchmarks.load.servers import recipe_file
from benchmarks.peers.record import BarePass, load_peer_run, save_peer_run
from benchmarks.peers.tasks import CHAT, LABEL
from benchmarks.record import RequestSample, load_record, load_run, save_json, save_run
from benchmarks.soak.checks import EngineKill, MemorySample, SoakRun
from benchmarks.soak.client import RequestOutcome
from models.common.record import Record
from tests.support.benchmarks.examples import arm, run_of, sample
from tests.support.benchmarks.peer_examples import MACHINE, made, offline, peer_run

STARTED = "2026-11-22T19:00:00+00:00"


def save(path: Path, record: Record) -> None:
    save_json(path, record.model_dump(mode="json"))


def load_sample(path: Path) -> RequestSample:
    return load_record(path, RequestSample, "is not a sample")


def load_soak(path: Path) -> SoakRun:
    return load_record(path, SoakRun, "is not a soak")


BENCH_RUN = derive(run_of(arm("fine-tune", {1: [sample(0, text="ü\n"), sample(1, error="HTTP 500")]})), Assumptions())[
    0
]
PEER_RUN = peer_run(made(LABEL, CHAT, "deskside, chosen", 1.0), offline=(offline("deskside", CHAT, 9.0),)).model_copy(
    update={"bare": (BarePass(task=LABEL, tokens=9, decodes=2, engine_s=(1.0,), bare_s=(0.9,)),)}
)
CONVERT_RUN = ConvertRun(
    started_at=STARTED,
    machine=MACHINE,
    checkpoint="toy",
    parameters=1,
    checkpoint_bytes=2,
    commands={"deskside": "deskside convert toy"},
    needs=(InstallSize(converter="deskside", versions={"numpy": "2"}, loaded_bytes=1, installed_bytes=2),),
    tensors=1,
    equal_tensors=1,
    conversions=(ConverterSample(converter="llama.cpp", wall_s=1.5, cpu_s=1.0, peak_bytes=3, load_before=0.5),),
)
TRIM_RUN = TrimRun(
    started_at=STARTED,
    machine=MACHINE,
    backend="CPU",
    repetitions=5,
    prompt_tokens=112,
    answer_tokens=3,
    files=(
        TrimFile(kind="Q8_0", trimmed=True, tokens=16, size_bytes=9, sha256="0" * 64, prefill_tokens_per_s=2.5,
                 decode_tokens_per_s={1: 1.5, 16: 9.0}),
    ),
)  # fmt: skip
SOAK_RUN = SoakRun(
    started_at=STARTED,
    machine=MACHINE,
    model="m",
    minutes=0.5,
    seed=0,
    clients=4,
    capacity=2,
    wanted_kills=1,
    load_s=30.0,
    outcomes=(RequestOutcome(kind="chat", started_s=0.0, ended_s=1.0, end="answered", accepted=True),),
    kills=(EngineKill(at_s=1.0, pid=2, ready_after_s=None),),
    memory=(MemorySample(at_s=0.0, server_bytes=1, engine_pid=None, engine_bytes=0),),
    canaries=("spam",),
    gauges={"deskside_live": 0.0},
    ready_at_end=True,
)
EVALUATION = Evaluation(
    labels=("a",), predictions=(Prediction(id="1", label="a", prediction="a", label_logprobs=(-0.5,)),)
)


@pytest.mark.parametrize(
    ("record", "write", "read", "fault"),
    [
        (BENCH_RUN, save_run, load_run, "is not a benchmark run: started_at"),
        (BENCH_RUN.arms[0].levels[0].samples[0], save, load_sample, "is not a sample: id"),
        (PEER_RUN, save_peer_run, load_peer_run, "is not a comparison with peers: started_at"),
        (CONVERT_RUN, save, load_convert_run, "is not a comparison of converters: started_at"),
        (TRIM_RUN, save, load_trim_run, "is not a comparison of trimmed files: started_at"),
        (SOAK_RUN, save, load_soak, "is not a soak: started_at"),
        (EVALUATION, save_evaluation, load_evaluation, "holds no predictions: labels"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Record) else "",
)
def test_a_record_is_read_as_it_was_saved(
    tmp_path: Path, record: Record, write: Callable[[Path, Any], None], read: Callable[[Path], Record], fault: str
) -> None:
    path = tmp_path / "deep" / "record.json"
    write(path, record)
    assert read(path) == record
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(kept), encoding="utf-8-sig")
    assert read(path) == record, "a byte order mark, as some editors write it"
    path.write_text(json.dumps(kept | {"no_such_field": 1}), encoding="utf-8")
    with pytest.raises(BadRecord, match="no_such_field: Extra"):
        read(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(BadRecord, match=fault):
        read(path)
    with pytest.raises(BadRecord, match="cannot be read"):
        read(tmp_path / "missing.json")


def test_the_committed_predictions_can_be_read() -> None:
    others = {"figures.json", "label_scores.json"}
    files = [path for path in sorted(recipe_file("results").glob("*.json")) if path.name not in others]
    assert len(files) == 9
    assert {len(load_evaluation(path).predictions) for path in files} == {343}


def test_predictions_made_elsewhere_need_labels_and_predictions_only(tmp_path: Path) -> None:
    path = tmp_path / "torch.json"
    save_json(path, {"labels": ["a"], "predictions": [{"id": "1", "label": "a", "prediction": "a"}]})
    assert load_evaluation(path).predictions[0].prediction == "a"
    save_json(path, {"labels": ["a"], "predictions": [{"id": "1", "label": "a"}]})
    with pytest.raises(BadRecord, match=r"predictions\.0\.prediction"):
        load_evaluation(path)


def test_a_record_with_a_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(tmp_path / "x.json", {"rate": float("nan")})
    assert not list(tmp_path.iterdir())
