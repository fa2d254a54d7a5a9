"""From a `/v1/decisions` body to one scoring request, and from its event to the wire answer."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from models.manifest import Manifest
from runtime.errors import ContextTooLong, InvalidRequest
from runtime.openai.decisions import Choice, DecisionBody, Question, options, parse_decision, to_decision
from runtime.prompt.prompter import ANSWER_MARK, input_text, question_text
from runtime.requests import Scored, Scoring, ScoringPrompt
from runtime.worker.inflight import Stream, only_event

from .chat import Serving, require_model

# Of all questions of a call together: bounds the memory of what waits.
MAX_PROMPT_TOKENS = 1 << 19


class Deciding(Serving, Protocol):
    """What preparing a decision needs of a served model."""

    @property
    def manifest(self) -> Manifest | None:
        """What the model says about itself: the labels it was trained on, and how it was asked."""


@dataclass(frozen=True, slots=True)
class DecisionCall:
    """A wire request that became `scoring`: one question of it for each of `questions`, in order."""

    model: str
    questions: tuple[Question, ...]
    scoring: Scoring

    def response(self, scored: Scored) -> dict[str, Any]:
        """The wire answer."""
        return to_decision(self.model, self.questions, scored.logprobs, scored.usage)


def prepare_decision(payload: object, served: Deciding) -> DecisionCall:
    """A parsed JSON body as a call that is valid, tokenised and known to fit the context.

    Raises InvalidRequest, ModelUnknown, ContextTooLong, TokenizeFailed or TemplateFailed.
    """
    body = parse_decision(payload)
    require_model(body.model, served.name)
    weighed: list[ScoringPrompt] = []
    n_tokens = 0
    for place in range(len(body.questions)):
        weighed.append(_weighed(body, place, served))
        n_tokens += len(weighed[-1].prompt)
        if n_tokens > MAX_PROMPT_TOKENS:
            message = f"the first {place + 1} questions have {n_tokens} prompt tokens, limit {MAX_PROMPT_TOKENS} a call"
            raise ContextTooLong(f"{message}; ask fewer at once", param="questions", code="context_length_exceeded")
    scoring = Scoring(f"decision-{secrets.token_hex(12)}", tuple(weighed), served.adapter)
    return DecisionCall(served.name, body.questions, scoring)


async def fold_decision(call: DecisionCall, stream: Stream) -> dict[str, Any]:
    """The answer of a call. Raises its error if it failed."""
    return call.response(await only_event(stream, Scored))


def _weighed(body: DecisionBody, place: int, served: Deciding) -> ScoringPrompt:
    question = body.questions[place]
    texts = [text for text, _ in options(question)]
    prompt, answers, ends = _asked(body, question, texts, served)
    encode = served.tokenizer.encode
    choices = tuple(tuple(encode(text, add_special=False, parse_special=False)) for text in answers)
    param = f"questions[{place}]"
    if len(set(choices)) < len(choices):
        raise InvalidRequest(f"{param}: two of the choices are the same tokens to this model", param=param)
    longest, n_ctx = max(map(len, choices)), served.prompter.n_ctx
    if len(prompt) + longest > n_ctx:
        message = f"{param}: the prompt has {len(prompt)} tokens and the longest choice {longest}"
        message += f"; the context holds {n_ctx} tokens"
        raise ContextTooLong(message, param="input", code="context_length_exceeded")
    return ScoringPrompt(prompt, choices, ends)


def _asked(
    body: DecisionBody, question: Question, texts: Sequence[str], served: Deciding
) -> tuple[tuple[int, ...], Sequence[str], tuple[int, ...]]:
    """The prompt, the texts that answer it, and the tokens that end an answer."""
    about = input_text([(message.role, message.content) for message in body.input])
    ends = served.tokenizer.end_tokens
    if (trained := _trained_prompt(question, served.manifest)) is not None:
        asked = trained.replace("{text}", about)
    else:
        asked = question_text(question.type, about, question.instructions, options(question))
    if served.info.chat_template is not None and ends:
        return served.prompter.chat([{"role": "user", "content": asked}], param="input"), texts, ends
    # A text-only model has learnt no end of a turn: a new line ends its answer too.
    new_line = served.tokenizer.encode("\n", add_special=False, parse_special=False)
    prompt = served.prompter.literal(asked + ANSWER_MARK, param="input")
    return prompt, [f" {text}" for text in texts], (*ends, new_line[-1])


def _trained_prompt(question: Question, manifest: Manifest | None) -> str | None:
    """The prompt a classifier was trained with, if the question is its own: a choice among its labels."""
    if manifest is None or not isinstance(question, Choice):
        return None
    values = {option.value for option in question.choices}
    return manifest.prompt.template if values <= set(manifest.labels) else None
