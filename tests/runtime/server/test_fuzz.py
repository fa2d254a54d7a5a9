"""Bodies that nobody would write, to every POST route: none is a fault of the server, and each refusal is OpenAI's.

Each is the text of a body that is accepted, with one to three places of any depth bent; some are any JSON, or bytes.
The generator is seeded by route and round: a failure names both, and comes again.
"""

import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.runtime import tool_templates as templates
from tests.support.runtime.connection import answered
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import Running, serving

from .test_openapi import ACCEPTED

PATHS = sorted(ACCEPTED)
ROUNDS, A_ROUND = 4, 15
LIMITS = ("max_tokens", "max_output_tokens")
# JSON texts: numbers at the limits of 32 and 64 bits, of a double and beyond; numbers without end; no number at all.
NUMBERS = [
    *(
        "0",
        "-1",
        "1",
        "2",
        "127",
        "-0",
        "0.5",
        "-0.0",
        "2147483648",
        "4294967296",
        "9223372036854775808",
        "1e5",
        "1E400",
    ),
    *(
        "-9223372036854775809",
        "1e308",
        "1e-320",
        "-1e999",
        "1" + "0" * 30,
        "9" * 5000,
        "0." + "3" * 9000,
        "1e" + "9" * 400,
    ),
    *("NaN", "Infinity", "-Infinity", "01", "1.", ".5", "+1", "0x10", "--1"),
]
# Characters of every plane, halves of pairs, keys and special tokens of templates, and strings that never end.
TEXTS = [
    *(
        '""',
        '" "',
        '"\\u0000"',
        '"\\ud83d"',
        '"\\ude00"',
        '"\\ude00\\ud83d"',
        '"\\ud83d\\ude00"',
        '"é😀\\u2028"',
        '"\x7f"',
    ),
    *('"type"', '"user"', '"function"', '"<end_of_turn>"', '"<|im_start|>"', '"{{ 1 }}"', '"["', '"(a*)*b"', '"toy"'),
    *('"' + "a" * 300 + '"', '"' + "😀" * 5000 + '"', '"\x00"', '"\n"', '"\\x"', '"\\u12"', '"open', "'a'"),
]
OTHERS = ["null", "true", "false", "[]", "{}", "[[]]", "[{}]", '{"a":1,"a":2}', '{"type":"text","type":[]}', "[1,]", ""]
DEEP = [opened * depth + "1" + closed * depth for opened, closed in (("[", "]"), ('{"a":', "}"), ('[{"type":', "}]"))
        for depth in (10, 90, 400, 5000)] + ["[" * 100_000, '{"a":' * 50_000]  # fmt: skip
KEYS = ["type", "role", "content", "text", "name", "id", "input", "format", "strict", "schema", "$ref", "n", "stop", ""]

KEYWORDS = [
    *("type", "enum", "const", "required", "properties", "patternProperties", "additionalProperties", "$defs", "$ref"),
    *("anyOf", "allOf", "if", "then", "dependentSchemas", "items", "prefixItems", "minimum", "multipleOf", "pattern"),
    *("$id", "x-guidance", "unevaluatedProperties", "minItems", "format"),
]
VALUES = ["null", "[[]]", "[{}]", '{"a": []}', "1e308", '"x"', "true"]


class Bender:
    """Writes bodies, bent by one generator."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def value(self) -> str:
        """A JSON text, or nearly one."""
        kind = self._random.choice([NUMBERS, NUMBERS, TEXTS, TEXTS, OTHERS, DEEP, None])
        if kind is not None:
            return self._random.choice(kind)
        part = self._random.choice(NUMBERS[:13] + TEXTS[:10] + OTHERS[:9])
        if self._random.random() < 0.5:
            return f"[{','.join([part] * self._random.choice([2, 70, 3000]))}]"
        return "{" + ",".join(f'"{i}":{part}' for i in range(self._random.choice([2, 300, 5000]))) + "}"

    def body(self, path: str) -> bytes:
        """A body for a path."""
        kind = self._random.random()
        if kind < 0.05:
            return self._random.randbytes(self._random.randrange(40))
        if kind < 0.1:
            return self.value().encode()
        accepted = self._random.choice(ACCEPTED[path])
        n_places = sum(1 for _ in places(accepted))
        bent = set(self._random.sample(range(1, n_places), k=min(self._random.randint(1, 3), n_places - 1)))
        # Few tokens, unless that is what is bent: none of these is about length.
        limit = {"/v1/responses": LIMITS[1]}.get(path, LIMITS[0])
        bounded = path in ("/v1/chat/completions", "/v1/completions", "/v1/responses") and limit not in accepted
        text = self._written(accepted, iter(range(n_places)), bent)
        return (text[:-1] + f', "{limit}": 4}}' if bounded else text).encode()

    def _written(self, value: Any, numbers: Iterator[int], bent: set[int]) -> str:
        """The text of `value`, its places numbered outermost first, with those of `bent` bent."""
        is_bent = next(numbers) in bent
        change = self._random.choice(["change", "change", "add", "repeat"])
        if isinstance(value, dict):
            parts = [f"{json.dumps(key)}: {self._written(part, numbers, bent)}" for key, part in value.items()]
            if is_bent and change == "add":
                parts.append(f'"{self._random.choice(KEYS)}": {self.value()}')
        elif isinstance(value, list):
            parts = [self._written(part, numbers, bent) for part in value]
        else:
            return self.value() if is_bent else json.dumps(value)
        if is_bent and change == "change":
            return self.value()
        if is_bent and change == "repeat":  # of an object: the same keys again
            parts *= self._random.choice([0, 2, 60])
        return ("{%s}" if isinstance(value, dict) else "[%s]") % ", ".join(parts)


def places(value: Any) -> Iterator[Any]:
    """Every value within `value`, outermost first."""
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from places(part)


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=2048, script="hello", template=templates.HERMES)) as running:
        yield running


def judge(response: httpx.Response, sent: bytes) -> None:
    """Require an answer, or an error that the client can mend, in OpenAI's shape."""
    shown = f"{sent[:1500]!r} -> {response.status_code} {response.text[:1500]}"
    kind = response.headers["content-type"].partition(";")[0]
    if response.status_code == 200 and kind == "text/event-stream":
        events = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]
        assert events, shown
        assert not [event for event in events if event.get("error")], shown
        return
    assert kind == "application/json", shown
    answer = json.loads(response.content.decode("utf-8"))
    if response.status_code == 200:
        assert answer.get("error") is None, shown
        return
    assert 400 <= response.status_code < 500, shown
    assert answer.keys() == {"error"}, shown
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}, shown
    assert isinstance(error["message"], str), shown
    assert 0 < len(error["message"]) < 2000, shown
    assert isinstance(error["type"], str), shown
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code")), shown


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("path", PATHS)
def test_no_body_is_a_fault_of_the_server(toy: Running, path: str, round_: int) -> None:
    bender = Bender(f"{path} {round_}")
    for _ in range(A_ROUND):
        body = bender.body(path)
        judge(toy.http.post(path, content=body), body)
    assert toy.supervisor.state == "ready"


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_schema_with_any_value_for_a_keyword_is_judged(toy: Running, keyword: str) -> None:
    path = "/v1/chat/completions"
    for value in VALUES:
        # The integer has the schema share a definition, among those that it has itself.
        schema = f'{{"anyOf": [{{"type": "integer"}}, {{"type": "object"}}], "{keyword}": {value}}}'
        called = f'{{"type": "object", "{keyword}": {value}}}'
        for field in (
            f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}',
            f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {called}}}}}]',
        ):
            sent = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, {field}}}'.encode()
            judge(toy.http.post(path, content=sent), sent)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("deep", DEEP, ids=len)
def test_depth_is_answered(toy: Running, path: str, deep: str) -> None:
    """As the whole body, and in the place of each field of one that is accepted."""
    for key in (None, *ACCEPTED[path][0]):
        others = {name: value for name, value in ACCEPTED[path][0].items() if name != key}
        text = deep if key is None else f'{json.dumps(others)[:-1]}{", " if others else ""}"{key}": {deep}}}'
        judge(toy.http.post(path, content=text.encode()), text.encode())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [9 << 20, 30 << 20])
def test_a_body_beyond_the_limit_is_refused_and_none_of_it_resets_the_connection(
    toy: Running, path: str, size: int
) -> None:
    """Down to the socket: libraries hide a reset while they send."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", int(toy.url.rsplit(":", 1)[1]))) as client:
        client.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
        for _ in range(size >> 20):
            client.sendall(b"[" * (1 << 20))
        status, _, body = answered(client)
        assert (status, json.loads(body)["error"].keys()) == (413, {"message", "type", "param", "code"})
        assert client.recv(1) == b""


@pytest.mark.parametrize("value", VALUES)
def test_options_in_the_schema_of_a_call_in_plain_json_are_judged(value: str) -> None:
    """Where a text may be JSON, too, both are one schema, with the options of the call's."""
    tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {{"x-guidance": {value}}}}}}}]'
    sent = f'{{"messages": [], "max_tokens": 1, "tools": {tools}, "response_format": {{"type": "json_object"}}}}'
    sent = sent.replace("[]", '[{"role": "user", "content": "a"}]', 1)
    with serving(FakeLlama(n_ctx=2048, script="hello", template=templates.JSON)) as running:
        judge(running.http.post("/v1/chat/completions", content=sent.encode()), sent.encode())
