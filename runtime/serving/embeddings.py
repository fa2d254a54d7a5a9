"""From a `/v1/embeddings` body to one embedding request, and from its event to the wire answer."""

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import ContextTooLong, InvalidRequest
from runtime.openai.embeddings import parse_embedding, to_embeddings
from runtime.requests import Embedded, Embedding
from runtime.worker.inflight import Stream, only_event

from .chat import Serving, require_model

# Of all inputs of a call together, as OpenAI bounds them.
MAX_TOKENS = 300_000


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """A wire request that became `embedding`."""

    model: str
    encoding: Literal["float", "base64"]
    embedding: Embedding

    def response(self, embedded: Embedded) -> dict[str, Any]:
        """The wire answer."""
        return to_embeddings(self.model, embedded.vectors, embedded.usage, self.encoding)


def prepare_embedding(payload: object, served: Serving) -> EmbeddingCall:
    """A parsed JSON body as a call that is valid, tokenised and short enough for the model.

    Raises InvalidRequest, ModelUnknown, ContextTooLong or TokenizeFailed.
    """
    body = parse_embedding(payload, served.info.n_embd)
    require_model(body.model, served.name)
    prompts: list[tuple[int, ...]] = []
    n_tokens = 0
    for place, item in enumerate(body.input):
        prompts.append(_tokens(item, f"input[{place}]", served))
        n_tokens += len(prompts[-1])
        if n_tokens > MAX_TOKENS:
            message = f"the first {place + 1} inputs have {n_tokens} tokens, limit {MAX_TOKENS} a call; send fewer"
            raise ContextTooLong(message, param="input", code="context_length_exceeded")
    embedding = Embedding(f"embedding-{secrets.token_hex(12)}", tuple(prompts), served.adapter)
    return EmbeddingCall(served.name, body.encoding_format, embedding)


async def fold_embedding(call: EmbeddingCall, stream: Stream) -> dict[str, Any]:
    """The answer of a call. Raises its error if it failed."""
    return await asyncio.to_thread(call.response, await only_event(stream, Embedded))


def _tokens(item: str | tuple[int, ...], name: str, served: Serving) -> tuple[int, ...]:
    info = served.info
    tokens = item if isinstance(item, tuple) else _encoded(item, served)
    if len(tokens) > info.embed_n_ctx:
        message = f"{name} has {len(tokens)} tokens, limit {info.embed_n_ctx} for an embedding; split it"
        raise ContextTooLong(message, param="input", code="context_length_exceeded")
    if not tokens:
        raise InvalidRequest(f"{name} has no tokens", param="input")
    if max(tokens) >= info.n_vocab:
        raise InvalidRequest(f"{name} holds token id {max(tokens)}, the vocabulary has {info.n_vocab}", param="input")
    return tokens


def _encoded(text: str, served: Serving) -> tuple[int, ...]:
    """As the model wants a whole text: with its first token, and its last one if it was trained with that."""
    tokens = served.prompter.literal(text, param="input")
    ends = served.info.metadata.get("tokenizer.ggml.add_eos_token") == "true"
    return (*tokens, served.tokenizer.eos) if ends and served.tokenizer.eos is not None else tokens
