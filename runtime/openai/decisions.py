"""OpenAI's `/v1/decisions`: the types of its body, and the wire answer made of the choices' probabilities. Pure.

A question is a predicate (how likely is it that this is true), a choice (which of these) or a score (where on this
scale); all are asked about one input. The shapes are those of the `openai` package's `types/decision*.py`.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Len
from pydantic import AfterValidator, Field, PlainValidator, ValidationError, model_validator
from typing_extensions import TypedDict

from runtime.errors import InvalidRequest
from runtime.requests import MAX_SCORED_CHOICES, Scored

from .answer_types import InputOutputUsage, to_input_output_usage
from .chat import MAX_MESSAGES
from .confidence import LabelConfidence, PromisedLabels, shares
from .fields import DECISION_FIELDS, below
from .wire import RefusalPart, TableBody, WireModel, answer_type, checked_later_as, invalid_request

MAX_QUESTIONS = 400
MAX_CHOICE_CHARS = 1024
MAX_NAME_CHARS = 256

# part type -> the field that holds its text
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def _text(content: object) -> str:
    """A string, or a list of text and JSON parts, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError("must be a string or a non-empty list of parts")
    return "\n".join(_part_text(index, part) for index, part in enumerate(content))


def _part_text(index: int, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "input_json" and isinstance(part.get("data"), dict | list):
        return json.dumps(part["data"], ensure_ascii=False)
    named = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    text = part.get(named) if isinstance(part, dict) and named is not None else None
    if not isinstance(text, str):
        raise ValueError(f"part {index} must be text or JSON, not {reprlib.repr(kind or part)}")
    return text


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _value(value: object) -> str | bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or len(value) > MAX_CHOICE_CHARS:
        raise ValueError(f"must be a boolean or a string of at most {MAX_CHOICE_CHARS} characters")
    return _said(value)


class DecisionTextPart(TypedDict):
    """A text."""

    type: Literal["input_text", "output_text"]
    text: str


class JsonPart(TypedDict):
    """A JSON value, read as its text."""

    type: Literal["input_json"]
    data: dict[str, Any] | list[Any]


_InputParts = Annotated[list[DecisionTextPart | RefusalPart | JsonPart], Len(1)]
Text = Annotated[str, PlainValidator(_text, json_schema_input_type=str | _InputParts), AfterValidator(_said)]
Option = Annotated[str, Field(max_length=MAX_CHOICE_CHARS), AfterValidator(_said)]


class InputMessage(WireModel):
    """One message of the input, its parts joined to one text."""

    rules = below(DECISION_FIELDS, "input[]")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    type: Literal["message"] = "message"

    @model_validator(mode="before")
    @classmethod
    def _messages_only(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("type") not in (None, "message"):
            raise ValueError(f"items of type {reprlib.repr(value['type'])} are not supported, only messages")
        return value


class _Question(WireModel):
    instructions: Text
    name: str | None = Field(None, max_length=MAX_NAME_CHARS)


class Predicate(_Question):
    """The question of whether a statement about the input is true."""

    type: Literal["predicate"]


class ChoiceOption(WireModel):
    """One of the values to choose from. The model reads `text`."""

    value: Annotated[
        str | bool, PlainValidator(_value, json_schema_input_type=bool | Annotated[str, Len(1, MAX_CHOICE_CHARS)])
    ]
    description: str | None = None

    @property
    def text(self) -> str:
        """The value in words."""
        return self.value if isinstance(self.value, str) else str(self.value).lower()


class Choice(_Question):
    """The question of which value fits the input."""

    type: Literal["choice"]
    choices: tuple[ChoiceOption, ...] = Field(min_length=2, max_length=MAX_SCORED_CHOICES, strict=False)


class ScoreLevel(WireModel):
    """One step of a scale."""

    label: Option
    description: str | None = None


class Score(_Question):
    """The question of the input's place on a scale; levels go from the lowest to the highest."""

    type: Literal["score"]
    levels: tuple[ScoreLevel, ...] = Field(min_length=2, max_length=MAX_SCORED_CHOICES, strict=False)


Question = Predicate | Choice | Score
Questions = Annotated[list[Annotated[Question, Field(discriminator="type")]], Len(1, MAX_QUESTIONS)]
_KINDS: Mapping[str, type[Predicate] | type[Choice] | type[Score]] = {
    "predicate": Predicate,
    "choice": Choice,
    "score": Score,
}


def _input(value: object) -> tuple[InputMessage, ...]:
    if isinstance(value, str):
        return (InputMessage(role="user", content=_said(value)),)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise ValueError(f"must be a text or a list of 1 … {MAX_MESSAGES} messages")
    return tuple(InputMessage.model_validate(item) for item in value)


class DecisionBody(TableBody):
    """The used fields of `/v1/decisions`, each question still as it was sent."""

    table = below(DECISION_FIELDS)

    model: str | None = None
    input: Annotated[
        tuple[InputMessage, ...],
        PlainValidator(_input, json_schema_input_type=str | Annotated[list[InputMessage], Len(1, MAX_MESSAGES)]),
    ]
    questions: Annotated[list[Any], Len(1, MAX_QUESTIONS), checked_later_as(Questions)]


@dataclass(frozen=True, slots=True)
class ParsedDecision:
    """The used fields of `/v1/decisions`; a text as input is one message of the user."""

    model: str | None
    input: tuple[InputMessage, ...]
    questions: tuple[Question, ...]


def parse_decision(payload: object) -> ParsedDecision:
    """The body, checked field by field. Raises InvalidRequest with `param` and the value given."""
    body = DecisionBody.read(payload)
    questions = tuple(_question(place, item) for place, item in enumerate(body.questions))
    return ParsedDecision(model=body.model, input=body.input, questions=questions)


def _question(place: int, item: object) -> Question:
    param = f"questions[{place}]"
    given = item.get("type") if isinstance(item, dict) else item
    kind = _KINDS.get(given) if isinstance(given, str) else None
    if kind is None or not isinstance(item, dict):
        message = f"{param}.type must be one of {', '.join(_KINDS)}, got {reprlib.repr(given)}"
        raise InvalidRequest(message, param=f"{param}.type", code="invalid_value")
    try:
        question = kind.model_validate(item)
    except ValidationError as error:
        fault = invalid_request(error)
        path = f"{param}.{fault.param}" if fault.param else param
        raise InvalidRequest(f"{param}: {fault}", param=path, code=fault.code) from None
    texts = [text for text, _ in options(question)]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        field = "levels" if isinstance(question, Score) else "choices"
        raise InvalidRequest(f"{param}.{field}: {twice!r} reads the same twice", param=f"{param}.{field}")
    return question


def options(question: Question) -> list[tuple[str, str | None]]:
    """The possible answers in order: each as the model reads it, and its description."""
    if isinstance(question, Choice):
        return [(option.text, option.description) for option in question.choices]
    if isinstance(question, Score):
        return [(level.label, level.description) for level in question.levels]
    return [("yes", None), ("no", None)]


@answer_type
class PredicateAnswer(TypedDict):
    """The probability that the statement is true."""

    type: Literal["predicate"]
    name: str | None
    probability: float


@answer_type
class ChoiceProbability(TypedDict):
    """One of the values and its probability."""

    value: str | bool
    probability: float


@answer_type
class ChoiceAnswer(TypedDict):
    """The likeliest value, its probability as `confidence`, and those of all values in order.

    Among all labels of a calibrated model, `deskside` has the calibrated confidence.
    """

    type: Literal["choice"]
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]
    deskside: NotRequired[LabelConfidence]


@answer_type
class LevelProbability(TypedDict):
    """One of the levels, counted from 0, and its probability."""

    label: str
    value: int
    probability: float


@answer_type
class ScoreAnswer(TypedDict):
    """The expected level, counted from 0, and the probabilities of all levels in order."""

    type: Literal["score"]
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


@answer_type
class Decision(TypedDict):
    """The answers to the questions, in order."""

    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer]
    model: str
    usage: InputOutputUsage


def to_decision(
    model: str, questions: Sequence[Question], scored: Scored, promise: PromisedLabels | None = None
) -> dict[str, Any]:
    """The wire answer. Raises EngineError if no option of a question has any probability.

    `promise` is that of the model's labels, if the input is such that it holds.
    """
    answers = []
    for question, row in zip(questions, scored.logprobs, strict=True):
        answer = to_answer(question, shares(row))
        if promise is not None and isinstance(question, Choice):
            texts = [text for text, _ in options(question)]
            given = texts[row.index(max(row))]
            if (sure := promise.confidence(given, texts, row)) is not None:
                answer["deskside"] = sure
        answers.append(answer)
    return {"answers": answers, "model": model, "usage": to_input_output_usage(scored.usage)}


def to_answer(question: Question, probabilities: Sequence[float]) -> dict[str, Any]:
    """One answer. Its confidence is the likeliest option's probability; a score is the expected level, from 0."""
    named = {"type": question.type, "name": question.name}
    if isinstance(question, Predicate):
        return named | {"probability": probabilities[0]}
    confidence = max(probabilities)
    if isinstance(question, Choice):
        values = [option.value for option in question.choices]
        shown = [{"value": v, "probability": p} for v, p in zip(values, probabilities, strict=True)]
        best = values[probabilities.index(confidence)]
        return named | {"choice": best, "confidence": confidence, "probabilities": shown}
    levels = enumerate(zip(question.levels, probabilities, strict=True))
    shown = [{"label": level.label, "value": value, "probability": p} for value, (level, p) in levels]
    score = sum(value * p for value, p in enumerate(probabilities))
    return named | {"score": score, "confidence": confidence, "probabilities": shown}
