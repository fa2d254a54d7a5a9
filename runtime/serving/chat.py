"""Preparation of the endpoints that write text, `/v1/chat/completions`, `/v1/completions` and `/v1/responses`.

A body becomes requests that are valid, tokenised and known to fit the context, tools and grammars included.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from msgspec import structs

from runtime.errors import ContextTooLong, InvalidRequest, ModelUnknown, TemplateFailed
from runtime.openai.answer import EchoedPrompt, TextAnswer, TextCall
from runtime.openai.chat import (
    Body,
    ChatBody,
    CompletionBody,
    Message,
    TokenizedPrompt,
    grammar_of,
    parse,
    to_requests,
    token_limit,
)
from runtime.openai.responses.answer import ResponseAnswer, ResponseCall
from runtime.openai.responses.request import Origins, parse_response
from runtime.openai.wire import Endpoint
from runtime.requests import MAX_SCORED_CHOICES

from .call import Call
from .form import prepare_form
from .model import ServedModel
from .promise import is_as_trained

T = TypeVar("T")

_ID_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}


def prepare_chat(payload: object, model: ServedModel) -> Call:
    """Prepare a body of `/v1/chat/completions`.

    Raises InvalidRequest, ModelUnknown, ContextTooLong, TokenizeFailed or TemplateFailed.
    """
    body = parse("chat", payload)
    call = _chat(body, model)
    return _text(_with_labels(call, model) if _answers_with_labels(body, model) else call)


def prepare_completion(payload: object, model: ServedModel) -> Call:
    """Prepare a body of `/v1/completions`. Raises InvalidRequest, ModelUnknown, ContextTooLong or TokenizeFailed."""
    body = parse("completion", payload)
    require_model(body.model, model.name)
    prompts = [model.prompter.text(item) if isinstance(item, str) else item for item in body.prompt]
    if not all(prompts):
        raise InvalidRequest("prompt must not be empty: this model has no token that begins a text", param="prompt")
    call = _text_call(body, prompts, model)
    if body.echo:
        echo = tuple(_echoed(given, prompt, model) for given, prompt in zip(body.prompt, prompts, strict=True))
        call = replace(call, echo=echo, echo_only=body.max_tokens == 0)
    return _text(call)


def _echoed(given: str | tuple[int, ...], prompt: tuple[int, ...], model: ServedModel) -> EchoedPrompt:
    spell = partial(model.tokenizer.token_bytes, special=True)
    text = given if isinstance(given, str) else b"".join(map(spell, prompt)).decode("utf-8", "replace")
    first = spell(prompt[0])
    return EchoedPrompt(text, first, leads=text.encode().startswith(first))


def prepare_response(payload: object, model: ServedModel) -> Call:
    """Prepare a body of `/v1/responses`, which is translated to the body of a chat. Raises as `prepare_chat`."""
    body = parse_response(payload)
    try:
        chat = _chat(parse("chat", dict(body.chat)), model)
    except (InvalidRequest, ContextTooLong) as error:
        renamed = _renamed(error, body.origins)
        if isinstance(error, ContextTooLong) and body.own.truncation == "auto":
            message = f"{renamed} Truncation 'auto' cuts nothing here."
            renamed = ContextTooLong(message, param=renamed.param, code=renamed.code)
        raise renamed from None
    response = ResponseCall(chat, body)
    return Call(
        response.id,
        chat.requests,
        partial(ResponseAnswer, response, time.time),
        streams=chat.stream,
        not_enforced=tuple(_renamed_note(note, body.origins) for note in chat.not_enforced),
        n_cut=chat.n_cut,
    )


def require_model(asked: str | None, served: str) -> None:
    """Raise ModelUnknown unless the client asks for the served model, or names none."""
    if asked is not None and asked != served:
        raise ModelUnknown(f"model {asked[:200]!r} is not served here; this server has {served!r}", param="model")


def require_chat(model: ServedModel) -> None:
    """Raise InvalidRequest for a model without a chat template, as base models are."""
    if model.info.chat_template is None:
        message = f"model {model.name!r} has no chat template; send a text to /v1/completions instead"
        raise InvalidRequest(message, param="messages", code="not_a_chat_model")


def require_tools(body: ChatBody, model: ServedModel) -> None:
    """Raise InvalidRequest if the body names tools or calls, and the model's chat template has no place for them."""
    tools = body.callable_tools
    names_a_call = next(
        (n for n, message in enumerate(body.messages) if message.tool_calls or message.tool_call_id), None
    )
    if (tools or names_a_call is not None) and not model.prompter.takes_tools:
        message = f"model {model.name!r} cannot call tools: its chat template has no place for them"
        param = "tools" if tools else f"messages[{names_a_call}]"
        raise InvalidRequest(message, param=param, code="unsupported_parameter")


def _text(call: TextCall) -> Call:
    answer = partial(TextAnswer, call)
    return Call(call.id, call.requests, answer, call.stream, not_enforced=call.not_enforced, n_cut=call.n_cut)


def _chat(body: ChatBody, model: ServedModel) -> TextCall:
    require_model(body.model, model.name)
    require_tools(body, model)
    require_chat(model)
    prompt, n_cut = _chat_prompt(body, model)
    return replace(_text_call(body, [prompt], model), n_cut=n_cut)


def _answers_with_labels(body: ChatBody, model: ServedModel) -> bool:
    """True for a calibrated model that is asked as it was trained, and may answer with each of its labels.

    Other labels' probabilities may take steps of their own, so a chat has them only where a target was given.
    """
    manifest = model.manifest
    if model.target is None or model.promise is None or manifest is None or body.callable_tools:
        return False
    grammar = grammar_of(body)
    if grammar is not None and (grammar.kind != "choice" or set(json.loads(grammar.source)) != set(manifest.labels)):
        return False
    said = [(message.role, message.content) for message in body.messages]
    return is_as_trained(said, manifest.prompt, wrapped=True)


def _with_labels(call: TextCall, model: ServedModel) -> TextCall:
    """The call with its labels scored beside the text; as it is, if the longest has no room after the prompt."""
    labels, n_prompt = model.label_tokens, len(call.requests[0].prompt)
    if not labels or n_prompt + max(map(len, labels)) > model.prompter.n_ctx or len(labels) > MAX_SCORED_CHOICES:
        return call
    requests = tuple(structs.replace(request, labels=labels) for request in call.requests)
    return replace(call, requests=requests, promise=model.promise)


def _chat_prompt(body: ChatBody, model: ServedModel) -> tuple[tuple[int, ...], int]:
    """The prompt's tokens, and the number of texts that were cut."""
    described = [tool.for_template() for tool in body.callable_tools]

    def write(turns: list[dict[str, Any]]) -> tuple[tuple[int, ...], int]:
        cut = model.cut(turns)
        return model.prompter.chat(cut.messages, tools=described), cut.n_cut

    return with_turns(body.messages, write)


def with_turns(messages: Sequence[Message], write: Callable[[list[dict[str, Any]]], T]) -> T:
    """Call `write` with the messages in the form that templates read, and return its result.

    Some templates go through the arguments of earlier calls one by one, and fail on those that a model broke: such
    a text becomes the one argument of its call.
    """
    turns: list[dict[str, Any]] = [message.model_dump() for message in messages]
    functions = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
    broken = [function for function in functions if isinstance(function["arguments"], str)]
    try:
        return write(turns)
    except (InvalidRequest, TemplateFailed):
        if not broken:
            raise
    for function in broken:
        function["arguments"] = {"arguments": function["arguments"]}
    return write(turns)


def _text_call(body: Body, prompts: Sequence[tuple[int, ...]], model: ServedModel) -> TextCall:
    """Check the lengths of prompts and answers, prepare the grammar and make the requests."""
    _check_ids(body, prompts, model.tokenizer.n_vocab)
    tokenized = [TokenizedPrompt(prompt, _limit(body, prompt, model)) for prompt in prompts]
    constrained = grammar_of(body) is not None or (isinstance(body, ChatBody) and bool(body.callable_tools))
    form = prepare_form(body, model) if constrained else None
    drawn = [secrets.randbits(64) for _ in range(len(prompts) * body.n)]
    endpoint: Endpoint = "chat" if isinstance(body, ChatBody) else "completion"
    call_id = _ID_PREFIX[endpoint] + secrets.token_hex(12)
    requests = to_requests(body, call_id, tokenized, drawn, model.adapter)
    return TextCall(
        id=call_id,
        endpoint=endpoint,
        model=model.name,
        created_s=int(time.time()),
        fingerprint=model.fingerprint,
        requests=form.hold(requests) if form else requests,
        choices_per_prompt=body.n,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        continuous_usage=body.stream_options is not None and body.stream_options.continuous_usage_stats,
        tools=form.calls if form else None,
        calls_first=form is not None and form.calls_first,
        not_enforced=form.not_enforced if form else (),
    )


def _check_ids(body: Body, prompts: Sequence[tuple[int, ...]], n_vocab: int) -> None:
    for prompt in prompts:
        if max(prompt) >= n_vocab:
            raise InvalidRequest(f"prompt holds token id {max(prompt)}, the vocabulary has {n_vocab}", param="prompt")
    if body.logit_bias and max(body.logit_bias) >= n_vocab:
        message = f"logit_bias names token id {max(body.logit_bias)}, the vocabulary has {n_vocab}"
        raise InvalidRequest(message, param="logit_bias")


def _limit(body: Body, prompt: tuple[int, ...], model: ServedModel) -> int:
    if isinstance(body, CompletionBody):
        model.prompter.limit(prompt, None, param="prompt")  # an overlong prompt is an error of `prompt`
    wanted, param = token_limit(body)
    limit = model.prompter.limit(prompt, wanted or 1 if wanted is not None else None, param=param)
    return limit if wanted != 0 else 0


def _renamed(error: InvalidRequest | ContextTooLong, origins: Origins) -> InvalidRequest | ContextTooLong:
    """The error with the name that the field has in the body of `/v1/responses`."""
    if error.param is None:
        return error
    param = origins.rename(error.param)
    return type(error)(str(error).replace(error.param, param, 1), param=param, code=error.code)


def _renamed_note(note: str, origins: Origins) -> str:
    param, colon, rest = note.partition(":")
    return origins.rename(param) + colon + rest
