"""Children of `convert.child`, forked from a process that has imported what they need.

A fresh interpreter spends most of a tiny model's job on importing numpy, llama.cpp's binding and pydantic.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.reduction import DupFd
from typing import Any

_CHILDREN = (
    "convert.measure.compare_child",
    "convert.measure.speed_child",
    "convert.proof.proof_child",
    "convert.proof.runs",
    "convert.quantize.imatrix_child",
    "convert.quantize.quantize_child",
)
_context = get_context("forkserver")
_context.set_forkserver_preload([__name__, *_CHILDREN])


class Forked:
    """The part of `subprocess.Popen` that a `Child` uses."""

    def __init__(self, module: str) -> None:
        (theirs, to_child), (from_child, writes) = os.pipe(), os.pipe()
        arguments = (module, _Passed(theirs), _Passed(writes), dict(os.environ))
        self._process = _context.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        os.close(theirs)
        os.close(writes)
        self.stdin = open(to_child, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        self.stdout = open(from_child, encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


class _Passed:
    """A file descriptor that becomes the child's own when the arguments are sent to it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._number),)


def _received(passed: Any) -> int:
    number: int = passed.detach()
    return number


def _run(module: str, source: int, target: int, environment: Mapping[str, str]) -> None:
    """In the child: become what `python -m module` would be."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(source, 0)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(source)
    os.close(target)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(importlib.import_module(module).main())
