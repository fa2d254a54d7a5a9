"""The base of every endpoint's wire translation: strict JSON and models, the table of fields, errors.

FIELDS says of each OpenAI body field whether it is used, ignored or refused; each row has a test. A field that is not
in it is refused by name. `null` counts as absent everywhere.
"""

import difflib
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, ValidationError, with_config
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import TypedDict

from runtime.errors import (
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

Endpoint = Literal["chat", "completion"]
Treatment = Literal["used", "ignored", "refused"]

_BOTH: tuple[Endpoint, ...] = ("chat", "completion")


class WireModel(BaseModel):
    """A part of a request body: strict types, no unknown fields, finite numbers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


# Types of answers are TypedDicts: they cost nothing at run time, and the OpenAPI document is made of them.
answer_type = with_config(ConfigDict(extra="forbid"))


@answer_type
class ErrorObject(TypedDict):
    """`param` is the field at fault, `code` the machine-readable reason."""

    message: str
    type: str
    param: str | None
    code: str | None


@answer_type
class ErrorAnswer(TypedDict):
    """OpenAI's error shape."""

    error: ErrorObject


def parse_strict_json(
    text: str | bytes, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Parse JSON without Python's NaN and Infinity. Raises ValueError, or RecursionError if it is nested too deeply."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=object_pairs_hook)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class TextPart(TypedDict):
    """A part of a message."""

    type: Literal["text"]
    text: str


def plain_text(content: object, kinds: Sequence[str] = ("text",), *, prefix: str = "") -> str:
    """A string, or the texts of a list of parts joined. Parts have a type of `kinds`, of which errors name the first.

    Raises ValueError; `prefix` begins its message.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{prefix}must be a string or a non-empty list of text parts")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in kinds or not isinstance(part.get("text"), str):
            expected = f"must be of type {kinds[0]!r} with a text"
            raise ValueError(f"{prefix}part {place} {expected}, not {reprlib.repr(kind)}")
        texts.append(part["text"])
    return "".join(texts)


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first fault that pydantic found, with the field's path as `param` and the value given."""
    first = error.errors()[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    if first["type"] == "missing":
        return InvalidRequest(f"{param!r} is required", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ").replace("Tuple", "List").replace("tuple", "list")
    return InvalidRequest(f"{param}: {message}, got {reprlib.repr(first['input'])}", param=param, code="invalid_value")


@dataclass(frozen=True, slots=True)
class FieldRule:
    """The treatment of a body field. A refused field passes with a value of `harmless`, which asks for nothing."""

    name: str
    treatment: Treatment
    endpoints: tuple[Endpoint, ...] = _BOTH
    harmless: tuple[Any, ...] = ()


class TableBody(WireModel):
    """The used fields of a body; `table` rules on every field. Its JSON schema is that of the whole body."""

    table: ClassVar[Mapping[str, FieldRule]]

    @classmethod
    def read(cls, payload: object) -> Self:
        """Read a body, field by field. Raises InvalidRequest with `param` and the value given."""
        try:
            return cls.model_validate(read_fields(cls.table, payload))
        except ValidationError as error:
            raise invalid_request(error) from None

    @classmethod
    def properties_checked_elsewhere(cls) -> dict[str, JsonSchemaValue]:
        """The JSON schemas of used fields that this model does not have."""
        return {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        whole = handler.resolve_ref_schema(schema)
        properties = whole.setdefault("properties", {})
        properties |= cls.properties_checked_elsewhere()
        for name, rule in cls.table.items():
            if rule.treatment == "used":
                if name not in whole.get("required", ()):
                    properties[name] = nullable(properties[name])
            elif rule.treatment == "ignored":
                properties[name] = {"description": "Ignored."}
            else:
                properties[name] = {"enum": [None, *rule.harmless], "description": "Not supported."}
        return schema


def checked_later_as(kind: Any) -> BeforeValidator:
    """Annotates a field whose items our own code checks after pydantic: the JSON schema is that of `kind`."""
    return BeforeValidator(lambda value: value, json_schema_input_type=kind)


def nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of a property for which null counts as absent."""
    kept = {name: value for name, value in schema.items() if name in ("title", "description", "default")}
    rest = {name: value for name, value in schema.items() if name not in kept}
    if not rest or {"type": "null"} in rest.get("anyOf", ()):
        return schema
    return {"anyOf": [*rest["anyOf"], {"type": "null"}] if set(rest) == {"anyOf"} else [rest, {"type": "null"}], **kept}


FIELDS: tuple[FieldRule, ...] = (
    *(FieldRule(name, "used") for name in ("model", "stream", "stream_options", "max_tokens", "temperature", "top_p")),
    *(FieldRule(name, "used") for name in ("top_k", "min_p", "seed", "stop", "n", "logprobs", "logit_bias")),
    *(FieldRule(name, "used") for name in ("presence_penalty", "frequency_penalty", "ignore_eos")),
    *(FieldRule(name, "used") for name in ("grammar", "regex", "choice")),
    *(
        FieldRule(name, "used", ("chat",))
        for name in ("messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice")
    ),
    FieldRule("prompt", "used", ("completion",)),
    # The client's identity, storage and billing; no answer depends on them.
    *(FieldRule(name, "ignored") for name in ("user", "metadata", "store", "service_tier", "safety_identifier")),
    *(FieldRule(name, "ignored") for name in ("prompt_cache_key", "prompt_cache_retention")),
    FieldRule("parallel_tool_calls", "used", ("chat",)),
    FieldRule("functions", "refused", ("chat",), ([],)),
    FieldRule("function_call", "refused", ("chat",), ("none", "auto")),
    FieldRule("modalities", "refused", ("chat",), (["text"],)),
    *(FieldRule(name, "refused", ("chat",)) for name in ("audio", "prediction", "web_search_options", "verbosity")),
    FieldRule("reasoning_effort", "refused", ("chat",), ("none",)),
    FieldRule("cache_prompt", "refused", _BOTH, (True,)),
    FieldRule("echo", "refused", ("completion",), (False,)),
    FieldRule("suffix", "refused", ("completion",), ("",)),
    FieldRule("best_of", "refused", ("completion",), (1,)),
)

MESSAGE_FIELDS_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "name": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
    "annotations": ([],),
}


def rules(endpoint: Endpoint) -> dict[str, FieldRule]:
    """The rows of FIELDS that hold for `endpoint`, by name."""
    return {rule.name: rule for rule in FIELDS if endpoint in rule.endpoints}


def read_fields(known: Mapping[str, FieldRule], payload: object) -> dict[str, Any]:
    """The fields of a body to read. Raises InvalidRequest unless it is an object, and for unknown or refused fields."""
    if not isinstance(payload, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {reprlib.repr(payload)}")
    used = {}
    for name, value in payload.items():
        rule = known.get(name)
        if rule is None:
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"unknown field {reprlib.repr(name)}{hint}", param=name[:64], code="unknown_parameter")
        if value is None or rule.treatment == "ignored":
            continue
        if rule.treatment == "used":
            used[name] = value
        elif not any(type(value) is type(fine) and value == fine for fine in rule.harmless):
            allowed = " or ".join(["null", *(json.dumps(fine) for fine in rule.harmless)])
            message = f"{name!r} is not supported; only {allowed} is accepted, got {reprlib.repr(value)}"
            raise InvalidRequest(message, param=name, code="unsupported_parameter")
    return used


@dataclass(frozen=True, slots=True)
class WireError:
    """The status, type and code of a class of errors on the wire."""

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


def error_body(message: str, error_type: str, param: str | None = None, code: str | None = None) -> ErrorAnswer:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def to_error(error: BaseException) -> tuple[int, ErrorAnswer]:
    """(HTTP status, body) of an error. The text of a foreign error is left out: it may hold anything."""
    wire = next((HTTP_ERRORS[kind] for kind in type(error).__mro__ if kind in HTTP_ERRORS), UNEXPECTED)
    if wire is UNEXPECTED:
        return wire.status, error_body("internal error; the server's log has the details", wire.type, None, wire.code)
    code, param = (error.code, error.param) if isinstance(error, RequestError) else (None, None)
    return wire.status, error_body(str(error), wire.type, param, code or wire.code)
