"""Reads request bodies: bounded in bytes while they come, in depth and in numbers while they are parsed."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from .errors import BodyTooLarge, BodyTooSlow, Cancelled, InvalidRequest

# Bodies above this are parsed, rendered and tokenised in a thread, so that the event loop goes on meanwhile.
INLINE_BYTES = 8 << 10
# So are bodies with a grammar, which is compiled; the first one waits for llguidance's form of the vocabulary.
NAMES_GRAMMAR = re.compile(rb'"(response_format|grammar|regex|choice|tools|format)"')
MAX_OBJECT_FIELDS = 4096
# Only so many bodies may be read at once, so that a client which never ends its own would keep the others out.
READ_SECONDS = 60.0

T = TypeVar("T")


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body.

    Raises BodyTooLarge as soon as it is known to exceed the limit, BodyTooSlow, or Cancelled if the client left.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise BodyTooLarge(f"the body has {declared} bytes, limit {limit_bytes}")
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise BodyTooLarge(f"the body has more than {limit_bytes} bytes, the limit")
    except TimeoutError:
        raise BodyTooSlow(f"{len(body)} bytes of the body came in {READ_SECONDS:g} s, the limit") from None
    except ClientDisconnect:
        raise Cancelled("the client left before its request was whole") from None
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """The body as JSON. Raises InvalidRequest for what is not strict JSON in UTF-8: NaN and lone surrogates too."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_bounded_object)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("the body holds half a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} cannot be decoded") from None
    except RecursionError:
        raise InvalidRequest("the body is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # malformed, or a number of more digits than Python reads
        raise InvalidRequest(f"the body is not valid JSON: {str(error)[:200]}") from None
    return value


def _bounded_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Each field too many would get an error of its own from the validation: slow, and large.
    if len(pairs) > MAX_OBJECT_FIELDS:
        raise InvalidRequest(f"the body holds an object of {len(pairs)} fields, limit {MAX_OBJECT_FIELDS}")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


async def with_json(body: bytes, handle: Callable[[Any], T]) -> T:
    """`handle(parsed body)`, in a thread when the body is large or names a grammar."""

    def work() -> T:
        return handle(parse_json(body))

    takes_long = len(body) > INLINE_BYTES or NAMES_GRAMMAR.search(body)
    return await asyncio.to_thread(work) if takes_long else work()
