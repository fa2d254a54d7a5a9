"""A comparison as it runs: the ways without a model first, then each model in turn, and a save after every way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.comparison.scoring import Predictions
from benchmarks.record import MachineRecord, now_text, this_machine
from models.common.console import NamedProgress
from models.common.files import sha256_file
from models.store.store import StoredModel
from models.task.task import SPLITS, text_of

from .asking import AskedWay, WayQuestion
from .counted import (
    Chances,
    RankedVoters,
    Voters,
    choose_mixture,
    choose_voters,
    commonest,
    learning_rows,
    likeliest,
    mixed,
    nearest_answer,
    word_chances,
)
from .judge import WayJudgement, judge_ways
from .plan import FINE_TUNE, HOSTED, MIXED, OF_BASE, ComparePlan
from .questions import Drawn, base_way, fine_tune_way, hosted_way, retrieved_way
from .record import KeptAnswers, Part, WayAnswer, WayComparison, WayRecord
from .session import ModelSession

# Preference for the way that is asked twice.
TWICE = (FINE_TUNE, "few-shot", "retrieved", "zero-shot")


def compare_ways(plan: ComparePlan, progress: NamedProgress, command: Sequence[str]) -> WayComparison:
    """Answer the test split in every way and judge the answers. Raises ServerFailed, BadRecord, BadWorkload."""
    kept = KeptAnswers(plan.out)
    run = _WayRun(plan, kept, ModelSession(plan, kept, progress), progress, tuple(command))
    try:
        run.counted()
        run.of_base()
        run.fine_tune()
        run.hosted()
        run.curve()
    finally:
        run.save()
    return run.save(finished=True)


def judgement_of(comparison: WayComparison, plan: ComparePlan) -> WayJudgement | None:
    """Judge what was answered; None if nothing was."""
    answers = {way.name: _predictions(way, "test") for way in comparison.ways if way.answers.get("test")}
    if not answers:
        return None
    twice = next((way for way in comparison.ways if way.answers.get("again")), None)
    pair = None if twice is None else (twice.name, _predictions(twice, "test"), _predictions(twice, "again"))
    return judge_ways(answers, plan.task.spec, pair)


def _predictions(way: WayRecord, part: Part) -> Predictions:
    return {one.id: (one.label, one.answer) for one in way.answers.get(part, ())}


@dataclass(slots=True)
class _WayRun:
    plan: ComparePlan
    kept: KeptAnswers
    models: ModelSession
    progress: NamedProgress
    command: tuple[str, ...]
    ways: dict[str, WayRecord] = field(default_factory=dict)
    voters: Voters | None = None
    curve_rows: tuple[Any, ...] = ()
    started_at: str = field(default_factory=now_text)
    machine: MachineRecord = field(default_factory=this_machine)
    sha256: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.sha256 = {split: sha256_file(self.plan.task.file(split)) for split in SPLITS}

    def save(self, *, finished: bool = False) -> WayComparison:
        """Write the result as far as it is."""
        plan = self.plan
        skipped = [WayRecord(name=name, how="", skipped=why) for name, why in plan.skipped.items()]
        made = WayComparison(
            started_at=self.started_at,
            finished_at=now_text() if finished else None,
            command=self.command,
            machine=self.machine,
            task=plan.task.name,
            task_kind=plan.task.spec.kind,
            sha256=self.sha256,
            labels=plan.task.spec.labels,
            n_test=len(plan.test),
            n_validation=len(plan.validation),
            quick=plan.settings.quick,
            ways=(*self.ways.values(), *skipped),
            curve=self.curve_rows,
            warnings=tuple(self.models.warnings),
        )
        # Bootstraps take a second or more: an unfinished run is not judged.
        judged = judgement_of(made, plan) if finished else None
        if judged is not None:
            made = made.model_copy(update={"judgement": asdict(judged)})
        if self.ways or finished:
            self.kept.save(made)
        return made

    def counted(self) -> None:
        """The ways that need no model."""
        plan, labels = self.plan, self.plan.task.spec.labels
        texts, expected = [text_of(one) for one in plan.test], [one.answer for one in plan.validation]
        began = time.perf_counter()
        voters = self.voters = Voters(plan.train, labels)
        indexed_s = time.perf_counter() - began
        if self._takes("majority"):
            answers = [commonest(plan.train)] * len(texts)
            self._computed("majority", "the answer given most often in the train split", answers, made_s=0.0)
        if self._takes("words"):
            began = time.perf_counter()
            chances, strength = word_chances(plan.train, labels, texts, plan.validation)
            made_s = time.perf_counter() - began
            how = f"TF-IDF of words, pairs and pieces of words, logistic regression of strength {strength:g}"
            self._computed(
                "words", how, likeliest(chances, labels), chances, made_s=made_s, chosen={"strength": strength}
            )
        if self._takes("vote"):
            began = time.perf_counter()
            n = choose_voters(voters.ranked([text_of(one) for one in plan.validation]), labels, expected)
            made_s = indexed_s + time.perf_counter() - began
            chances = voters.ranked(texts).chances(n)
            how = f"vote of the {n} most similar train examples (BM25), weighed by similarity"
            self._computed("vote", how, likeliest(chances, labels), chances, made_s=made_s, chosen={"voters": n})
        if self._takes("nearest"):
            answers = [nearest_answer(voters, text, plan.train) for text in texts]
            self._computed("nearest", "the most similar train example's answer (BM25)", answers, made_s=indexed_s)

    def of_base(self) -> None:
        """The base model, without and with examples in its prompt."""
        plan, base, url = self.plan, self.plan.base, self.plan.settings.local_url
        voters = self.voters
        assert voters is not None
        if base is None:
            return
        drawn: Drawn = {"test": plan.test}
        n_shots = plan.settings.shots
        made: dict[str, Callable[[], AskedWay]] = {
            "zero-shot": lambda: base_way("zero-shot", plan.task, base, drawn, 0, url),
            "few-shot": lambda: base_way("few-shot", plan.task, base, drawn, n_shots, url),
            "retrieved": lambda: retrieved_way(plan.task, base, drawn, n_shots, voters, url),
        }
        ways = [made[name]() for name in OF_BASE if self._takes(name)]
        self._local(ways, base)

    def fine_tune(self) -> None:
        """The fine-tune, and its mixture with the vote."""
        plan, model = self.plan, self.plan.model
        if model is None or not self._takes(FINE_TUNE):
            return
        drawn: Drawn = {"test": plan.test}
        if self._takes(MIXED):
            drawn = {"test": plan.test, "validation": plan.validation}
        self._local([fine_tune_way(plan.task, model, drawn, plan.settings.local_url)], model)
        if self._takes(MIXED):
            self._mixture()

    def hosted(self) -> None:
        """A hosted API, asked or replayed."""
        plan, hosted = self.plan, self.plan.hosted
        if hosted is None or not self._takes(HOSTED):
            return
        drawn: Drawn = {"test": plan.test}
        way = hosted_way(plan.task, hosted.url, hosted.model, hosted.body, drawn, plan.settings.shots)
        replayed = hosted.replayed
        record = self.models.bought(way, hosted) if replayed is None else self.models.replayed(way, replayed)
        self.ways[record.name] = record
        self.save()

    def curve(self) -> None:
        """Measure what fewer examples would have given."""
        if self.plan.settings.curve:
            plan = self.plan
            self.curve_rows = learning_rows(
                plan.train,
                plan.validation,
                plan.test,
                plan.task.spec.labels,
                lambda done, total: self.progress("learning curve", done, total),
            )

    def _takes(self, name: str) -> bool:
        return name in self.plan.ways and name not in self.plan.skipped

    def _computed(
        self,
        name: str,
        how: str,
        answers: Sequence[str],
        chances: Chances | None = None,
        *,
        made_s: float | None,
        chosen: dict[str, float] | None = None,
    ) -> None:
        rows = chances if chances is not None else [()] * len(answers)
        kept = tuple(
            WayAnswer(id=one.id, label=one.answer, answer=answer, probabilities=tuple(round(p, 6) for p in row))
            for one, answer, row in zip(self.plan.test, answers, rows, strict=True)
        )
        self.ways[name] = WayRecord(
            name=name,
            how=how,
            kind="computed",
            made_s=made_s,
            made="computed here",
            chosen=chosen or {},
            answers={"test": kept},
        )
        self.save()

    def _local(self, ways: Sequence[AskedWay], stored: StoredModel) -> None:
        """Ask a model of this machine all that has no answer yet, and one of its ways a second time."""
        jobs: list[tuple[AskedWay, Part, Sequence[WayQuestion]]] = []
        for way in ways:
            jobs += [(way, part, questions) for part, questions in way.questions.items()]
            # In the reverse order, so that other examples are beside each: that may not change an answer.
            if way.name == self._asked_twice():
                jobs.append((way, "again", way.questions["test"][::-1]))
        self.models.local(jobs)
        training = getattr(stored.manifest, "training", None)
        for way in ways:
            record = self.models.record(way, [part for other, part, _ in jobs if other is way])
            trained = way.name == FINE_TUNE
            seconds = getattr(training, "seconds", None) if trained else 0.0
            said = (
                ("training, by the model's manifest" if seconds is not None else "") if trained else "nothing to make"
            )
            self.ways[way.name] = record.model_copy(update={"made_s": seconds, "made": said})
        self.save()

    def _asked_twice(self) -> str | None:
        return next((name for name in TWICE if self._takes(name)), None)

    def _mixture(self) -> None:
        """The mixture of the fine-tune and the vote: shares and voters are chosen on the validation split."""
        plan, labels = self.plan, self.plan.task.spec.labels
        assert self.voters is not None
        answers = self.ways[FINE_TUNE].answers
        if not all(one.probabilities for part in ("test", "validation") for one in answers[part]):
            why = "the fine-tune gives no probabilities of labels: its manifest names none"
            self.ways[MIXED] = WayRecord(name=MIXED, how="", skipped=why)
            return

        def both(part: Part, texts: Sequence[str]) -> tuple[Chances, RankedVoters]:
            assert self.voters is not None
            return [one.probabilities for one in answers[part]], self.voters.ranked(texts)

        model, ranked = both("validation", [text_of(one) for one in plan.validation])
        share, n = choose_mixture(model, ranked, labels, [one.answer for one in plan.validation])
        model, ranked = both("test", [text_of(one) for one in plan.test])
        chances = mixed(model, ranked.chances(n), share)
        how = f"{1 - share:.1f} of the fine-tune's probabilities and {share:.1f} of the vote of {n} examples"
        self._computed(
            MIXED,
            how,
            likeliest(chances, labels),
            chances,
            made_s=self.ways[FINE_TUNE].made_s,
            chosen={"share": share, "voters": n},
        )
