"""`quality.json`: the loss and gain of quantizing (and trimming) by candidate, and the choice with its reason.

Everything is measured against the half-precision file of the same conversion, on held-out examples, on one machine.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from models.common.files import write_atomic
from models.common.record import Record, Share

from .errors import BadManifest

QUALITY_FILE = "quality.json"

TaskKind = Literal["classify", "write"]
Verdict = Literal["unjudged", "chosen", "within budget", "over budget", "undoes the fine-tune", "failed"]


class Loss(Record):
    """The next-token distributions beside the reference's, over `positions` rows of logits.

    KL divergence in nats, reference first. `top1_agreement`: share of positions with the same likeliest token.
    `perplexity_ratio`: on the examples' own answers, the candidate's over the reference's.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    top1_agreement: Share
    perplexity_ratio: float


class MeanScore(Record):
    """The mean score of written answers, each against its example's own answer, beside the reference's mean.

    `difference_low` … `difference_high`: 95 % interval of the mean paired difference, this less the reference's
    (percentile bootstrap over the examples). `metric` is the name of the score, for tables.
    """

    metric: str
    mean: Share
    reference_mean: Share
    difference_low: float
    difference_high: float

    @property
    def difference(self) -> float:
        """The mean less the reference's."""
        return self.mean - self.reference_mean


class Answers(Record):
    """The answers to the held-out examples. `flips`: answers that differ from the reference's.

    `difference_low` … `difference_high`: 95 % interval of the paired accuracy difference, this less the reference's
    (Newcombe); `p_value`: exact McNemar. For work to write `score` is judged instead of accuracy and flips.
    """

    total: Annotated[int, Field(gt=0)]
    correct: Annotated[int, Field(ge=0)]
    flips: Annotated[int, Field(ge=0)]
    difference_low: float
    difference_high: float
    p_value: Share
    score: MeanScore | None = None


class Speed(Record):
    """Measured on this machine, medians over rounds. `decode_tokens_per_s`: by number of sequences that decode at once.

    `score_samples_per_s`: examples a second for the stated work, one figure a round, in order.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]
    peak_memory_bytes: int
    score_samples_per_s: tuple[float, ...] = ()


class Shape(Record):
    """The workload of the speed measurements: the typical example (medians, in tokens) and how it was served."""

    prompt_tokens: Annotated[int, Field(gt=0)]
    answer_tokens: Annotated[int, Field(gt=0)]
    sequences: Annotated[int, Field(gt=0)]
    step_tokens: Annotated[int, Field(gt=0)]
    threads: Annotated[int, Field(gt=0)]
    rounds: Annotated[int, Field(gt=0)]


class Candidate(Record):
    """A file that was made and measured. `score_per_s`: examples per second for the work, by which the choice is made.

    `kl_to_base`: mean KL divergence to the model before its fine-tuning, where that was available. `grid` describes
    which fine-tuned matrices are rounded to the grid their base lay on. `verdict` is "unjudged" until the choice.
    """

    name: str
    file: str
    size_bytes: Annotated[int, Field(gt=0)]
    sha256: str
    imatrix: bool = False
    overrides: tuple[str, ...] = ()
    loss: Loss | None = None
    answers: Answers | None = None
    speed: Speed | None = None
    score_per_s: float | None = None
    kl_to_base: float | None = None
    grid: str = ""
    verdict: Verdict = "unjudged"
    reason: str = ""


class LossBudget(Record):
    """The largest permitted loss of a candidate. Accuracy may not be lower at 95 % on the paired test.

    Written answers have no limit of `flips`: two equally good texts may differ. Their mean score may not be lower at
    95 %.
    """

    kl_mean: float = 0.02
    flips: float = 0.02


class Trim(Record):
    """A vocabulary that was cut. Coverage is of the held-out texts, in the untrimmed vocabulary's tokens."""

    tokens_before: int
    tokens_after: int
    covered_tokens: Share
    covered_examples: Share
    greedy_agreement: Share | None = None


class Quality(Record):
    """The whole report.

    `noise`, `noise_flips` and `noise_score` are the noise floor: the reference compared with itself at another batch
    size, measured on the first `noise_examples` of the held-out ones (None: on all of them). `base_distance` is the
    distance of the fine-tune from its base, if there is a base to compare with; `base_check` describes that comparison,
    or why there was none. `overruled`: the user chose, not the budget.
    """

    schema_version: Literal[1] = 1
    work: TaskKind
    budget: LossBudget
    machine: str
    examples_file: str
    examples_sha256: str
    calibration_examples: int
    held_out_examples: int
    noise: Loss | None
    noise_flips: int | None
    noise_score: MeanScore | None = None
    noise_examples: int | None = None
    base_distance: Loss | None = None
    base_check: str = ""
    shape: Shape | None = None
    trim: Trim | None = None
    candidates: tuple[Candidate, ...]
    chosen: str
    overruled: bool = False

    @property
    def metric(self) -> str | None:
        """The name of the score that answers are judged by; None where it is their accuracy."""
        scores = (one.answers.score for one in self.candidates if one.answers is not None)
        return next((score.metric for score in scores if score is not None), None)


def read_quality(folder: Path) -> Quality:
    """Read a model folder's `quality.json`. Raises BadManifest naming the file and the field."""
    file = folder / QUALITY_FILE
    try:
        return Quality.model_validate_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadManifest(f"{str(file)!r} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "quality"
        raise BadManifest(f"{str(file)!r}: {field}: {first['msg']}") from error


def write_quality(folder: Path, quality: Quality) -> None:
    """Write `quality.json`, whole or not at all."""
    write_atomic(folder / QUALITY_FILE, quality.model_dump_json(indent=2) + "\n")
