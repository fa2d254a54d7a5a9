"""The types of text answers on the wire: chats, completions, their chunks, and token counts.

The OpenAPI document is generated from them, and a test checks real answers against it.
"""

from collections.abc import Sequence
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from runtime.requests import Usage

from .confidence import LabelConfidence
from .wire import answer_type

TextEnd = Literal["stop", "length", "tool_calls"]


@answer_type
class CachedTokens(TypedDict):
    """Prompt tokens that no choice had to compute."""

    cached_tokens: int


@answer_type
class CompletionTokens(TypedDict):
    """Always 0: reasoning is counted like any other text, and predictions are ignored."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


@answer_type
class TextUsage(TypedDict):
    """Token counts; a prompt counts once, however many choices share it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[CachedTokens]
    completion_tokens_details: CompletionTokens


@answer_type
class TopToken(TypedDict):
    """A candidate token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


@answer_type
class ChatToken(TopToken):
    """A token of the answer, its log-probability, and the likeliest candidates at its position."""

    top_logprobs: list[TopToken]


@answer_type
class ChatLogprobs(TypedDict):
    """Log-probabilities in the form of chats."""

    content: list[ChatToken]
    refusal: None


@answer_type
class CompletionLogprobs(TypedDict):
    """Log-probabilities in the form of completions; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


@answer_type
class FunctionCall(TypedDict):
    """The function's name and its arguments as JSON text."""

    name: str
    arguments: str


@answer_type
class MadeCall(TypedDict):
    """A tool call made by the model."""

    id: str
    type: Literal["function"]
    function: FunctionCall


@answer_type
class AssistantMessage(TypedDict):
    """The model's message: text, calls, or both."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[MadeCall]]


@answer_type
class ChatChoice(TypedDict):
    """One whole choice of a chat; `deskside` where it is a label of a calibrated model."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: TextEnd
    deskside: NotRequired[LabelConfidence]


@answer_type
class ChatCompletion(TypedDict):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TextUsage


@answer_type
class FunctionDelta(TypedDict):
    """The next piece of the arguments; the name is in the first delta only."""

    name: NotRequired[str]
    arguments: str


@answer_type
class MadeCallDelta(TypedDict):
    """The next piece of call number `index`."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


@answer_type
class ChatDelta(TypedDict):
    """The next piece of a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[MadeCallDelta]]


@answer_type
class ChatChunkChoice(TypedDict):
    """The next piece of one choice of a chat; `deskside` in the last, where it is a label of a calibrated model."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: TextEnd | None
    deskside: NotRequired[LabelConfidence]


@answer_type
class ChatChunk(TypedDict):
    """The data of one event of a streamed chat. With `include_usage`, `usage` is null until the last event.

    With `continuous_usage_stats` every event has the counts so far.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[TextUsage | None]


@answer_type
class CompletionChoice(TypedDict):
    """One choice of a completion, whole or the next piece of it; `finish_reason` is null until the last piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


@answer_type
class Completion(TypedDict):
    """The answer of `/v1/completions`, and the data of one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[TextUsage | None]


@answer_type
class InputDetails(TypedDict):
    """Input tokens reused from the KV cache; `cache_write_tokens` is always 0."""

    cached_tokens: int
    cache_write_tokens: int


@answer_type
class OutputDetails(TypedDict):
    """Always 0: reasoning is counted as output, like any other text."""

    reasoning_tokens: int


@answer_type
class InputOutputUsage(TypedDict):
    """Token counts, under their names in `/v1/responses` and `/v1/decisions`."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


def to_usage(usages: Sequence[Usage], choices_per_prompt: int) -> TextUsage:
    """OpenAI's token counts. A prompt counts once, however many choices share it.

    Of its tokens, those count as cached that no choice had to compute: the least that any of them found.
    """
    prompt, cached = 0, 0
    for start in range(0, len(usages), choices_per_prompt):
        shared = usages[start : start + choices_per_prompt]
        prompt += shared[0].prompt_tokens
        cached += min(usage.cached_tokens for usage in shared)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def to_input_output_usage(usage: Usage) -> InputOutputUsage:
    """The token counts of one answer, in the words of `/v1/responses` and `/v1/decisions`."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
