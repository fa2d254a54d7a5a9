"""The models of a comparison as they are asked: what has no answer yet, each answer kept, hosted calls paid for."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.record import now_text
from models.common.console import NamedProgress

from .asking import AskedWay, AskingRules, WayQuestion, ask
from .hosted import HostedRecording, SpendingCap, cost_of, replayed_answers, save_recording
from .plan import HOSTED, ComparePlan, HostedPlan
from .record import KeptAnswers, Part, WayAnswer, WayRecord


@dataclass(slots=True)
class ModelSession:
    """Asks the models of a plan; `warnings` are what the user should know of the answers."""

    plan: ComparePlan
    kept: KeptAnswers
    progress: NamedProgress
    warnings: list[str] = field(default_factory=list)

    def local(self, jobs: Sequence[tuple[AskedWay, Part, Sequence[WayQuestion]]]) -> None:
        """Ask a model of this machine all that has no answer yet; its server is started only for that."""
        rules = AskingRules(self.plan.settings.concurrency)
        missing = [(way, part, self._missing(way, part, questions)) for way, part, questions in jobs]
        if any(questions for _, _, questions in missing):
            with jobs[0][0].plan.start() as server:
                for way, part, questions in missing:
                    self._ask(way, server.base_url, part, questions, rules)

    def record(self, way: AskedWay, parts: Sequence[Part]) -> WayRecord:
        """The way with the answers that are kept."""
        facts = way.plan.facts
        answers: dict[Part, tuple[WayAnswer, ...]] = {}
        for part in parts:
            known = self.kept.of(way.name, way.identity, part)
            asked = way.questions["test" if part == "again" else part]
            found = ((one, known.get(one.example.id)) for one in asked)
            answers[part] = tuple(kept for one, kept in found if kept is not None and kept.asked == one.sha256)
        if n_cut := sum(one.cut for one in answers["test"]):
            self.warnings.append(f"{way.name}: {n_cut} answers were cut at {way.limit} tokens")
        return WayRecord(
            name=way.name,
            how=way.how,
            identity=way.identity,
            model=facts.model,
            sha256=facts.sha256,
            quantization=facts.quantization,
            endpoint=facts.endpoint,
            source=facts.source,
            answers=answers,
        )

    def bought(self, way: AskedWay, hosted: HostedPlan) -> WayRecord:
        """Ask a hosted API within the cap. Raises ServerFailed."""
        assert hosted.price is not None
        known = self.kept.of(way.name, way.identity, "test")
        cap = SpendingCap(hosted.max_cost, hosted.price, known.values())
        missing = self._missing(way, "test", way.questions["test"])
        rules = AskingRules(self.plan.settings.concurrency, cap)
        try:
            if missing:
                with way.plan.start() as server:
                    self._ask(way, server.base_url, "test", missing, rules)
        finally:
            self._keep_recording(way, hosted)
        record = self.record(way, ["test"])
        answered = record.answers["test"]
        stopped = ""
        if cap.n_refused:
            stopped = f"--max-cost ${cap.max_usd:g} was reached after {len(answered)} of {len(self.plan.test)} answers"
            self.warnings.append(f"{way.name}: {stopped}; a higher one continues")
        spent = sum(cost_of(one, hosted.price) for one in answered)
        return record.model_copy(
            update={
                "made_s": 0.0,
                "made": "nothing to make",
                "cost_usd": spent,
                "stopped": stopped,
                "source": f"{record.source}; priced by {hosted.price.source}",
            }
        )

    def replayed(self, way: AskedWay, recording: HostedRecording) -> WayRecord:
        """The recorded answers. Raises BadWorkload."""
        path = self.plan.settings.replay
        assert path is not None
        answers = replayed_answers(recording, path, [(one.example.id, one.sha256) for one in way.questions["test"]])
        said = f"replayed: recorded {recording.recorded_at} from {recording.model} at {recording.url}"
        way = replace(way, name=f"{HOSTED} (replayed)")
        record = self.record(way, ["test"]).model_copy(update={"kind": "replayed", "source": said})
        return record.model_copy(update={"answers": {"test": tuple(answers)}, "made_s": 0.0, "made": "nothing to make"})

    def _missing(self, way: AskedWay, part: Part, questions: Sequence[WayQuestion]) -> list[WayQuestion]:
        known = self.kept.of(way.name, way.identity, part)
        stale = self.kept.others(way.name, way.identity)
        if stale and not known:
            print(f"{way.name}: {stale} earlier answers are of another model or prompt, and not used", file=sys.stderr)
        return [one for one in questions if one.example.id not in known or known[one.example.id].asked != one.sha256]

    def _ask(
        self, way: AskedWay, base_url: str, part: Part, questions: Sequence[WayQuestion], rules: AskingRules
    ) -> None:
        if not questions:
            return
        name = f"{way.name} ({part})"
        done = 0
        self.progress(name, 0, len(questions))

        def keep(answer: WayAnswer) -> None:
            nonlocal done
            self.kept.add(way.name, way.identity, part, answer)
            done += 1
            self.progress(name, done, len(questions))

        ask(way, base_url, questions, rules, keep)

    def _keep_recording(self, way: AskedWay, hosted: HostedPlan) -> None:
        path = self.plan.settings.record
        calls = self.kept.of(way.name, way.identity, "test")
        if path is not None and calls:
            recording = HostedRecording(
                url=hosted.url,
                model=hosted.model,
                task=self.plan.task.name,
                recorded_at=now_text(),
                calls=tuple(calls.values()),
            )
            save_recording(path, recording)
