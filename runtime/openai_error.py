"""The one table from our errors to HTTP: status, OpenAI's error type, and a code where the error carries none."""

from dataclasses import dataclass
from typing import Any

from .errors import (
    BatchInvalid,
    BodyTooLarge,
    BodyTooSlow,
    Cancelled,
    ContextTooLong,
    DecodeAborted,
    DecodeFailed,
    EngineDied,
    EngineDown,
    EngineError,
    GrammarFailed,
    InvalidRequest,
    LoadFailed,
    ModelUnknown,
    NoKvSlot,
    NoRoom,
    Overloaded,
    RequestError,
    ShuttingDown,
    TemplateFailed,
    TokenizeFailed,
    Unauthorized,
)


@dataclass(frozen=True, slots=True)
class WireError:
    """How a kind of error looks on the wire."""

    status: int
    type: str
    code: str | None = None


HTTP_ERRORS: dict[type[Exception], WireError] = {
    RequestError: WireError(400, "invalid_request_error"),
    InvalidRequest: WireError(400, "invalid_request_error"),
    Unauthorized: WireError(401, "invalid_request_error", "invalid_api_key"),
    ModelUnknown: WireError(404, "invalid_request_error", "model_not_found"),
    ContextTooLong: WireError(400, "invalid_request_error", "context_length_exceeded"),
    BodyTooLarge: WireError(413, "invalid_request_error", "body_too_large"),
    BodyTooSlow: WireError(408, "invalid_request_error", "body_too_slow"),
    Overloaded: WireError(429, "rate_limit_error", "queue_full"),
    Cancelled: WireError(499, "request_cancelled", "cancelled"),
    EngineError: WireError(500, "server_error", "engine_error"),
    LoadFailed: WireError(503, "server_error", "model_not_loaded"),
    NoRoom: WireError(503, "server_error", "model_has_no_room"),
    NoKvSlot: WireError(503, "server_error", "kv_cache_full"),
    DecodeAborted: WireError(500, "server_error", "decode_aborted"),
    BatchInvalid: WireError(500, "server_error", "engine_error"),
    DecodeFailed: WireError(500, "server_error", "decode_failed"),
    GrammarFailed: WireError(500, "server_error", "grammar_failed"),
    TokenizeFailed: WireError(500, "server_error", "tokenize_failed"),
    TemplateFailed: WireError(500, "server_error", "template_failed"),
    EngineDied: WireError(500, "server_error", "engine_died"),
    EngineDown: WireError(503, "server_error", "engine_down"),
    ShuttingDown: WireError(503, "server_error", "shutting_down"),
}
UNEXPECTED = WireError(500, "server_error", "internal_error")


def error_body(message: str, error_type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def to_error(error: BaseException) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of an error. What is not ours is reported without its text, which may hold anything."""
    wire = next((HTTP_ERRORS[kind] for kind in type(error).__mro__ if kind in HTTP_ERRORS), UNEXPECTED)
    if wire is UNEXPECTED:
        return wire.status, error_body("internal error; the server's log has the details", wire.type, None, wire.code)
    code, param = (error.code, error.param) if isinstance(error, RequestError) else (None, None)
    return wire.status, error_body(str(error), wire.type, param, code or wire.code)
