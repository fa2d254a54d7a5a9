"""OpenAI's `/v1/embeddings`: the type of its body, and the wire answer made of the vectors. Pure."""

import base64
from typing import Annotated, Any, Literal

from pydantic import PlainValidator
from typing_extensions import TypedDict

from runtime.errors import InvalidRequest
from runtime.requests import Embedded

from .chat import TextsOrIds, texts_or_ids
from .fields import EMBEDDING_FIELDS, below
from .wire import TableBody, answer_type

MAX_INPUTS = 2048


def _inputs(value: object) -> tuple[str | tuple[int, ...], ...]:
    inputs = texts_or_ids(value)
    if len(inputs) > MAX_INPUTS:
        raise ValueError(f"must hold at most {MAX_INPUTS} inputs, holds {len(inputs)}")
    for place, item in enumerate(inputs):
        if not item:
            raise ValueError(f"input {place} is empty")
    return inputs


class EmbeddingBody(TableBody):
    """The used fields of `/v1/embeddings`; `input` in any of its four shapes is a tuple of texts or token-id tuples."""

    table = below(EMBEDDING_FIELDS)

    model: str | None = None
    input: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_inputs, json_schema_input_type=TextsOrIds)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def parse_embedding(payload: object, n_embd: int) -> EmbeddingBody:
    """Read a body, field by field, for a model of width `n_embd`.

    Raises InvalidRequest with `param` and the value given.
    """
    body = EmbeddingBody.read(payload)
    if body.dimensions not in (None, n_embd):
        message = f"dimensions: vectors of this model have {n_embd} and cannot be cut, got {body.dimensions}"
        raise InvalidRequest(message, param="dimensions", code="invalid_value")
    return body


@answer_type
class EmbeddingVector(TypedDict):
    """The vector of an input: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


@answer_type
class EmbeddingUsage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


@answer_type
class EmbeddingList(TypedDict):
    """The vectors of all inputs, in order."""

    object: Literal["list"]
    data: list[EmbeddingVector]
    model: str
    usage: EmbeddingUsage


def to_embeddings(model: str, embedded: Embedded, encoding: Literal["float", "base64"]) -> dict[str, Any]:
    """The wire answer; `base64` encodes each vector's little-endian float32 bytes."""
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
