"""The errors of `benchmarks`. Each message names the subject, the value found and, if there is one, the fix.

BenchError
├── BadWorkload      the examples or the prompt file cannot be used, or there are too few of them
├── BadRecord        a results file is of another kind or damaged
├── ServerFailed     a server did not start, or a URL does not answer as an OpenAI server
├── BadAssumption    a cost assumption is out of range
└── ExtraMissing     a library of the `bench` extra is not installed
"""


class BenchError(Exception):
    """Base of the errors of `benchmarks`."""


class BadWorkload(BenchError):
    """The examples or the prompt file cannot be used, or there are too few of them."""


class BadRecord(BenchError):
    """A results file is of another kind or damaged."""


class ServerFailed(BenchError):
    """A server did not start, or a URL does not answer as an OpenAI server."""


class BadAssumption(BenchError):
    """A cost assumption is out of range."""


class ExtraMissing(BenchError):
    """A library of the `bench` extra is not installed."""
