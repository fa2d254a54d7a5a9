"""The figures of a set of synopses: ROUGE-L, exact match and conformity, with 95 % intervals.

    python -m models.debian_synopsis.figures

Reads `results/*.json` and writes the card's figures: a row for each way, and each beside the best of the others; and
twenty of the fine-tune's answers, from the best to the worst.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from models.common.chat_records import ChatRecord
from models.common.files import write_atomic
from models.common.stats import Interval, bootstrap_mean, compare_paired, wilson
from models.common.text_scores import rouge_l

from .data.prompts import HOME, read_split, text_of
from .rules import RULES, Draft, broken, conforms

RESULTS = HOME / "results"
CARD = HOME / "README.md"
START, END = "<!-- figures -->\n", "<!-- /figures -->\n"
MAINTAINERS = "the maintainers' own"
WAYS = {
    "first_sentence": "first sentence of the description",
    "first_phrase": "the first sentence made into a phrase by rules",
    "nearest": "synopsis of the nearest train description (BM25)",
    "base_zero_shot": "base, zero-shot prompt",
    "base_few_shot": "base, few-shot prompt (8 examples)",
    "base_retrieved": "base, retrieved examples (BM25, 4)",
    "finetune_f16": "fine-tune, F16",
}
FINETUNE = "finetune_f16"
SAMPLES_START, SAMPLES_END = "<!-- samples -->\n", "<!-- /samples -->\n"
N_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class SynopsisScore:
    """`rouge` is each item's ROUGE-L F1, `right` and `conforming` its other two verdicts, all in one order.

    `kept` is the share that keeps each rule, by its name.
    """

    rouge: tuple[float, ...]
    right: tuple[bool, ...]
    conforming: tuple[bool, ...]
    kept: Mapping[str, float]

    @property
    def intervals(self) -> tuple[Interval, Interval, Interval]:
        """Mean ROUGE-L (bootstrap), exact match and conformity (both Wilson)."""
        total = len(self.rouge)
        return (
            bootstrap_mean(self.rouge),
            wilson(sum(self.right), total),
            wilson(sum(self.conforming), total),
        )


def score_synopses(drafts: list[Draft], expected: list[str]) -> SynopsisScore:
    """Score drafts against the maintainers' synopses, in the same order."""
    pairs = list(zip(drafts, expected, strict=True))
    faults = [broken(draft) for draft in drafts]
    return SynopsisScore(
        rouge=tuple(rouge_l(synopsis, draft.synopsis) for draft, synopsis in pairs),
        right=tuple(draft.synopsis.strip() == synopsis for draft, synopsis in pairs),
        conforming=tuple(map(conforms, drafts)),
        kept={rule.name: 1 - sum(rule.name in names for names in faults) / len(drafts) for rule in RULES},
    )


def read_predictions(path: Path) -> dict[str, str]:
    """The answers of an evaluation, by the package's name."""
    return {one["id"]: one["prediction"] for one in json.loads(path.read_text(encoding="utf-8"))["predictions"]}


def score_results(path: Path) -> SynopsisScore:
    """Score a file of predictions on the test split."""
    predictions = read_predictions(path)
    records = read_split("test")
    drafts = [Draft(one.id, text_of(one), predictions[one.id]) for one in records]
    return score_synopses(drafts, [one.answer for one in records])


def table(scores: Mapping[str, SynopsisScore]) -> str:
    """The ways as Markdown, and the paired difference of each to the best in ROUGE-L."""
    lines = ["| way | ROUGE-L | exact | conforming |", "|---|---|---|---|"]
    for what, score in scores.items():
        lines.append(f"| {what} | " + " | ".join(map(_shown, score.intervals)) + " |")
    written = {what: score for what, score in scores.items() if what != MAINTAINERS}
    best = max(written, key=lambda what: sum(written[what].rouge))
    lines.append("")
    for what in written:
        if what != best:
            pairs = zip(written[best].rouge, written[what].rouge, strict=True)
            difference = bootstrap_mean([first - second for first, second in pairs])
            exact = compare_paired(written[best].right, written[what].right).difference
            lines.append(
                f"- {best} minus {what}: ROUGE-L {_shown(difference)} (paired bootstrap), "
                f"exact {_shown(exact)} (Newcombe)."
            )
    return "\n".join(lines) + "\n"


def rules_table(scores: Mapping[str, SynopsisScore]) -> str:
    """The share of each way that keeps each rule, as Markdown."""
    lines = ["| rule | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for rule in RULES:
        shares = " | ".join(f"{score.kept[rule.name]:.3f}" for score in scores.values())
        lines.append(f"| {rule.name}{'' if rule.required else ' (not required)'} | {shares} |")
    return "\n".join(lines) + "\n"


def samples_table(records: Sequence[ChatRecord], answers: Mapping[str, str]) -> str:
    """Answers at equal distances in the order of ROUGE-L, from the best to the worst, as Markdown.

    Answers of the same score are in the order of their packages' digests, so that no sample is picked by hand.
    """
    scored = [(rouge_l(one.answer, answers[one.id]), one) for one in records]
    scored.sort(key=lambda pair: (-pair[0], sha256(pair[1].id.encode()).digest()))
    picked = [scored[place * (len(scored) - 1) // (N_SAMPLES - 1)] for place in range(N_SAMPLES)]
    lines = ["| package | the maintainers' | the fine-tune's | ROUGE-L |", "|---|---|---|---|"]
    for rouge, one in picked:
        cells = (cell.replace("|", "\\|") for cell in (one.id, one.answer, answers[one.id]))
        lines.append("| " + " | ".join(cells) + f" | {rouge:.2f} |")
    return "\n".join(lines) + "\n"


def _shown(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def main() -> None:
    records = read_split("test")
    own = [Draft(one.id, text_of(one), one.answer) for one in records]
    scores = {MAINTAINERS: score_synopses(own, [one.answer for one in records])}
    scores |= {what: score_results(path) for name, what in WAYS.items() if (path := RESULTS / f"{name}.json").is_file()}
    text = f"{table(scores)}\n{rules_table(scores)}"
    card = _between(CARD.read_text(encoding="utf-8"), (START, END), text)
    samples = samples_table(records, read_predictions(RESULTS / f"{FINETUNE}.json"))
    card = _between(card, (SAMPLES_START, SAMPLES_END), samples)
    write_atomic(CARD, card)
    print(text)


def _between(card: str, marks: tuple[str, str], text: str) -> str:
    """The card with `text` between the marks, in place of what is there."""
    before, rest = card.split(marks[0])
    return f"{before}{marks[0]}{text}{marks[1]}{rest.split(marks[1])[1]}"


if __name__ == "__main__":
    main()
