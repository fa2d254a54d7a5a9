"""OpenAI's tools on the wire: functions, the choice among them, and the calls of a conversation.

Pure. Sizes are bounded here; how a model writes its calls is in `tool_calls`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from runtime.errors import InvalidRequest

from .fields import CHAT_FIELDS, below, without_unused
from .grammar import MAX_GRAMMAR_BYTES, bound_depth
from .wire import WireModel, parse_strict_json

MAX_TOOLS = 128
MAX_CALLS = 128
MAX_CALL_ID_CHARS = 128
NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

# What in a schema says which keys an object has.
NAMING = ("properties", "patternProperties", "additionalProperties", "required", "$ref", "allOf", "anyOf", "oneOf")

Mode = Literal["none", "auto", "required"]


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    bound_depth(schema)
    if schema.get("type", "object") != "object":
        raise ValueError("must be a JSON schema of type 'object'")
    return schema if "type" in schema else {"type": "object", **schema}


class Function(WireModel):
    """A function that the model may call. Its arguments are held to `parameters` whether it is `strict` or not."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_parameters)] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> Mapping[str, Any]:
        """The schema of its arguments; none may be given where it names none."""
        return NO_PARAMETERS if self.parameters is None else self.parameters

    @property
    def text_of_arguments(self) -> str:
        """Their schema as JSON. One that names no argument at all allows none, instead of any."""
        schema = self.schema_of_arguments
        names = any(name in schema for name in NAMING)
        return json.dumps(schema if names else {**schema, "properties": {}}, ensure_ascii=False)


class Tool(WireModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates write it into the prompt."""
        described = {} if self.function.description is None else {"description": self.function.description}
        function = {"name": self.function.name} | described | {"parameters": dict(self.function.schema_of_arguments)}
        return {"type": self.type, "function": function}


class CalledFunction(WireModel):
    """A function that was called, and the text of its arguments: JSON, unless the model broke off or erred."""

    name: str = Field(pattern=NAME_PATTERN)
    arguments: str

    def read_arguments(self) -> dict[str, Any] | None:
        """The arguments as an object; None for a text that is none, or that no template could write."""
        try:
            arguments = parse_strict_json(self.arguments or "{}")
            bound_depth(arguments)
            json.dumps(arguments, ensure_ascii=False).encode()
        except (ValueError, RecursionError):  # a UnicodeEncodeError for half a surrogate pair is a ValueError too
            return None
        return arguments if isinstance(arguments, dict) else None


class ToolCall(WireModel):
    """A call that the model made in an earlier turn."""

    rules = below(CHAT_FIELDS, "messages[].tool_calls[]")

    id: str = Field(min_length=1, max_length=MAX_CALL_ID_CHARS)
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: they write the arguments as JSON themselves. Broken ones stay a text."""
        arguments = self.function.read_arguments()
        function = {
            "name": self.function.name,
            "arguments": self.function.arguments if arguments is None else arguments,
        }
        return {"id": self.id, "type": self.type, "function": function}


class ChosenFunction(TypedDict):
    """The name of the function to call."""

    name: str


class ChosenTool(TypedDict):
    """One function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(TypedDict):
    """The tools that may be called, or of which one must."""

    mode: Literal["auto", "required"]
    tools: list[ChosenTool]


class AllowedToolChoice(TypedDict):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoiceBody = Literal["none", "auto", "required"] | ChosenTool | AllowedToolChoice


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode` says if the model may or must call; `names` are the only functions that it may call (None: any).

    `named`: one function was named, to be called once.
    """

    mode: Mode = "auto"
    names: tuple[str, ...] | None = None
    named: bool = False

    def allows(self, name: str) -> bool:
        """True if the function may be called."""
        return self.names is None or name in self.names


def parse_tool_choice(value: object) -> ToolChoice:
    """Read OpenAI's `tool_choice`. Raises ValueError for any other form."""
    if value == "none" or value == "auto" or value == "required":
        return ToolChoice(value)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _allowed_tools(value)
    if (name := _function_name(value)) is not None:
        return ToolChoice("required", (name,), named=True)
    raise ValueError(
        "must be 'none', 'auto', 'required', {'type': 'function', 'function': {'name': …}} or "
        "{'type': 'allowed_tools', 'allowed_tools': {'mode': …, 'tools': […]}}"
    )


def _function_name(value: object) -> str | None:
    """The name in {"type": "function", "function": {"name": …}}; None for any other value."""
    chosen = _present(value)
    function = _present(chosen.get("function"))
    if set(chosen) != {"type", "function"} or chosen["type"] != "function" or set(function) != {"name"}:
        return None
    return function["name"] if isinstance(function["name"], str) else None


def _present(value: object) -> dict[str, Any]:
    """The fields of an object that are not null."""
    return without_unused({}, value) if isinstance(value, dict) else {}


def _allowed_tools(value: Mapping[str, Any]) -> ToolChoice:
    allowed = _present(value.get("allowed_tools"))
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if (mode != "auto" and mode != "required") or not isinstance(tools, list) or not tools:
        raise ValueError("allowed_tools must hold a mode, 'auto' or 'required', and a list of tools that is not empty")
    names = [_function_name(tool) for tool in tools]
    if len(names) > MAX_TOOLS or None in names:
        raise ValueError(f"allowed_tools takes at most {MAX_TOOLS} tools, each {{'type': 'function', 'function': …}}")
    return ToolChoice(mode, tuple(name for name in names if name is not None))


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Check the tools together, and against the choice. Raises InvalidRequest."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise InvalidRequest(f"tools: two functions are called {twice!r}", param="tools", code="invalid_value")
    n_bytes = sum(len(json.dumps(tool.function.schema_of_arguments, ensure_ascii=False).encode()) for tool in tools)
    if n_bytes > MAX_GRAMMAR_BYTES:
        message = f"tools: the parameters of all functions take at most {MAX_GRAMMAR_BYTES} bytes, got {n_bytes}"
        raise InvalidRequest(message, param="tools", code="invalid_value")
    if choice.mode == "required" and not tools:
        raise InvalidRequest("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if (unknown := next((name for name in choice.names or () if name not in names), None)) is not None:
        message = f"tool_choice names the function {unknown[:64]!r}, which is not among the tools"
        raise InvalidRequest(message, param="tool_choice", code="invalid_value")
