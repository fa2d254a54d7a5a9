"""The endpoints that a model answers through its engine: path -> preparation. A new one is a new row."""

from collections.abc import Callable, Mapping

from .call import Call
from .chat import prepare_chat, prepare_completion, prepare_response
from .decisions import prepare_decision
from .embeddings import prepare_embedding
from .model import ServedModel

Prepare = Callable[[object, ServedModel], Call]
"""Makes a call of a parsed JSON body. Raises RequestError, TokenizeFailed or TemplateFailed."""

ROUTES: Mapping[str, Prepare] = {
    "/v1/chat/completions": prepare_chat,
    "/v1/completions": prepare_completion,
    "/v1/decisions": prepare_decision,
    "/v1/embeddings": prepare_embedding,
    "/v1/responses": prepare_response,
}
