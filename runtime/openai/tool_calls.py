"""Formats of tool calls, one row per family of chat templates, and the grammar of an answer that may hold calls.

Pure. A call is `lead`, the function's name, `middle`, its arguments as a JSON object, and `tail`. The grammar holds the
model to that form and to each function's schema, so that every call that is read can be parsed.
"""

import hashlib
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runtime.requests import Grammar

from .tools import Function, Tool


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One format of calls.

    `marker` begins the first call and never occurs in text; without one, an answer that begins with `{` is a call.
    `between` separates two calls; None if a model writes only one. `id_chars` is the length of a call's id, if the
    template requires one. `hints`: a template that renders no calls has this format if its text holds all of them.
    """

    name: str
    marker: str
    opening: str
    lead: str
    middle: str
    tail: str
    between: str | None
    closing: str
    hints: tuple[str, ...] = ()
    id_chars: int | None = None

    @property
    def pieces(self) -> tuple[str, ...]:
        """The parts of the format that may hold control tokens."""
        return self.marker, self.opening, self.lead, self.middle, self.tail, self.between or "", self.closing

    def writes(self, conversation: str, turn: str) -> bool:
        """True if a template writes calls in this format.

        `conversation` is its rendering of `probe`, `turn` the part that begins with the model's turn.
        """
        head = f"{self.marker}{self.opening}{self.lead}{PROBE_NAME}{self.middle}{PROBE_ARGUMENTS}"
        return head in conversation if self.marker else turn.lstrip().startswith(head)


# The call that each template renders, to find its format.
PROBE_NAME, PROBE_ARGUMENTS = "get_weather", '{"city": "Oslo"}'
# Some templates require nine letters or digits.
_PROBE_ID = "abcdefghi"
_PART = "urn:deskside:"
_NAME, _ARGUMENTS, _PARAMETERS = '{"name": "', '", "arguments": ', '", "parameters": '

FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        "hermes", "<tool_call>", "\n", _NAME, _ARGUMENTS, "}\n</tool_call>", "\n<tool_call>\n", "",
        hints=("<tool_call>", '"name"', '"arguments"'),
    ),
    ToolFormat("mistral", "[TOOL_CALLS]", "[", _NAME, _ARGUMENTS, "}", ", ", "]", id_chars=9),
    ToolFormat("mistral-spaced", "[TOOL_CALLS]", " [", _NAME, _ARGUMENTS, "}", ", ", "]", id_chars=9),
    ToolFormat("mistral-args", "[TOOL_CALLS]", "", "", "[ARGS]", "", "[TOOL_CALLS]", "", id_chars=9),
    ToolFormat(
        "granite", "<|tool_call|>", "[", _NAME, _ARGUMENTS, "}", ", ", "]", hints=("<|tool_call|>",)
    ),
    ToolFormat("nemotron", "<TOOLCALL>", "[", _NAME, _ARGUMENTS, "}", ", ", "]</TOOLCALL>"),
    ToolFormat("minimax", "<tool_calls>", "\n", _NAME, _ARGUMENTS, "}", "\n", "\n</tool_calls>"),
    ToolFormat("apriel", "<tool_calls>", "[", _NAME, _ARGUMENTS, "}", ", ", "]</tool_calls>"),
    ToolFormat("llama", "", "", _NAME, _PARAMETERS, "}", None, ""),
    ToolFormat("json", "", "", _NAME, _ARGUMENTS, "}", None, ""),
)  # fmt: skip


def probe() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages with a call and its result, and the tools, for a template to render."""
    function: dict[str, Any] = {"name": PROBE_NAME, "arguments": json.loads(PROBE_ARGUMENTS)}
    call = {"id": _PROBE_ID, "type": "function", "function": function}
    asked = {"role": "user", "content": "?"}
    answered = {"role": "tool", "tool_call_id": _PROBE_ID, "content": "8 C"}
    tool = Tool(type="function", function=Function(name=PROBE_NAME, description="weather"))
    return [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, answered], [tool.for_template()]


def recognise(conversation: str, turn: str, template_text: str) -> ToolFormat | None:
    """The format in which a template rendered `probe`; if it rendered no call, the format that its text hints at.

    `turn` is the conversation from the beginning of the model's turn, `template_text` all text that the template may
    write. None if the format is unknown.
    """
    if json.loads(PROBE_ARGUMENTS)["city"] in conversation:
        return next((form for form in FORMATS if form.writes(conversation, turn)), None)
    return next((form for form in FORMATS if form.hints and all(hint in template_text for hint in form.hints)), None)


def tool_grammar(
    form: ToolFormat,
    schemas: Mapping[str, str],
    control: Mapping[str, int],
    *,
    must_call: bool,
    parallel: bool,
    text: Grammar | None = None,
) -> Grammar:
    """The grammar of an answer: calls, or unless `must_call`, a text, which the grammar `text` may constrain.

    `schemas` maps each function's name to the schema of its arguments, as llguidance takes it; `control` maps control
    tokens' texts to ids.
    """
    text = None if must_call else text
    if text is not None and not form.marker and text.kind == "json_schema":
        return _either(form, schemas, text)
    rules = [f"one: {_terms(form.lead, control)} called {_terms(form.tail, control)}"]
    called = []
    for number, (name, schema) in enumerate(schemas.items()):
        called.append(f"{_terms(name + form.middle, control)} arguments{number}")
        rules.append(f"arguments{number}: %json {schema}")
    rules.append(f"called: {' | '.join(called)}")
    more = f"({_terms(form.between, control)} one)*" if parallel and form.between is not None else ""
    rules.append(f"calls: {_terms(form.opening, control)} one {more} {_terms(form.closing, control)}")
    start = _start(form, control, must_call=must_call, fits=text is not None)
    return Grammar("lark", "\n".join([*start, *rules]), "tools", text=text)


def _either(form: ToolFormat, schemas: Mapping[str, str], text: Grammar) -> Grammar:
    """Calls in plain JSON, or a text that is JSON too: one schema, since both begin alike."""
    arguments = json.loads(form.lead + PROBE_NAME + form.middle + "{}" + form.tail)
    argument_field = next(name for name in arguments if name != "name")
    parts = [{"$id": f"{_PART}text", **json.loads(text.source)}]
    for number, (name, schema) in enumerate(schemas.items()):
        # With an address of its own a part's references mean the part.
        fields = {"name": {"const": name}, argument_field: {"$id": f"{_PART}{number}", **json.loads(schema)}}
        call = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        parts.append(call)
    options = json.loads(next(iter(schemas.values()))).get("x-guidance", {})
    if isinstance(options, dict):  # llguidance refuses anything else
        options = options | {"lenient": True}
    return Grammar("json_schema", json.dumps({"anyOf": parts, "x-guidance": options}, ensure_ascii=False), "tools")


def _start(form: ToolFormat, control: Mapping[str, int], *, must_call: bool, fits: bool) -> list[str]:
    if must_call:
        return [f"start: {_terms(form.marker, control)} calls"]
    if fits:
        return [f"start: @text | {_terms(form.marker, control)} calls"]
    if not form.marker:
        return ["start: TEXT | calls", r"TEXT: /(\s*[^{\s](.|\n)*)?/"]
    mark = re.escape(form.marker).replace("/", r"\/")
    text = rf"TEXT: /(.|\n)*/ & ~/(.|\n)*{mark}(.|\n)*/"
    if form.marker in control:
        return [f"start: TEXT | TEXT? {_terms(form.marker, control)} calls", text]
    return ["start: TEXT | begun calls", text, rf"begun[lazy]: /(.|\n)*{mark}/"]


def _terms(text: str | None, control: Mapping[str, int]) -> str:
    """A text as Lark terms: control tokens by their ids, the rest quoted."""
    if not text:
        return ""
    known = "|".join(map(re.escape, control)) or "(?!)"
    parts = (part for part in re.split(f"({known})", text) if part)
    return " ".join(f"<[{control[part]}]>" if part in control else json.dumps(part) for part in parts)


_SPACE = " \t\r\n"
_NAME_CHARACTERS = string.ascii_letters + string.digits + "_-"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """The next piece of call number `index`: its `name` in the first delta only, and a piece of its arguments."""

    index: int
    id: str
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """The content of a piece of an answer, then its calls: at most one delta for each call."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class ToolCallReader:
    """Splits the text of one answer into content and calls. Feed it every piece, then `finish`.

    With `calls_first`, an answer with calls begins with the first of them, and any other answer is text throughout.
    """

    def __init__(self, form: ToolFormat, request_id: str, *, calls_first: bool = False) -> None:
        self._form = form
        self._calls_first = calls_first
        self._request_id = request_id
        self._state: Literal["text", "only text", "head", "arguments"] = "text"
        self._buffer = ""
        self._head = re.compile(re.escape(form.lead) + "([a-zA-Z0-9_-]+)" + re.escape(form.middle))
        self._depth, self._in_string, self._escaped = 0, False, False
        self.n_calls = 0

    def feed(self, text: str) -> ToolDelta:
        """Add a piece of text; return the content and calls that are certain by now."""
        self._buffer += text
        content, deltas = "", dict[int, CallDelta]()
        state = None
        while state != self._state:
            state = self._state
            if state in ("text", "only text"):
                content += self._text()
            elif state == "head":
                self._read_head(deltas)
            else:
                self._read_arguments(deltas)
        return ToolDelta(content, tuple(deltas.values()))

    def finish(self) -> str:
        """End the answer; return the content that was held back as a possible beginning of a call."""
        held, self._buffer = self._buffer, ""
        return held if self._state in ("text", "only text") else ""

    def _text(self) -> str:
        marker = self._form.marker
        if self._state == "only text":
            return self._take(len(self._buffer))
        if self._calls_first:
            begins = self._begins_a_call()
            if begins is not None:
                self._state = "head" if begins else "only text"
                self._take(len(marker) if begins else 0)
            return ""
        if not marker:
            if self._buffer:
                self._state = "head" if self._buffer[0] == "{" else "only text"
            return ""
        start = self._buffer.find(marker)
        if start >= 0:
            content = self._take(start).rstrip(_SPACE)
            self._take(len(marker))
            self._state = "head"
            return content
        longest = min(len(self._buffer), len(marker) - 1)
        keep = next((n for n in range(longest, 0, -1) if marker.startswith(self._buffer[-n:])), 0)
        # White space before a call belongs neither to the text nor to the call.
        return self._take(len(self._buffer[: len(self._buffer) - keep].rstrip(_SPACE)))

    def _begins_a_call(self) -> bool | None:
        """True if the buffer, which is all of the answer so far, begins with a call; None if that is still open."""
        text, marker, lead, middle = self._buffer, self._form.marker, self._form.lead, self._form.middle
        opening = marker or lead
        if len(text) < len(opening):
            return None if opening.startswith(text) else False
        if marker or not text.startswith(lead):
            return text.startswith(opening)
        if self._head.match(text):
            return True
        rest = text[len(lead) :].lstrip(_NAME_CHARACTERS)
        return None if middle.startswith(rest) else False

    def _read_head(self, deltas: dict[int, CallDelta]) -> None:
        found = self._head.search(self._buffer)
        if found is None:
            return
        self._take(found.end())
        index, self.n_calls = self.n_calls, self.n_calls + 1
        deltas[index] = CallDelta(index, self._id(index), found[1], "")
        self._state = "arguments"

    def _read_arguments(self, deltas: dict[int, CallDelta]) -> None:
        index = self.n_calls - 1
        piece = self._take(self._end_of_arguments())
        if piece:
            before = deltas.get(index, CallDelta(index, self._id(index), None, ""))
            deltas[index] = CallDelta(index, before.id, before.name, before.arguments + piece)

    def _end_of_arguments(self) -> int:
        """The length of the arguments in the buffer; at their end the state becomes `head` again."""
        for place, character in enumerate(self._buffer):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "head"
                    return place + 1
        return len(self._buffer)

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _id(self, index: int) -> str:
        """An id made from the request's, so that a streamed and a whole answer give the same."""
        drawn = hashlib.sha256(f"{self._request_id}/{index}".encode()).hexdigest()
        return drawn[: self._form.id_chars] if self._form.id_chars else f"call_{drawn[:24]}"
