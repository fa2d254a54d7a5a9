"""Preparation of `/v1/embeddings`: a body becomes one embedding request."""

import secrets

from runtime.errors import ContextTooLong, InvalidRequest
from runtime.openai.answer import WholeAnswer
from runtime.openai.embeddings import parse_embedding, to_embeddings
from runtime.prompt.prompter import too_long
from runtime.requests import Embedded, Embedding

from .call import Call
from .chat import require_model
from .model import ServedModel

# Of all inputs of a call together, as OpenAI bounds them.
MAX_TOKENS = 300_000


def prepare_embedding(payload: object, model: ServedModel) -> Call:
    """Prepare a body of `/v1/embeddings`. Raises InvalidRequest, ModelUnknown, ContextTooLong or TokenizeFailed."""
    body = parse_embedding(payload, model.info.n_embd)
    require_model(body.model, model.name)
    prompts: list[tuple[int, ...]] = []
    n_tokens = 0
    for place, item in enumerate(body.input):
        prompts.append(_tokens(item, f"input[{place}]", model))
        n_tokens += len(prompts[-1])
        if n_tokens > MAX_TOKENS:
            message = f"the first {place + 1} inputs have {n_tokens} tokens, limit {MAX_TOKENS} a call; send fewer"
            raise ContextTooLong(message, param="input", code="context_length_exceeded")
    embedding = Embedding(f"embedding-{secrets.token_hex(12)}", tuple(prompts), model.adapter)

    def answer() -> WholeAnswer[Embedded]:
        return WholeAnswer(Embedded, lambda embedded: to_embeddings(model.name, embedded, body.encoding_format))

    return Call(embedding.id, (embedding,), answer, large=True)


def _tokens(item: str | tuple[int, ...], name: str, model: ServedModel) -> tuple[int, ...]:
    info = model.info
    tokens = item if isinstance(item, tuple) else _encoded(item, model)
    if len(tokens) > info.embed_n_ctx:
        message = too_long(f"{name} has {len(tokens)} tokens; split it", info.embed_n_ctx)
        raise ContextTooLong(message, param="input", code="context_length_exceeded")
    if not tokens:
        raise InvalidRequest(f"{name} has no tokens", param="input")
    if max(tokens) >= info.n_vocab:
        raise InvalidRequest(f"{name} holds token id {max(tokens)}, the vocabulary has {info.n_vocab}", param="input")
    return tokens


def _encoded(text: str, model: ServedModel) -> tuple[int, ...]:
    """The tokens of a whole text: BOS where the model has one, and EOS if it was trained with it."""
    tokens = model.prompter.literal(text, param="input")
    ends = model.info.metadata.get("tokenizer.ggml.add_eos_token") == "true"
    return (*tokens, model.tokenizer.eos) if ends and model.tokenizer.eos is not None else tokens
