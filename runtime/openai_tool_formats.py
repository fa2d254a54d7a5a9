"""How models write tool calls, one row per family of chat templates, and the grammar of an answer that may hold calls.

Pure. A call is `lead`, the function's name, `middle`, its arguments as a JSON object, and `tail`. The grammar holds the
model to that form and to each function's schema, so that whatever is read as a call can be parsed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .openai_tools import Tool
from .sequence import Grammar

# As Python's json.dumps and the templates' `tojson` write them, which is what models were trained on.
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form of writing calls.

    `marker` begins the first call and never stands in text; without one, an answer that begins with `{` is a call.
    `between` stands between two calls; None if a model writes only one. `id_chars` is how long a call's id is where the
    template minds. A template is of this family if its text holds all of `holds` and none of `lacks`.
    """

    name: str
    marker: str
    opening: str
    lead: str
    middle: str
    tail: str
    between: str | None
    closing: str
    holds: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    id_chars: int | None = None

    @property
    def pieces(self) -> tuple[str, ...]:
        """Every text of it that may hold a control token."""
        return self.marker, self.opening, self.lead, self.middle, self.tail, self.between or "", self.closing


_NAME, _ARGUMENTS, _PARAMETERS = '{"name": "', '", "arguments": ', '", "parameters": '
# Forms that are not JSON, or not in this order: their templates also hold some of the texts that are looked for.
_OTHERS = ("<function=", "<arg_key>", "<parameter=")

FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        "mistral-args", "[TOOL_CALLS]", "", "", "[ARGS]", "", "[TOOL_CALLS]", "", ("[TOOL_CALLS]", "[ARGS]"),
        ("[CALL_ID]",), id_chars=9,
    ),
    ToolFormat(
        "mistral-spaced", "[TOOL_CALLS]", " [", _NAME, _ARGUMENTS, "}", ", ", "]", ("[TOOL_CALLS] [",),
        ("[ARGS]",), id_chars=9,
    ),
    ToolFormat(
        "mistral", "[TOOL_CALLS]", "[", _NAME, _ARGUMENTS, "}", ", ", "]", ("[TOOL_CALLS]",), ("[ARGS]",), id_chars=9
    ),
    ToolFormat(
        "hermes", "<tool_call>", "\n", _NAME, _ARGUMENTS, "}\n</tool_call>", "\n<tool_call>\n", "",
        ("<tool_call>", '"name"', '"arguments"'), _OTHERS,
    ),
    ToolFormat("granite", "<|tool_call|>", "[", _NAME, _ARGUMENTS, "}", ", ", "]", ("<|tool_call|>",), _OTHERS),
    ToolFormat("llama", "", "", _NAME, _PARAMETERS, "}", None, "", ('"name"', '"parameters"'), _OTHERS),
    ToolFormat("json", "", "", _NAME, _ARGUMENTS, "}", None, "", ('"name"', '"arguments"'), _OTHERS),
)  # fmt: skip


def recognise(template_text: str) -> ToolFormat | None:
    """The format that the text of a chat template shows; None if it shows none that is known."""
    for row in FORMATS:
        if all(text in template_text for text in row.holds) and not any(text in template_text for text in row.lacks):
            return row
    return None


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
