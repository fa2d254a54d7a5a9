"""Every error has its row: an HTTP status for what a request can meet, an exit code for what a command can meet."""

import importlib
import inspect
import io
from http import HTTPStatus

import pytest

from runtime.cli.main import EXIT_CODES, exit_code
from runtime.errors import ERROR_CODES, EngineError, Overloaded, RequestError
from runtime.openai.wire import HTTP_ERRORS, to_error
from runtime.worker.messages import Died, read_from_engine, write_message

MODULES = ("models.errors", "runtime.errors", "convert.errors", "benchmarks.errors")
CLASSES = [
    kind
    for module in map(importlib.import_module, MODULES)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, Exception) and kind.__module__ == module.__name__
]
ON_THE_WIRE = [kind for kind in CLASSES if issubclass(kind, RequestError | EngineError)]


def make(kind: type[Exception], message: str) -> Exception:
    return Overloaded(message, retry_after_s=9) if issubclass(kind, Overloaded) else kind(message)


@pytest.mark.parametrize("kind", ON_THE_WIRE, ids=lambda kind: kind.__name__)
def test_every_error_of_a_request_has_its_own_http_row(kind: type[Exception]) -> None:
    assert kind in HTTP_ERRORS
    status, body = to_error(make(kind, "limit 3, got 4"))
    assert status == HTTP_ERRORS[kind].status
    assert (status < 500) == issubclass(kind, RequestError)
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] == "limit 3, got 4"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_error_has_an_exit_code(kind: type[Exception]) -> None:
    assert exit_code(make(kind, "x")) in {1, 2, 3}


@pytest.mark.parametrize("kind", ON_THE_WIRE, ids=lambda kind: kind.__name__)
def test_every_error_of_a_request_travels_whole_between_processes(kind: type[Exception]) -> None:
    error = make(kind, "limit 3, got 4")
    fields: dict[str, str | int] = {"param": "a param", "code": "a code", "retry_after_s": 77}
    vars(error).update({name: value for name, value in fields.items() if hasattr(error, name)})
    pipe = io.BytesIO()
    write_message(pipe, Died(error))
    pipe.seek(0)
    died = read_from_engine(pipe)
    assert isinstance(died, Died)
    assert type(died.error) is kind
    assert (str(died.error), vars(died.error)) == (str(error), vars(error))
    assert set(vars(error)) <= set(fields), "an attribute that does not travel"


def test_every_error_of_a_request_has_its_own_code_on_the_pipe() -> None:
    assert set(ERROR_CODES) == set(ON_THE_WIRE)
    assert len(set(ERROR_CODES.values())) == len(ERROR_CODES)


def test_no_row_of_either_table_is_for_nothing() -> None:
    assert set(HTTP_ERRORS) == set(ON_THE_WIRE)
    assert all(wire.status == 499 or HTTPStatus(wire.status) for wire in HTTP_ERRORS.values())
    assert all(issubclass(kind, BaseException) for kind in EXIT_CODES)


def test_an_errors_own_code_and_param_reach_the_wire() -> None:
    _, body = to_error(RequestError("no", param="n", code="special"))
    assert (body["error"]["param"], body["error"]["code"]) == ("n", "special")


def test_a_subclass_without_a_row_takes_its_parents() -> None:
    class Special(EngineError):
        pass

    assert to_error(Special("odd"))[0] == 500


def test_what_is_not_ours_tells_the_client_nothing_of_itself() -> None:
    status, body = to_error(KeyError("/secret/path"))
    assert status == 500
    assert "secret" not in body["error"]["message"]
