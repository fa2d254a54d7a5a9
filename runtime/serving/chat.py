"""From a wire body to engine requests, and from events to the wire answer: what server and batch do alike."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from runtime.decoding.grammar import Constrainer
from runtime.errors import ContextTooLong, InvalidRequest, ModelUnknown, TemplateFailed
from runtime.llama.interface import ModelInfo, TokenizerLike
from runtime.openai.answer import Answer, Call
from runtime.openai.chat import Body, ChatBody, CompletionBody, grammar_of, parse, to_requests, token_limit
from runtime.openai.responses import Origins, parse_response
from runtime.openai.responses_stream import ResponseAnswer, ResponseCall
from runtime.openai.tool_calls import ToolFormat, probe, recognise, tool_grammar
from runtime.openai.wire import Endpoint
from runtime.prompt.prompter import Prompter
from runtime.requests import Grammar, Request
from runtime.worker.inflight import Stream, cancelling


class Calling(Protocol):
    """What preparing tools needs of a served model."""

    @property
    def name(self) -> str:
        """The name clients call it by."""

    @property
    def prompter(self) -> Prompter:
        """Renders and tokenises."""

    @property
    def tokenizer(self) -> TokenizerLike:
        """Its tokenizer."""


@dataclass(frozen=True, slots=True)
class PreparedTools:
    """How the model writes calls, the grammar of its answer, and the control tokens to be read in it."""

    form: ToolFormat
    grammar: Grammar
    spelled: tuple[int, ...]

    def constrained(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The requests, held to the grammar."""
        params = (replace(request.params, grammar=self.grammar, spelled=self.spelled) for request in requests)
        return tuple(replace(request, params=params) for request, params in zip(requests, params, strict=True))


def prepare_tools(body: ChatBody, served: Calling) -> PreparedTools | None:
    """What the body's tools ask for; None if nothing may be called.

    Raises InvalidRequest if the model's chat template has no place for tools, or writes calls in an unknown way.
    """
    tools = body.callable_tools
    told_of_tools = next(
        (n for n, message in enumerate(body.messages) if message.tool_calls or message.tool_call_id), None
    )
    if (tools or told_of_tools is not None) and not served.prompter.takes_tools:
        message = f"model {served.name!r} cannot call tools: its chat template has no place for them"
        param = "tools" if tools else f"messages[{told_of_tools}]"
        raise InvalidRequest(message, param=param, code="unsupported_parameter")
    if not tools:
        return None
    form = recognise(*example_call(served.prompter), served.prompter.template_text)
    if form is None:
        message = f"model {served.name!r} cannot call tools here: its chat template writes calls in an unknown format"
        raise InvalidRequest(message, param="tools", code="unsupported_parameter")
    control = control_tokens(form, served.tokenizer)
    choice = body.tool_choice
    may_call = [tool for tool in tools if choice.name in (None, tool.function.name)]
    grammar = tool_grammar(
        form,
        may_call,
        control,
        must_call=choice.mode == "required",
        parallel=body.parallel_tool_calls and choice.name is None,
    )
    return PreparedTools(form, grammar, tuple(control.values()))


def example_call(prompter: Prompter) -> tuple[str, str]:
    """A conversation with a call as the chat template writes it, and that from where the model's turn begins.

    Both are empty if it cannot write one.
    """
    turns, tools = probe()
    extra = {"tools": tools}
    try:
        before = prompter.render(turns[:1], extra=extra)
        whole = prompter.render(turns, extra=extra, add_generation_prompt=False)
    except (InvalidRequest, TemplateFailed):
        return "", ""
    return whole, whole.removeprefix(before.rstrip())


def control_tokens(form: ToolFormat, tokenizer: TokenizerLike) -> dict[str, int]:
    """Which texts of a format are control tokens to this model, and which."""
    found = {}
    for text in tokenizer.special_texts:
        if any(text in piece for piece in form.pieces):
            tokens = tokenizer.encode(text, add_special=False, parse_special=True)
            if len(tokens) == 1 and not tokenizer.token_bytes(tokens[0]):
                found[text] = tokens[0]
    return found


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


def prepare(kind: Endpoint, payload: object, served: Serving) -> Call:
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


def prepare_response(payload: object, served: Serving) -> ResponseCall:
    """A parsed JSON body as a call that is valid, tokenised and known to fit the context.

    Raises InvalidRequest, ModelUnknown, ContextTooLong, TokenizeFailed or TemplateFailed.
    """
    body = parse_response(payload)
    try:
        return ResponseCall(prepare("chat", dict(body.chat), served), body)
    except (InvalidRequest, ContextTooLong) as error:
        raise _renamed(error, body.origins) from None


def _renamed(error: InvalidRequest | ContextTooLong, origins: Origins) -> InvalidRequest | ContextTooLong:
    if error.param is None:
        return error
    param = origins.rename(error.param)
    return type(error)(str(error).replace(error.param, param, 1), param=param, code=error.code)


async def fold_response(asked: ResponseCall, stream: Stream) -> dict[str, Any]:
    """The whole response. Raises the error it failed with."""
    answer = ResponseAnswer(asked, time.time)
    with cancelling(stream):
        async for event in stream:
            answer.feed(event)
    return answer.response()
