"""Any JSON value anywhere in a body is read or refused with an InvalidRequest: no type of value is a fault of ours."""

import json
from typing import Any

import pytest

from runtime.batch.lines import BadLine, BatchLine, parse_line
from runtime.errors import InvalidRequest
from tests.support.runtime.bodies import BODIES, places, with_value

VALUES: tuple[Any, ...] = (None, True, 0, -1.5, 10**400, "", "x", [], [[]], [{}], {}, {"type": {}}, {"a": [None]})


@pytest.mark.parametrize("name", BODIES)
def test_any_value_anywhere_is_read_or_refused(name: str) -> None:
    body, read = BODIES[name]
    read(body)
    refusals: list[InvalidRequest] = []
    for at in places(body):
        for value in VALUES:
            try:
                read(with_value(body, at, value))
            except InvalidRequest as error:
                refusals.append(error)
    assert 0 < max(len(str(error)) for error in refusals) < 1000


def test_any_value_anywhere_in_a_batch_line_is_a_line_or_a_bad_one() -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "stream": False}}
    for at in places(line):
        for value in VALUES:
            parsed = parse_line(1, json.dumps(with_value(line, at, value)).encode())
            assert isinstance(parsed, BatchLine | BadLine)
