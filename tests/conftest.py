"""What every test may count on, however the run was started."""

import signal
import sys

from hypothesis import HealthCheck, settings


def pytest_configure() -> None:
    """Let SIGINT interrupt. A shell starts background jobs with SIGINT ignored, and children inherit that: a test that
    interrupts a child would wait for it for ever.

    Hypothesis judges no test by its speed: on a busy machine any example may be slow.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("deskside", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("deskside")


def pytest_unconfigure() -> None:
    """Close the two files on the null device that llama_cpp opens when it is imported, and never closes."""
    utilities = sys.modules.get("llama_cpp._utils")
    if utilities is not None:
        utilities.outnull_file.close()
        utilities.errnull_file.close()
