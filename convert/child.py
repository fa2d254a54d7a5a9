"""Child processes for jobs of llama.cpp, which cannot be interrupted and may abort.

Ctrl-C must end a conversion at once, and an abort must become an error with a reason.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

StepProgress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_STEP = re.compile(r"(\d+) (\d+)")


def start_python(module: str) -> "subprocess.Popen[str]":
    """Start `module` in a new interpreter, with pipes for its standard input and output; stderr joins the output."""
    # -P: a folder `convert` in the user's working directory must not shadow ours
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


class Child:
    """A process that runs `module` on `job`. Leaving the block kills it unless it has ended.

    A job is a line of JSON on its standard input; more may follow. A line of two numbers on its standard output is
    progress (done, total); any other line is an error message.
    """

    def __init__(self, module: str, job: Mapping[str, Any]) -> None:
        self._process = start_python(module)
        self.give(job)

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process if it has not ended. Closing twice is harmless."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # the process may have died before it read its job
            self._process.stdin.close()
        self._process.stdout.close()

    def give(self, job: Mapping[str, Any]) -> None:
        """Send another job. If the process has died, `wait` returns its exit code."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def has_failed(self) -> bool:
        """True if the process has ended with an error."""
        return self._process.poll() not in {None, 0}

    def wait(self, progress: StepProgress) -> tuple[int, str]:
        """Wait for the process to end. Returns its exit code and its last error message."""
        assert self._process.stdout is not None
        complaint = "no error message"
        for line in self._process.stdout:
            if match := _STEP.fullmatch(line.strip()):
                progress(int(match[1]), int(match[2]))
            elif line.strip():
                complaint = line.strip()
        return self._process.wait(), complaint


def run_child(module: str, job: Mapping[str, Any], progress: StepProgress) -> tuple[int, str]:
    """Run `module` with one job. Returns its exit code and its last error message.

    `progress` is called with (done, total). An exception during the call kills the child.
    """
    with Child(module, job) as child:
        return child.wait(progress)


def read_job() -> dict[str, Any]:
    """In the child: read the next job. Ends the process if the parent is gone."""
    line = sys.stdin.readline()
    if not line:
        os._exit(1)
    job: dict[str, Any] = json.loads(line)
    return job


def tell(*words: object) -> None:
    """In the child: print a line for the parent. Ends the process if the parent is gone."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        os._exit(1)
