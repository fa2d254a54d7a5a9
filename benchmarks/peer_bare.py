"""What the engine itself costs: its tokens a second over those of a bare `llama_decode` loop with the same batches."""

import json
import subprocess
import sys
from collections.abc import Sequence

from .errors import ServerFailed
from .peer_record import BarePass
from .peer_run import Progress, Recorder, Slices
from .peer_servers import ModelFile
from .peer_tasks import CHAT, LABEL, LABEL_TOKENS, REPLY, REPLY_TOKENS


def run_bare(
    file: ModelFile, slices: Slices, repetitions: int, threads: int, recorder: Recorder, progress: Progress
) -> None:
    """Measure labels and replies of 16 clients. Raises ServerFailed with the child's last words."""
    progress("engine beside a bare loop", 0, 1)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.bare_loop", str(file.folder), str(threads), str(repetitions)],
        input=json.dumps(_work(slices)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServerFailed(f"the bare loop failed (exit {done.returncode}): {done.stderr[-1000:]}")
    recorder.add(bare=tuple(parse(done.stdout.splitlines())))
    progress("engine beside a bare loop", 1, 1)


def parse(lines: Sequence[str]) -> list[BarePass]:
    """What the child printed."""
    return [BarePass.model_validate_json(line) for line in lines]


def _work(slices: Slices) -> dict[str, dict[str, object]]:
    return {
        task: {"texts": [example.text for example in slices[task, CHAT][0]], "tokens": tokens, "stops": stops}
        for task, tokens, stops in ((LABEL, LABEL_TOKENS, True), (REPLY, REPLY_TOKENS, False))
    }
