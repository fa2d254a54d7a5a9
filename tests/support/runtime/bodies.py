"""Bodies of every route that hold every form of their fields, how each is read, and the way to each value in them."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from runtime.openai.chat import parse
from runtime.openai.decisions import parse_decision
from runtime.openai.embeddings import parse_embedding
from runtime.openai.responses.request import parse_response

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
TEXT = [{"type": "text", "text": "hi"}]
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": TEXT, "name": "n"},
        {"role": "assistant", "content": "x", "tool_calls": CALLS},
        {"role": "tool", "content": TEXT, "tool_call_id": "1", "name": "f"},
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "logit_bias": {"1": 1},
    "modalities": ["text"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
FORMATTED: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "response_format": FORMAT, "stop": ["a"]}
COMPLETION: dict[str, Any] = {
    "prompt": ["a"],
    "logprobs": 1,
    "choice": ["a"],
    "stop": "a",
    "stream": True,
    "stream_options": {},
}
RESPONSE: dict[str, Any] = {
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}], "status": "completed"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "output_text", "text": "x"}]},
    ],
    "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "medium"},
    "include": ["message.output_text.logprobs"],
    "stream_options": {},
    "prompt_cache_options": {},
    "metadata": {"a": "b"},
    "reasoning": {"effort": "none"},
}
CALLING: dict[str, Any] = {
    "input": "x",
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
    "tool_choice": {"type": "function", "name": "f"},
}
DECISION: dict[str, Any] = {
    "input": [
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "x"}, {"type": "input_json", "data": {"a": 1}}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ],
    "questions": [
        {"type": "predicate", "instructions": [{"type": "input_text", "text": "x"}]},
        {"type": "choice", "instructions": "x", "choices": [{"value": "a"}, {"value": True, "description": "d"}]},
        {"type": "score", "instructions": "x", "levels": [{"label": "a"}, {"label": "b"}]},
    ],
}
EMBEDDING: dict[str, Any] = {"input": ["a"], "encoding_format": "float", "dimensions": 8}
BODIES: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "chat": (CHAT, lambda body: parse("chat", body)),
    "chat with a format": (FORMATTED, lambda body: parse("chat", body)),
    "completion": (COMPLETION, lambda body: parse("completion", body)),
    "response": (RESPONSE, lambda body: parse("chat", dict(parse_response(body).chat))),
    "response with tools": (CALLING, lambda body: parse("chat", dict(parse_response(body).chat))),
    "decision": (DECISION, parse_decision),
    "embedding": (EMBEDDING, lambda body: parse_embedding(body, 8)),
}
Place = tuple[str | int, ...]


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """The way to each value in `value`, itself included."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*at, key))


def with_value(body: Any, at: Place, value: Any) -> Any:
    """A copy of `body` with another value at a place."""
    if not at:
        return value
    changed = deepcopy(body)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return changed
