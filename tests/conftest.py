"""What every test may count on, however the run was started."""

import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

MODEL_TESTS = "tests/model/"
WHOLE_FINE_TUNE = {"test_hot_adapter.py", "test_measure.py"}
"""Those that take this fixture, which converts a model."""


def pytest_configure() -> None:
    """Let SIGINT interrupt. A shell starts background jobs with SIGINT ignored, and children inherit that: a test that
    interrupts a child would wait for it for ever.

    Hypothesis judges no test by its speed: on a busy machine any example may be slow. llama.cpp's threads give a busy
    core back instead of spinning on it, as when `deskside` starts them.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when llama.cpp's library is loaded
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("deskside", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("deskside")


def pytest_unconfigure() -> None:
    """Close the two files on the null device that llama_cpp opens when it is imported, and never closes."""
    utilities = sys.modules.get("llama_cpp._utils")
    if utilities is not None:
        utilities.outnull_file.close()
        utilities.errnull_file.close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers: begin with the longest files, so that they end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(MODEL_TESTS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores: a sixth of the time a test waits, for a process or a signal."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> "FileScheduling":
    """Share the tests out among the workers by files."""
    config.option.loadscopereorder = False
    return FileScheduling(config, log)


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """A file's tests share a worker, and so its fixtures; files that take the same long fixture are one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return MODEL_TESTS if file.removeprefix(MODEL_TESTS) in WHOLE_FINE_TUNE else file
