"""How models write tool calls, one row per family of chat templates, and the grammar of an answer that may hold calls.

Pure. A call is `lead`, the function's name, `middle`, its arguments as a JSON object, and `tail`. The grammar holds the
model to that form and to each function's schema, so that whatever is read as a call can be parsed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .openai_tools import Function, Tool
from .sequence import Grammar

# As Python's json.dumps and the templates' `tojson` write them, which is what models were trained on.
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form of writing calls.

    `marker` begins the first call and never stands in text; without one, an answer that begins with `{` is a call.
    `between` stands between two calls; None if a model writes only one. `id_chars` is how long a call's id is where the
    template minds. `hints` are texts that a template of this family holds, all of them, if it writes no calls itself.
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
        """Every text of it that may hold a control token."""
        return self.marker, self.opening, self.lead, self.middle, self.tail, self.between or "", self.closing

    def writes(self, conversation: str, turn: str) -> bool:
        """Whether a template that wrote PROBE as `conversation`, its call beginning `turn`, does so in this form."""
        head = f"{self.marker}{self.opening}{self.lead}{PROBE_NAME}{self.middle}{PROBE_ARGUMENTS}"
        return head in conversation if self.marker else turn.lstrip().startswith(head)


# A call that a template is let write, to see how it does.
PROBE_NAME, PROBE_ARGUMENTS = "get_weather", '{"city": "Oslo"}'
# Nine letters or digits, as some templates insist.
_PROBE_ID = "abcdefghi"
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
    """Messages with a call and its result, and the tools, for a template to write."""
    function: dict[str, Any] = {"name": PROBE_NAME, "arguments": json.loads(PROBE_ARGUMENTS)}
    call = {"id": _PROBE_ID, "type": "function", "function": function}
    asked = {"role": "user", "content": "?"}
    answered = {"role": "tool", "tool_call_id": _PROBE_ID, "content": "8 C"}
    tool = Tool(type="function", function=Function(name=PROBE_NAME, description="weather"))
    return [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, answered], [tool.for_template()]


def recognise(conversation: str, turn: str, template_text: str) -> ToolFormat | None:
    """The format in which a template wrote PROBE; where it wrote no call at all, the one it hints at.

    `turn` is the conversation from where the model's turn begins, `template_text` all text that the template may write.
    None for a form that is not known.
    """
    if json.loads(PROBE_ARGUMENTS)["city"] in conversation:
        return next((form for form in FORMATS if form.writes(conversation, turn)), None)
    return next((form for form in FORMATS if form.hints and all(hint in template_text for hint in form.hints)), None)


def tool_grammar(
    form: ToolFormat, tools: Sequence[Tool], control: Mapping[str, int], *, must_call: bool, parallel: bool
) -> Grammar:
    """The grammar of an answer: calls, or unless it must call, any text. `control` are control tokens by their text."""
    rules = [f"one: {_terms(form.lead, control)} called {_terms(form.tail, control)}"]
    called = []
    for number, tool in enumerate(tools):
        called.append(f"{_terms(tool.function.name + form.middle, control)} arguments{number}")
        schema = json.dumps({**tool.function.schema_of_arguments, "x-guidance": _SEPARATORS}, ensure_ascii=False)
        rules.append(f"arguments{number}: %json {schema}")
    rules.append(f"called: {' | '.join(called)}")
    more = f"({_terms(form.between, control)} one)*" if parallel and form.between is not None else ""
    rules.append(f"calls: {_terms(form.opening, control)} one {more} {_terms(form.closing, control)}")
    return Grammar("lark", "\n".join([*_start(form, control, must_call=must_call), *rules]), "tools")


def _start(form: ToolFormat, control: Mapping[str, int], *, must_call: bool) -> list[str]:
    if must_call:
        return [f"start: {_terms(form.marker, control)} calls"]
    if not form.marker:
        return ["start: TEXT | calls", r"TEXT: /(\s*[^{\s](.|\n)*)?/"]
    mark = re.escape(form.marker).replace("/", r"\/")
    text = rf"TEXT: /(.|\n)*/ & ~/(.|\n)*{mark}(.|\n)*/"
    if form.marker in control:
        return [f"start: TEXT | TEXT? {_terms(form.marker, control)} calls", text]
    return ["start: TEXT | begun calls", text, rf"begun[lazy]: /(.|\n)*{mark}/"]


def _terms(text: str | None, control: Mapping[str, int]) -> str:
    """A text as Lark terms: control tokens by their number, the rest quoted."""
    if not text:
        return ""
    known = "|".join(map(re.escape, control)) or "(?!)"
    parts = (part for part in re.split(f"({known})", text) if part)
    return " ".join(f"<[{control[part]}]>" if part in control else json.dumps(part) for part in parts)
