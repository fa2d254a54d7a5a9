"""From a wire body to engine requests, and from events to the wire answer: what server and batch do alike."""

import secrets
import time
from dataclasses import replace
from typing import Protocol

from .constrain_protocol import Constrainer
from .errors import InvalidRequest, ModelUnknown
from .intake_tools import Calling, prepare_tools
from .llama_protocol import ModelInfo
from .openai import Body, ChatBody, CompletionBody, grammar_of, parse, to_requests, token_limit
from .openai_answer import Answer, Call
from .openai_fields import Kind
from .worker_stream import Stream, cancelling

_ID_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}


class Serving(Calling, Protocol):
    """What preparing a request needs of a served model."""

    @property
    def adapter(self) -> str | None:
        """The LoRA adapter its requests are answered with, if one is."""

    @property
    def fingerprint(self) -> str:
        """What answers with the same seed can be compared under."""

    @property
    def constrainer(self) -> Constrainer:
        """Its grammars."""

    @property
    def info(self) -> ModelInfo:
        """What is loaded."""


def prepare(kind: Kind, payload: object, served: Serving) -> Call:
    """A parsed JSON body as a call whose requests are valid, tokenised and known to fit the context.

    Raises InvalidRequest, ModelUnknown, ContextTooLong, TokenizeFailed or TemplateFailed.
    """
    body = parse(kind, payload)
    require_model(body.model, served.name)
    tools = prepare_tools(body, served) if isinstance(body, ChatBody) else None
    prompts = _prompts(body, served)
    _check_ids(body, prompts, served.tokenizer.n_vocab)
    limits = [_limit(body, prompt, served) for prompt in prompts]
    if (grammar := tools.grammar if tools else grammar_of(body)) is not None:
        served.constrainer.check(grammar)
    drawn = [secrets.randbits(64) for _ in range(len(prompts) * body.n)]
    call_id = _ID_PREFIX[kind] + secrets.token_hex(12)
    requests = to_requests(body, call_id, prompts, limits, drawn, served.adapter)
    return Call(
        id=call_id,
        kind=kind,
        model=served.name,
        created_s=int(time.time()),
        fingerprint=served.fingerprint,
        requests=tools.constrained(requests) if tools else requests,
        choices_per_prompt=body.n,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        tools=tools.form if tools else None,
    )


def _limit(body: Body, prompt: tuple[int, ...], served: Serving) -> int:
    if isinstance(body, CompletionBody):
        served.prompter.limit(prompt, None, param="prompt")  # a prompt too long by itself is its own fault
    wanted, param = token_limit(body)
    return served.prompter.limit(prompt, wanted, param=param)


def require_model(asked: str | None, served: str) -> None:
    """Raise ModelUnknown unless the client asks for the served model, or names none."""
    if asked is not None and asked != served:
        raise ModelUnknown(f"model {asked[:200]!r} is not served here; this server has {served!r}", param="model")


def require_chat(served: Serving) -> None:
    """Raise InvalidRequest if the model cannot be talked to: a base model has no chat template."""
    if served.info.chat_template is None:
        message = f"model {served.name!r} has no chat template; send a text to /v1/completions instead"
        raise InvalidRequest(message, param="messages", code="not_a_chat_model")


def _prompts(body: Body, served: Serving) -> list[tuple[int, ...]]:
    if isinstance(body, ChatBody):
        require_chat(served)
        tools = [tool.for_template() for tool in body.callable_tools]
        return [served.prompter.chat([message.model_dump() for message in body.messages], tools=tools)]
    prompts = [served.prompter.text(item) if isinstance(item, str) else item for item in body.prompt]
    if not all(prompts):
        raise InvalidRequest("prompt must not be empty: this model has no token that begins a text", param="prompt")
    return prompts


def _check_ids(body: Body, prompts: list[tuple[int, ...]], n_vocab: int) -> None:
    for prompt in prompts:
        if max(prompt) >= n_vocab:
            raise InvalidRequest(f"prompt holds token id {max(prompt)}, the vocabulary has {n_vocab}", param="prompt")
    if body.logit_bias and max(body.logit_bias) >= n_vocab:
        message = f"logit_bias names token id {max(body.logit_bias)}, the vocabulary has {n_vocab}"
        raise InvalidRequest(message, param="logit_bias")


async def fold(call: Call, stream: Stream) -> dict[str, object]:
    """The whole answer of a call. Raises the error of the first choice that failed, and cancels the others."""
    answer = Answer(replace(call, stream=False))
    with cancelling(stream):
        async for event in stream:
            answer.feed(event)
    return answer.response()
