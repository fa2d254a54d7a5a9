"""Offline batches: a file of requests through the engine to a file of answers, with nothing lost.

The input is read once, in order, with a bounded window of requests in flight; answers are written as they finish, so
`custom_id` is the key, not the order. A resumed run skips answered lines and tries every other line again.
"""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from models.common.console import ProgressBars
from models.store.store import Store
from runtime.config import RuntimeConfig
from runtime.errors import EngineError, InvalidRequest, Overloaded, RequestError
from runtime.openai.chat import MAX_ANSWERS_PER_CALL
from runtime.openai.wire import to_error
from runtime.requests import Work
from runtime.serving.model import ServedModel, load_model, under_name
from runtime.serving.names import find
from runtime.serving.promise import require_target
from runtime.serving.routes import ROUTES
from runtime.worker.inflight import Stream

from .journal import (
    ErrorsFile,
    JsonlFile,
    answer_record,
    check_files,
    error_record,
    errors_path,
    require_same_input,
    resume,
)
from .lines import BadLine, BatchLine, count_lines, read_lines

MAX_LINE_BYTES = 4 << 20
LINES_PER_SLOT = 4
# The routes that take a seed.
_SEEDED = ("/v1/chat/completions", "/v1/completions")

_log = logging.getLogger("deskside.batch")


@dataclass(frozen=True)
class BatchJob:
    """One batch: requests of `source` for `model`, answers to `output`, `window` requests in flight.

    `weights` is the hash of the model's files.
    """

    source: Path
    output: Path
    model: str
    weights: str
    window: int
    max_line_bytes: int = MAX_LINE_BYTES


@dataclass
class BatchCounts:
    """The progress of a run. `skipped` were answered by an earlier run; tokens are of this run."""

    answered: int = 0
    skipped: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    started_s: float = field(default_factory=time.monotonic)

    @property
    def lines(self) -> int:
        """Requests answered, skipped or failed."""
        return self.answered + self.skipped + self.failed

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed, prompt and answer together, per second of this run."""
        computed = self.prompt_tokens - self.cached_tokens + self.completion_tokens
        return computed / max(time.monotonic() - self.started_s, 1e-9)


@dataclass(frozen=True)
class BatchFiles:
    """The files of a run, opened, checked and locked: `done` maps answered custom_ids to their fingerprints."""

    answers: JsonlFile
    errors: ErrorsFile
    done: Mapping[int, int]


class Answerer(Protocol):
    """The engine as a batch sees it."""

    async def answer(self, line: BatchLine) -> Mapping[str, Any]:
        """Return OpenAI's response body. Any exception fails this line only."""

    def require_alive(self) -> None:
        """Raise EngineError if no request will be answered any more."""


class EngineAnswerer:
    """Answers batch lines through a model's engine, on the event loop that calls it."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._ended = asyncio.Event()

    async def answer(self, line: BatchLine) -> dict[str, Any]:
        """Return OpenAI's response body. When cancelled, cancel the line's requests."""
        call = ROUTES[line.url].prepare(_body(line), self._model)
        try:
            return await call.fold(await self._submit(call.work))
        finally:
            self._ended.set()

    async def _submit(self, work: tuple[Work, ...]) -> Stream:
        while True:
            self._ended.clear()
            try:
                return self._model.supervisor.submit(*work, whole=True)
            except Overloaded:
                await self._ended.wait()

    def require_alive(self) -> None:
        """Raise EngineDown or ShuttingDown if the supervisor takes no requests any more."""
        self._model.supervisor.require_room(0)


def _body(line: BatchLine) -> dict[str, Any]:
    """The line's body. A missing seed is derived from the line, so that a batch run twice gives the same answers."""
    if line.url not in _SEEDED or line.body.get("seed") is not None:
        return dict(line.body)
    return {**line.body, "seed": int(line.fingerprint[:15], 16)}


class BatchRun:
    """One run of a job. `counts` can be read while it runs."""

    def __init__(
        self, job: BatchJob, files: BatchFiles, answerer: Answerer, on_progress: Callable[[BatchCounts], None]
    ) -> None:
        self.counts = BatchCounts()
        self._job = job
        self._files = files
        self._answerer = answerer
        self._on_progress = on_progress
        self._window = asyncio.Semaphore(job.window)

    async def run(self) -> None:
        """Answer every line. When cancelled, stop the requests in flight; the answers written stay for a resumed run.

        Raises EngineError when the engine is gone, OSError when a file cannot be written.
        """
        self.counts.started_s = time.monotonic()
        seen: set[int] = set()
        try:
            async with asyncio.TaskGroup() as group:
                for line in read_lines(self._job.source, self._job.max_line_bytes):
                    await asyncio.sleep(0)  # lets others run, also while it skips a million lines in a row
                    if request := self._open_request(line, seen):
                        await self._window.acquire()
                        group.create_task(self._answer(request))
        except ExceptionGroup as several:
            raise several.exceptions[0] from None

    def _open_request(self, line: BatchLine | BadLine, seen: set[int]) -> BatchLine | None:
        """Return `line` if it is still open. Records a bad line as failed; skips an answered one."""
        if isinstance(line, BadLine):
            self._fail(line, line.error)
            return None
        if line.key in seen:
            message = f"custom_id {line.custom_id!r:.80} was used by an earlier line"
            error = InvalidRequest(message, param="custom_id", code="duplicate_custom_id")
            self._fail(line, error)
            return None
        seen.add(line.key)
        if line.key not in self._files.done:
            return line
        self.counts.skipped += 1
        self._on_progress(self.counts)
        return None

    async def _answer(self, line: BatchLine) -> None:
        try:
            body = await self._answerer.answer(line)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  (one line must not stop the others; a Rust panic is no Exception)
            self._answerer.require_alive()
            if not isinstance(error, RequestError | EngineError):
                _log.error("line %d failed unexpectedly", line.number, exc_info=error)
            self._fail(line, error)
        else:
            self._files.answers.append(answer_record(line, self._job.weights, body))
            self._count(body.get("usage") or {})
        finally:
            self._window.release()

    def _fail(self, line: BatchLine | BadLine, error: BaseException) -> None:
        self._files.errors.append(error_record(line, *to_error(error)))
        self.counts.failed += 1
        self._on_progress(self.counts)

    def _count(self, usage: Mapping[str, Any]) -> None:
        counts = self.counts
        counts.answered += 1
        # OpenAI's newer routes say input and output for prompt and completion.
        into, out = ("input", "output") if "input_tokens" in usage else ("prompt", "completion")
        counts.prompt_tokens += usage.get(f"{into}_tokens", 0)
        counts.completion_tokens += usage.get(f"{out}_tokens", 0)
        counts.cached_tokens += (usage.get(f"{into}_tokens_details") or {}).get("cached_tokens", 0)
        self._on_progress(counts)


@contextmanager
def open_files(job: BatchJob) -> Iterator[BatchFiles]:
    """Open and lock the job's files for one run. Raises BatchRefused when they cannot be used together."""
    check_files(job.source, job.output)
    with JsonlFile(job.output) as answers:
        done = resume(answers, job.model, job.weights)
        if done:
            require_same_input(job.source, job.max_line_bytes, done, job.output)
        with ErrorsFile(errors_path(job.output)) as errors:
            yield BatchFiles(answers, errors, done)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[BatchCounts], None]]:
    """Draw done, failed, tokens/s and time left; `total` counts lines."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with ProgressBars(*columns, transient=True) as bars:
        bars.start("", total, failed=0, rate=0.0)
        yield lambda counts: bars.update("", counts.lines, failed=counts.failed, rate=counts.tokens_per_s)


def summarise(job: BatchJob, counts: BatchCounts, interrupted: bool) -> dict[str, Any]:
    """The run as a JSON object: counts, tokens of this run, seconds, files."""
    return {
        "model": job.model,
        "answered": counts.answered,
        "answered_before": counts.skipped,
        "failed": counts.failed,
        "interrupted": interrupted,
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "completion_tokens": counts.completion_tokens,
        "seconds": round(time.monotonic() - counts.started_s, 3),
        "output": str(job.output),
        "errors": str(errors_path(job.output)) if counts.failed else None,
    }


def closing_line(summary: dict[str, Any]) -> str:
    """The summary of a run in one line."""
    line = f"{summary['answered']} answered"
    if summary["answered_before"]:
        line += f", {summary['answered_before']} answered before"
    line += f", {summary['failed']} failed"
    if summary["errors"]:
        line += f" (see {summary['errors']})"
    tokens = summary["prompt_tokens"] - summary["cached_tokens"] + summary["completion_tokens"]
    line += f", {tokens} tokens computed in {summary['seconds']:.1f} s"
    return f"interrupted: {line}; rerun the same command to resume" if summary["interrupted"] else line


def queue_for(window: int) -> int:
    """The queue length at which a line of the most choices fits beside `window` others."""
    return window + MAX_ANSWERS_PER_CALL


def run_files(source: Path, output: Path, model: str, config: RuntimeConfig) -> dict[str, Any]:
    """Answer `source` into `output` and return the summary. SIGINT and SIGTERM end the run early; the summary says so.

    Raises BatchRefused (before anything is loaded), ModelNotFound, LoadFailed, EngineError, OSError.
    """
    wanted = find(model, Store())
    require_target({wanted.id: wanted.manifest}, config.target)
    window = config.slots * LINES_PER_SLOT
    check_files(source, output)
    job = BatchJob(source, output, wanted.id, wanted.digest(), window)
    with open_files(job) as files:
        loaded = load_model(wanted.base, config.model_copy(update={"queue": queue_for(window)}), wanted.adapters)
        try:
            counts, interrupted = _run(job, files, under_name(wanted, loaded))
        finally:
            loaded.supervisor.stop()
    summary = summarise(job, counts, interrupted)
    print(closing_line(summary), file=sys.stderr)
    return summary


def _run(job: BatchJob, files: BatchFiles, served: ServedModel) -> tuple[BatchCounts, bool]:
    with progress_bar(count_lines(job.source)) as draw:
        batch = BatchRun(job, files, EngineAnswerer(served), draw)
        try:
            asyncio.run(_until_signalled(batch))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return batch.counts, True
    return batch.counts, False


async def _until_signalled(batch: BatchRun) -> None:
    """Run `batch`; SIGTERM cancels it, as SIGINT does under asyncio.run."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await batch.run()
