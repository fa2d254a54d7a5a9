"""Every field of OpenAI's request bodies and its treatment: used, ignored or refused.

A path names a field: `messages[].content[].text`. Bodies are read by this table, FIELDS.md is written from it
(`python -m runtime.openai.fields > runtime/openai/FIELDS.md`), and a test compares it with the installed client, so
that a field or value of a new release is decided before a request brings it. A field below a refused or ignored one has
no row. `null` counts as absent everywhere, in unknown fields too; any other unknown field is refused by name.
"""

import difflib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import InvalidRequest

Treatment = Literal["used", "ignored", "refused"]


@dataclass(frozen=True, slots=True)
class FieldRule:
    """The treatment of a field; `path` begins at the body.

    Of a field with named values, `accepts` are the ones that are used, or that ask for nothing in a refused field;
    `ignores` and `refuses` are the others that OpenAI publishes. `ours`: not one of OpenAI's.
    """

    path: str
    treatment: Treatment
    accepts: tuple[Any, ...] = ()
    ignores: tuple[Any, ...] = ()
    refuses: tuple[Any, ...] = ()
    note: str = ""
    ours: bool = False

    @property
    def name(self) -> str:
        """The field's own name."""
        return self.path.rpartition(".")[2]

    def harmless(self, value: object) -> bool:
        """True if `value`, of a refused field, has no effect."""
        return any(type(value) is type(fine) and value == fine for fine in self.accepts)


Table = Mapping[str, FieldRule]


def _used(names: str, **more: Any) -> list[FieldRule]:
    return [FieldRule(name, "used", **more) for name in names.split()]


def _ignored(names: str, **more: Any) -> list[FieldRule]:
    return [FieldRule(name, "ignored", **more) for name in names.split()]


def _refused(names: str, *accepts: Any, **more: Any) -> list[FieldRule]:
    return [FieldRule(name, "refused", accepts, **more) for name in names.split()]


def _table(*groups: Iterable[FieldRule]) -> Table:
    rules = [rule for group in groups for rule in group]
    table = {rule.path: rule for rule in rules}
    assert len(table) == len(rules), "a field has two rows"
    return table


_ROLES = ("developer", "system", "user", "assistant")
_MODES = ("none", "auto", "required")
_SCHEMA = "only schema and strict matter"
_PREFIXES = "every prefix is shared here"
_NO_STORE = "nothing is kept, nobody is billed"

_TEXT_WRITING = (
    *_used("model stream temperature top_p seed stop n max_tokens logprobs logit_bias"),
    *_used("presence_penalty frequency_penalty stream_options stream_options.include_usage"),
    *_ignored("stream_options.include_obfuscation", note="no padding is sent"),
    *_used("stream_options.continuous_usage_stats", note="token counts in every chunk", ours=True),
    *_used("top_k min_p ignore_eos grammar regex choice", ours=True),
    *_used("structured_outputs guided_json guided_regex guided_choice guided_grammar", note="of vLLM", ours=True),
    *_ignored("guided_decoding_backend", note="there is one", ours=True),
    *_ignored("user", note=_NO_STORE),
    *_refused("cache_prompt", True, ours=True),
)

CHAT_FIELDS = _table(
    _TEXT_WRITING,
    _used("messages messages[].content messages[].content[].text messages[].content[].refusal"),
    _used("messages[].role", accepts=(*_ROLES, "tool"), refuses=("function",)),
    _used("messages[].name", note="given to the chat template"),
    _used("messages[].content[].type", accepts=("text", "refusal"), refuses=("image_url", "input_audio", "file")),
    _ignored("messages[].content[].prompt_cache_breakpoint", note=_PREFIXES),
    _used("messages[].refusal", note="the text of an assistant's message without content"),
    _used("messages[].reasoning_content", note="given to the chat template", ours=True),
    _ignored("messages[].annotations", ours=True),
    _refused("messages[].audio messages[].function_call"),
    _used("messages[].tool_calls messages[].tool_call_id messages[].tool_calls[].id messages[].tool_calls[].function"),
    _used("messages[].tool_calls[].type", accepts=("function",), refuses=("custom",)),
    _used("messages[].tool_calls[].function.name messages[].tool_calls[].function.arguments"),
    _ignored("messages[].tool_calls[].index", ours=True),
    _used("max_completion_tokens top_logprobs response_format response_format.json_schema"),
    _used("response_format.type", accepts=("text", "json_schema", "json_object")),
    _used("response_format.json_schema.schema response_format.json_schema.strict"),
    _ignored("response_format.json_schema.name response_format.json_schema.description", note=_SCHEMA),
    _used("response_format.schema", note="of a json_object", ours=True),
    _used("tools tools[].function tools[].function.name tools[].function.description"),
    _used("tools[].function.parameters tools[].function.strict parallel_tool_calls"),
    _used("tools[].type", accepts=("function",), refuses=("custom",)),
    _used("tool_choice", accepts=_MODES),
    _used("tool_choice.type", accepts=("function", "allowed_tools"), refuses=("custom",)),
    _used("tool_choice.function tool_choice.function.name tool_choice.allowed_tools tool_choice.allowed_tools.tools"),
    _used("tool_choice.allowed_tools.mode", accepts=("auto", "required")),
    _ignored("metadata store service_tier safety_identifier", note=_NO_STORE),
    _ignored("prompt_cache_key prompt_cache_options prompt_cache_retention", note=_PREFIXES),
    _ignored("prediction", note="a hint for speed; no answer depends on it"),
    _refused("functions", [], note="deprecated; send tools"),
    _refused("function_call", "none", "auto", note="deprecated; send tool_choice"),
    _refused("modalities", ["text"], refuses=("audio",)),
    _refused("audio web_search_options moderation"),
    _refused("verbosity", "medium", refuses=("low", "high")),
    _refused("reasoning_effort", "none", refuses=("minimal", "low", "medium", "high", "xhigh", "max")),
)

COMPLETION_FIELDS = _table(
    _TEXT_WRITING,
    _used("prompt"),
    _ignored("metadata store service_tier safety_identifier", note=_NO_STORE, ours=True),
    _ignored("prompt_cache_key prompt_cache_retention", note=_PREFIXES, ours=True),
    _used("echo", note="with logprobs the prompt's too; max_tokens may then be 0"),
    _refused("suffix", "", note="no model here is asked to fill a gap"),
    _refused("best_of", 1, note="ask for n answers with logprobs, and choose"),
)

LOGPROBS = "message.output_text.logprobs"
_OTHER_ITEMS = (
    "file_search_call", "computer_call", "computer_call_output", "web_search_call", "tool_search_call",
    "tool_search_output", "additional_tools", "configuration_update", "compaction", "image_generation_call",
    "code_interpreter_call", "local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output",
    "apply_patch_call", "apply_patch_call_output", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response",
    "mcp_call", "custom_tool_call_output", "custom_tool_call", "compaction_trigger", "item_reference", "program",
    "program_output",
)  # fmt: skip
_OTHER_TOOLS = (
    "file_search", "computer", "computer_use_preview", "web_search", "web_search_2025_08_26", "mcp",
    "code_interpreter", "programmatic_tool_calling", "image_generation", "local_shell", "shell", "custom", "namespace",
    "tool_search", "web_search_preview", "web_search_preview_2025_03_11", "apply_patch",
)  # fmt: skip
_OTHER_CHOICES = (
    "file_search", "web_search_preview", "computer", "computer_use_preview", "computer_use",
    "web_search_preview_2025_03_11", "image_generation", "code_interpreter", "mcp", "custom",
    "programmatic_tool_calling", "apply_patch", "shell",
)  # fmt: skip
_OTHER_OUTPUT = (
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
)  # fmt: skip

RESPONSE_FIELDS = _table(
    _used("model stream temperature top_p parallel_tool_calls"),
    _used("seed top_k min_p presence_penalty frequency_penalty", ours=True),
    _used("input input[].content input[].content[].text input[].content[].refusal"),
    _used("input[].role", accepts=_ROLES),
    _used("input[].type", accepts=("message", "function_call", "function_call_output"), ignores=("reasoning",),
          refuses=_OTHER_ITEMS),
    _used("input[].content[].type", accepts=("input_text", "output_text", "refusal"),
          refuses=("input_image", "input_file", "input_audio")),
    _ignored("input[].content[].annotations input[].content[].logprobs"),
    _ignored("input[].content[].prompt_cache_breakpoint input[].output[].prompt_cache_breakpoint", note=_PREFIXES),
    _ignored("input[].id input[].status input[].phase", note="as they came in an earlier output"),
    _used("input[].call_id input[].name input[].arguments input[].output input[].output[].text"),
    _used("input[].output[].type", accepts=("input_text",), refuses=("input_image", "input_file")),
    _refused("input[].async", False),
    _refused("input[].caller", {"type": "direct"}),
    _refused("input[].namespace"),
    _used("instructions max_output_tokens metadata top_logprobs"),
    _used("include", accepts=(LOGPROBS,), ignores=_OTHER_OUTPUT, note="the rest is nothing that is ever put out here"),
    _used("text text.format text.format.schema text.format.strict"),
    _used("text.format.type", accepts=("text", "json_schema", "json_object")),
    _ignored("text.format.name text.format.description", note=_SCHEMA),
    _refused("text.verbosity", "medium", refuses=("low", "high")),
    _used("tools tools[].name tools[].description tools[].parameters tools[].strict"),
    _used("tools[].type", accepts=("function",), refuses=_OTHER_TOOLS),
    _refused("tools[].async tools[].defer_loading", False),
    _refused("tools[].allowed_callers", ["direct"], refuses=("programmatic",)),
    _ignored("tools[].output_schema"),
    _used("tool_choice", accepts=_MODES),
    _used("tool_choice.type", accepts=("function", "allowed_tools"), refuses=_OTHER_CHOICES),
    _used("tool_choice.name tool_choice.tools"),
    _used("tool_choice.mode", accepts=("auto", "required")),
    _used("truncation", accepts=("auto", "disabled"), note="what does not fit is refused, never cut"),
    _used("reasoning", note="of a model that does not reason"),
    _refused("reasoning.effort", "none", refuses=("minimal", "low", "medium", "high", "xhigh", "max")),
    _refused("reasoning.mode", "standard", refuses=("pro",)),
    _ignored("reasoning.summary reasoning.generate_summary reasoning.context"),
    _used("stream_options"),
    _ignored("stream_options.include_obfuscation", note="no padding is sent"),
    _used("prompt_cache_options"),
    _ignored("prompt_cache_options.mode prompt_cache_options.ttl prompt_cache_options.comparison_response_id"),
    _refused("prompt_cache_options.prewarm", False),
    _ignored("prompt_cache_key prompt_cache_retention", note=_PREFIXES),
    _ignored("user store service_tier safety_identifier", note=_NO_STORE),
    _ignored("image max_tool_calls", note="there are no images and no tools of the server"),
    _refused("previous_response_id conversation prompt", note="nothing is kept; send the whole input"),
    _refused("moderation"),
    _refused("background", False),
    _refused("background_options", {}, {"completion_window": "soonest"}),
    _refused("context_management", []),
    _refused("access_programs", {}, {"cyber": "standard"}),
)  # fmt: skip

DECISION_FIELDS = _table(
    _used("model input input[].content input[].content[].text input[].content[].refusal input[].content[].data"),
    _used("input[].role", accepts=_ROLES),
    _used("input[].type", accepts=("message",),
          refuses=("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output")),
    _used("input[].content[].type", accepts=("input_text", "output_text", "refusal", "input_json"),
          refuses=("input_image",)),
    _ignored("input[].content[].prompt_cache_breakpoint", note=_PREFIXES),
    _ignored("input[].phase"),
    _used("questions questions[].name questions[].instructions questions[].instructions[].text"),
    _used("questions[].type", accepts=("predicate", "choice", "score")),
    _used("questions[].instructions[].data"),
    _used("questions[].instructions[].type", accepts=("input_text", "input_json"), refuses=("input_image",)),
    _used("questions[].choices questions[].choices[].value questions[].choices[].description"),
    _used("questions[].levels questions[].levels[].label questions[].levels[].description"),
    _ignored("prompt_cache_key prompt_cache_options", note=_PREFIXES),
    _ignored("safety_identifier", note=_NO_STORE),
)  # fmt: skip

EMBEDDING_FIELDS = _table(
    _used("model input"),
    _used("encoding_format", accepts=("float", "base64")),
    _used("dimensions", note="the model's own width only"),
    _ignored("user", note=_NO_STORE),
)

TABLES: Mapping[str, Table] = {
    "/v1/chat/completions": CHAT_FIELDS,
    "/v1/completions": COMPLETION_FIELDS,
    "/v1/responses": RESPONSE_FIELDS,
    "/v1/decisions": DECISION_FIELDS,
    "/v1/embeddings": EMBEDDING_FIELDS,
}


def below(table: Table, place: str = "") -> Table:
    """The rows of the fields directly in an object of a body, by name: the body itself, or `tools[].function`."""
    start = f"{place}." if place else ""
    direct = (rule for path, rule in table.items() if path.startswith(start) and "." not in path[len(start) :])
    return {rule.name: rule for rule in direct}


def without_unused(rules: Table, value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an object that remain to be read.

    Leaves out null and ignored ones, and refused ones with a harmless value.
    """
    kept = {}
    for name, item in value.items():
        rule = rules.get(name)
        unused = rule is not None and (
            rule.treatment == "ignored" or (rule.treatment == "refused" and rule.harmless(item))
        )
        if item is not None and not unused:
            kept[name] = item
    return kept


def read_fields(known: Table, payload: object) -> dict[str, Any]:
    """The fields of a body to read. Raises InvalidRequest unless it is an object, and for unknown or refused fields."""
    if not isinstance(payload, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {reprlib.repr(payload)}")
    used = without_unused(known, payload)
    for name, value in used.items():
        rule = known.get(name)
        if rule is None:
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"unknown field {reprlib.repr(name)}{hint}", param=name[:64], code="unknown_parameter")
        if rule.treatment == "refused":
            allowed = " or ".join(["null", *(json.dumps(fine) for fine in rule.accepts)])
            why = f" ({rule.note})" if rule.note else ""
            message = f"{name!r} is not supported{why}; only {allowed} is accepted, got {reprlib.repr(value)}"
            raise InvalidRequest(message, param=name, code="unsupported_parameter")
    return used


_ANSWER_LINES = """\
## Answers

Answers have OpenAI's fields. One is added, where a model of labels is calibrated: `deskside`, an object with

| field | |
|---|---|
| `confidence` | calibrated probability of the label given, among all labels of the model |
| `automatic` | true if that reaches the threshold of the target: of such answers at least that share is right |
| `target` | the target that applies: `--target` of serve and batch, else the model's own |

It is in `answers[]` of a decision and, where serve or batch was given a `--target`, in `choices[]` of a chat (streamed:
in the choice's last chunk), beside the choice's own fields; OpenAI's clients keep it (Python:
`choice.model_extra["deskside"]`). It is absent if the answer is
none of the labels, if a decision or `choice` is not among all of them, and if the model is asked otherwise than it was
calibrated: one text of the user's, with the prompt that it was trained with, and no other turns. The field
`confidence` of a decision is OpenAI's: the share among the choices, not calibrated. A chat reads its label's share
from the rows that it is written from, and computes the other labels that those leave open, which took 55 short steps
beside 172 for 60 mails of email-triage; a decision computes nothing more.""".splitlines()


def fields_page() -> str:
    """The text of FIELDS.md."""
    lines = [
        "# Fields of OpenAI's requests, and what becomes of each",
        "",
        "Written by `python -m runtime.openai.fields`; a test holds it to the official client's types. `null` counts",
        "as absent everywhere. Unknown fields are refused by name. A field marked + is an extension.",
    ]
    for route, table in TABLES.items():
        lines += ["", f"## {route}", "", "| field | | values |", "|---|---|---|"]
        for path, rule in sorted(table.items()):
            told = [rule.note] if rule.note else []
            only = "only " if rule.treatment == "refused" else ""
            for verb, values in (
                (f"{only}accepted", rule.accepts), ("ignored", rule.ignores), ("refused", rule.refuses)
            ):  # fmt: skip
                if values:
                    told.append(f"{verb}: " + ", ".join(f"`{json.dumps(value)}`" for value in values))
            lines.append(f"| `{path}`{' +' if rule.ours else ''} | {rule.treatment} | {'; '.join(told)} |")
    return "\n".join([*lines, "", *_ANSWER_LINES]) + "\n"


if __name__ == "__main__":
    print(fields_page(), end="")
