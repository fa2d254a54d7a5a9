"""The confidence in a label and the promise that goes with it, beside OpenAI's fields. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import TypedDict

from runtime.errors import EngineError

from .wire import answer_type


@answer_type
class LabelConfidence(TypedDict):
    """The calibrated probability of the label given, and whether it may go out without a person.

    `automatic`: answers as sure as this one are right with a share of `target` at least.
    """

    confidence: float
    automatic: bool
    target: float


@dataclass(frozen=True, slots=True)
class PromisedLabels:
    """A model's labels, the temperature of their probabilities, and the confidence from which `target` is kept.

    Without a `threshold` no answer is automatic.
    """

    labels: tuple[str, ...]
    temperature: float
    target: float
    threshold: float | None

    def confidence(self, label: str, labels: Sequence[str], logprobs: Sequence[float]) -> LabelConfidence | None:
        """The confidence in `label` by the log-probabilities of `labels`; None unless those are the model's, all."""
        if label not in self.labels or len(labels) != len(self.labels) or set(labels) != set(self.labels):
            return None
        sure = shares([logprob / self.temperature for logprob in logprobs])[labels.index(label)]
        automatic = self.threshold is not None and sure >= self.threshold
        return {"confidence": sure, "automatic": automatic, "target": self.target}


def beside(promise: PromisedLabels | None, text: str, logprobs: Sequence[float]) -> dict[str, LabelConfidence]:
    """The fields of an answer beside OpenAI's: none unless `text` is a label. `logprobs` are in the model's order."""
    sure = promise.confidence(text, promise.labels, logprobs) if promise is not None and logprobs else None
    return {} if sure is None else {"deskside": sure}


def shares(logprobs: Sequence[float]) -> list[float]:
    """Log-probabilities as probabilities that sum to 1. Raises EngineError if none is above zero."""
    highest = max(logprobs)
    if highest == -math.inf:
        raise EngineError("the model gives none of the choices any probability")
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
