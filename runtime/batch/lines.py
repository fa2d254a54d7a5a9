"""The lines of a batch file, one at a time: millions of them pass through in constant memory.

A line is OpenAI's: `{"custom_id", "method": "POST", "url", "body"}`. What a line says is judged here; what its body
says is judged by the same functions that judge a request over HTTP.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InvalidRequest
from runtime.openai.wire import parse_strict_json, require_characters

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/decisions", "/v1/embeddings")
FIELDS = ("custom_id", "method", "url", "body")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of the file. `number` counts from 1; `fingerprint` is a hash of custom_id, url and body, in hex."""

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]
    fingerprint: str

    @property
    def key(self) -> int:
        """64 bits of the custom_id's hash: what is remembered of a line once it is done."""
        return key_of(self.custom_id)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be read as a request. `custom_id` is None if it cannot be read either."""

    number: int
    custom_id: str | None
    error: InvalidRequest

    @property
    def fingerprint(self) -> str:
        """A hash in hex, of the line's number: its text may be too long to be held."""
        return hashlib.blake2b(f"line {self.number}".encode(), digest_size=16).hexdigest()


def key_of(custom_id: str) -> int:
    """64 bits of a hash: at ten million lines two custom_ids share one with a chance of about 3 in a million."""
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest(), "big")


def read_lines(path: Path, max_line_bytes: int) -> Iterator[BatchLine | BadLine]:
    """Yield the requests of `path` in order, without blank lines. A line over the limit is never held whole."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(max_line_bytes + 1):
            number += 1
            if len(raw) > max_line_bytes and not raw.endswith(b"\n"):
                size = len(raw) + _skip_line(file.readline)
                yield BadLine(number, None, _refuse(f"the line has {size} bytes, the limit is {max_line_bytes}"))
            elif line := raw.removeprefix(_BOM).strip() if number == 1 else raw.strip():
                yield parse_line(number, line)


def count_lines(path: Path) -> int:
    """Count the lines of `path`, blank ones included, for the progress bar."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def parse_line(number: int, raw: bytes) -> BatchLine | BadLine:
    """Read one line. Never raises: a fault becomes the BadLine's error."""
    custom_id = None
    try:
        record = _json_object(raw)
        custom_id = _custom_id(record)
        require_characters(raw, record)
        return _request(number, custom_id, record)
    except InvalidRequest as error:
        return BadLine(number, custom_id, error)
    except RecursionError:
        return BadLine(number, custom_id, _refuse("the line is nested too deeply"))


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        record = parse_strict_json(raw.decode("utf-8"))
    except ValueError as error:
        raise _refuse(f"the line is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _refuse(f"the line must be a JSON object, got {type(record).__name__}")
    return record


def _custom_id(record: Mapping[str, Any]) -> str:
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _refuse(f"custom_id must be a string that is not empty, got {custom_id!r:.80}", "custom_id")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise _refuse(f"custom_id must be valid Unicode, got {custom_id!r:.80}", "custom_id") from None
    return custom_id


def _request(number: int, custom_id: str, record: Mapping[str, Any]) -> BatchLine:
    for name in record:
        if name not in FIELDS:
            raise _refuse(f"unknown field {name!r:.80}; a line has {', '.join(FIELDS)}", str(name)[:80])
    method, url, body = (record.get(name) for name in FIELDS[1:])
    if method != "POST":
        raise _refuse(f"method must be 'POST', got {method!r:.80}", "method")
    if url not in URLS:
        raise _refuse(f"url must be one of {', '.join(map(repr, URLS))}, got {url!r:.80}", "url")
    if not isinstance(body, dict):
        raise _refuse(f"body must be a JSON object, got {type(body).__name__}", "body")
    if body.get("stream"):
        raise _refuse("stream: a batch writes whole answers; leave it out", "stream")
    whole = json.dumps([custom_id, url, body], sort_keys=True).encode()
    return BatchLine(number, custom_id, str(url), body, hashlib.blake2b(whole, digest_size=16).hexdigest())


def _refuse(message: str, param: str | None = None) -> InvalidRequest:
    return InvalidRequest(message, param=param)


def _skip_line(readline: Callable[[int], bytes]) -> int:
    skipped = 0
    while raw := readline(1 << 20):
        skipped += len(raw)
        if raw.endswith(b"\n"):
            break
    return skipped
