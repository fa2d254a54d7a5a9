"""The ladder: every candidate is quantized, compared with the F16 file and timed on this machine, and one is chosen.

Each measurement is kept under a hash of everything it depends on, so that a repeated run measures only new candidates.
Of the candidates' files only the chosen one remains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from convert.child import StepProgress
from convert.errors import ImatrixInvalid, MeasureFailed, QuantizeFailed
from convert.gguf_writer import OutTensor
from convert.measure.answers import metric_for
from convert.measure.compare import (
    NOISE_EXAMPLES,
    MeasuredLoss,
    ReferenceRun,
    compare,
    noise,
    rows_bytes,
    take_reference,
)
from convert.measure.speed import ServingLoad, SpeedReport, measure_speeds, serving_load
from convert.measure.tasks import Tasks
from convert.quantize.layouts import CandidateSpec
from convert.quantize.quantize import QuantizeResult, disk_need, quantize
from models.common.console import Reporter
from models.common.files import check_free, sha256_file
from models.common.machine import BUSY_SHARE, busy_share, describe_machine
from models.gguf.header import Header, read_header, read_meta
from models.quality import Candidate, Loss, LossBudget, MeanScore, Quality, Trim

from .cache import Cache, digest
from .choice import REFERENCE, Selection, base_distances, choose, shared_grid, undo_cause, undo_reason

NO_BASE = "there is no file of the model before its fine-tuning, so nothing could be compared with it"
OTHER_VOCABULARY = "the base has another vocabulary, so it could not be compared with it"
CHECKED = (
    "each file was compared with the model before its fine-tuning, and lies nearer the fine-tune unless it says so"
)
NO_DISTANCE = "the fine-tune differs from its base by no more than the noise floor: there is nothing to lose"


@dataclass(frozen=True)
class LadderInputs:
    """The model to measure and its candidates. `f16` is the F16 GGUF; `specs` may or may not contain it ("F16").

    `base` is a GGUF of the model before its fine-tuning; `tuned` are the tensors that the fine-tuning changed.
    `base_header` describes the weights it was merged onto, if `base` was made from them and has other kinds.
    `forced` names a candidate to choose regardless of the budget. Candidates' files are named after `stem`.
    """

    f16: Path
    stem: str
    tasks: Tasks
    specs: tuple[CandidateSpec, ...]
    imatrix: Path | None = None
    base: Path | None = None
    tuned: tuple[str, ...] = ()
    base_header: Header | None = None
    budget: LossBudget = field(default_factory=LossBudget)
    forced: str | None = None


@dataclass(frozen=True)
class Provenance:
    """The origin of the examples, for the report."""

    examples_file: str
    examples_sha256: str
    calibration_examples: int
    trim: Trim | None = None


@dataclass(frozen=True)
class Tools:
    """The functions that quantize and measure; tests replace them."""

    quantize: Callable[[Path, Path, CandidateSpec, Path | None, StepProgress], QuantizeResult] = quantize
    take_reference: Callable[[Path, Tasks, Path, StepProgress, Sequence[ReferenceRun]], ReferenceRun] = take_reference
    compare: Callable[[Path, Sequence[ReferenceRun], StepProgress], tuple[MeasuredLoss, ...]] = compare
    noise: Callable[[ReferenceRun, StepProgress], MeasuredLoss] = noise
    speeds: Callable[[Mapping[str, Path], ServingLoad, StepProgress], SpeedReport] = measure_speeds
    machine: Callable[[str], str] = describe_machine
    busy: Callable[[], float] = busy_share


def run_ladder(
    inputs: LadderInputs,
    origin: Provenance,
    workdir: Path,
    report: Reporter,
    tools: Tools | None = None,
    *,
    results: Path | None = None,
) -> tuple[Quality, Path]:
    """Make, measure and time the candidates. Returns the report and the chosen file: `f16` itself or one in `workdir`.

    A candidate that fails is a line of the report. The other candidates' files are deleted. Measurements are kept in
    `results` (None: a folder in `workdir`). Raises StoreError when the disk cannot hold all files, RequestInvalid for
    impossible specs or an unknown forced name, MeasureFailed when the reference itself does not run.
    """
    ladder = _Ladder(inputs, workdir, report, tools or Tools(), results or workdir / "results")
    try:
        timed = ladder.timed(ladder.candidates())
        selection = choose(timed.candidates, inputs.budget, inputs.forced, noise=ladder.noise().score)
        quality = ladder.quality(origin, timed, selection)
        chosen = ladder.file(selection.chosen)
    finally:
        ladder.discard_rows()
    ladder.keep_only(chosen)
    return quality, chosen


@dataclass(frozen=True)
class NoiseFloor:
    """The reference compared with itself at another batch size, over the first `examples` examples."""

    loss: Loss | None
    flips: int
    examples: int
    score: MeanScore | None = None


@dataclass(frozen=True)
class TimedCandidates:
    """Candidates with their speeds, and the machine that measured them."""

    candidates: tuple[Candidate, ...]
    report: SpeedReport
    machine: str


class _Ladder:
    """The state of one run: its files, and the measurements so far."""

    def __init__(self, inputs: LadderInputs, workdir: Path, report: Reporter, tools: Tools, results: Path) -> None:
        self._inputs, self._report, self._tools = inputs, report, tools
        self._workdir = workdir
        workdir.mkdir(parents=True, exist_ok=True)
        quantized = [spec for spec in inputs.specs if spec.name != REFERENCE]
        self._specs = {spec.name: spec for spec in quantized}
        self._check_disk(quantized)
        report.stage("hash what is measured")
        self._f16_sha256 = sha256_file(inputs.f16)
        self._base = inputs.base if inputs.base is not None and self._has_same_vocabulary(inputs.base) else None
        parts = [self._f16_sha256, digest(inputs.tasks), *(sha256_file(file) for file in (self._base,) if file)]
        # Answers that an earlier version measured without their score are measured again.
        metric = metric_for(inputs.tasks.work)
        self._cache = Cache(results, [*parts, metric] if metric is not None else parts)
        self._references: tuple[ReferenceRun, ...] = ()
        self._places: Mapping[str, str] = {}

    def candidates(self) -> list[Candidate]:
        """The reference and every candidate, with size and loss."""
        n = len(self._specs)
        self._places = {name: f" (candidate {place} of {n})" for place, name in enumerate(self._specs, 1)}
        return [self._reference(), *(self._candidate(spec) for spec in self._specs.values())]

    def timed(self, candidates: Sequence[Candidate]) -> TimedCandidates:
        """Add the speeds of all that did not fail. The same set of files is timed only once on a machine."""
        load = serving_load(self._inputs.tasks)
        sha256s = {one.name: one.sha256 for one in candidates if one.verdict != "failed"}
        parts = [load, self._tools.machine(""), *sha256s.items()]

        def measure() -> SpeedReport:
            files = {name: self.file(name) for name in sha256s}
            if (busy := self._tools.busy()) > BUSY_SHARE:
                self._report.warn(
                    f"other programs use {busy:.0%} of this machine's processors: the speeds, and the choice by them, "
                    "are uncertain. Convert again with --replace on an idle machine"
                )
            self._report.stage(f"time {len(files)} files on this machine")
            return self._tools.speeds(files, load, self._report.advance)

        report = self._cache.value(
            TypeAdapter(SpeedReport), "speed", parts, measure, keep=lambda made: not made.failures
        )
        timed = tuple(_with_speed(one, report) for one in candidates)
        return TimedCandidates(timed, report, self._tools.machine(report.backend))

    def noise(self) -> NoiseFloor:
        """The noise floor, measured at the first call."""

        def measure() -> NoiseFloor:
            reference = self._take_references()[0]
            self._report.stage(f"measure the noise floor of {REFERENCE}", NOISE_EXAMPLES)
            measured = self._tools.noise(reference, self._report.advance)
            answers = measured.answers
            return NoiseFloor(measured.loss, answers.flips, answers.total, answers.score)

        return self._cache.value(TypeAdapter(NoiseFloor), "noise", [], measure)

    def quality(self, origin: Provenance, timed: TimedCandidates, selection: Selection) -> Quality:
        """The report. Measures the distance to the base, if no candidate needed it before."""
        noise_floor = self.noise()
        return Quality(
            work=self._inputs.tasks.work,
            budget=self._inputs.budget,
            machine=timed.machine,
            examples_file=origin.examples_file,
            examples_sha256=origin.examples_sha256,
            calibration_examples=origin.calibration_examples,
            held_out_examples=len(self._inputs.tasks.tasks),
            noise=noise_floor.loss,
            noise_flips=noise_floor.flips,
            noise_score=noise_floor.score,
            noise_examples=noise_floor.examples,
            base_distance=self._base_distance(),
            base_check=self._base_check(),
            shape=timed.report.shape,
            trim=origin.trim,
            candidates=selection.candidates,
            chosen=selection.chosen,
            overruled=selection.overruled,
        )

    def file(self, name: str) -> Path:
        """A candidate's file, made if it is missing."""
        if name == REFERENCE:
            return self._inputs.f16
        spec = self._specs[name]
        target = self._path(spec)
        if not target.is_file():
            self._report.stage(f"quantize to {spec.name}{self._places.get(spec.name, '')}")
            self._tools.quantize(self._inputs.f16, target, spec, self._inputs.imatrix, self._report.advance)
        return target

    def discard_rows(self) -> None:
        """Delete the references' rows: computing them again takes less than storing them for another run."""
        for reference in self._references:
            reference.rows_file.unlink(missing_ok=True)

    def keep_only(self, chosen: Path) -> None:
        """Delete the other candidates' files."""
        for spec in self._specs.values():
            if (path := self._path(spec)) != chosen:
                path.unlink(missing_ok=True)

    def _reference(self) -> Candidate:
        def measure() -> Candidate:
            f16, answers = self._inputs.f16, self._take_references()[0].totals
            lossless = Loss(positions=0, kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0, perplexity_ratio=1.0)
            return Candidate(
                name=REFERENCE,
                file=f16.name,
                size_bytes=f16.stat().st_size,
                sha256=self._f16_sha256,
                loss=lossless,
                answers=answers,
            )

        return self._cache.value(TypeAdapter(Candidate), REFERENCE, [], measure)

    def _candidate(self, spec: CandidateSpec) -> Candidate:
        matrix = self._inputs.imatrix if spec.imatrix else None
        before = self._inputs.base_header
        kinds = {name: tensor.kind.name for name, tensor in before.tensors.items()} if before is not None else {}
        parts = [spec, sha256_file(matrix) if matrix is not None else "", sorted(self._inputs.tuned), kinds]
        return self._cache.value(
            TypeAdapter(Candidate),
            spec.name,
            parts,
            lambda: self._measure(spec),
            keep=lambda made: made.verdict != "failed",
        )

    def _measure(self, spec: CandidateSpec) -> Candidate:
        path = self._path(spec)
        path.unlink(missing_ok=True)  # a file of an earlier run may come from another source
        try:
            self.file(spec.name)
            candidate = _unmeasured(spec, path)
            references = self._take_references()
            self._report.stage(f"measure {spec.name}{self._places.get(spec.name, '')}", len(self._inputs.tasks.tasks))
            losses = self._tools.compare(path, references, self._report.advance)
        except (MeasureFailed, QuantizeFailed, ImatrixInvalid) as error:
            size = path.stat().st_size if path.is_file() else 1
            self._report.warn(f"candidate {spec.name} is left out: {error}")
            return Candidate(
                name=spec.name, file=path.name, size_bytes=size, sha256="", verdict="failed", reason=str(error)
            )
        candidate = candidate.model_copy(update={"loss": losses[0].loss, "answers": losses[0].answers})
        return candidate if self._base is None else self._judged_by_base(candidate, path, losses)

    def _judged_by_base(self, candidate: Candidate, path: Path, losses: Sequence[MeasuredLoss]) -> Candidate:
        distances = base_distances(*losses)
        grid, n_tuned = self._grid(path)
        cause = undo_cause(grid, n_tuned)
        candidate = candidate.model_copy(update={"kl_to_base": distances.kl_to_base, "grid": cause if grid else ""})
        why = undo_reason(distances, _kl_mean(self._base_distance()), _kl_mean(self.noise().loss))
        if why is None:
            return candidate
        reason = f"{why}. {cause}"
        self._report.warn(f"{candidate.name} UNDOES THE FINE-TUNE: {reason}")
        return candidate.model_copy(update={"verdict": "undoes the fine-tune", "reason": reason})

    def _grid(self, path: Path) -> tuple[Mapping[str, int], int]:
        """The grid that a candidate shares with the base, and the number of fine-tuned matrices."""
        assert self._base is not None
        header = read_header(path)
        tuned = self._inputs.tuned or tuple(name for name, tensor in header.tensors.items() if len(tensor.shape) > 1)
        return shared_grid(self._inputs.base_header or read_header(self._base), header, tuned), len(tuned)

    def _base_distance(self) -> Loss | None:
        """The loss from fine-tune to base; None without a base."""
        if self._base is None:
            return None
        kind: TypeAdapter[Loss | None] = TypeAdapter(Loss | None)
        return self._cache.value(kind, "base", [], lambda: self._take_references()[1].beside[0].loss)

    def _base_check(self) -> str:
        """One sentence on the comparison with the base, or on the reason for its absence."""
        if self._base is None:
            return OTHER_VOCABULARY if self._inputs.base is not None else NO_BASE
        return CHECKED if _kl_mean(self._base_distance()) > _kl_mean(self.noise().loss) else NO_DISTANCE

    def _take_references(self) -> tuple[ReferenceRun, ...]:
        """The fine-tune's run and, if there is a base, the base's; computed at the first call."""
        if not self._references:
            tasks, taken = self._inputs.tasks, list[ReferenceRun]()
            for file, place in ((self._inputs.f16, "fine-tune"), (self._base, "base")):
                if file is not None:
                    self._report.stage(f"take the reference: {place}", len(tasks.tasks))
                    folder = self._workdir / "rows" / place
                    taken.append(self._tools.take_reference(file, tasks, folder, self._report.advance, tuple(taken)))
            self._references = tuple(taken)
        return self._references

    def _has_same_vocabulary(self, base: Path) -> bool:
        return read_meta(base).n_vocab == self._inputs.tasks.n_vocab

    def _check_disk(self, specs: Sequence[CandidateSpec]) -> None:
        header = read_header(self._inputs.f16)
        tensors = [OutTensor(info.name, info.shape, info.kind) for info in header.tensors.values()]
        f16_bytes = self._inputs.f16.stat().st_size
        needed = disk_need(f16_bytes, tensors, specs) - f16_bytes
        check_free(self._workdir, needed + (2 if self._inputs.base else 1) * rows_bytes(self._inputs.tasks))

    def _path(self, spec: CandidateSpec) -> Path:
        return self._workdir / f"{self._inputs.stem}-{spec.name}.gguf"


def _unmeasured(spec: CandidateSpec, path: Path) -> Candidate:
    return Candidate(
        name=spec.name,
        file=path.name,
        size_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        imatrix=spec.imatrix,
        overrides=tuple(f"{override.pattern}={override.kind.name}" for override in spec.overrides),
    )


def _with_speed(one: Candidate, report: SpeedReport) -> Candidate:
    if one.name in report.failures:
        return one.model_copy(update={"verdict": "failed", "reason": report.failures[one.name]})
    return one.model_copy(update={"speed": report.speeds.get(one.name), "score_per_s": report.scores.get(one.name)})


def _kl_mean(loss: Loss | None) -> float:
    return loss.kl_mean if loss is not None else 0.0
