"""The body of `/v1/responses`: its fields, and its translation to the body of a chat completion.

Pure. No state is kept between requests, so fields that refer to an earlier response are refused. The chat's body checks
the fields that it shares; `Origins` maps its fields back to this body.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Len
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from typing_extensions import TypedDict

from runtime.errors import InvalidRequest
from runtime.openai.chat import MAX_MESSAGES, ChatBody
from runtime.openai.fields import LOGPROBS, RESPONSE_FIELDS, Table, below, read_fields, without_unused
from runtime.openai.grammar import FormatSchema, ObjectFormat, TextFormat
from runtime.openai.tools import MAX_CALL_ID_CHARS, MAX_TOOLS, CalledFunction, Function
from runtime.openai.wire import (
    TEXT_PARTS,
    RefusalPart,
    TableBody,
    WireModel,
    checked_later_as,
    invalid_request,
    plain_text,
)

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS, MAX_METADATA_VALUE_CHARS = 64, 512

# Fields with the same meaning in a chat's body, which checks them.
PASSED: tuple[str, ...] = ("model", "stream", "temperature", "top_p", "parallel_tool_calls")
PASSED += ("seed", "top_k", "min_p", "presence_penalty", "frequency_penalty")

# Part types that clients write, and those of earlier responses.
_TEXT_PARTS = {"input_text": "text", "output_text": "text", **TEXT_PARTS}
_ITEM_RULES = below(RESPONSE_FIELDS, "input[]")


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


_TextParts = Annotated[list[ResponseTextPart | RefusalPart], Len(1)]
PlainText = Annotated[str, PlainValidator(_plain_text, json_schema_input_type=str | _TextParts)]


class MessageItem(WireModel):
    """A message of the input."""

    rules = _ITEM_RULES

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: PlainText


class CallItem(CalledFunction):
    """A call that the model made earlier."""

    rules = _ITEM_RULES

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=MAX_CALL_ID_CHARS)


class ResultItem(WireModel):
    """The result of a call. `name`, of the function, changes nothing."""

    rules = _ITEM_RULES

    type: Literal["function_call_output"]
    call_id: str
    output: PlainText
    name: str | None = None


class ReasoningItem(WireModel):
    """The reasoning that came with an earlier answer of another model; it is left out."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning"]


Item = MessageItem | CallItem | ResultItem | ReasoningItem
_Input = str | Annotated[list[Item], Len(1, MAX_MESSAGES)]
_ITEMS: dict[object, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": ResultItem,
    "reasoning": ReasoningItem,
}


class ResponseSchemaFormat(FormatSchema):
    """JSON that matches a schema."""

    type: Literal["json_schema"]


class TextOptions(WireModel):
    """The form of the text; the format is checked as a chat's `response_format`."""

    rules = below(RESPONSE_FIELDS, "text")

    format: Annotated[
        dict[str, Any] | None, checked_later_as(TextFormat | ObjectFormat | ResponseSchemaFormat | None)
    ] = None


class ReasoningOptions(WireModel):
    """Options of reasoning: none has a use, since the models here do not reason apart from their answer."""

    rules = below(RESPONSE_FIELDS, "reasoning")


class ResponseStreamOptions(WireModel):
    """Options of the stream, of which none changes anything."""

    rules = below(RESPONSE_FIELDS, "stream_options")


class PromptCacheOptions(WireModel):
    """Options of a hosted cache; here every prefix is shared."""

    rules = below(RESPONSE_FIELDS, "prompt_cache_options")


class ResponseTool(Function):
    """A function that the model may call, checked as a chat's tool."""

    rules = below(RESPONSE_FIELDS, "tools[]")

    type: Literal["function"]


_Tools = Annotated[list[ResponseTool], Len(0, MAX_TOOLS)]


class ChosenFunctionTool(TypedDict):
    """The one function that the model must call."""

    type: Literal["function"]
    name: str


class AllowedFunctionTools(TypedDict):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunctionTool]


_ToolChoice = Literal["none", "auto", "required"] | ChosenFunctionTool | AllowedFunctionTools


def _includable(value: str) -> str:
    known = (*RESPONSE_FIELDS["include"].accepts, *RESPONSE_FIELDS["include"].ignores)
    if value not in known:
        raise ValueError(f"must be one of {', '.join(map(repr, known))}")
    return value


class ResponseBody(TableBody):
    """The used fields of `/v1/responses` that a chat's body does not have in this form; `PASSED` lists the others."""

    table: ClassVar[Table] = below(RESPONSE_FIELDS)

    input: Annotated[str | list[Any], PlainValidator(_text_or_items, json_schema_input_type=_Input)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = TextOptions()
    tools: Annotated[list[Any], Len(0, MAX_TOOLS), checked_later_as(_Tools)] = Field(default_factory=list)
    tool_choice: Annotated[Any, checked_later_as(_ToolChoice | None)] = None
    include: list[Annotated[str, AfterValidator(_includable)]] = Field(default_factory=list)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA)
    truncation: Literal["auto", "disabled"] = "disabled"
    reasoning: ReasoningOptions = ReasoningOptions()
    stream_options: ResponseStreamOptions = ResponseStreamOptions()
    prompt_cache_options: PromptCacheOptions = PromptCacheOptions()

    @property
    def logprobs(self) -> bool:
        """True if the client asked for log-probabilities."""
        return LOGPROBS in self.include

    @classmethod
    def properties_checked_elsewhere(cls) -> dict[str, Any]:
        """The JSON schemas of the fields that the chat's body checks."""
        properties = ChatBody.model_json_schema()["properties"]
        return {name: properties[name] for name in PASSED}


@dataclass(slots=True)
class Origins:
    """The paths in this body from which the chat's messages and calls come."""

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
    """A parsed body: its own fields, the chat's body made of it, and the origins of that body's fields."""

    own: ResponseBody
    chat: Mapping[str, Any]
    origins: Origins


def parse_response(payload: object) -> ParsedResponse:
    """Read the body of `/v1/responses`. Raises InvalidRequest with `param` and the value given."""
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
    if own.logprobs:
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
    if own.top_logprobs and not own.logprobs:
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
        elif isinstance(item, CallItem):
            # The calls of a turn are items here; in a chat they are one message, with the text before them.
            if not messages or messages[-1]["role"] != "assistant":
                add({"role": "assistant", "content": None}, where)
            calls = messages[-1].setdefault("tool_calls", [])
            origins.calls[len(messages) - 1, len(calls)] = where
            called = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": called})
    return messages


def _item(value: object, where: str) -> Item:
    kind = value.get("type") if isinstance(value, dict) else None
    kind = "message" if kind is None else kind
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
    function = without_unused(ResponseTool.rules, tool)
    del function["type"]
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> object:
    """The choice in a chat's form, if it has the form of a response's."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_chosen_function(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    return _chosen_function(choice)


def _chosen_function(choice: object) -> object:
    present = without_unused({}, choice) if isinstance(choice, dict) else {}
    if set(present) == {"type", "name"} and present["type"] == "function":
        return {"type": "function", "function": {"name": present["name"]}}
    return choice
