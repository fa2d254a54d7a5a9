"""OpenAI's wire answers: engine events become stream chunks, and the whole answer is a fold over the same events."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from runtime.requests import (
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    Scored,
    TextDelta,
    TokenLogprob,
    Usage,
)

from .answer_types import ChatLogprobs, ChatToken, CompletionLogprobs, TextUsage, TopToken, to_usage
from .confidence import LabelConfidence, PromisedLabels, beside
from .tool_calls import CallDelta, ToolCallReader, ToolDelta, ToolFormat
from .wire import Endpoint

# JSON has no infinity; OpenAI writes this for a token of probability zero.
LEAST_LOGPROB = -9999.0

AnswerChunk = Mapping[str, Any] | str
"""The data of one server-sent event: a JSON object, or the text DONE."""
DONE = "[DONE]"


class WireAnswer(ABC):
    """A wire answer under construction. Feed it every event of its call; then `response` is whole.

    A streamed answer is the chunks of `begin`, of each `feed`, and of `end`; of `fail` instead if an error ends it.
    """

    def begin(self) -> Iterable[AnswerChunk]:
        """Chunks to send before the first event."""
        return ()

    @abstractmethod
    def feed(self, event: Event) -> Iterable[AnswerChunk]:
        """Take in an event and return the chunks that show it. Raises the error of a `Failed`."""

    def end(self) -> Iterable[AnswerChunk]:
        """Chunks to send after the last event."""
        return ()

    def fail(self, error: Mapping[str, Any]) -> Iterable[AnswerChunk]:
        """Chunks that end a stream; `error` is the body that `to_error` makes."""
        return (error,)

    @abstractmethod
    def response(self) -> dict[str, Any]:
        """Return the whole answer, once every event has been fed."""


WholeEvent = TypeVar("WholeEvent", bound=Scored | Embedded)


class WholeAnswer(WireAnswer, Generic[WholeEvent]):
    """An answer made of one event of type `kind`: scores or vectors."""

    def __init__(self, kind: type[WholeEvent], to_response: Callable[[WholeEvent], dict[str, Any]]) -> None:
        self._kind = kind
        self._to_response = to_response
        self._event: WholeEvent | None = None

    def feed(self, event: Event) -> Iterable[AnswerChunk]:
        """Keep the event."""
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, self._kind), f"expected {self._kind.__name__}, got {type(event).__name__}"
        self._event = event
        return ()

    def response(self) -> dict[str, Any]:
        """Translate the event."""
        assert self._event is not None, "every request ends in a terminal event"
        return self._to_response(self._event)


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt that its answers begin with: its text, and its first token, which has no log-probability.

    `leads`: the text begins with that token; it does not if the token is one that only begins every text.
    """

    text: str
    first: bytes
    leads: bool


@dataclass(frozen=True, slots=True)
class TextCall:
    """A prepared chat or completion: `choices_per_prompt` requests for each prompt, in order of choice index.

    `tools` is the format of the model's tool calls; None if it may make none. `calls_first` is as in `ToolCallReader`.
    `not_enforced` names the parts of schemas that the answer may break. `echo` holds the prompts that the answers begin
    with, if they do; with `echo_only`, nothing follows them. `promise` is that of the labels that its requests have.
    """

    id: str
    endpoint: Endpoint
    model: str
    created_s: int
    fingerprint: str
    requests: tuple[Request, ...]
    choices_per_prompt: int
    stream: bool
    include_usage: bool
    tools: ToolFormat | None = None
    continuous_usage: bool = False
    echo: tuple[EchoedPrompt, ...] = ()
    echo_only: bool = False
    calls_first: bool = False
    not_enforced: tuple[str, ...] = ()
    n_cut: int = 0
    promise: PromisedLabels | None = None

    @property
    def logprobs(self) -> bool:
        """True if the client asked for log-probabilities."""
        return self.requests[0].params.logprobs is not None

    def echoed(self, index: int) -> EchoedPrompt | None:
        """The prompt that choice `index` begins with, if it does."""
        return self.echo[index // self.choices_per_prompt] if self.echo else None


@dataclass(slots=True)
class AnswerChoice:
    """The text, log-probabilities and end of one choice, so far `n_tokens` long."""

    index: int
    n_tokens: int = 0
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    begun: bool = False
    beside: dict[str, LabelConfidence] = field(default_factory=dict)


class TextAnswer(WireAnswer):
    """The answer to a chat or completion request: chunks if it is streamed, else the fold of the same events."""

    def __init__(self, call: TextCall) -> None:
        self.call = call
        self.choices = [AnswerChoice(index) for index in range(len(call.requests))]
        self._by_id = {request.id: choice for request, choice in zip(call.requests, self.choices, strict=True)}
        self._offsets = [TextOffsets() for _ in self.choices]
        self._readers = [call_reader(call, choice.index) for choice in self.choices]

    def begin(self) -> Iterator[AnswerChunk]:
        """Give the role of each choice of a chat; nothing for a completion."""
        if self.call.endpoint == "chat":
            for choice in self.choices:
                first = self._chunk(choice.index, "", role="assistant")
                if self.call.tools is not None:
                    first["choices"][0]["delta"]["content"] = None
                yield first

    def feed(self, event: Event) -> Iterable[AnswerChunk]:
        """Take in an event: return its chunk for a streamed answer, if it adds anything; keep it for a whole one.

        Raises the error of a `Failed`.
        """
        choice = self._by_id[event.request_id]
        if self.call.echo and not isinstance(event, Failed):
            return [chunk for told in self._with_prompt(choice, event) for chunk in self._feed(choice, told)]
        return self._feed(choice, event)

    def _with_prompt(self, choice: AnswerChoice, event: Event) -> Iterator[Event]:
        """The event, after the prompt if it is the choice's first; with `echo_only`, the prompt and the end only."""
        prompt, alone = self.call.echoed(choice.index), self.call.echo_only
        assert prompt is not None, "a call that echoes has each choice's prompt"
        before = "" if choice.begun else prompt.text
        if isinstance(event, TextDelta):
            text, tokens, logprobs = event.text, event.token_ids, event.logprobs
            if alone:
                n_told = 0 if choice.begun else len(self.call.requests[choice.index].prompt) - 1
                text, tokens, logprobs = "", (), logprobs[:n_told]
            yield TextDelta(event.request_id, before + text, tokens, logprobs)
            return
        assert isinstance(event, Finished), "a call for text has been given scores"
        if before:
            yield TextDelta(event.request_id, before, ())
        usage = Usage(event.usage.prompt_tokens, event.usage.cached_tokens, 0)
        yield Finished(event.request_id, "length", usage) if alone else event

    def _feed(self, choice: AnswerChoice, event: Event) -> Iterable[AnswerChunk]:
        if isinstance(event, Finished):
            choice.finish_reason, choice.usage = event.reason, event.usage
            if self.call.promise is not None:
                choice.beside = beside(self.call.promise, "".join(choice.text), event.label_logprobs)
            reader = self._readers[choice.index]
            told = ToolDelta(reader.finish()) if reader else ToolDelta()
            reason = finish_reason(event.reason, reader)
            last = self._chunk(choice.index, told.content or None, finish_reason=reason)
            last["choices"][0] |= choice.beside
            return (last,)
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, TextDelta), "a call for text has been given scores"
        choice.n_tokens += len(event.token_ids)
        if not self.call.stream:
            choice.begun = True
            choice.text.append(event.text)
            choice.logprobs.extend(event.logprobs)
            return ()
        if not event.text and not event.logprobs:
            return ()
        if self.call.promise is not None:
            choice.text.append(event.text)
        echoed = None if choice.begun else self.call.echoed(choice.index)
        choice.begun = True
        logprobs = to_logprobs(self.call, event.logprobs, self._offsets[choice.index], echoed)
        if (reader := self._readers[choice.index]) is None:
            return (self._chunk(choice.index, event.text, logprobs),)
        told = reader.feed(event.text)
        if not told.content and not told.calls and not event.logprobs:
            return ()
        return (self._chunk(choice.index, told.content or None, logprobs, calls=told.calls),)

    def end(self) -> Iterator[AnswerChunk]:
        """Give the token counts, if the client asked for them, and DONE."""
        if self.call.include_usage:
            yield _envelope(self.call, chunk=True) | {"choices": [], "usage": self.usage()}
        yield DONE

    def usage(self) -> TextUsage:
        """The token counts of all choices so far; see `to_usage`. What was cached is known once all have finished."""
        usages = [
            choice.usage or Usage(len(request.prompt), 0, choice.n_tokens)
            for choice, request in zip(self.choices, self.call.requests, strict=True)
        ]
        counts = to_usage(usages, self.call.choices_per_prompt)
        if any(choice.usage is None for choice in self.choices):
            del counts["prompt_tokens_details"]
        return counts

    def _chunk(
        self,
        index: int,
        text: str | None,
        logprobs: ChatLogprobs | CompletionLogprobs | None = None,
        *,
        finish_reason: str | None = None,
        role: str | None = None,
        calls: Sequence[CallDelta] = (),
    ) -> dict[str, Any]:
        chunk = to_chunk(self.call, index, text, logprobs, finish_reason=finish_reason, role=role, calls=calls)
        return chunk | {"usage": self.usage()} if self.call.continuous_usage else chunk

    def response(self) -> dict[str, Any]:
        """The whole answer, once every choice has finished."""
        choices = [to_choice(self.call, choice) for choice in self.choices]
        return _envelope(self.call, chunk=False) | {"choices": choices, "usage": self.usage()}


class TextOffsets:
    """Counts characters token by token, for the `text_offset` of a completion's log-probabilities."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def take(self, token: bytes) -> int:
        """The offset at which `token` begins; a character split between tokens counts with its last one."""
        start = self._characters
        self._characters += len(self._decoder.decode(token))
        return start


def _envelope(call: TextCall, *, chunk: bool) -> dict[str, Any]:
    chat = "chat.completion.chunk" if chunk else "chat.completion"
    name = "text_completion" if call.endpoint == "completion" else chat
    envelope: dict[str, Any] = {"id": call.id, "object": name, "created": call.created_s, "model": call.model}
    return envelope | {"system_fingerprint": call.fingerprint}


def to_chunk(
    call: TextCall,
    index: int,
    text: str | None = None,
    logprobs: ChatLogprobs | CompletionLogprobs | None = None,
    *,
    finish_reason: str | None = None,
    role: str | None = None,
    calls: Sequence[CallDelta] = (),
) -> dict[str, Any]:
    """One chunk of a streamed choice."""
    choice: dict[str, Any] = {"index": index}
    if call.endpoint == "completion":
        choice["text"] = text or ""
    else:
        choice["delta"] = ({"role": role} if role else {}) | ({} if text is None else {"content": text})
        if calls:
            choice["delta"]["tool_calls"] = [_call_delta(delta) for delta in calls]
    choice |= {"logprobs": logprobs, "finish_reason": finish_reason}
    chunk = _envelope(call, chunk=True) | {"choices": [choice]}
    return chunk | {"usage": None} if call.include_usage else chunk


def to_choice(call: TextCall, choice: AnswerChoice) -> dict[str, Any]:
    """One whole choice of a response."""
    text = "".join(choice.text)
    reader = call_reader(call, choice.index)
    said = {"text": text} if call.endpoint == "completion" else {"message": _message(text, reader)}
    logprobs = to_logprobs(call, choice.logprobs, TextOffsets(), call.echoed(choice.index))
    reason = choice.finish_reason and finish_reason(choice.finish_reason, reader)
    return {"index": choice.index} | said | {"logprobs": logprobs, "finish_reason": reason} | choice.beside


def call_reader(call: TextCall, index: int) -> ToolCallReader | None:
    """The reader that splits tool calls from the text of a choice; None if the model may make none."""
    if call.tools is None:
        return None
    return ToolCallReader(call.tools, call.requests[index].id, calls_first=call.calls_first)


def finish_reason(reason: FinishReason, reader: ToolCallReader | None) -> str:
    """OpenAI's `finish_reason`; `reader` must have read the whole choice."""
    return "tool_calls" if reason == "stop" and reader is not None and reader.n_calls else reason


def _message(text: str, reader: ToolCallReader | None) -> dict[str, Any]:
    if reader is None:
        return {"role": "assistant", "content": text}
    told = reader.feed(text)
    content = told.content + reader.finish()
    if not told.calls:
        return {"role": "assistant", "content": content}
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in told.calls
    ]
    return {"role": "assistant", "content": content or None, "tool_calls": calls}


def _call_delta(delta: CallDelta) -> dict[str, Any]:
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def to_logprobs(
    call: TextCall, tokens: Sequence[TokenLogprob], offsets: TextOffsets, echoed: EchoedPrompt | None = None
) -> ChatLogprobs | CompletionLogprobs | None:
    """The log-probabilities of `tokens` in the form of the call's endpoint; None unless the client asked for them.

    `echoed`: the first of the tokens come from this prompt, but for its very first, which has none.
    """
    if not call.logprobs:
        return None
    if call.endpoint == "chat":
        return {"content": [to_chat_token(token) for token in tokens], "refusal": None}
    wants_top = bool(call.requests[0].params.logprobs)
    shown: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": None, "text_offset": []}
    if echoed is not None:
        shown["tokens"].append(_name(echoed.first))
        shown["token_logprobs"].append(None)
        shown["text_offset"].append(offsets.take(echoed.first if echoed.leads else b""))
    shown["tokens"] += [_name(token.token_bytes) for token in tokens]
    shown["token_logprobs"] += [_finite(token.logprob) for token in tokens]
    shown["text_offset"] += [offsets.take(token.token_bytes) for token in tokens]
    if wants_top:
        first: list[dict[str, float] | None] = [] if echoed is None else [None]
        shown["top_logprobs"] = [*first, *({_name(raw): _finite(p) for _, raw, p in t.top} for t in tokens)]
    return shown


def to_chat_token(token: TokenLogprob) -> ChatToken:
    """A token's log-probability in the form of chats."""
    return {**_token(token.token_bytes, token.logprob), "top_logprobs": [_token(raw, p) for _, raw, p in token.top]}


def _token(raw: bytes, logprob: float) -> TopToken:
    return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _name(raw: bytes) -> str:
    """A token as a dictionary key; one that is not valid UTF-8 is written as bytes, so that different ones differ."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST_LOGPROB)
