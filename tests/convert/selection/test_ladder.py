"""The ladder's order, what it keeps for another run, and what it does when a candidate fails: with fakes."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import gguf
import pytest

from convert.child import StepProgress
from convert.errors import MeasureFailed, QuantizeFailed, RequestInvalid
from convert.measure.answers import ExampleResult, judge, totals
from convert.measure.compare import MeasuredLoss, ReferenceRun
from convert.measure.forward import ModelAnswer
from convert.measure.speed import ServingLoad, SpeedReport
from convert.measure.tasks import EvalTask, Tasks
from convert.quantize.layouts import CandidateSpec, plain
from convert.quantize.quantize import QuantizeResult
from convert.selection.by_examples import sample_power
from convert.selection.ladder import NO_BASE, OTHER_VOCABULARY, LadderInputs, Provenance, Tools, run_ladder
from models.errors import StoreError
from models.gguf.header import read_header
from models.quality import Answers, Loss, LossBudget, Speed
from tests.support.convert.tiny import TOKENS, write_model

TASKS = Tasks(
    "classify",
    tuple(EvalTask(str(n), (5, 6, 7), (8, 9), "ab"[n % 2]) for n in range(10)),
    ("a", "b"),
    ((8,), (9,)),
    (1,),
    len(TOKENS),
)
ORIGIN = Provenance("mails.jsonl", "e" * 64, 3)
# name -> (KL to the fine-tune, KL to the base, examples a second)
FIGURES = {
    "F16": (0.0, 1.5, 2.0),
    "Q8_0": (0.001, 1.5, 3.0),
    "Q4_0": (0.5, 1.0, 5.0),
    "Q4_K_M": (1.4, 0.01, 9.0),
    "base": (1.5, 0.0, 0.0),
}


class Quiet:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def close(self) -> None:
        pass


def loss(kl_mean: float) -> Loss:
    return Loss(positions=10, kl_mean=kl_mean, kl_p99=kl_mean, top1_agreement=1.0, perplexity_ratio=1.0)


def measured(kl_mean: float, answer: str, reference_answer: str) -> MeasuredLoss:
    examples = tuple(
        ExampleResult(
            *(task.id, "a", answer, reference_answer, answer == "a", reference_answer == "a"),
            is_flipped=answer != reference_answer,
            likeness=float(answer == reference_answer),
            kl_mean=kl_mean,
        )
        for task in TASKS.tasks
    )
    right = 10 if answer == "a" else 0
    answers = Answers(total=10, correct=right, flips=0, difference_low=0, difference_high=0, p_value=1.0)
    return MeasuredLoss(loss(kl_mean), answers, examples)


@dataclass
class Work:
    """Fakes that write down what they were asked. What lies nearer the base answers "b" as the base does."""

    done: list[str] = field(default_factory=list)
    fails: Mapping[str, BaseException] = field(default_factory=dict)
    busy: float = 0.0

    def quantize(
        self, source: Path, target: Path, spec: CandidateSpec, imatrix: Path | None, told: StepProgress
    ) -> QuantizeResult:
        self.done.append(f"quantize {spec.name}")
        if spec.name in self.fails and isinstance(self.fails[spec.name], QuantizeFailed):
            raise self.fails[spec.name]
        write_model(target, kind=gguf.GGMLQuantizationType.Q4_0 if "Q4" in spec.name else gguf.GGMLQuantizationType.F16)
        target.write_bytes(target.read_bytes() + spec.name.encode())
        return QuantizeResult({}, 0)

    def take_reference(
        self, model: Path, tasks: Tasks, folder: Path, told: StepProgress, beside: Sequence[ReferenceRun]
    ) -> ReferenceRun:
        self.done.append(f"reference {folder.name}")
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / "rows"
        rows.write_bytes(b"x")
        distances = tuple(measured(FIGURES["base"][0], "b", "a") for _ in beside)
        return ReferenceRun(model, tasks, tuple(ModelAnswer("a") for _ in tasks.tasks), (), rows, distances)

    def compare(self, file: Path, references: Sequence[ReferenceRun], told: StepProgress) -> tuple[MeasuredLoss, ...]:
        name = file.stem.removeprefix("tuned-")
        self.done.append(f"compare {name}")
        if name in self.fails:
            raise self.fails[name]
        near, far, _ = FIGURES[name]
        answer = "a" if near <= far else "b"
        return tuple(measured(near if place == 0 else far, answer, "ab"[place]) for place, _ in enumerate(references))

    def noise(self, reference: ReferenceRun, told: StepProgress) -> MeasuredLoss:
        self.done.append("noise")
        return measured(0.0001, "a", "a")

    def speeds(self, files: Mapping[str, Path], how: ServingLoad, told: StepProgress) -> SpeedReport:
        self.done.append("time " + " ".join(files))
        assert all(file.is_file() for file in files.values())
        speed = Speed(prefill_tokens_per_s=1, decode_tokens_per_s={1: 1}, peak_memory_bytes=1)
        return SpeedReport(dict.fromkeys(files, speed), {name: FIGURES[name][2] for name in files}, {}, None, "CPU")

    def tools(self) -> Tools:
        return Tools(
            self.quantize,
            self.take_reference,
            self.compare,
            self.noise,
            self.speeds,
            lambda backend: f"here {backend}",
            lambda: self.busy,
        )


@pytest.fixture
def inputs(tmp_path: Path) -> LadderInputs:
    f16 = write_model(tmp_path / "tuned-F16.gguf", kind=gguf.GGMLQuantizationType.F16)
    base = write_model(tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q4_0)
    specs = tuple(map(plain, ("F16", "Q8_0", "Q4_0", "Q4_K_M")))
    return LadderInputs(f16, "tuned", TASKS, specs, base=base)


@pytest.mark.parametrize(
    ("n", "says"),
    [(75, "lets 1 of them change.*up to 3.9% of all"), (20, "lets none of them"), (200, "lets 4 of them.*up to 1.5%")],
)
def test_the_sample_is_said_to_show_what_it_shows(n: int, says: str) -> None:
    assert re.search(says, sample_power(n, LossBudget()))


def test_of_written_answers_the_sample_promises_no_share() -> None:
    says = sample_power(40, LossBudget(), "ROUGE-L")
    assert says.startswith("40 examples")
    assert "mean ROUGE-L is lower than F16's" in says
    assert "2%" not in says


def test_a_busy_machine_is_warned_of(inputs: LadderInputs, tmp_path: Path) -> None:
    quiet = Quiet()
    run_ladder(inputs, ORIGIN, tmp_path / "work", quiet, Work(busy=0.62).tools())
    assert [warning for warning in quiet.warnings if warning.startswith("other programs use 62%")]


def test_the_fastest_that_keeps_the_fine_tune_is_chosen(inputs: LadderInputs, tmp_path: Path) -> None:
    work, quiet, folder = Work(), Quiet(), tmp_path / "work"
    quality, chosen = run_ladder(inputs, ORIGIN, folder, quiet, work.tools())
    assert {one.name: one.verdict for one in quality.candidates} == {
        "F16": "within budget",
        "Q8_0": "chosen",
        "Q4_0": "over budget",
        "Q4_K_M": "undoes the fine-tune",
    }
    assert chosen == folder / "tuned-Q8_0.gguf"
    assert "measure Q4_0 (candidate 2 of 3)" in quiet.stages
    assert not [warning for warning in quiet.warnings if "other programs" in warning]
    assert [file.name for file in folder.rglob("*.gguf")] == [chosen.name]
    assert not list(folder.rglob("rows/*/rows"))
    undo_reason = quality.candidates[3]
    assert "1.4 to the fine-tune, 0.01 to its base" in undo_reason.reason
    assert "rounded to the very grid their base lay on (Q4_0)" in undo_reason.reason
    assert any("UNDOES THE FINE-TUNE" in warning for warning in quiet.warnings)
    assert quality.base_distance == loss(1.5)
    assert (quality.noise, quality.noise_examples) == (loss(0.0001), 10)
    # the base is compared with the fine-tune in the pass that takes its rows
    assert [what for what in work.done if what.startswith(("reference", "compare"))] == [
        "reference fine-tune",
        "reference base",
        "compare Q8_0",
        "compare Q4_0",
        "compare Q4_K_M",
    ]
    assert (quality.machine, quality.held_out_examples, quality.calibration_examples) == ("here CPU", 10, 3)


def test_the_grid_is_that_of_the_weights_that_were_merged_onto(inputs: LadderInputs, tmp_path: Path) -> None:
    """With a trimmed vocabulary the base is written anew in half precision, and no longer shows on what grid it lay."""
    assert inputs.base is not None
    before = read_header(inputs.base)
    (tmp_path / "again").mkdir()
    trimmed = write_model(tmp_path / "again" / "base.gguf", kind=gguf.GGMLQuantizationType.F16)
    for header, named in ((None, "quantizing it loses more"), (before, "the very grid their base lay on (Q4_0)")):
        changed = replace(inputs, base=trimmed, base_header=header, tuned=("blk.0.attn_q.weight",))
        quality, _ = run_ladder(changed, ORIGIN, tmp_path / "work", Quiet(), Work().tools())
        assert named in quality.candidates[3].reason


def test_a_repeated_run_measures_nothing_again(inputs: LadderInputs, tmp_path: Path) -> None:
    first = run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), Work().tools())
    again = Work()
    assert run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), again.tools()) == first
    assert again.done == []
    first[1].unlink()
    assert run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), again.tools()) == first
    assert again.done == ["quantize Q8_0"]


def test_a_new_candidate_is_measured_and_all_are_timed_together(inputs: LadderInputs, tmp_path: Path) -> None:
    run_ladder(replace(inputs, specs=inputs.specs[:2]), ORIGIN, tmp_path / "work", Quiet(), Work().tools())
    again = Work()
    run_ladder(replace(inputs, specs=inputs.specs[:3]), ORIGIN, tmp_path / "work", Quiet(), again.tools())
    assert [what for what in again.done if what.startswith(("compare", "time"))] == [
        "compare Q4_0",
        "time F16 Q8_0 Q4_0",
    ]


@pytest.mark.parametrize("what", ["half", "tasks", "base", "imatrix"])
def test_what_a_result_depends_on_makes_it_new(inputs: LadderInputs, tmp_path: Path, what: str) -> None:
    imatrix = tmp_path / "imatrix"
    imatrix.write_bytes(b"1")
    spec = CandidateSpec("Q8_0", "Q8_0", imatrix=True)
    inputs = replace(inputs, specs=(spec,), imatrix=imatrix)
    run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), Work().tools())
    if what == "tasks":
        inputs = replace(inputs, tasks=replace(TASKS, tasks=TASKS.tasks[:9]))
    else:
        file = {"half": inputs.f16, "base": inputs.base, "imatrix": imatrix}[what]
        assert file is not None
        file.write_bytes(file.read_bytes() + b"x")
    again = Work()
    run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), again.tools())
    assert "compare Q8_0" in again.done


@pytest.mark.parametrize("error", [MeasureFailed("aborted"), QuantizeFailed("no such type")])
def test_a_candidate_that_fails_is_a_line_of_the_report(inputs: LadderInputs, tmp_path: Path, error: Exception) -> None:
    quiet = Quiet()
    quality, chosen = run_ladder(inputs, ORIGIN, tmp_path / "work", quiet, Work(fails={"Q8_0": error}).tools())
    failed = next(one for one in quality.candidates if one.name == "Q8_0")
    assert (failed.verdict, failed.reason) == ("failed", str(error))
    assert chosen == inputs.f16
    assert quiet.warnings[0] == f"candidate Q8_0 is left out: {error}"
    again = Work()
    assert run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), again.tools())[0].chosen == "Q8_0"


def test_a_forced_candidate_is_made_whatever_it_loses(inputs: LadderInputs, tmp_path: Path) -> None:
    quality, chosen = run_ladder(replace(inputs, forced="Q4_K_M"), ORIGIN, tmp_path / "work", Quiet(), Work().tools())
    assert (quality.chosen, quality.overruled) == ("Q4_K_M", True)
    assert chosen.name == "tuned-Q4_K_M.gguf"
    with pytest.raises(RequestInvalid, match="no candidate 'Q2_K'"):
        run_ladder(replace(inputs, forced="Q2_K"), ORIGIN, tmp_path / "work", Quiet(), Work().tools())


def test_without_a_base_nothing_is_compared_with_it(inputs: LadderInputs, tmp_path: Path) -> None:
    work = Work()
    quality, _ = run_ladder(replace(inputs, base=None), ORIGIN, tmp_path / "work", Quiet(), work.tools())
    assert (quality.base_check, quality.base_distance) == (NO_BASE, None)
    assert "reference base" not in work.done
    assert next(one for one in quality.candidates if one.name == "Q4_K_M").verdict == "over budget"


def test_a_base_of_another_vocabulary_is_not_compared(inputs: LadderInputs, tmp_path: Path) -> None:
    tasks = replace(TASKS, n_vocab=len(TOKENS) - 1)
    quality, _ = run_ladder(replace(inputs, tasks=tasks), ORIGIN, tmp_path / "work", Quiet(), Work().tools())
    assert quality.base_check == OTHER_VOCABULARY


class Writer(Work):
    """Each file writes its own text. Q8_0's lacks as much as F16's at another batch size, Q4_0's more."""

    TEXTS: ClassVar[Mapping[str, str]] = {
        "F16": "reads mail quickly",
        "Q8_0": "mail",
        "Q4_0": "sorts mail",
        "noise": "reads mail very quickly",
    }

    def take_reference(
        self, model: Path, tasks: Tasks, folder: Path, told: StepProgress, beside: Sequence[ReferenceRun]
    ) -> ReferenceRun:
        taken = super().take_reference(model, tasks, folder, told, beside)
        return replace(taken, answers=tuple(ModelAnswer(self.TEXTS["F16"]) for _ in tasks.tasks))

    def compare(self, file: Path, references: Sequence[ReferenceRun], told: StepProgress) -> tuple[MeasuredLoss, ...]:
        return (self.written(file.stem.removeprefix("tuned-"), references[0]),)

    def noise(self, reference: ReferenceRun, told: StepProgress) -> MeasuredLoss:
        self.done.append("noise")
        return self.written("noise", reference)

    def written(self, name: str, reference: ReferenceRun) -> MeasuredLoss:
        given = [ModelAnswer(self.TEXTS[name])] * len(reference.answers)
        examples = judge(reference.tasks, given, reference.answers)
        return MeasuredLoss(loss(0.001), totals("write", examples), examples)


def test_written_answers_are_judged_by_their_score(inputs: LadderInputs, tmp_path: Path) -> None:
    tasks = Tasks(
        "write", tuple(replace(task, expected="reads mail") for task in TASKS.tasks), (), (), (1,), len(TOKENS)
    )
    inputs = replace(inputs, tasks=tasks, base=None, specs=tuple(map(plain, ("Q8_0", "Q4_0"))))
    quality, chosen = run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), Writer().tools())
    assert chosen.name == "tuned-Q8_0.gguf"
    assert [one.answers.flips for one in quality.candidates if one.answers is not None] == [0, 10, 10]
    assert quality.candidates[2].verdict == "over budget"
    assert "mean ROUGE-L 0.500, F16's is 0.800" in quality.candidates[2].reason
    assert quality.metric == "ROUGE-L"
    assert quality.noise_score is not None
    assert quality.noise_score.difference == pytest.approx(2 / 3 - 4 / 5)


def test_the_disk_is_asked_first(inputs: LadderInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    work = Work()
    with pytest.raises(StoreError, match="are needed under"):
        run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), work.tools())
    assert work.done == []


def test_an_interrupted_run_leaves_no_rows_and_goes_on(inputs: LadderInputs, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_ladder(
            inputs,
            ORIGIN,
            tmp_path / "work",
            Quiet(),
            Work(fails={"Q4_0": KeyboardInterrupt()}).tools(),
        )
    assert not list((tmp_path / "work").rglob("rows/*/rows"))
    again = Work()
    run_ladder(inputs, ORIGIN, tmp_path / "work", Quiet(), again.tools())
    assert "compare Q8_0" not in again.done
