"""The body of `/v1/responses`: its fields, and its translation to the body of a chat completion.

Pure. Nothing is kept between requests, so whatever names an earlier response is refused. What a chat's body checks is
left to it; `Origins` says where in this body a field of that one came from.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Len
from pydantic import BaseModel, Field, PlainValidator, ValidationError
from typing_extensions import TypedDict

from runtime.errors import InvalidRequest

from .chat import MAX_MESSAGES, ChatBody
from .grammar import FormatSchema, ObjectFormat, TextFormat
from .tools import MAX_CALL_ID_CHARS, MAX_TOOLS, CalledFunction, Function
from .wire import FieldRule, TableBody, WireModel, checked_later_as, invalid_request, plain_text, read_fields

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS, MAX_METADATA_VALUE_CHARS = 64, 512
LOGPROBS = "message.output_text.logprobs"

# Fields with the same meaning in a chat's body, which checks them.
PASSED: tuple[str, ...] = ("model", "stream", "temperature", "top_p", "parallel_tool_calls")
PASSED += ("seed", "top_k", "min_p", "presence_penalty", "frequency_penalty")

RESPONSE_FIELDS: tuple[FieldRule, ...] = (
    *(FieldRule(name, "used") for name in PASSED),
    *(FieldRule(name, "used") for name in ("input", "instructions", "max_output_tokens", "text", "tools")),
    *(FieldRule(name, "used") for name in ("tool_choice", "include", "top_logprobs", "metadata")),
    *(FieldRule(name, "ignored") for name in ("user", "store", "service_tier", "safety_identifier")),
    *(FieldRule(name, "ignored") for name in ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")),
    *(FieldRule(name, "refused") for name in ("previous_response_id", "conversation", "prompt", "moderation")),
    *(FieldRule(name, "refused") for name in ("max_tool_calls", "background_options", "access_programs", "image")),
    FieldRule("background", "refused", harmless=(False,)),
    FieldRule("context_management", "refused", harmless=([],)),
    FieldRule("reasoning", "refused", harmless=({}, {"effort": "none"})),
    FieldRule("stream_options", "refused", harmless=({}, {"include_obfuscation": False})),
    FieldRule("truncation", "refused", harmless=("disabled",)),
)


Status = Literal["in_progress", "completed", "incomplete"]

# As they are sent, and as they came in an earlier response.
_TEXT_PARTS = ("input_text", "output_text", "text")


def _plain_text(content: object) -> str:
    return plain_text(content, _TEXT_PARTS)


def _text_or_items(value: object) -> str | list[Any]:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of items")
    return value


class ResponseTextPart(TypedDict):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str


_TextParts = Annotated[list[ResponseTextPart], Len(1)]
PlainText = Annotated[str, PlainValidator(_plain_text, json_schema_input_type=str | _TextParts)]


class MessageItem(WireModel):
    """A message of the input. `id`, `status` and `phase` come back from earlier outputs, and change nothing."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: PlainText
    id: str | None = None
    status: Status | None = None
    phase: Any = None


class CallItem(CalledFunction):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=MAX_CALL_ID_CHARS)
    id: str | None = None
    status: Status | None = None


class ResultItem(WireModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: PlainText
    id: str | None = None
    status: Status | None = None


Item = MessageItem | CallItem | ResultItem
_Input = str | Annotated[list[Item], Len(1, MAX_MESSAGES)]
_ITEMS: dict[object, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": ResultItem,
}


class ResponseSchemaFormat(FormatSchema):
    """JSON that a schema describes."""

    type: Literal["json_schema"]


class TextOptions(WireModel):
    """The form of the text; the format is checked as a chat's `response_format`."""

    format: Annotated[
        dict[str, Any] | None, checked_later_as(TextFormat | ObjectFormat | ResponseSchemaFormat | None)
    ] = None
    verbosity: None = None


class ResponseTool(Function):
    """A function that the model may call, checked as a chat's tool."""

    type: Literal["function"]


_Tools = Annotated[list[ResponseTool], Len(0, MAX_TOOLS)]


class ChosenFunctionTool(TypedDict):
    """One function that must be called."""

    type: Literal["function"]
    name: str


class ResponseBody(TableBody):
    """The used fields of `/v1/responses` that a chat's body does not have in this form; `PASSED` are the others."""

    table: ClassVar = {rule.name: rule for rule in RESPONSE_FIELDS}

    input: Annotated[str | list[Any], PlainValidator(_text_or_items, json_schema_input_type=_Input)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = TextOptions()
    tools: Annotated[list[Any], Len(0, MAX_TOOLS), checked_later_as(_Tools)] = Field(default_factory=list)
    tool_choice: Annotated[Any, checked_later_as(Literal["none", "auto", "required"] | ChosenFunctionTool | None)] = (
        None
    )
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA)

    @classmethod
    def properties_checked_elsewhere(cls) -> dict[str, Any]:
        """Those that pass to the chat's body."""
        properties = ChatBody.model_json_schema()["properties"]
        return {name: properties[name] for name in PASSED}


@dataclass(slots=True)
class Origins:
    """Where the messages of the chat came from, as paths into the body of the response."""

    messages: list[str] = field(default_factory=list)
    calls: dict[tuple[int, int], str] = field(default_factory=dict)

    def rename(self, param: str) -> str:
        """The name in this body of the field `param` of the chat's body."""
        if turn := re.match(r"messages\[([0-9]+)\](?:\.tool_calls\[([0-9]+)\])?(.*)", param):
            place, call, rest = int(turn[1]), turn[2], turn[3]
            where = self.messages[place] if call is None else self.calls[place, int(call)]
            return where + {".id": ".call_id", ".tool_call_id": ".call_id"}.get(rest, rest)
        if tool := re.match(r"(tools\[[0-9]+\])\.function(.*)", param):
            return tool[1] + tool[2]
        names = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
        return names.get(param, param)


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A body that was read: its own fields, the chat it asks for, and where that chat's fields came from."""

    own: ResponseBody
    chat: Mapping[str, Any]
    origins: Origins


def parse_response(payload: object) -> ParsedResponse:
    """The body of `/v1/responses`. Raises InvalidRequest with `param` and the value given."""
    used = read_fields(ResponseBody.table, payload)
    own = _validated(ResponseBody, {name: value for name, value in used.items() if name not in PASSED}, "")
    _check(own)
    chat = {name: used[name] for name in PASSED if name in used}
    origins = Origins()
    chat["messages"] = _messages(own, origins)
    if own.max_output_tokens is not None:
        chat["max_completion_tokens"] = own.max_output_tokens
    if own.text.format is not None:
        chat["response_format"] = _response_format(own.text.format)
    if own.tools:
        chat["tools"] = [_tool(tool, place) for place, tool in enumerate(own.tools)]
    if own.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(own.tool_choice)
    if own.include:
        chat |= {"logprobs": True, "top_logprobs": own.top_logprobs or 0}
    return ParsedResponse(own, chat, origins)


M = TypeVar("M", bound=BaseModel)


def _validated(kind: type[M], value: object, where: str) -> M:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        fault = invalid_request(error)
    found = fault.param or ""
    param = f"{where}.{found}".strip(".")
    message = str(fault).replace(found, param, 1) if found else f"{param}: {fault}"
    raise InvalidRequest(message, param=param, code=fault.code)


def _check(own: ResponseBody) -> None:
    if own.top_logprobs and not own.include:
        raise InvalidRequest(f"top_logprobs needs include [{LOGPROBS!r}]", param="top_logprobs")
    for key, value in own.metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
            limits = f"{MAX_METADATA_KEY_CHARS} characters a key and {MAX_METADATA_VALUE_CHARS} a value"
            message = f"metadata takes at most {limits}, got {len(key)} and {len(value)}"
            raise InvalidRequest(message, param="metadata", code="invalid_value")


def _messages(own: ResponseBody, origins: Origins) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []

    def add(message: dict[str, Any], origin: str) -> None:
        messages.append(message)
        origins.messages.append(origin)

    if own.instructions is not None:
        add({"role": "system", "content": own.instructions}, "instructions")
    if isinstance(own.input, str):
        add({"role": "user", "content": own.input}, "input")
        return messages
    if not 0 < len(own.input) <= MAX_MESSAGES:
        raise InvalidRequest(f"input takes 1 to {MAX_MESSAGES} items, got {len(own.input)}", param="input")
    for place, value in enumerate(own.input):
        where = f"input[{place}]"
        item = _item(value, where)
        if isinstance(item, MessageItem):
            add({"role": item.role, "content": item.content}, where)
        elif isinstance(item, ResultItem):
            add({"role": "tool", "tool_call_id": item.call_id, "content": item.output}, where)
        else:
            # The calls of a turn are items here; in a chat they are one message, with the text before them.
            if not messages or messages[-1]["role"] != "assistant":
                add({"role": "assistant", "content": None}, where)
            calls = messages[-1].setdefault("tool_calls", [])
            origins.calls[len(messages) - 1, len(calls)] = where
            called = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": called})
    return messages


def _item(value: object, where: str) -> Item:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    if not isinstance(kind, str) or kind not in _ITEMS:
        message = f"{where}.type: {str(kind)[:64]!r} is not supported; only {', '.join(map(repr, _ITEMS))} are"
        raise InvalidRequest(message, param=f"{where}.type", code="invalid_value")
    return _validated(_ITEMS[kind], value, where)


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return dict(given)
    return {"type": "json_schema", "json_schema": {name: item for name, item in given.items() if name != "type"}}


def _tool(tool: object, place: int) -> object:
    if not isinstance(tool, dict):
        return tool
    if tool.get("type") != "function":
        param = f"tools[{place}].type"
        message = f"{param}: only tools of type 'function' are supported, got {str(tool.get('type'))[:64]!r}"
        raise InvalidRequest(message, param=param, code="invalid_value")
    function = {name: item for name, item in tool.items() if name != "type" and item is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> object:
    if isinstance(choice, dict) and set(choice) == {"type", "name"} and choice["type"] == "function":
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice
