"""A new model takes the place of an installed one only if it is not worse: both answer the same examples, paired.

The examples are a task's validation split. Each model is asked as it is served: with its own prompt, template and
labels, every label scored whole, or a text written with the likeliest tokens. What a model cannot read counts as wrong.
"""

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from convert.errors import ConvertError, NotReplaced
from convert.measure.answers import is_right
from convert.measure.compare import MeasureJob, run_job
from convert.measure.examples import MIN_EXAMPLES
from convert.measure.forward import MAX_TOGETHER
from convert.measure.tasks import tasks_of
from convert.planning.request import ConvertRequest
from models.common.console import Reporter
from models.common.stats import CONFIDENCE, Interval, bootstrap_mean, compare_paired, sign_flip_p
from models.common.text_scores import rouge_l
from models.errors import ModelError
from models.quality import TaskKind
from models.store.store import Store, StoredModel
from models.task.task import Task
from runtime.errors import EngineError, RequestError

SPLIT = "validation"
# As few as conversion measures with: with fewer than six, even all of them lost are no proof.
MIN_TESTED = MIN_EXAMPLES // 2
OVERRULE = "--replace installs the new model without the test"


@dataclass(frozen=True)
class PairedScores:
    """Two models on the same examples. `difference` is the new one's score minus the old one's."""

    new: float
    old: float
    difference: Interval
    p_value: float

    @property
    def is_worse(self) -> bool:
        """True if the new model's score is lower by more than chance explains (two-sided, 95 %)."""
        return self.difference.estimate < 0 and self.p_value < 1 - CONFIDENCE


def compare_scores(new: Sequence[float], old: Sequence[float]) -> PairedScores:
    """Compare the scores of two models on the same examples, right and wrong (1 and 0) or between them."""
    if {*new, *old} <= {0.0, 1.0}:
        paired = compare_paired([score == 1 for score in new], [score == 1 for score in old])
        return PairedScores(fmean(new), fmean(old), paired.difference, paired.p_value)
    differences = [after - before for after, before in zip(new, old, strict=True)]
    return PairedScores(fmean(new), fmean(old), bootstrap_mean(differences), sign_flip_p(differences))


@dataclass(frozen=True)
class Incumbent:
    """An installed model, and its score for each of a task's validation examples."""

    name: str
    task: Task
    scores: Mapping[str, float]
    report: Reporter

    def admit(self, conversion: ConvertRequest, new: StoredModel) -> None:
        """Raise NotReplaced if `new`, made by `conversion` and not installed yet, is worse."""
        self.report.stage(f"ask the new {self.name!r} the {SPLIT} examples")
        try:
            scores = _scores(new, self.task, self.report)
        except _UNCOMPARABLE as error:
            raise NotReplaced(
                f"{self._stays()}: the new model cannot be compared: {error}. {_way(conversion)}"
            ) from error
        found = compare_scores([scores[key] for key in self.scores], [*self.scores.values()])
        low, high = found.difference.low, found.difference.high
        said = (
            f"on the {len(scores)} {SPLIT} examples of {self.task.name!r} its {_measure(self.task)} is "
            f"{found.new:.3f}, that of the installed one {found.old:.3f} (difference {found.difference.estimate:+.3f} "
            f"[{low:+.3f}, {high:+.3f}], p = {found.p_value:.3g})"
        )
        if found.is_worse:
            raise NotReplaced(f"{self._stays()}: the new model is worse: {said}. {_way(conversion)}")
        self.report.note(f"the new {self.name!r} is not worse and is installed: {said}")

    def _stays(self) -> str:
        return f"the installed {self.name!r} stays"


def incumbent_of(name: str, task: Task, store: Store, report: Reporter, *, overruled: bool) -> Incumbent | None:
    """Ask the installed model the examples that its successor will be asked; None if there is none, or no test to do.

    Raises NotReplaced if it cannot be compared.
    """
    if name not in store.names():
        return None
    if overruled:
        report.note(f"--replace: the installed {name!r} is replaced without a test")
        return None
    report.stage(f"ask the installed {name!r} the {SPLIT} examples")
    try:
        store.verify(name)
        stored = store.get(name)
        _check_comparable(stored, task)
        return Incumbent(name, task, _scores(stored, task, report), report)
    except _UNCOMPARABLE as error:
        raise NotReplaced(
            f"{name!r} is installed already, and a new model cannot be compared with it: {error}. {OVERRULE}; or give "
            "another --name"
        ) from error


def command_of(conversion: ConvertRequest) -> str:
    """The command that converts what a fine-tune has trained."""
    options = {"--adapter": conversion.adapter, "--examples": conversion.examples, "--manifest": conversion.manifest}
    given = [f"{option} {shlex.quote(str(value))}" for option, value in options.items() if value is not None]
    return " ".join(["deskside convert", shlex.quote(conversion.source), *given, "--name", str(conversion.name)])


_UNCOMPARABLE = (ConvertError, ModelError, EngineError, RequestError)


def _way(conversion: ConvertRequest) -> str:
    trained = str(conversion.adapter or conversion.source)
    return f"What was trained is kept in {trained!r}; to install it all the same: {command_of(conversion)} --replace"


def _check_comparable(stored: StoredModel, task: Task) -> None:
    manifest, labels = stored.manifest, task.spec.labels
    if (n := len(task.records(SPLIT))) < MIN_TESTED:
        raise NotReplaced(f"the task {task.name!r} has {n} {SPLIT} examples, the test needs {MIN_TESTED}")
    assert manifest is not None, "an installed model has one"
    if manifest.kind == "adapter":
        raise NotReplaced("it is an adapter, which is served with its base")
    if set(manifest.labels) != set(labels):
        theirs, ours = (", ".join(map(repr, sorted(given))) or "none" for given in (manifest.labels, labels))
        raise NotReplaced(f"its labels are {theirs}; those of the task {task.name!r} are {ours}")


def _scores(stored: StoredModel, task: Task, report: Reporter) -> dict[str, float]:
    """The model's score for each example of the split, by the example's id."""
    manifest, records = stored.manifest, task.records(SPLIT)
    assert manifest is not None, "a model of the store has one"
    work: TaskKind = "classify" if task.spec.kind == "classify" else "write"
    asked = tasks_of(stored.gguf, records, work, manifest.labels, manifest.prompt)
    # Longer than for the ladder, which compares texts up to a limit only.
    longest = max(len(one.answer) for one in asked.tasks)
    asked = replace(asked, max_written=max(asked.max_written, longest))
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_job(MeasureJob(str(stored.gguf), asked, MAX_TOGETHER), Path(folder), report.advance)
    scores = {record.id: 0.0 for record in records}
    for one, answer in zip(asked.tasks, outcome.answers, strict=True):
        graded = _is_graded(task)
        scores[one.id] = rouge_l(one.expected, answer.text) if graded else float(is_right(work, answer, one))
    return scores


def _is_graded(task: Task) -> bool:
    return task.spec.scorer in {"rouge-l", "field-f1"}


def _measure(task: Task) -> str:
    return "mean ROUGE-L" if _is_graded(task) else "accuracy"
