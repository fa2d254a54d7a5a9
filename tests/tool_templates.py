"""Chat templates of our own in the manner of the families that write tool calls, for the toy model."""

_TURNS = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALLED {{ call.id }} {{ call.function.name }}"
    " {{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m.tool_call_id %} ANSWERS {{ m.tool_call_id }}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _with_tools(how: str) -> str:
    return (
        "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}" + how + "{% endif %}"
    ) + _TURNS


HERMES = _with_tools('Answer with <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>.\n')
LLAMA = _with_tools('Answer with {"name": function name, "parameters": dictionary}.\n')
JSON = _with_tools('Answer with {{ \'{"name": …, "arguments": …}\' }}.\n')
MISTRAL = _with_tools("Answer with {{ '[TOOL_CALLS][' }}.\n")
MISTRAL_SPACED = _with_tools("Answer with {{ '[TOOL_CALLS] [' }}.\n")
MISTRAL_ARGS = _with_tools("Answer with {{ '[TOOL_CALLS]' }}name{{ '[ARGS]' }}.\n")
GRANITE = _with_tools("Answer with <|tool_call|>[…].\n")
XML = _with_tools('Answer with <tool_call>\n<function=name> "name" "arguments"\n</tool_call>.\n')
UNKNOWN = _with_tools("Answer in the way you know.\n")
# Says `tools` in a comment and in its text, but reads no such variable.
NO_TOOLS = "{# tools #}{% set tools = 1 %}{{ bos_token }}<tool_call> tools \n" + _TURNS

# What a model of each family writes to call f with {"city": "Oslo"} and then g with {}; Llama's writes one call only.
TWO_CALLS = {
    HERMES: '<tool_call>\n{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    MISTRAL: '[TOOL_CALLS][{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {}}]',
    MISTRAL_SPACED: '[TOOL_CALLS] [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {}}]',
    MISTRAL_ARGS: '[TOOL_CALLS]f[ARGS]{"city": "Oslo"}[TOOL_CALLS]g[ARGS]{}',
    GRANITE: '<|tool_call|>[{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {}}]',
    LLAMA: '{"name": "f", "parameters": {"city": "Oslo"}}',
    JSON: '{"name": "f", "arguments": {"city": "Oslo"}}',
}
