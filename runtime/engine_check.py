"""The last look at a request for text before the engine takes it: nothing that could crash C gets past."""

from .errors import ContextTooLong, InvalidRequest
from .llama_protocol import ModelInfo
from .sequence import Request


def check_request(request: Request, info: ModelInfo) -> None:
    """Raise InvalidRequest or ContextTooLong for what the edge should have refused."""
    params = request.params
    if not request.prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {params.max_tokens}", param="max_tokens")
    for token in (*request.prompt, *params.logit_bias):
        if not 0 <= token < info.n_vocab:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {info.n_vocab}")
    if len(request.prompt) + params.max_tokens > info.n_ctx:
        raise ContextTooLong(
            f"{len(request.prompt)} prompt tokens and max_tokens {params.max_tokens} exceed "
            f"the context of {info.n_ctx} tokens"
        )
