"""Chat templates of our own in the manner of the families that write tool calls, for the toy model."""

_NAME, _ARGUMENTS = "{{ call.function.name }}", "{{ call.function.arguments | tojson }}"


def _template(call: str, before: str = "", between: str = "", after: str = "", told: str = "") -> str:
    """A template that tells of the tools, adds `told`, and writes calls as it says."""
    calls = f"{{% for call in m.tool_calls %}}{call}{{% if not loop.last %}}{between}{{% endif %}}{{% endfor %}}"
    return (
        "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
        + told
        + "{% endif %}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
        + before
        + calls
        + after
        + "{% endif %}{% if m.tool_call_id %} ANSWERS {{ m.tool_call_id }}{% endif %}<end_of_turn>\n{% endfor %}"
        + "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )


_JSON = '{"name": "' + _NAME + '", "arguments": ' + _ARGUMENTS + "}"
HERMES = _template("<tool_call>\n" + _JSON + "\n</tool_call>", between="{{ '\n' }}")
LLAMA = _template('{"name": "' + _NAME + '", "parameters": ' + _ARGUMENTS + "}")
JSON = _template(_JSON)
MISTRAL = _template(_JSON, "[TOOL_CALLS][", ", ", "]")
MISTRAL_SPACED = _template(_JSON, "[TOOL_CALLS] [", ", ", "]")
MISTRAL_ARGS = _template("[TOOL_CALLS]" + _NAME + "[ARGS]" + _ARGUMENTS)
NEMOTRON = _template(_JSON, "<TOOLCALL>[", ", ", "]</TOOLCALL>")
MINIMAX = _template(_JSON + "{{ '\n' }}", "<tool_calls>\n", "", "</tool_calls>")
APRIEL = _template(_JSON, "<tool_calls>[", ", ", "]</tool_calls>")
# Tells how to call, but never writes a call itself.
GRANITE = _template("", told="Answer with <|tool_call|>[…].\n")
# Writes calls in forms that are not known, though it tells of one that is.
XML = _template(
    "<tool_call>\n<function=" + _NAME + ">" + _ARGUMENTS + "</tool_call>", told='<tool_call> "name" "arguments"'
)
UNKNOWN = _template("CALL " + _NAME + " " + _ARGUMENTS)
# Says `tools` in a comment and in its text, but reads no such variable.
NO_TOOLS = "{# tools #}{% set tools = 1 %}tools" + _template(_JSON).replace("if tools", "if 0").replace(
    "in tools", "in []"
)

# What a model of each family writes to call f with {"city": "Oslo"} and then g with {}; a bare call stands alone.
_F, _G = '{"name": "f", "arguments": {"city": "Oslo"}}', '{"name": "g", "arguments": {}}'
TWO_CALLS = {
    HERMES: f"<tool_call>\n{_F}\n</tool_call>\n<tool_call>\n{_G}\n</tool_call>",
    MISTRAL: f"[TOOL_CALLS][{_F}, {_G}]",
    MISTRAL_SPACED: f"[TOOL_CALLS] [{_F}, {_G}]",
    MISTRAL_ARGS: '[TOOL_CALLS]f[ARGS]{"city": "Oslo"}[TOOL_CALLS]g[ARGS]{}',
    NEMOTRON: f"<TOOLCALL>[{_F}, {_G}]</TOOLCALL>",
    MINIMAX: f"<tool_calls>\n{_F}\n{_G}\n</tool_calls>",
    APRIEL: f"<tool_calls>[{_F}, {_G}]</tool_calls>",
    GRANITE: f"<|tool_call|>[{_F}, {_G}]",
    LLAMA: '{"name": "f", "parameters": {"city": "Oslo"}}',
    JSON: _F,
}
