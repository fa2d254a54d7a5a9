"""llama-server's own routes that tools rely on: /tokenize, /detokenize and /apply-template, in its shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import FailFast, Field, ValidationError
from typing_extensions import TypedDict

from runtime.errors import InvalidRequest
from runtime.openai.chat import MAX_MESSAGES, Message
from runtime.openai.wire import WireModel, answer_type, invalid_request
from runtime.serving.chat import require_chat, require_model, with_turns
from runtime.serving.model import ServedModel

# Tokenising can take time quadratic in the text's length: texts and lists far beyond any prompt are refused.
MOST_PER_CELL = 16


class NativeBody(WireModel):
    """The field that all native routes share."""

    model: str | None = None


B = TypeVar("B", bound=NativeBody)


class TokenizeBody(NativeBody):
    """The body of `/tokenize`. `parse_special` reads control tokens written out in the text."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(NativeBody):
    """The body of `/detokenize`."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]


class TemplateBody(NativeBody):
    """The body of `/apply-template`."""

    messages: tuple[Message, ...] = Field(min_length=1, max_length=MAX_MESSAGES, strict=False)


@answer_type
class TokenPiece(TypedDict):
    """A token and its text, or its bytes if they are not valid UTF-8."""

    id: int
    piece: str | list[int]


@answer_type
class Tokenized(TypedDict):
    """The answer of `/tokenize`."""

    tokens: list[int] | list[TokenPiece]


@answer_type
class Detokenized(TypedDict):
    """The answer of `/detokenize`."""

    content: str


@answer_type
class RenderedTemplate(TypedDict):
    """The answer of `/apply-template`."""

    prompt: str


def tokenize(payload: object, model: ServedModel) -> Tokenized:
    """{content} -> {tokens}: ids, or with `with_pieces` {id, piece}; a piece that is not valid UTF-8 is a byte list."""
    body = _parse(TokenizeBody, payload, model)
    _check_size("content", "characters", len(body.content), model)
    tokens = model.tokenizer.encode(body.content, add_special=body.add_special, parse_special=body.parse_special)
    if not body.with_pieces:
        return {"tokens": tokens}
    pieces: list[TokenPiece] = [{"id": token, "piece": _piece(model, token)} for token in tokens]
    return {"tokens": pieces}


def detokenize(payload: object, model: ServedModel) -> Detokenized:
    """{tokens} -> {content}: control tokens written out, invalid UTF-8 as U+FFFD."""
    body = _parse(DetokenizeBody, payload, model)
    _check_size("tokens", "ids", len(body.tokens), model)
    largest = max(body.tokens, default=0)
    if largest >= model.tokenizer.n_vocab:
        message = f"tokens holds id {largest}, the vocabulary has {model.tokenizer.n_vocab}"
        raise InvalidRequest(message, param="tokens")
    raw = b"".join(model.tokenizer.token_bytes(token, special=True) for token in body.tokens)
    return {"content": raw.decode("utf-8", "replace")}


def apply_template(payload: object, model: ServedModel) -> RenderedTemplate:
    """{messages} -> {prompt}: the prompt of a chat completion as text."""
    body = _parse(TemplateBody, payload, model)
    require_chat(model)
    return {"prompt": with_turns(body.messages, lambda turns: model.prompter.render(model.cut(turns).messages))}


@dataclass(frozen=True, slots=True)
class NativeRoute:
    """A route: the function that answers a parsed JSON body, and the types for the OpenAPI document."""

    summary: str
    answer: Callable[[object, ServedModel], Any]
    body: type[NativeBody]
    answered: type


NATIVE_ROUTES: Mapping[str, NativeRoute] = {
    "/tokenize": NativeRoute("Tokenize a text", tokenize, TokenizeBody, Tokenized),
    "/detokenize": NativeRoute("Turn tokens into text", detokenize, DetokenizeBody, Detokenized),
    "/apply-template": NativeRoute(
        "Render a conversation by the chat template", apply_template, TemplateBody, RenderedTemplate
    ),
}


def _parse(kind: type[B], payload: object, model: ServedModel) -> B:
    try:
        body = kind.model_validate(payload)
    except ValidationError as error:
        raise invalid_request(error) from None
    require_model(body.model, model.name)
    return body


def _check_size(field: str, unit: str, size: int, model: ServedModel) -> None:
    limit = MOST_PER_CELL * model.info.n_ctx
    if size > limit:
        message = f"{field} has {size} {unit}, limit {limit} ({MOST_PER_CELL} for each token of the context)"
        raise InvalidRequest(message, param=field)


def _piece(model: ServedModel, token: int) -> str | list[int]:
    raw = model.tokenizer.token_bytes(token, special=True)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
