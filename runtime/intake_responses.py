"""`/v1/responses`: from its body to the engine's request, by way of a chat completion, and from events to the whole."""

import time
from typing import Any

from .errors import ContextTooLong, InvalidRequest
from .intake import Serving, prepare
from .openai_responses import Origins, parse_response
from .openai_responses_stream import ResponseAnswer, ResponseCall
from .worker_stream import Stream, cancelling


def prepare_response(payload: object, served: Serving) -> ResponseCall:
    """A parsed JSON body as a call that is valid, tokenised and known to fit the context.

    Raises InvalidRequest, ModelUnknown, ContextTooLong, TokenizeFailed or TemplateFailed.
    """
    body = parse_response(payload)
    try:
        return ResponseCall(prepare("chat", dict(body.chat), served), body)
    except (InvalidRequest, ContextTooLong) as error:
        raise _renamed(error, body.origins) from None


def _renamed(error: InvalidRequest | ContextTooLong, origins: Origins) -> InvalidRequest | ContextTooLong:
    if error.param is None:
        return error
    param = origins.rename(error.param)
    return type(error)(str(error).replace(error.param, param, 1), param=param, code=error.code)


async def fold_response(asked: ResponseCall, stream: Stream) -> dict[str, Any]:
    """The whole response. Raises the error it failed with."""
    answer = ResponseAnswer(asked, time.time)
    with cancelling(stream):
        async for event in stream:
            answer.feed(event)
    return answer.response()
