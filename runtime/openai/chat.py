"""The bodies of `/v1/chat/completions` and `/v1/completions`: their types, and their translation to engine requests.

Pure: no server, tokenizer or clock. `fields` says which fields there are, and what happens to each.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self, overload

from annotated_types import Len
from pydantic import AfterValidator, Field, GetJsonSchemaHandler, PlainValidator, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from runtime.errors import InvalidRequest
from runtime.requests import Grammar, Request, SamplingParams

from .fields import CHAT_FIELDS, COMPLETION_FIELDS, below
from .grammar import (
    ObjectFormat,
    SchemaFormat,
    StructuredOutputs,
    TextFormat,
    choice_grammar,
    format_grammar,
    lark_grammar,
    regex_grammar,
    schema_grammar,
    structured_grammar,
)
from .tools import MAX_CALLS, MAX_TOOLS, Tool, ToolCall, ToolChoice, ToolChoiceBody, check_tools, parse_tool_choice
from .wire import Endpoint, RefusalPart, TableBody, TextPart, WireModel, nullable, plain_text

MAX_ANSWERS_PER_CALL = 128
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
DEFAULT_COMPLETION_TOKENS = 16
SEED_SPACE = 1 << 64


WireToken = Annotated[int, Field(ge=0)]
TextsOrIds = (
    str
    | Annotated[list[str], Len(1)]
    | Annotated[list[WireToken], Len(1)]
    | Annotated[list[Annotated[list[WireToken], Len(1)]], Len(1)]
)
_Stop = Annotated[str, Len(1, MAX_STOP_CHARS)]
Stops = _Stop | Annotated[list[_Stop], Len(0, MAX_STOPS)]
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Len(0, MAX_LOGIT_BIAS)]
Format = TextFormat | ObjectFormat | SchemaFormat


def _plain_text(content: object) -> str:
    return plain_text(content, prefix="content ")


def texts_or_ids(value: object) -> tuple[str | tuple[int, ...], ...]:
    """The four shapes of a prompt as a tuple of texts or token-id tuples. Raises ValueError."""
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
    try:
        "".join(stops).encode()
    except UnicodeEncodeError:  # a batch's line may hold some; the engine gets its messages in UTF-8
        raise ValueError("must be valid Unicode, got half a surrogate pair") from None
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


class StreamOptions(WireModel):
    """`include_usage` sends token counts in one more chunk at the end, `continuous_usage_stats` in every chunk."""

    rules = below(CHAT_FIELDS, "stream_options")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Message(WireModel):
    """One turn of the conversation, its content parts joined to one text. It is dumped as chat templates read it."""

    rules = below(CHAT_FIELDS, "messages[]")

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[str, PlainValidator(_plain_text, json_schema_input_type=str | list[TextPart | RefusalPart])]
    tool_calls: tuple[ToolCall, ...] = Field((), max_length=MAX_CALLS, strict=False)
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_content(cls, value: object) -> object:
        """An assistant's message may have calls or a refusal instead of content."""
        if not isinstance(value, dict) or value.get("role") != "assistant":
            return value
        content = value.get("content")
        if content == [] or (content is None and value.get("tool_calls")):
            content = ""
        elif content is None:
            content = value.get("refusal")
        return {**value, "content": content}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core, handler)
        whole = handler.resolve_ref_schema(schema)
        content = nullable(whole["properties"]["content"])
        whole["properties"]["content"] = {**content, "description": "Null or absent only beside `tool_calls`."}
        whole["required"] = ["role"]
        return schema

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
        more = {name: text for name in ("name", "reasoning_content") if (text := getattr(self, name)) is not None}
        return {"role": self.role, "content": self.content} | calls | answers | more


class TextBody(TableBody):
    """The fields that chats and completions share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=Stops)] = ()
    n: int = Field(1, ge=1, le=MAX_ANSWERS_PER_CALL)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=LogitBias)] = Field(
        default_factory=dict
    )
    ignore_eos: bool = False
    grammar: Annotated[Grammar | None, PlainValidator(lark_grammar, json_schema_input_type=str)] = None
    regex: Annotated[Grammar | None, PlainValidator(regex_grammar, json_schema_input_type=str)] = None
    choice: Annotated[Grammar | None, PlainValidator(choice_grammar, json_schema_input_type=list[str])] = None
    guided_json: Annotated[
        Grammar | None, PlainValidator(schema_grammar, json_schema_input_type=dict[str, Any] | str)
    ] = None
    guided_regex: Annotated[
        Grammar | None, PlainValidator(partial(regex_grammar, param="guided_regex"), json_schema_input_type=str)
    ] = None
    guided_choice: Annotated[
        Grammar | None, PlainValidator(partial(choice_grammar, param="guided_choice"), json_schema_input_type=list[str])
    ] = None
    guided_grammar: Annotated[
        Grammar | None, PlainValidator(partial(lark_grammar, param="guided_grammar"), json_schema_input_type=str)
    ] = None
    structured_outputs: Annotated[
        Grammar | None, PlainValidator(structured_grammar, json_schema_input_type=StructuredOutputs)
    ] = None


class ChatBody(TextBody):
    """The used fields of `/v1/chat/completions`."""

    table = below(CHAT_FIELDS)

    messages: tuple[Message, ...] = Field(min_length=1, max_length=MAX_MESSAGES, strict=False)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: Annotated[Grammar | None, PlainValidator(format_grammar, json_schema_input_type=Format)] = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: tuple[Tool, ...] = Field((), max_length=MAX_TOOLS, strict=False)
    tool_choice: Annotated[ToolChoice, PlainValidator(parse_tool_choice, json_schema_input_type=ToolChoiceBody)] = (
        Field(ToolChoice(), json_schema_extra={"default": "auto"})
    )
    parallel_tool_calls: bool = True

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Tools that the model may call. Where it may call none, its prompt names none."""
        return () if self.tool_choice.mode == "none" else self.tools


class CompletionBody(TextBody):
    """The used fields of `/v1/completions`."""

    table = below(COMPLETION_FIELDS)

    prompt: Annotated[
        tuple[str | tuple[int, ...], ...], PlainValidator(texts_or_ids, json_schema_input_type=TextsOrIds)
    ]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False


Body = ChatBody | CompletionBody


@overload
def parse(endpoint: Literal["chat"], payload: object) -> ChatBody: ...
@overload
def parse(endpoint: Literal["completion"], payload: object) -> CompletionBody: ...
@overload
def parse(endpoint: Endpoint, payload: object) -> Body: ...
def parse(endpoint: Endpoint, payload: object) -> Body:
    """Read the body of a request, field by field. Raises InvalidRequest with `param` and the value given."""
    body = ChatBody.read(payload) if endpoint == "chat" else CompletionBody.read(payload)
    _check_together(body)
    return body


def _check_together(body: Body) -> None:
    """Check the fields against each other. Raises InvalidRequest."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream true", param="stream_options")
    grammars = _grammars(body)
    if len(grammars) > 1:
        names = " and ".join(grammar.param for grammar in grammars)
        raise InvalidRequest(f"{names} cannot be combined; give one of them", param=grammars[-1].param)
    if isinstance(body, CompletionBody):
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
        if body.n * len(body.prompt) > MAX_ANSWERS_PER_CALL:
            got = f"{len(body.prompt)} prompts with n {body.n}"
            raise InvalidRequest(f"prompts times n must be at most {MAX_ANSWERS_PER_CALL}, got {got}", param="prompt")
        return
    if body.tools or body.tool_choice.mode == "required":
        check_tools(body.tools, body.tool_choice)
    _check_turns(body.messages)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs true", param="top_logprobs")
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        message = f"max_tokens ({both[0]}) and max_completion_tokens ({both[1]}) differ; give one of them"
        raise InvalidRequest(message, param="max_completion_tokens")


def _check_turns(messages: Sequence[Message]) -> None:
    """Check that each result answers one call: the nearest earlier one of its id. Raises InvalidRequest.

    An id may be used again in a later turn; the calls of one turn have different ids.
    """
    called: set[str] = set()
    answered: set[str] = set()
    for place, message in enumerate(messages):
        ids = [call.id for call in message.tool_calls]
        for number, call_id in enumerate(ids):
            if call_id in ids[:number]:
                param = f"messages[{place}].tool_calls[{number}].id"
                shown = reprlib.repr(call_id)
                raise InvalidRequest(f"{param}: {shown} is the id of another call of this message", param=param)
        called.update(ids)
        answered.difference_update(ids)
        if message.tool_call_id is not None:
            param = f"messages[{place}].tool_call_id"
            if message.tool_call_id not in called:
                shown = reprlib.repr(message.tool_call_id)
                raise InvalidRequest(f"{param}: no earlier message calls a tool with id {shown}", param=param)
            if message.tool_call_id in answered:
                shown = reprlib.repr(message.tool_call_id)
                raise InvalidRequest(f"{param}: the call {shown} is answered already", param=param)
            answered.add(message.tool_call_id)


def _grammars(body: Body) -> list[Grammar]:
    formatted = body.response_format if isinstance(body, ChatBody) else None
    own = (formatted, body.grammar, body.regex, body.choice)
    guided = (body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar, body.structured_outputs)
    return [grammar for grammar in (*own, *guided) if grammar is not None]


def grammar_of(body: Body) -> Grammar | None:
    """The grammar of the answers, if the body has one."""
    return next(iter(_grammars(body)), None)


def token_limit(body: Body) -> tuple[int | None, str]:
    """The limit of an answer in tokens (None: all that the context leaves), and the field that sets it."""
    if isinstance(body, CompletionBody):
        return DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        return body.max_completion_tokens, "max_completion_tokens"
    return body.max_tokens, "max_tokens"


def _alternatives(body: Body) -> int | None:
    """The number of alternatives to report per token; 0: the token's own log-probability only; None: nothing."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as token ids, and how many tokens each answer to it may have: none if only the prompt is echoed."""

    tokens: tuple[int, ...]
    max_tokens: int


def to_requests(
    body: Body,
    call_id: str,
    prompts: Sequence[TokenizedPrompt],
    drawn_seeds: Sequence[int],
    adapter: str | None = None,
) -> tuple[Request, ...]:
    """The requests of all choices of a call, in order of index: prompt by prompt, `n` of each.

    With a seed given, choice i of every prompt uses seed + i, so that a list of prompts answers as single calls would;
    without one, choice k of the call takes `drawn_seeds[k]`. A seed may be negative, as OpenAI's are; it is folded into
    64 bits.
    """
    requests: list[Request] = []
    for prompt in prompts:
        for choice in range(body.n):
            seed = drawn_seeds[len(requests)] if body.seed is None else body.seed + choice
            params = _sampling_params(body, prompt.max_tokens, seed % SEED_SPACE)
            requests.append(Request(f"{call_id}-{len(requests)}", prompt.tokens, params, adapter))
    return tuple(requests)


def _sampling_params(body: Body, max_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max(max_tokens, 1),
        seed=seed,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        stop=body.stop,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        logprobs=_alternatives(body),
        ignore_eos=body.ignore_eos,
        grammar=grammar_of(body),
        prompt_logprobs=isinstance(body, CompletionBody) and body.echo and body.logprobs is not None,
    )
