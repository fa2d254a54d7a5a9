"""The errors of `runtime`: a client's faults, and the engine's own.

They travel between processes as a code of ERROR_CODES, their message and the attributes `param`, `code` and
`retry_after_s`: each class can be made from its message alone.

RequestError                 the client can correct it; carries `param` and `code` for the wire
├── InvalidRequest           a field is malformed, out of range or not supported
├── Unauthorized             the API key is missing or wrong
├── Forbidden                the request's Host or Origin is not one that the server answers
├── ModelUnknown             no model of that name is served
├── ContextTooLong           prompt + max_tokens exceed the context
├── BodyTooLarge             the request body exceeds the limit
├── BodyTooSlow              the request body did not arrive in time
├── UnsupportedMedia         the request body is not declared as JSON
├── Overloaded               the queue is full; carries `retry_after_s`
└── Cancelled                the client went away or cancelled
EngineError                  the engine's own; the request is not to blame
├── LoadFailed               the model cannot be loaded
├── NoRoom                   no memory for the model while others answer; carries `retry_after_s`
├── NoKvSlot                 llama_decode 1: no room in the KV cache for this batch (state restored)
├── DecodeAborted            llama_decode 2: the abort callback fired
├── BatchInvalid             llama_decode -1: the batch is malformed
├── DecodeFailed             llama_decode < -1: fatal
├── GrammarFailed            the grammar of an answer met a limit or a dead end
├── TokenizeFailed           the tokenizer refused the text
├── TemplateFailed           the chat template raised or is missing
├── EngineDied               the engine's process ended while it had the request
├── EngineDown               the engine stopped after a fatal error and takes no more requests
└── ShuttingDown             the server stopped before the request was answered
"""


class RequestError(Exception):
    """A fault the client can correct.

    `param` names the offending field (or None), `code` is OpenAI's machine-readable code (or None).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """A field is malformed, out of range or not supported."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""


class Forbidden(RequestError):
    """The request's Host is not a name of the server, or it comes from a web page of another site."""


class ModelUnknown(RequestError):
    """No model of that name is served."""


class ContextTooLong(RequestError):
    """Prompt and answer together exceed the context."""


class BodyTooLarge(RequestError):
    """The request body exceeds the limit in bytes."""


class BodyTooSlow(RequestError):
    """The request body did not arrive completely within the limit in seconds."""


class UnsupportedMedia(RequestError):
    """The request body is not declared as JSON."""


class Overloaded(RequestError):
    """The queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_s = retry_after_s


class Cancelled(RequestError):
    """The client disconnected or cancelled the request."""


class EngineError(Exception):
    """The engine failed; the request is not to blame."""


class LoadFailed(EngineError):
    """The model cannot be loaded."""


class NoRoom(EngineError):
    """The memory budget leaves no room for the model while others answer; try again after `retry_after_s` seconds."""

    retry_after_s = 1


class NoKvSlot(EngineError):
    """llama_decode returned 1: no room in the KV cache for this batch. The state is restored; retry with less."""


class DecodeAborted(EngineError):
    """llama_decode returned 2: the abort callback fired."""


class BatchInvalid(EngineError):
    """llama_decode returned -1: the batch is malformed."""


class DecodeFailed(EngineError):
    """llama_decode returned less than -1: fatal for the context."""


class GrammarFailed(EngineError):
    """The grammar of an answer met a limit, or a dead end, while the answer was written."""


class TokenizeFailed(EngineError):
    """The tokenizer refused the text."""


class TemplateFailed(EngineError):
    """The chat template raised, or the model has none."""


class EngineDied(EngineError):
    """The engine's process ended while it had the request; the message says why. The supervisor launches another."""


class EngineDown(EngineError):
    """The engine stopped after a fatal error and takes no more requests."""


class ShuttingDown(EngineError):
    """The server stopped before the request was answered."""


class BatchRefused(Exception):
    """The batch's files cannot be used together: busy, foreign, or of another input or model."""


# error -> its name on the pipe between server and engine. A test checks that no error is missing.
ERROR_CODES: dict[type[RequestError | EngineError], str] = {
    RequestError: "request_error",
    InvalidRequest: "invalid_request",
    Unauthorized: "unauthorized",
    Forbidden: "forbidden",
    ModelUnknown: "model_unknown",
    ContextTooLong: "context_too_long",
    BodyTooLarge: "body_too_large",
    BodyTooSlow: "body_too_slow",
    UnsupportedMedia: "unsupported_media",
    Overloaded: "overloaded",
    Cancelled: "cancelled",
    EngineError: "engine_error",
    LoadFailed: "load_failed",
    NoRoom: "no_room",
    NoKvSlot: "no_kv_slot",
    DecodeAborted: "decode_aborted",
    BatchInvalid: "batch_invalid",
    DecodeFailed: "decode_failed",
    GrammarFailed: "grammar_failed",
    TokenizeFailed: "tokenize_failed",
    TemplateFailed: "template_failed",
    EngineDied: "engine_died",
    EngineDown: "engine_down",
    ShuttingDown: "shutting_down",
}


def encodable(text: str) -> str:
    """`text` with half surrogates, which UTF-8 lacks, as escapes: a file's or a field's name may hold some."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
