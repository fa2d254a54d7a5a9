"""Requests to an engine and the events it answers with.

A request is valid and tokenised; events carry the answer back. Every accepted request ends in exactly one terminal
event: `Finished`, `Scored`, `Embedded` or `Failed`. Requests and events travel between the server and the engine's
process in msgpack (`runtime/worker/messages.py`); those of a union carry their type's name as a tag.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from msgspec import Struct

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["json_schema", "lark", "regex", "choice"]

# Choices of one `ScoringPrompt`.
MAX_SCORED_CHOICES = 255


class PipeStruct(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A value that travels between processes, as an array of its fields. Copy it with `msgspec.structs.replace`."""


class Grammar(PipeStruct, frozen=True):
    """A constraint on an answer, which the client gave in the wire field `param`.

    `source` is a JSON schema, a Lark grammar, a regular expression, or a JSON list of texts of which the answer is one.
    `strict`: the client wants a schema enforced whole or not at all. `text` is the meaning of a Lark grammar's `@text`.
    """

    kind: GrammarKind
    source: str
    param: str
    strict: bool = False
    text: "Grammar | None" = None


class SamplingParams(PipeStruct, frozen=True):
    """Sampling of the tokens of one answer.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `logprobs` is the number of alternatives to
    report for each token (0: the drawn token only; None: no log-probabilities). `logit_bias` adds to raw logits by
    token id. `grammar` allows only tokens that lead to an answer it describes. No `stop` ends an answer that holds
    `call_mark`, or begins with it if `calls_first`: it is a call. The text of an answer leaves control
    tokens out, except those of `spelled`. `seed` is always set: the server draws it when the client gave none, so that
    a request can be repeated. With `prompt_logprobs` the first delta begins with the log-probabilities of the prompt's
    tokens, from its second one on; the whole prompt is computed for that.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    logprobs: int | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None
    spelled: tuple[int, ...] = ()
    prompt_logprobs: bool = False
    call_mark: str = ""
    calls_first: bool = False


class Request(PipeStruct, frozen=True, tag=True):
    """A request to write one answer, which fits the context.

    `id` is unique among live requests. A wire request with `n` choices becomes n of these, which share the prompt.
    `adapter` names the LoRA adapter to apply (None: the base model alone). Where the answer is one of `labels` (token
    ids), its terminal event has the log-probabilities of all.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None
    labels: tuple[tuple[int, ...], ...] = ()


class ScoringPrompt(PipeStruct, frozen=True):
    """A prompt and the choices to score after it, as token ids: no choice is empty, no two are equal.

    A choice is complete with its last token; if another choice continues it, once one of `ends` follows it.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]


class Scoring(PipeStruct, frozen=True, tag=True):
    """A request for the probabilities of choices, all of which fit the context. `id` and `adapter` as in `Request`."""

    id: str
    questions: tuple[ScoringPrompt, ...]
    adapter: str | None = None


class Embedding(PipeStruct, frozen=True, tag=True):
    """A request for one vector per text: token ids, none empty or longer than the model can embed.

    `id` and `adapter` as in `Request`.
    """

    id: str
    prompts: tuple[tuple[int, ...], ...]
    adapter: str | None = None


Work = Request | Scoring | Embedding


class TokenLogprob(PipeStruct, frozen=True):
    """A token's natural-log probability; `top` holds (id, bytes, log-probability) of the likeliest, best first."""

    token: int
    token_bytes: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


class Usage(PipeStruct, frozen=True):
    """Token counts of one answer. `cached_tokens` of the prompt came from the prefix cache.

    `completion_tokens` counts every drawn token, including an end-of-turn token.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class TextDelta(PipeStruct, frozen=True, tag=True):
    """More text of an answer. `text` may be empty while half a character or a possible stop string is held back.

    `logprobs` belong to the tokens of this delta; empty unless the request has `logprobs`.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class Finished(PipeStruct, frozen=True, tag=True):
    """Terminal: the answer is complete. `label_logprobs`, where it is one of the labels, are as in `Scored`."""

    request_id: str
    reason: FinishReason
    usage: Usage
    label_logprobs: tuple[float, ...] = ()


class Scored(PipeStruct, frozen=True, tag=True):
    """Terminal: for each prompt, the natural-log probabilities of its choices, in order.

    They are the model's own, not normalised among the choices: the sum over the choice's tokens, and over the token
    that ends it if another choice continues it. For a negligible choice the value is an upper bound.
    `completion_tokens` counts the computed tokens of choices, which may be 0.
    """

    request_id: str
    logprobs: tuple[tuple[float, ...], ...]
    usage: Usage


class Embedded(PipeStruct, frozen=True, tag=True, eq=False):
    """Terminal: the vectors of all texts in order, float32 of shape (texts, model's width), each of length 1."""

    request_id: str
    vectors: np.ndarray
    usage: Usage


class Failed(PipeStruct, frozen=True, tag=True):
    """Terminal: the request failed with `error`."""

    request_id: str
    error: Exception


Event = TextDelta | Finished | Scored | Embedded | Failed


class EngineStats(PipeStruct, frozen=True):
    """The engine's current counts, and its totals since it started.

    `step_seconds_total` is the wall-clock time of all steps; `decode_seconds_total` of it went into the model's decode,
    the rest into planning, sampling and emitting. `draft_tokens_total` speculative tokens were verified and
    `draft_tokens_accepted_total` of them accepted. Prefixes that left the KV cache take `snapshot_bytes`; on disk some
    were `dropped` instead of written. The supervisor counts `engine_restarts_total`.
    """

    running: int = 0
    waiting: int = 0
    kv_cells_used: int = 0
    kv_cells_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    steps_total: int = 0
    preemptions_total: int = 0
    decode_seconds_total: float = 0.0
    step_seconds_total: float = 0.0
    draft_tokens_total: int = 0
    draft_tokens_accepted_total: int = 0
    snapshot_bytes: int = 0
    snapshots_restored_total: int = 0
    disk_prefixes_written_total: int = 0
    disk_prefixes_loaded_total: int = 0
    disk_prefixes_dropped_total: int = 0
    disk_prefixes_damaged_total: int = 0
    engine_restarts_total: int = 0
