"""OpenAI's wire requests: the types of their bodies, and how a body becomes engine requests.

Pure: no server, tokenizer or clock. Which fields there are, and what happens to each, stands in `openai_fields`.
"""

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_serializer,
    model_validator,
)

from runtime.errors import InvalidRequest
from runtime.requests import Grammar, Request, SamplingParams

from . import tools as openai_tools
from . import wire as openai_grammar
from .tools import MAX_CALLS, MAX_TOOLS, Tool, ToolCall, ToolChoice, check_tools, check_turns
from .wire import MESSAGE_FIELDS_REFUSED, Endpoint, used_fields

MAX_ANSWERS_PER_CALL = 128
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
DEFAULT_COMPLETION_TOKENS = 16
SEED_SPACE = 1 << 64


def _plain_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError("content must be a string or a non-empty list of text parts")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"content part {index} must be of type 'text' with a text, not {reprlib.repr(kind)}")
        texts.append(part["text"])
    return "".join(texts)


def texts_or_ids(value: object) -> tuple[str | tuple[int, ...], ...]:
    """The four shapes of a prompt as one: a tuple of texts or token-id tuples."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists, none empty")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a non-empty string or a list of such")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"takes at most {MAX_STOPS} strings, got {len(stops)}")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_CHARS:
        raise ValueError(f"takes strings of at most {MAX_STOP_CHARS} characters, got {longest}")
    return tuple(stops)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must map at most {MAX_LOGIT_BIAS} token ids to numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"takes token ids as keys, got {reprlib.repr(key)}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"takes numbers from -100 to 100, got {reprlib.repr(bias)} for token {key}")
        biases[int(key)] = float(bias)
    return biases


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Wire):
    """`include_usage` sends token counts in one more chunk at the end."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Message(_Wire):
    """One turn of the conversation, its content parts joined to one text. It is dumped as chat templates read it."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[str, PlainValidator(_plain_text)]
    tool_calls: tuple[ToolCall, ...] = Field((), max_length=MAX_CALLS, strict=False)
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        is_result = value.get("role") == "tool"
        refused = {name: fine for name, fine in MESSAGE_FIELDS_REFUSED.items() if not (is_result and name == "name")}
        for name, harmless in refused.items():
            if value.get(name) is not None and value[name] not in harmless:
                raise ValueError(f"field {name!r} is not supported")
        kept = {name: item for name, item in value.items() if name not in refused}
        calls = kept.get("tool_calls")
        if calls is None:
            kept.pop("tool_calls", None)
        elif calls and value.get("role") == "assistant" and value.get("content") is None:
            kept["content"] = ""
        return kept

    @model_validator(mode="after")
    def _who_calls(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only an assistant has tool_calls, not a {self.role}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a tool's message, and no other, has a tool_call_id")
        return self

    @model_serializer
    def _for_template(self) -> dict[str, Any]:
        calls = {"tool_calls": [call.for_template() for call in self.tool_calls]} if self.tool_calls else {}
        answers = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": self.content} | calls | answers | named


class _Body(_Wire):
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    n: int = Field(1, ge=1, le=MAX_ANSWERS_PER_CALL)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], PlainValidator(_logit_bias)] = Field(default_factory=dict)
    ignore_eos: bool = False
    grammar: Annotated[Grammar | None, PlainValidator(openai_grammar.lark)] = None
    regex: Annotated[Grammar | None, PlainValidator(openai_grammar.regex)] = None
    choice: Annotated[Grammar | None, PlainValidator(openai_grammar.choice)] = None


class ChatBody(_Body):
    """The used fields of `/v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1, max_length=MAX_MESSAGES, strict=False)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: Annotated[Grammar | None, PlainValidator(openai_grammar.response_format)] = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: tuple[Tool, ...] = Field((), max_length=MAX_TOOLS, strict=False)
    tool_choice: Annotated[ToolChoice, PlainValidator(openai_tools.tool_choice)] = ToolChoice()
    parallel_tool_calls: bool = True

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """What the model may call. Where it may call nothing, it is not told of any."""
        return () if self.tool_choice.mode == "none" else self.tools


class CompletionBody(_Body):
    """The used fields of `/v1/completions`."""

    prompt: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(texts_or_ids)]
    logprobs: int | None = Field(None, ge=0, le=5)


Body = ChatBody | CompletionBody


def parse(kind: Endpoint, payload: object) -> Body:
    """The body of a request, checked field by field. Raises InvalidRequest with `param` and the value given."""
    used = used_fields(kind, payload)
    try:
        body = ChatBody.model_validate(used) if kind == "chat" else CompletionBody.model_validate(used)
    except ValidationError as error:
        raise invalid_request(error) from None
    _check_together(body)
    return body


def _check_together(body: Body) -> None:
    """What one field allows or forbids another."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream true", param="stream_options")
    grammars = _grammars(body)
    if len(grammars) > 1:
        names = " and ".join(grammar.param for grammar in grammars)
        raise InvalidRequest(f"{names} cannot be combined; give one of them", param=grammars[-1].param)
    if grammars and body.ignore_eos:
        raise InvalidRequest(f"ignore_eos cannot be combined with {grammars[0].param}", param="ignore_eos")
    if isinstance(body, CompletionBody):
        if body.n * len(body.prompt) > MAX_ANSWERS_PER_CALL:
            got = f"{len(body.prompt)} prompts with n {body.n}"
            raise InvalidRequest(f"prompts times n must be at most {MAX_ANSWERS_PER_CALL}, got {got}", param="prompt")
        return
    _check_tools(body, grammars)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs true", param="top_logprobs")
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        message = f"max_tokens ({both[0]}) and max_completion_tokens ({both[1]}) differ; give one of them"
        raise InvalidRequest(message, param="max_completion_tokens")


def _check_tools(body: ChatBody, grammars: Sequence[Grammar]) -> None:
    check_tools(body.tools, body.tool_choice)
    check_turns(body.messages)
    if not body.callable_tools:
        return
    # Each of these would break a call off, or forbid it.
    clashing = [grammar.param for grammar in grammars]
    clashing += [name for name in ("stop", "ignore_eos") if getattr(body, name)]
    if clashing:
        raise InvalidRequest(f"{clashing[0]} cannot be combined with tools; give one of them", param=clashing[0])


def _grammars(body: Body) -> list[Grammar]:
    formatted = body.response_format if isinstance(body, ChatBody) else None
    return [grammar for grammar in (formatted, body.grammar, body.regex, body.choice) if grammar is not None]


def grammar_of(body: Body) -> Grammar | None:
    """What the answers must look like, if the body says."""
    return next(iter(_grammars(body)), None)


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first fault that pydantic found, with the field's path as `param` and the value given."""
    first = error.errors()[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    if first["type"] == "missing":
        return InvalidRequest(f"{param!r} is required", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ").replace("Tuple", "List").replace("tuple", "list")
    return InvalidRequest(f"{param}: {message}, got {reprlib.repr(first['input'])}", param=param, code="invalid_value")


def token_limit(body: Body) -> tuple[int | None, str]:
    """How many tokens an answer may have (None: whatever the context leaves), and the field that said so."""
    if isinstance(body, CompletionBody):
        return body.max_tokens or DEFAULT_COMPLETION_TOKENS, "max_tokens"
    if body.max_completion_tokens is not None:
        return body.max_completion_tokens, "max_completion_tokens"
    return body.max_tokens, "max_tokens"


def _alternatives(body: Body) -> int | None:
    """How many other tokens to report beside each one, 0 for none but its own log-probability; None: not asked."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def to_request(
    body: Body, request_id: str, prompt: tuple[int, ...], max_tokens: int, seed: int, adapter: str | None = None
) -> Request:
    """One choice as the engine takes it. `seed` may be negative, as OpenAI's are; it is folded into 64 bits."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=seed % SEED_SPACE,
        stop=body.stop,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        logprobs=_alternatives(body),
        ignore_eos=body.ignore_eos,
        grammar=grammar_of(body),
    )
    return Request(request_id, prompt, params, adapter)


def to_requests(
    body: Body,
    call_id: str,
    prompts: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    drawn_seeds: Sequence[int],
    adapter: str | None = None,
) -> tuple[Request, ...]:
    """All choices of a call, in order of index: prompt by prompt, `n` of each.

    With a seed given, choice i of every prompt uses seed + i, so that a list of prompts answers as single calls would;
    otherwise choice k of the call takes `drawn_seeds[k]`.
    """
    requests: list[Request] = []
    for prompt, limit in zip(prompts, limits, strict=True):
        for choice in range(body.n):
            seed = drawn_seeds[len(requests)] if body.seed is None else body.seed + choice
            requests.append(to_request(body, f"{call_id}-{len(requests)}", prompt, limit, seed, adapter))
    return tuple(requests)
