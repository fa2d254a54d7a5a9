"""Fine-tune a base on chat records: from examples to a PEFT adapter, or to a whole model.

Order: read, tokenise, measure a few steps, refuse or choose what fits, compute the states below the trained layers
once, train with a validation after each epoch, keep the best. A run that is killed resumes at its last checkpoint.
"""

import importlib.util
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.checkpoint.source import Checkpoint, open_checkpoint
from convert.errors import FinetuneFailed
from convert.lora.adapter import ADAPTER_WEIGHTS_FILE
from convert.measure.tasks import Tasks
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.common.files import default_home, discard

from .base import RetrainedCheckpoint, read_shape, read_weights, write_model
from .examples import (
    LabelBranches,
    TokenBatch,
    TokenRow,
    TrainingData,
    batches_of,
    read_data,
    training_rows,
)
from .settings import EpochScore, FinetuneResult, FinetuneSettings, TrainingCost
from .storage import CHECKPOINT_FILE, KeptStates, RunLog, read_checkpoint, write_adapter, write_checkpoint

if TYPE_CHECKING:
    from .cost import TrainingWork
    from .steps import DecoderSteps, TrainingState

INSTALL = ".venv/bin/pip install -e '.[finetune]'"
MODEL_FILE = "model.gguf"
# A checkpoint at most so often, and never for more than a fiftieth of the time.
CHECKPOINT_S = 60.0


def finetune(
    base: Path,
    train: Sequence[ChatRecord],
    validation: Sequence[ChatRecord],
    labels: Sequence[str] | None,
    settings: FinetuneSettings,
    out: Path,
    progress: Reporter,
) -> FinetuneResult:
    """Train `base` on `train`; the epoch that is best on `validation` is written to the folder `out`.

    `labels` None: the answers are labels if they repeat. Raises FinetuneFailed, BadExamples, and what reading the base
    raises, before anything is written; a full disk raises StoreError and leaves the last checkpoint.
    """
    check_installed()
    from .steps import DecoderSteps, use_compilation_cache

    checkpoint = open_checkpoint(base)
    try:
        shape = read_shape(checkpoint.header)
        if settings.layers is not None and settings.layers > shape.n_layers:
            raise FinetuneFailed(f"--layers {settings.layers}: {base.name} has {shape.n_layers} layers")
        data = read_data(checkpoint, train, validation, labels, settings.max_tokens)
        progress.stage(f"read {base.name}", shape.n_layers)
        use_compilation_cache(default_home() / "compiled")
        steps = DecoderSteps(read_weights(checkpoint, progress.advance), settings, shape.n_layers)
        out.mkdir(parents=True, exist_ok=True)
        return _Run(checkpoint, steps, data, settings, out, progress).result()
    finally:
        checkpoint.close()


def check_installed() -> None:
    """Raise FinetuneFailed with the command that installs JAX, if it is missing."""
    if importlib.util.find_spec("jax") is None:
        raise FinetuneFailed(f"training needs JAX, which is not installed; in Deskside's folder: {INSTALL}")


class _Run:
    """One run under way: its data in batches, the state of its training, and its log."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        steps: "DecoderSteps",
        data: TrainingData,
        settings: FinetuneSettings,
        out: Path,
        progress: Reporter,
    ) -> None:
        self._checkpoint, self._steps, self._data = checkpoint, steps, data
        self._settings, self._out, self._progress = settings, out, progress
        self._work = _workload(data, settings)
        # The time allowed may differ when a run resumes.
        given = settings.model_dump(mode="json", exclude={"minutes", "layers", "epochs"})
        rows = (*self._work.rows, *self._work.checked)
        digest = sha256(b"".join(part.tobytes() + b"|" for row in rows for part in (row.tokens, row.targets)))
        sizes = {"examples": len(self._work.rows), "digest": digest.hexdigest()[:16], "labels": list(data.labels)}
        self._log = RunLog({"base": _name(checkpoint), "settings": given, **sizes})

    def result(self) -> FinetuneResult:
        """Train from the last checkpoint on, or from the start; a finished run of the same is not done again."""
        made = MODEL_FILE if self._settings.method == "full" else ADAPTER_WEIGHTS_FILE
        asked = self._settings.layers, self._settings.epochs
        if (self._out / made).is_file() and self._log.is_finished(self._out, *asked):
            self._progress.note(f"trained before, of the same examples and with the same settings: {str(self._out)!r}")
            return self._found()
        found = read_checkpoint(self._out)
        if found is None:
            self._log.cost = self._cost = self._plan()
        else:
            self._cost = self._log.resume(found[1], self._out, *asked)
        self._steps.train_top(self._cost.layers)
        self._state = self._start()
        if found is not None:
            self._state.load(found[0], found[1]["step"])
        self._report_plan(resumed=found is not None)
        self._keep_states()
        self._progress.stage("train", self._total)
        for epoch in range(self._epochs_done, self._cost.epochs):
            if self._has_stopped():
                self._progress.note(f"no better epoch in {self._settings.patience}: stopped early")
                break
            self._run_epoch(epoch)
        for one in (self._states, self._checked_states):
            one.remove()
        self._log.write(self._out, finished=True)
        discard(self._out / CHECKPOINT_FILE)
        return self._found()

    def _found(self) -> FinetuneResult:
        best, cost = self._log.best, self._log.cost
        assert best is not None, "there is at least one epoch"
        assert cost is not None, "it is planned before the first epoch"
        trained = self._out / MODEL_FILE if self._settings.method == "full" else self._out
        losses = tuple(entry["loss"] for entry in self._log.steps)
        seconds, seed = self._log.seconds, self._settings.seed
        return FinetuneResult(trained, best, tuple(self._log.scores), cost, *seconds, seed, losses)

    @property
    def _epochs_done(self) -> int:
        return len(self._log.scores)

    @property
    def _total(self) -> int:
        return self._cost.epochs * len(self._work.batches)

    def _has_stopped(self) -> bool:
        best = self._log.best
        return best is not None and self._epochs_done - best.epoch >= self._settings.patience

    def _plan(self) -> TrainingCost:
        from .cost import choose, measure

        self._progress.stage("measure steps")
        costs = measure(self._steps, self._work)
        return choose(costs, self._work, self._steps)

    def _start(self) -> "TrainingState":
        from .steps import TrainingState

        return TrainingState.start(self._steps.initial())

    def _report_plan(self, *, resumed: bool) -> None:
        cost, work = self._cost, self._work
        n_layers = self._steps.shape.n_layers
        out = [tasks.n_too_long for tasks in (self._data.train, self._data.validation) if tasks is not None]
        self._progress.note(
            f"{len(work.rows)} examples, {sum(len(row.tokens) for row in work.rows)} tokens; the top {cost.layers} of "
            f"{n_layers} layers, {cost.epochs} epochs of {len(work.batches)} steps"
        )
        if sum(out):
            limit = self._settings.max_tokens
            self._progress.warn(f"{sum(out)} examples are longer than {limit} tokens and left out (--max-tokens)")
        if resumed:
            self._progress.note(f"resumed at step {self._state.step} of {self._total}")
        else:
            minutes, mib = cost.seconds / 60, cost.memory_bytes >> 20
            self._progress.note(f"estimate: {minutes:.1f} minutes, {mib} MiB of memory beside the weights")

    def _keep_states(self) -> None:
        """Compute the hidden states below the trained layers, unless an earlier run has."""
        steps, work = self._steps, self._work
        key = (self._log.identity["base"], steps.n_frozen, work.scored)
        names = (("train", work.rows), ("validation", work.checked))
        self._states, self._checked_states = (
            KeptStates(self._out, name, rows, steps.shape.n_embd, key) for name, rows in names
        )
        kept = (
            (self._states, work.rows, work.batches, None),
            (self._checked_states, work.checked, work.check_batches, work.scored),
        )
        for states, rows, batches, branches in kept:
            if steps.n_frozen and rows and not states.is_complete:
                self._progress.stage(f"compute the {steps.n_frozen} lower layers", len(batches))
                states.fill(self._frozen(rows, batches, branches))

    def _frozen(
        self, rows: Sequence[TokenRow], batches: Sequence[TokenBatch], branches: LabelBranches | None
    ) -> Iterator[tuple[TokenBatch, np.ndarray]]:
        for done, batch in enumerate(batches):
            self._progress.advance(done, len(batches))
            places = self._steps.places(rows, batch, branches)
            yield batch, self._steps.freeze(self._embedded(rows, batch), places)

    def _embedded(self, rows: Sequence[TokenRow], batch: TokenBatch) -> np.ndarray:
        x = np.zeros((batch.shape.rows, batch.shape.width, self._steps.shape.n_embd), np.float32)
        for place, member in enumerate(batch.members):
            tokens = rows[member].tokens
            x[place, -len(tokens) :] = self._steps.embed(tokens)
        return x

    def _input(self, states: KeptStates, rows: Sequence[TokenRow], batch: TokenBatch) -> np.ndarray:
        return states.read(batch) if self._steps.n_frozen else self._embedded(rows, batch)

    def _run_epoch(self, epoch: int) -> None:
        chance = random.Random(f"{self._settings.seed}/{epoch}")
        work, steps, state = self._work, self._steps, self._state
        batches = batches_of(work.rows, self._settings.batch, chance)
        saved_at = time.monotonic()
        pause = CHECKPOINT_S
        for batch in batches[state.step - epoch * len(batches) :]:
            x = self._input(self._states, work.rows, batch)
            places = steps.places(work.rows, batch)
            loss, gradients = steps.gradients(state.parameters, x, places, work.rows, batch)
            if not np.isfinite(loss):
                raise FinetuneFailed(
                    f"the loss is {loss} at step {state.step + 1}: try a lower --learning-rate than "
                    f"{self._settings.learning_rate:g}; remove {str(self._out)!r} before"
                )
            rate = self._settings.learning_rate * self._schedule(state.step / self._total)
            steps.apply(state, gradients, rate)
            self._log_step(epoch, loss, rate, batch)
            self._progress.advance(state.step, self._total, self._detail())
            if time.monotonic() - saved_at > pause and state.step < (epoch + 1) * len(batches):
                saved_at = time.monotonic()
                self._save()
                pause = max(CHECKPOINT_S, 50 * (time.monotonic() - saved_at))
        self._validate(epoch)

    def _log_step(self, epoch: int, loss: float, rate: float, batch: TokenBatch) -> None:
        tokens = sum(len(self._work.rows[member].tokens) for member in batch.members)
        entry = {"step": self._state.step, "epoch": epoch + 1, "loss": round(loss, 5), "rate": round(rate, 8)}
        self._log.steps.append({**entry, "tokens": tokens, "seconds": round(self._log.seconds[0], 2)})

    def _detail(self) -> str:
        """The mean of the last losses, the best validation score so far, and the time left by the last steps."""
        recent = self._log.steps[-10:]
        loss = sum(entry["loss"] for entry in recent) / len(recent)
        best = self._log.best
        score = "" if best is None else f", validation {best.loss if best.accuracy is None else best.accuracy:.3f}"
        pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / max(1, len(recent) - 1)
        return f"loss {loss:.3f}{score}, {pace * (self._total - self._state.step) / 60:.1f} minutes left"

    def _schedule(self, done: float) -> float:
        """Linear warm-up, then half a cosine down to zero; `done` in 0..1."""
        warmup = self._settings.warmup
        if done < warmup:
            return (done + 1 / self._total) / warmup
        return 0.5 * (1 + float(np.cos(np.pi * (done - warmup) / (1 - warmup))))

    def _validate(self, epoch: int) -> None:
        losses = [entry["loss"] for entry in self._log.steps if entry["epoch"] == epoch + 1]
        loss, right = self._score()
        accuracy = sum(right) / len(right) if right else None
        train_loss = sum(losses) / len(losses)
        score = EpochScore(epoch + 1, train_loss, train_loss if loss is None else loss, accuracy, kept=False)
        score = replace(score, right="".join(str(int(one)) for one in right))
        # without validation examples the last epoch is kept
        score = replace(score, kept=loss is None or score.is_better_than(self._log.best))
        self._log.scores.append(score)
        if score.kept:
            self._write_best()
        self._save()
        self._progress.note(self._told(score))

    def _told(self, score: EpochScore) -> str:
        told = f"accuracy {score.accuracy:.3f}, " if score.accuracy is not None else ""
        left = self._cost.epochs - score.epoch
        per_epoch = self._log.seconds[0] / score.epoch
        return (
            f"epoch {score.epoch}: loss {score.train_loss:.3f}, validation {told}loss {score.loss:.3f}"
            f"{' (best so far)' if score.kept else ''}; at most {left * per_epoch / 60:.1f} minutes left"
        )

    def _score(self) -> tuple[float | None, list[bool]]:
        """The validation's loss (None without examples), and where there are labels the answers that are right."""
        work, steps, parameters = self._work, self._steps, self._state.parameters
        if not work.checked:
            return None, []
        total, count = 0.0, 0
        right: dict[int, bool] = {}
        for batch in work.check_batches:
            x = self._input(self._checked_states, work.checked, batch)
            places = steps.places(work.checked, batch, work.scored)
            if work.scored is None:
                loss, n_tokens = steps.loss(parameters, x, places, work.checked, batch)
                total, count = total + loss, count + n_tokens
                continue
            rows = steps.logits(parameters, x, places, batch.shape.n_last)
            for place, member in enumerate(batch.members):
                loss, right[member] = self._judge(work.scored, member, rows[place])
                total, count = total + loss, count + 1
        return total / count, [right[member] for member in sorted(right)]

    def _judge(self, branches: LabelBranches, member: int, rows: np.ndarray) -> tuple[float, bool]:
        """The loss of the right label of a validation example, and true if it is the likeliest one."""
        assert self._data.validation is not None
        task = self._data.validation.tasks[member]
        logprobs = branches.logprobs(task.prompt, rows)
        expected = self._data.labels.index(task.expected)
        return -logprobs[expected], logprobs.index(max(logprobs)) == expected

    def _write_best(self) -> None:
        steps, layers = self._steps, self._state.parameters
        if self._settings.method == "lora":
            name = _name(self._checkpoint)
            write_adapter(self._out, steps.shape, self._settings, steps.n_frozen, layers, name)
            return
        trained = {
            steps.n_frozen + index: {name: np.asarray(array) for name, array in layer.items()}
            for index, layer in enumerate(layers)
        }
        retrained = RetrainedCheckpoint(self._checkpoint, steps.shape, trained)
        write_model(retrained, self._out / MODEL_FILE, "write the best model", self._progress)
        self._progress.stage("train", self._total)

    def _save(self) -> None:
        """Write the checkpoint and the log."""
        write_checkpoint(self._out, self._state.tensors(), {**self._log.facts(), "step": self._state.step})
        self._log.write(self._out)


def _workload(data: TrainingData, settings: FinetuneSettings) -> "TrainingWork":
    from .cost import TrainingWork

    rows = training_rows(data.train)
    checked, scored = _checked(data.validation)
    n_last = scored.n_last if scored is not None else 0
    check_batches = batches_of(checked, settings.batch, None, n_last) if checked else []
    return TrainingWork(rows, batches_of(rows, settings.batch, random.Random(0)), checked, check_batches, scored)


def _checked(tasks: Tasks | None) -> tuple[list[TokenRow], LabelBranches | None]:
    """The rows to validate by: prompts with all labels behind them, or texts with their answers."""
    if tasks is None:
        return [], None
    if tasks.work == "write":
        return training_rows(tasks), None
    branches = LabelBranches.of(tasks)
    return [branches.row(task.prompt) for task in tasks.tasks], branches


def _name(checkpoint: Checkpoint) -> str:
    field = checkpoint.header.fields.get("general.name")
    return str(field.value) if field is not None else checkpoint.header.path.stem
