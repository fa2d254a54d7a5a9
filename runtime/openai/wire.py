"""The base of every endpoint's wire translation: strict JSON and models, read by the tables of `fields`; errors."""

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
    with_config,
)
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
    Forbidden,
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
    UnsupportedMedia,
    encodable,
)

from .fields import Table, read_fields, without_unused

Endpoint = Literal["chat", "completion"]
_ESCAPED = re.compile(r"[\x85\u2028\u2029\ud800-\udfff]")


class WireModel(BaseModel):
    """An object in a request body: strict types, no unknown fields, finite numbers; null counts as absent.

    `rules` are the rows of its fields, by name; of those that are not used only harmless values pass.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
    rules: ClassVar[Table] = {}

    @model_validator(mode="before")
    @classmethod
    def _used_fields(cls, value: object) -> object:
        return without_unused(cls.rules, value) if isinstance(value, dict) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        describe_fields(handler.resolve_ref_schema(schema), cls.rules)
        return schema


def describe_fields(schema: JsonSchemaValue, rules: Table) -> None:
    """Complete the JSON schema of an object's used fields: allow nulls, and the fields without use."""
    properties = schema.setdefault("properties", {})
    for name in properties.keys() - set(schema.get("required", ())):
        properties[name] = nullable(properties[name])
    for name, rule in rules.items():
        if rule.treatment == "ignored":
            properties[name] = {"description": "Ignored."}
        elif rule.treatment == "refused":
            properties[name] = {"enum": [None, *rule.accepts], "description": "Not supported."}
    schema["additionalProperties"] = {"type": "null"}


# Types of answers are TypedDicts: they cost nothing at run time, and the OpenAPI document is generated from them.
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


def require_characters(text: bytes, value: object) -> None:
    """Raise InvalidRequest if `value`, parsed from `text`, holds half a surrogate pair, which UTF-8 cannot."""
    if b"\\ud" in text or b"\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest("half a surrogate pair (\\ud800 … \\udfff alone) is no character") from None


def to_json(text: str) -> bytes:
    """JSON `text` in UTF-8, with escapes for what some readers end a line at, and for half surrogates.

    JSON allows U+0085, U+2028 and U+2029 as they are, but `str.splitlines` and others would cut an event there.
    """
    if not text.isascii():
        text = _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.encode("utf-8")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class TextPart(TypedDict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(TypedDict):
    """A refusal, read as text."""

    type: Literal["refusal"]
    refusal: str


# part type -> the field that holds its text
TEXT_PARTS: Mapping[str, str] = {"text": "text", "refusal": "refusal"}


def plain_text(content: object, kinds: Mapping[str, str] = TEXT_PARTS, *, prefix: str = "") -> str:
    """Return `content` if it is a string, else the joined texts of its parts.

    `kinds` are the types of parts, as in TEXT_PARTS; errors name the first. Raises ValueError; `prefix` begins its
    message.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{prefix}must be a string or a non-empty list of text parts")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        named = kinds.get(kind) if isinstance(kind, str) else None
        text = part.get(named) if isinstance(part, dict) and named is not None else None
        if not isinstance(text, str):
            expected = f"must be of type {next(iter(kinds))!r} with a text"
            raise ValueError(f"{prefix}part {place} {expected}, not {reprlib.repr(kind)}")
        texts.append(text)
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
    if first["type"] == "extra_forbidden":
        message = "the field is unknown, or not supported with a value"
    return InvalidRequest(f"{param}: {message}, got {reprlib.repr(first['input'])}", param=param, code="invalid_value")


class TableBody(WireModel):
    """The used fields of a body; `table` has the treatment of every field. The JSON schema is of the whole body."""

    table: ClassVar[Table]

    @classmethod
    def read(cls, payload: object) -> Self:
        """Read a body, field by field. Raises InvalidRequest with `param` and the value given."""
        try:
            return cls.model_validate(read_fields(cls.table, payload))
        except ValidationError as error:
            raise invalid_request(error) from None

    @classmethod
    def properties_checked_elsewhere(cls) -> dict[str, JsonSchemaValue]:
        """The JSON schemas of the used fields that another model checks."""
        return {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        whole = handler.resolve_ref_schema(schema)
        whole.setdefault("properties", {}).update(cls.properties_checked_elsewhere())
        describe_fields(whole, cls.table)
        return schema


def checked_later_as(kind: Any) -> BeforeValidator:
    """Give a field the JSON schema of `kind`, if our own code checks its items after pydantic."""
    return BeforeValidator(lambda value: value, json_schema_input_type=kind)


def nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of a property, with null allowed: it counts as absent."""
    kept = {name: value for name, value in schema.items() if name in ("title", "description", "default")}
    rest = {name: value for name, value in schema.items() if name not in kept}
    if not rest or {"type": "null"} in rest.get("anyOf", ()):
        return schema
    return {"anyOf": [*rest["anyOf"], {"type": "null"}] if set(rest) == {"anyOf"} else [rest, {"type": "null"}], **kept}


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
    Forbidden: WireError(403, "invalid_request_error", "forbidden"),
    ModelUnknown: WireError(404, "invalid_request_error", "model_not_found"),
    ContextTooLong: WireError(400, "invalid_request_error", "context_length_exceeded"),
    BodyTooLarge: WireError(413, "invalid_request_error", "body_too_large"),
    BodyTooSlow: WireError(408, "invalid_request_error", "body_too_slow"),
    UnsupportedMedia: WireError(415, "invalid_request_error", "unsupported_media_type"),
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
    """OpenAI's error shape. Half surrogates, of a field's name for one, are spelled as escapes."""
    message, param = encodable(message), None if param is None else encodable(param)
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def to_error(error: BaseException) -> tuple[int, ErrorAnswer]:
    """(HTTP status, body) of an error. The text of an error outside HTTP_ERRORS is left to the log."""
    wire = next((HTTP_ERRORS[kind] for kind in type(error).__mro__ if kind in HTTP_ERRORS), UNEXPECTED)
    if wire is UNEXPECTED:
        return wire.status, error_body("internal error; the server's log has the details", wire.type, None, wire.code)
    code, param = (error.code, error.param) if isinstance(error, RequestError) else (None, None)
    return wire.status, error_body(str(error), wire.type, param, code or wire.code)
