"""Work of llama.cpp's that runs in a process of its own: it cannot be interrupted, and takes its process with it if it
aborts. Ctrl-C has to end a conversion at once, and an abort has to be an error with a reason.
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
    """Start `module` in a fresh interpreter: pipes at its standard input and output, its errors among the output."""
    # -P: a folder called `convert` where the user stands must not be taken for ours
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


class Child:
    """`module` at work on `job`. Leaving its block kills it if it is not done: whatever ends the block early, ends it.

    A job is JSON on its standard input, a line each; it may be given more of them. A line of two numbers on its
    standard output is progress (done, total), any other a complaint.
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
        """Kill it if it is not done. Closing twice is harmless."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it may have died before it read its job
            self._process.stdin.close()
        self._process.stdout.close()

    def give(self, job: Mapping[str, Any]) -> None:
        """One more job. If it has died, `wait` tells."""
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
        """Whether it has ended already, and not well."""
        return self._process.poll() not in {None, 0}

    def wait(self, progress: StepProgress) -> tuple[int, str]:
        """Wait until it is done: its exit code and the last line it complained with."""
        assert self._process.stdout is not None
        complaint = "no word from it"
        for line in self._process.stdout:
            if match := _STEP.fullmatch(line.strip()):
                progress(int(match[1]), int(match[2]))
            elif line.strip():
                complaint = line.strip()
        return self._process.wait(), complaint


def run_child(module: str, job: Mapping[str, Any], progress: StepProgress) -> tuple[int, str]:
    """Run `module` with one job; its exit code and the last line it complained with.

    `progress` is told (done, total). Whatever ends this call early, kills the child.
    """
    with Child(module, job) as child:
        return child.wait(progress)


def read_job() -> dict[str, Any]:
    """In the child: what it is to do, or to do next. Ends the process when nobody is there to say it any more."""
    line = sys.stdin.readline()
    if not line:
        os._exit(1)
    job: dict[str, Any] = json.loads(line)
    return job


def tell(*words: object) -> None:
    """In the child: a line for the parent. Ends the process when nobody waits for the result any more."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        os._exit(1)
