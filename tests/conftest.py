"""What every test may count on, however the run was started."""

import signal


def pytest_configure() -> None:
    """Let SIGINT interrupt. A shell starts background jobs with SIGINT ignored, and children inherit that: a test that
    interrupts a child would wait for it for ever.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
