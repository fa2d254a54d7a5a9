"""The nouns of the runtime, all in one place and none with another's behaviour.

A request is written down once, valid and tokenised; events carry the answer back. Every accepted request ends in
exactly one terminal event: `Finished`, `Scored`, `Embedded` or `Failed`.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from msgspec import Struct

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["json_schema", "lark", "regex", "choice"]

# Choices of one `ScoringPrompt`.
MAX_SCORED_CHOICES = 255


class Grammar(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an answer must look like, as the client said it in the wire field `param`.

    `source` is a JSON schema, a Lark grammar, a regular expression, or a JSON list of texts of which the answer is one.
    """

    kind: GrammarKind
    source: str
    param: str


class SamplingParams(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the tokens of one answer are drawn.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 are off. `logprobs` is None for none, else how
    many alternatives to report for each token (0: only the chosen one's). `logit_bias` adds to raw logits by token id.
    `grammar` allows only tokens that lead to an answer it describes. `spelled` are control tokens that stand in the
    answer's text, which are left out otherwise.
    `seed` is always set: one is drawn at the edge when the client gave none, so that a request can be repeated.
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


class Request(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """One answer to be written: valid, tokenised, and known to fit the context.

    `id` is unique among live requests. A wire request with `n` choices becomes n of these, which share the prompt.
    `adapter` names the LoRA adapter that is applied (None: the bare model).
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None


class ScoringPrompt(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which of `choices` follows `prompt`, all as token ids: none empty, no two choices alike.

    A choice has been said with its last token; where another choice goes on from there, once one of `ends` follows it.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]


class Scoring(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Choices to be weighed rather than an answer to be written: valid, tokenised, and known to fit the context.

    `adapter` is as in `Request`.
    """

    id: str
    questions: tuple[ScoringPrompt, ...]
    adapter: str | None = None


class Embedding(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Texts of which a vector each is wanted: as token ids, none empty or longer than the model can embed.

    `adapter` is as in `Request`.
    """

    id: str
    prompts: tuple[tuple[int, ...], ...]
    adapter: str | None = None


Work = Request | Scoring | Embedding


class TokenLogprob(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A token's natural-log probability; `top` holds (id, bytes, log-probability) of the likeliest, best first."""

    token: int
    token_bytes: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


class Usage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Token counts of one answer. `cached_tokens` of the prompt were never computed for it.

    `completion_tokens` counts every token that was drawn, an end-of-turn token included.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class TextDelta(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """More text of an answer. `text` may be empty while bytes or a possible stop string are held back.

    `logprobs` belong to the tokens of this delta and are empty unless asked for.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class Finished(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Terminal: the answer is whole."""

    request_id: str
    reason: FinishReason
    usage: Usage


class Scored(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Terminal: every question is answered. For each its choices' natural-log probabilities, in order.

    They are the model's own, not normalised among the choices: the sum over the choice's tokens, and over what ends it
    where another choice goes on from it. Of a choice that cannot matter it is an upper bound.
    `completion_tokens` counts the choices' tokens that were computed, which may be none.
    """

    request_id: str
    logprobs: tuple[tuple[float, ...], ...]
    usage: Usage


class Embedded(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True, eq=False):
    """Terminal: the vectors of all texts in order, float32 of shape (texts, model's width), each of length 1."""

    request_id: str
    vectors: np.ndarray
    usage: Usage


class Failed(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Terminal: the answer will not come, and why."""

    request_id: str
    error: Exception


Event = TextDelta | Finished | Scored | Embedded | Failed


class EngineStats(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the engine holds right now, and has done since it began.

    Of `step_seconds_total`, the wall-clock time of all steps, `decode_seconds_total` went by inside the model's decode;
    the rest is planning, sampling and emitting. `draft_tokens_total` looked-up tokens were verified;
    `draft_tokens_accepted_total` of them were right. `engine_restarts_total` counts its own restarts.
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
    engine_restarts_total: int = 0
