"""OpenAI's `/v1/embeddings`: the type of its body, and the wire answer made of the vectors. Pure."""

import base64
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, ValidationError

from runtime.errors import InvalidRequest
from runtime.requests import Embedded

from .chat import texts_or_ids
from .wire import FieldRule, WireModel, invalid_request, read_fields

MAX_INPUTS = 2048

EMBEDDING_FIELDS: Mapping[str, FieldRule] = {
    **{name: FieldRule(name, "used") for name in ("model", "input", "encoding_format", "dimensions")},
    "user": FieldRule("user", "ignored"),
}


def _inputs(value: object) -> tuple[str | tuple[int, ...], ...]:
    inputs = texts_or_ids(value)
    if len(inputs) > MAX_INPUTS:
        raise ValueError(f"must hold at most {MAX_INPUTS} inputs, holds {len(inputs)}")
    for place, item in enumerate(inputs):
        if not item:
            raise ValueError(f"input {place} is empty")
    return inputs


class EmbeddingBody(WireModel):
    """The used fields of `/v1/embeddings`; `input` in any of its four shapes is a tuple of texts or token-id tuples."""

    model: str | None = None
    input: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_inputs)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def parse_embedding(payload: object, n_embd: int) -> EmbeddingBody:
    """The body, checked field by field, for a model of width `n_embd`.

    Raises InvalidRequest with `param` and the value given.
    """
    try:
        body = EmbeddingBody.model_validate(read_fields(EMBEDDING_FIELDS, payload))
    except ValidationError as error:
        raise invalid_request(error) from None
    if body.dimensions not in (None, n_embd):
        message = f"dimensions: vectors of this model have {n_embd} and cannot be cut, got {body.dimensions}"
        raise InvalidRequest(message, param="dimensions", code="invalid_value")
    return body


def to_embeddings(model: str, embedded: Embedded, encoding: Literal["float", "base64"]) -> dict[str, Any]:
    """The wire answer. base64 is of each vector's little-endian float32 bytes."""
    if encoding == "base64":
        shown: list[Any] = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in embedded.vectors]
    else:
        shown = embedded.vectors.tolist()
    n_tokens = embedded.usage.prompt_tokens
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)],
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
