"""The endpoints that a model answers through its engine, for server and batch. A new one is a new row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.openai.answer_types import ChatChunk, ChatCompletion, Completion
from runtime.openai.chat import ChatBody, CompletionBody
from runtime.openai.decisions import Decision, DecisionBody
from runtime.openai.embeddings import EmbeddingBody, EmbeddingList
from runtime.openai.responses.answer import Response, ResponseChunk
from runtime.openai.responses.request import ResponseBody
from runtime.openai.wire import TableBody

from .call import Call
from .chat import prepare_chat, prepare_completion, prepare_response
from .model import ServedModel
from .reading import prepare_decision, prepare_embedding

Prepare = Callable[[object, ServedModel], Call]
"""Makes a call of a parsed JSON body. Raises RequestError, TokenizeFailed or TemplateFailed."""


@dataclass(frozen=True, slots=True)
class Route:
    """An endpoint: the preparation of a call, and for the OpenAPI document the types of body, answer and chunk."""

    summary: str
    prepare: Prepare
    body: type[TableBody]
    answer: Any
    chunk: Any = None


ROUTES: Mapping[str, Route] = {
    "/v1/chat/completions": Route("Answer a conversation", prepare_chat, ChatBody, ChatCompletion, ChatChunk),
    "/v1/completions": Route("Continue a text", prepare_completion, CompletionBody, Completion, Completion),
    "/v1/decisions": Route(
        "Answer questions about a text, with probabilities", prepare_decision, DecisionBody, Decision
    ),
    "/v1/embeddings": Route("Embed texts as vectors", prepare_embedding, EmbeddingBody, EmbeddingList),
    "/v1/responses": Route(
        "Answer a conversation, in the shape of responses", prepare_response, ResponseBody, Response, ResponseChunk
    ),
}
