"""Work of llama.cpp's that runs in a process of its own: it cannot be interrupted, and takes its process with it if it
aborts. Ctrl-C has to end a conversion at once, and an abort has to be an error with a reason.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

_STEP = re.compile(r"(\d+) (\d+)")


def run_child(module: str, job: Mapping[str, Any], progress: Callable[[int, int], None]) -> tuple[int, str]:
    """Run `module` with `job` as JSON on its standard input; its exit code and the last line it complained with.

    A line of two numbers is progress (done, total). Whatever ends this call early, kills the child.
    """
    # -P: a folder called `convert` where the user stands must not be taken for ours
    command = [sys.executable, "-P", "-m", module]
    complaint = "no word from it"
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        try:
            _hand_over(child, job)
            assert child.stdout is not None
            for line in child.stdout:
                if match := _STEP.fullmatch(line.strip()):
                    progress(int(match[1]), int(match[2]))
                elif line.strip():
                    complaint = line.strip()
            return child.wait(), complaint
        except BaseException:
            child.kill()
            raise


def read_job() -> dict[str, Any]:
    """In the child: what it is to do."""
    job: dict[str, Any] = json.load(sys.stdin)
    return job


def tell(*words: object) -> None:
    """In the child: a line for the parent. Ends the process when nobody waits for the result any more."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        os._exit(1)


def _hand_over(child: "subprocess.Popen[str]", job: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    try:
        with child.stdin:
            json.dump(job, child.stdin)
    except BrokenPipeError:
        pass  # it died; its last words and its exit code tell why
