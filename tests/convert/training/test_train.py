"""A tiny model learns two labels; a stopped run resumes to the same bits; the result converts to the trained model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.errors import ConvertError, FinetuneFailed
from convert.lora.adapter import ADAPTER_WEIGHTS_FILE, read_adapter
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.training.base import write_shallow
from convert.training.settings import FinetuneResult, FinetuneSettings
from models.common.chat_records import ChatRecord, read_chat_records
from models.common.console import LineReporter
from models.store.store import Store
from tests.support.convert.tiny import write_mails, write_model
from tests.support.convert.trained import engine_logits, jax_logits

jax = pytest.importorskip("jax", reason="needs the extra `finetune`")
from convert.training import train as train_module  # noqa: E402
from convert.training.storage import CHECKPOINT_FILE, LOG_FILE  # noqa: E402
from convert.training.train import MODEL_FILE, finetune  # noqa: E402

pytestmark = pytest.mark.finetune
TURNS = "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
QUICK: dict[str, Any] = {"layers": 2, "epochs": 4, "batch": 4, "learning_rate": 0.02, "rank": 4, "alpha": 8}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All tests of this file share compiled steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DESKSIDE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base.gguf", "llama", template=TURNS)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatRecord, ...]:
    return read_chat_records(write_mails(tmp_path_factory.mktemp("mails") / "mails.jsonl"))


def trained(base: Path, records: Sequence[ChatRecord], out: Path, **changes: Any) -> FinetuneResult:
    settings = FinetuneSettings(**{**QUICK, **changes})
    return finetune(base, records[:28], records[28:], None, settings, out, LineReporter())


def tensors(folder: Path) -> bytes:
    return (folder / ADAPTER_WEIGHTS_FILE).read_bytes()


class Killed(BaseException):
    """As a signal would end the run."""


def kill_after(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """End the run in its `n_steps`-th step, with a checkpoint after each before."""
    from convert.training.steps import DecoderSteps, TrainingState

    apply = DecoderSteps.apply

    def fatal(self: DecoderSteps, state: TrainingState, gradients: Any, rate: float) -> None:
        if state.step == n_steps - 1:
            raise Killed
        apply(self, state, gradients, rate)

    monkeypatch.setattr(train_module, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(DecoderSteps, "apply", fatal)


def test_two_labels_are_learnt(base: Path, records: tuple[ChatRecord, ...], tmp_path: Path) -> None:
    result = trained(base, records, tmp_path / "out")
    assert result.best.accuracy == 1
    assert result.best.train_loss < result.epochs[0].train_loss / 2
    log = json.loads((tmp_path / "out" / LOG_FILE).read_text())
    assert [entry["step"] for entry in log["steps"]] == list(range(1, 7 * len(result.epochs) + 1))
    assert log["epochs"][-1]["train_loss"] < log["epochs"][0]["train_loss"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", ADAPTER_WEIGHTS_FILE, LOG_FILE}


def test_the_same_seed_gives_the_same_bits(base: Path, records: tuple[ChatRecord, ...], tmp_path: Path) -> None:
    runs = [trained(base, records, tmp_path / str(n), epochs=1, seed=seed) for n, seed in enumerate((3, 3, 4))]
    first, again, other = (tensors(run.trained) for run in runs)
    assert first == again != other


@pytest.mark.parametrize("killed_at", [3, 8])
def test_a_killed_run_resumes_to_the_same_bits(
    base: Path, records: tuple[ChatRecord, ...], tmp_path: Path, killed_at: int
) -> None:
    """In the first epoch, and at the first step of the second."""
    whole = trained(base, records, tmp_path / "whole", layers=1)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, killed_at)
        with pytest.raises(Killed):
            trained(base, records, tmp_path / "out", layers=1)
    assert (tmp_path / "out" / CHECKPOINT_FILE).is_file()
    resumed = trained(base, records, tmp_path / "out", layers=1)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")
    assert resumed.epochs == whole.epochs
    losses = [
        [(one["step"], one["loss"]) for one in json.loads((tmp_path / name / LOG_FILE).read_text())["steps"]]
        for name in ("whole", "out")
    ]
    assert losses[0] == losses[1]


def test_a_finished_run_is_not_done_again(
    base: Path, records: tuple[ChatRecord, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(base, records, tmp_path / "out", epochs=1)
    kill_after(monkeypatch, 1)
    again = trained(base, records, tmp_path / "out", epochs=1)
    assert (again.best, again.epochs, again.trained) == (first.best, first.epochs, first.trained)
    relabelled = (replace(records[0], answer=records[1].answer), *records[1:])
    assert relabelled[0].answer != records[0].answer
    with pytest.raises(Killed):
        trained(base, relabelled, tmp_path / "out", epochs=1)
    (tmp_path / "out" / ADAPTER_WEIGHTS_FILE).unlink()
    with pytest.raises(Killed):
        trained(base, records, tmp_path / "out", epochs=1)


def test_another_run_s_checkpoint_is_refused(
    base: Path, records: tuple[ChatRecord, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            trained(base, records, tmp_path)
    with pytest.raises(FinetuneFailed, match=r"was made with settings .* another --out, or remove the file"):
        trained(base, records, tmp_path, rank=8)
    with pytest.raises(FinetuneFailed, match=r"was made with epochs 4, asked is 5"):
        trained(base, records, tmp_path, epochs=5)


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_the_converted_adapter_is_the_trained_model(
    records: tuple[ChatRecord, ...], tmp_path: Path, architecture: str
) -> None:
    """Llama's rows of q and k are in another order in the GGUF than in the adapter."""
    base = write_model(tmp_path / "base.gguf", architecture, template=TURNS)
    result = trained(base, records, tmp_path / "out", epochs=1)
    adapter = read_adapter(result.trained)
    assert adapter.rank == 4
    assert len(adapter.loras) == 14
    assert not adapter.is_zero
    request = ConvertRequest(source=str(base), adapter=result.trained, name="made", quantization="F16")
    made = convert(request, Store(tmp_path / "store"), LineReporter())
    tokens = np.random.default_rng(2).integers(4, 260, 40)
    merged, before = engine_logits(made.gguf, tokens, 10), engine_logits(base, tokens, 10)
    wanted = jax_logits(base, tokens, 10, adapter=result.trained)
    assert np.abs(merged - wanted).max() < 0.02 * wanted.std()
    assert np.abs(before - wanted).max() > 0.2 * wanted.std()


def test_whole_matrices_are_trained(base: Path, records: tuple[ChatRecord, ...], tmp_path: Path) -> None:
    result = trained(base, records, tmp_path / "out", method="full", layers=1, epochs=2, learning_rate=5e-3)
    assert result.trained == tmp_path / "out" / MODEL_FILE
    assert result.epochs[1].train_loss < result.epochs[0].train_loss
    tokens = np.random.default_rng(2).integers(4, 260, 40)
    assert not np.allclose(engine_logits(result.trained, tokens, 5), engine_logits(base, tokens, 5), atol=0.01)
    made = convert(ConvertRequest(source=str(result.trained), name="made"), Store(tmp_path / "store"), LineReporter())
    assert made.gguf.is_file()


def test_work_to_write_is_judged_by_its_loss(base: Path, tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"Name {n}"}, {"role": "assistant", "content": f"hello {n} you"}]}
        for n in range(40)
    ]
    path = tmp_path / "write.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = trained(base, read_chat_records(path), tmp_path / "out")
    assert {score.accuracy for score in result.epochs} == {None}
    assert result.best.loss == min(score.loss for score in result.epochs) < result.epochs[0].train_loss


def test_a_run_stops_when_no_epoch_is_better(base: Path, records: tuple[ChatRecord, ...], tmp_path: Path) -> None:
    """Steps that are too large make it worse from some epoch on."""
    result = trained(base, records, tmp_path, layers=1, epochs=9, patience=1, learning_rate=0.2)
    assert len(result.epochs) < 9
    assert result.best == result.epochs[-2]


def test_a_shallow_base_is_trained_and_converted(base: Path, records: tuple[ChatRecord, ...], tmp_path: Path) -> None:
    shallow = tmp_path / "shallow.gguf"
    write_shallow(base, [1], shallow, LineReporter())
    result = trained(shallow, records, tmp_path / "out", layers=1)
    request = ConvertRequest(source=str(shallow), adapter=result.trained, name="made", quantization="F16")
    made = convert(request, Store(tmp_path / "store"), LineReporter())
    assert made.gguf.stat().st_size < base.stat().st_size


def test_too_little_time_is_refused_with_what_would_fit(
    base: Path, records: tuple[ChatRecord, ...], tmp_path: Path
) -> None:
    with pytest.raises(FinetuneFailed, match=r"--minutes 1e-05 is too little for 2 layers and 4 epochs.*--minutes \d+"):
        trained(base, records, tmp_path / "out", minutes=1e-5)
    assert list((tmp_path / "out").iterdir()) == []


def test_more_layers_than_there_are_is_refused(base: Path, records: tuple[ChatRecord, ...], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"--layers 3: base\.gguf has 2 layers"):
        trained(base, records, tmp_path / "out", layers=3)


def test_too_little_memory_is_refused_with_what_would_fit(
    base: Path, records: tuple[ChatRecord, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.training.cost.machine_budget", lambda: 1 << 20)
    with pytest.raises(FinetuneFailed, match=r"MiB more, 1 MiB are free: try --layers 1, a smaller --batch"):
        trained(base, records, tmp_path / "out")


def test_a_loss_that_is_no_number_ends_the_run(base: Path, records: tuple[ChatRecord, ...], tmp_path: Path) -> None:
    from convert.training.steps import DecoderSteps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderSteps, "gradients", lambda *_: (float("nan"), []))
        with pytest.raises(FinetuneFailed, match=r"the loss is nan at step 1: try a lower --learning-rate than 0\.02"):
            trained(base, records, tmp_path)
