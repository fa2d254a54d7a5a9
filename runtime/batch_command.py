"""One `deskside batch`: hold the files, load the model, run on an event loop, say what came of it."""

import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.store.store import Store

from .batch import BatchCounts, BatchFiles, BatchJob, BatchRun, open_files
from .batch_answerer import EngineAnswerer, queue_for
from .batch_input import count_lines
from .batch_progress import closing_line, progress_bar, summarise
from .config import RuntimeConfig
from .served import ServedModel, load_model, under_name
from .served_names import find

LINES_PER_SLOT = 4


def run_files(source: Path, output: Path, model: str, config: RuntimeConfig) -> dict[str, Any]:
    """Answer `source` into `output` and return the summary; SIGINT and SIGTERM end it early and say so there.

    Raises BatchRefused (before anything is loaded), ModelNotFound, LoadFailed, EngineError, OSError.
    """
    wanted = find(model, Store())
    window = config.slots * LINES_PER_SLOT
    job = BatchJob(source, output, wanted.id, window)
    with open_files(job) as files:
        loaded = load_model(wanted.base, replace(config, queue=queue_for(window)), wanted.adapters)
        served = under_name(wanted, loaded)
        try:
            served.worker.start()
            counts, interrupted = _run(job, files, served)
        finally:
            served.worker.stop()
    summary = summarise(job, counts, interrupted)
    print(closing_line(summary), file=sys.stderr)
    return summary


def _run(job: BatchJob, files: BatchFiles, served: ServedModel) -> tuple[BatchCounts, bool]:
    with progress_bar(count_lines(job.source)) as draw:
        batch = BatchRun(job, files, EngineAnswerer(served, served.worker), draw)
        try:
            asyncio.run(_until_signalled(batch))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return batch.counts, True
    return batch.counts, False


async def _until_signalled(batch: BatchRun) -> None:
    """`batch.run()`, cancelled by SIGTERM as asyncio.run lets SIGINT do."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await batch.run()
