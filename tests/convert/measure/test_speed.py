"""Speed is measured with batches such as serving makes, in turns, within the cells there are; its figures add up."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.errors import MeasureFailed
from convert.measure.speed import ServingLoad, measure_speeds, order_of, score, serving_load
from convert.measure.speed_child import (
    LoadShape,
    Meter,
    SpeedSample,
    StepLimits,
    example_steps,
    measure,
    peak_memory_bytes,
)
from convert.measure.tasks import EvalTask, Tasks
from tests.support.convert.tiny import write_model
from tests.support.runtime.fakes import FakeLlama


class Clock:
    """Each token computed takes 1 s, each decode 10 s beside."""

    def __init__(self, llama: FakeLlama) -> None:
        self._llama = llama

    def __call__(self) -> float:
        return float(sum(len(batch.tokens) for batch in self._llama.batches) + 10 * self._llama.decodes)


@pytest.mark.parametrize(
    ("work", "limits"),
    [
        (LoadShape(7, 3), StepLimits(16, 32, 4)),
        (LoadShape(40, 2), StepLimits(16, 32, 3)),
        (LoadShape(1, 5), StepLimits(16, 6, 8)),
        (LoadShape(3, 0), StepLimits(64, 4, 16)),
        (LoadShape(1, 0), StepLimits(8, 2, 1)),
    ],
)
def test_every_example_is_computed_whole_and_in_order(work: LoadShape, limits: StepLimits) -> None:
    """The fake refuses a position out of order; here every cell, row and limit is counted."""
    llama = FakeLlama(unified=True, n_ctx=10_000, n_batch=limits.n_batch)
    begun = rows = tokens = 0
    for step in itertools.islice(example_steps(work, limits, llama.info.n_vocab), 40):
        [seq_id] = set(step.batch.seq_ids.tolist())
        if step.begins:
            assert seq_id == begun % limits.n_sequences
            llama.remove(seq_id)
        found = llama.decode(step.batch)
        assert len(found) == step.batch.wants_logits.sum() <= limits.n_rows
        begun, rows, tokens = begun + step.begins, rows + len(found), tokens + len(step.batch.tokens)
    whole, rest = divmod(tokens, work.cycle)
    assert begun == whole + (rest > 0)
    assert rows == whole * (1 + work.labels) + max(0, rest - work.prompt + 1)


@pytest.mark.parametrize(("n_batch", "sizes"), [(512, [100, 3]), (64, [64, 36, 3])])
def test_a_prompt_has_steps_of_its_own(n_batch: int, sizes: list[int]) -> None:
    steps = itertools.islice(example_steps(LoadShape(100, 3), StepLimits(n_batch, 32, 16), 9), 2 * len(sizes))
    assert [len(step.batch.tokens) for step in steps] == 2 * sizes


def test_rates_are_work_by_time() -> None:
    llama = FakeLlama(unified=True, n_ctx=2048, n_batch=110)
    meter = Meter(llama, 1.0, Clock(llama))
    assert meter.tokens_per_s(50, 4) == pytest.approx(50 / 60)
    assert Meter(llama, 61.0, Clock(llama)).examples_per_s(LoadShape(50, 5), 4) == pytest.approx(1 / 75)
    meter.tokens_per_s(50, 4)
    assert meter.decode_tokens_per_s(4, 5) == pytest.approx(4 / 14)
    assert meter.decode_tokens_per_s(1, 5) == pytest.approx(1 / 11)


def test_a_measurement_goes_on_until_its_time_is_over_but_not_for_ever() -> None:
    llama = FakeLlama(unified=True, n_ctx=2048, n_batch=64)
    meter = Meter(llama, 100.0, Clock(llama))
    meter.tokens_per_s(50, 4)
    assert llama.decodes == 2
    Meter(llama, 1e9, Clock(llama)).warm_up()
    before = llama.decodes
    fresh = Meter(llama, 1e9, Clock(llama))
    fresh.warm_up()
    fresh.decode_tokens_per_s(1, 5)
    assert llama.decodes - before == 1 + 32


@pytest.mark.parametrize("seconds", [50.0, 400.0])
def test_a_faster_file_is_not_timed_on_longer_texts(seconds: float) -> None:
    """A step takes the fake 14 s, so the time is over in the second answer, or in a much later one."""
    llama = FakeLlama(unified=True, n_ctx=2048, n_batch=80)
    meter = Meter(llama, 100.0, Clock(llama))
    meter.tokens_per_s(20, 4)
    held, before = llama.sequences, llama.decodes
    meter._seconds = seconds
    meter.decode_tokens_per_s(4, 3)
    written = [batch.positions.tolist() for batch in llama.batches[before:]]
    assert len(written) == -(-int(seconds) // 14)
    assert {tuple(positions) for positions in written} == {(20,) * 4, (21,) * 4, (22,) * 4}
    assert llama.sequences == held, "what was written is gone"


@pytest.mark.parametrize(("prompt", "answer"), [(1, 1), (100, 3), (4000, 64), (4096, 2048), (700, 700)])
def test_every_shape_fits_the_cells(prompt: int, answer: int) -> None:
    """Of the widest decoding to the narrowest, with as many steps as there may be: the fake counts the cells."""
    how = ServingLoad("classify", prompt, answer)
    llama = FakeLlama(unified=True, n_ctx=how.context, n_batch=how.step_tokens, n_seq_max=2 * how.sequences)
    meter = Meter(llama, 1e6, Clock(llama))
    meter._seconds = 1.0
    meter.warm_up()
    meter.examples_per_s(LoadShape(prompt, answer), how.n_prompts)
    meter.tokens_per_s(prompt, how.n_prompts)
    meter._seconds = 1e9
    for width in (16, 8, 1):
        meter.decode_tokens_per_s(width, answer)
        assert len(llama.sequences) == width
    assert llama.used_cells <= how.context


def test_one_round_measures_all_there_is() -> None:
    llama = FakeLlama(unified=True, n_ctx=8192)
    prefill, examples, decode = measure(Meter(llama, 1.0, Clock(llama)), LoadShape(20, 2), 16, 3, (1, 8, 16))
    assert prefill > 0
    assert examples is not None
    assert list(decode) == [1, 8, 16]
    assert decode[1] < decode[8] < decode[16]
    assert measure(Meter(llama, 1.0, Clock(llama)), LoadShape(20, 0), 16, 3, (1,))[1] is None


def sample(prefill: float = 100.0, decode: float = 50.0, examples: float | None = None, memory: int = 7) -> SpeedSample:
    return SpeedSample(prefill, {1: decode / 4, 16: decode}, examples, memory, 2, "CPU")


def test_writing_is_scored_by_prompt_and_answer() -> None:
    how = ServingLoad("write", 200, 100)
    assert score(sample(), how) == pytest.approx(1 / (200 / 100 + 100 / 50))
    assert score(sample(examples=3.5), how) == 3.5


def test_files_are_measured_to_and_fro_and_medians_taken() -> None:
    order: list[str] = []
    rates = iter([1.0, 10.0, 20.0, 2.0, 4.0, 30.0])

    def once(file: Path) -> SpeedSample:
        order.append(file.name)
        return sample(examples=next(rates), memory=len(order))

    told: list[tuple[int, int]] = []
    files = {"A": Path("a"), "B": Path("b")}
    found = measure_speeds(
        files, ServingLoad("classify", 100, 3), lambda done, total: told.append((done, total)), measure=once
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found.scores == {"A": 2.0, "B": 20.0}
    assert found.speeds["A"].score_samples_per_s == (1.0, 2.0, 4.0)
    assert found.speeds["B"].peak_memory_bytes == 6
    assert told[-1] == (6, 6)
    assert found.shape is not None
    assert (found.shape.rounds, found.shape.threads) == (3, 2)
    assert order_of(["A", "B", "C"], 1) == ["C", "B", "A"]


def test_one_that_fails_is_left_out_and_not_tried_again() -> None:
    tried: list[str] = []

    def once(file: Path) -> SpeedSample:
        tried.append(file.name)
        if file.name == "bad":
            raise MeasureFailed("aborted")
        return sample(examples=1.0)

    files = {"good": Path("good"), "bad": Path("bad")}
    found = measure_speeds(files, ServingLoad("classify", 100, 3), lambda done, total: None, measure=once)
    assert tried.count("bad") == 1
    assert found.failures == {"bad": "aborted"}
    assert list(found.speeds) == ["good"]


def test_the_typical_example_is_the_median_one() -> None:
    lengths = [(10, 2), (30, 3), (900, 60)]
    tasks = tuple(EvalTask(str(p), (1,) * p, (1,) * a, "x") for p, a in lengths)
    how = serving_load(Tasks("write", tasks, (), (), (1,), 300))
    assert (how.work, how.prompt_tokens, how.answer_tokens, how.n_prompts) == ("write", 30, 3, 16)
    assert ServingLoad("write", 4000, 90).n_prompts == 1


def test_a_tiny_model_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    files = {"tiny": write_model(tmp_path / "tiny.gguf"), "none": tmp_path / "none.gguf"}
    how = ServingLoad("classify", 20, 2, context=1024, step_tokens=64, threads=1)
    found = measure_speeds(files, how, lambda done, total: None, rounds=1, seconds=0.01)
    speed = found.speeds["tiny"]
    assert speed.prefill_tokens_per_s > 0
    assert set(speed.decode_tokens_per_s) == {1, 8, 16}
    assert speed.peak_memory_bytes > 1 << 20
    assert found.scores["tiny"] > 0
    assert "No such file" in found.failures["none"]
    assert found.backend


def test_peak_memory_is_in_bytes() -> None:
    assert peak_memory_bytes() > 10 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere than on Linux a process counts itself")
def test_peak_memory_is_the_processs_own_and_not_its_parents() -> None:
    # the child is forked from a process that holds this much
    ballast = np.ones(300 << 20, np.uint8)
    command = [sys.executable, "-c", "from convert.measure.speed_child import peak_memory_bytes as p; print(p())"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) < 200 << 20 < len(ballast)


def test_files_are_timed_for_whoever_asks_with_a_job(tmp_path: Path) -> None:
    job = {
        "files": {"tiny": str(write_model(tmp_path / "tiny.gguf"))},
        "prompt_tokens": 20,
        "answer_tokens": 2,
        "rounds": 1,
        "threads": 1,
    }
    done = run_speed_files(job)
    report = json.loads(done.stdout)
    assert (done.returncode, report["speeds"].keys()) == (0, {"tiny"})
    assert report["speeds"]["tiny"]["decode_tokens_per_s"].keys() == {"1", "8", "16"}
    refused = run_speed_files(job | {"files": {"none": str(tmp_path / "none.gguf")}})
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "none.gguf" in refused.stderr


def run_speed_files(job: dict[str, object]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "convert.measure.speed"]
    return subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
