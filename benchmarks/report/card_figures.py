"""The figures of the default model's card, in one command: `python -m benchmarks.report.card_figures`.

Measured on the test split: the majority class, a linear classifier and the fine-tune before conversion (written by
`baseline.py` and `recipe.py` of the model), the base with a zero-shot and a few-shot prompt, each by its text and by
scored labels (a base model may not have learnt to write a label and nothing else), the converted model as served, and
with `--whole-vocab` (`deskside eval --out`), which shows the cost of trimming. Predictions are kept in
`models/email_triage/results/` and reused.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import tomli_w

from benchmarks.comparison.arms import base_arm, fine_tune_arm
from benchmarks.comparison.evaluate import (
    Evaluation,
    EvaluationTask,
    Prediction,
    evaluate,
    load_evaluation,
    predictions_of,
    save_evaluation,
    score_evaluation,
)
from benchmarks.comparison.scoring import ClassificationScore, compare
from benchmarks.load.servers import recipe_file
from benchmarks.load.workload import PromptTemplate, labels_of, read_examples, read_prompt
from benchmarks.record import save_json
from models.card.card import render_quality
from models.common.console import NamedProgress
from models.common.files import write_atomic
from models.common.stats import Interval
from models.manifest import Accuracy
from models.quality import read_quality
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store

from .plots import confusion_picture

TEST, TRAIN = recipe_file("data", "test.jsonl.gz"), recipe_file("data", "train.jsonl.gz")
CONCURRENCY = 8
FIGURES, LADDER = "figures", "ladder"
# Scoring forces all labels' tokens at once, so that few mails fill the server.
CONCURRENCY_SCORED = 4
NAMES: Mapping[str, str] = {
    "majority": "majority class",
    "tfidf_logistic": "TF-IDF and logistic regression, no language model",
    "base_zero_shot": "base, zero-shot prompt, greedy text",
    "base_zero_shot_scored": "base, zero-shot prompt, labels scored",
    "base_few_shot": "base, few-shot prompt (2 examples a class), greedy text",
    "base_few_shot_scored": "base, few-shot prompt (2 examples a class), labels scored",
    "finetune_torch": "fine-tune before conversion",
    "whole_vocabulary": "fine-tune as served but for its vocabulary, left whole",
    "as_served": "fine-tune as served",
}
MADE_ELSEWHERE = ("tfidf_logistic", "finetune_torch", "whole_vocabulary")


def majority() -> Evaluation:
    """Predict the most common label of the training split for every mail."""
    train, test = read_examples(TRAIN), read_examples(TEST)
    label = Counter(example.label for example in train).most_common(1)[0][0]
    return Evaluation(
        labels=labels_of(test),
        predictions=tuple(Prediction(id=e.id, label=e.label, prediction=label) for e in test),
        note=f"always {label!r}, the commonest label of the training split",
    )


def measure(results: Path, store: Store, progress: NamedProgress) -> dict[str, Evaluation]:
    """Measure or load every set of predictions; those of MADE_ELSEWHERE only if `results` has them.

    Raises ModelNotFound when one of the two models is not installed; earlier measurements are kept.
    """
    found = {"majority": majority()}
    save_evaluation(results / "majority.json", found["majority"])
    for shots in ("zero_shot", "few_shot"):
        arm = base_arm(store.resolve("gemma-3-270m"), read_prompt(recipe_file("prompts", f"{shots}.txt")), None)
        written, scored = results / f"base_{shots}.json", results / f"base_{shots}_scored.json"
        found[written.stem] = evaluate(EvaluationTask(arm, TEST, CONCURRENCY, written), progress)
        found[scored.stem] = evaluate(EvaluationTask(arm, TEST, CONCURRENCY_SCORED, scored, "labels scored"), progress)
    served = fine_tune_arm(store.resolve(DEFAULT_MODEL), PromptTemplate("short"), None)
    found["as_served"] = evaluate(EvaluationTask(served, TEST, CONCURRENCY, results / "as_served.json"), progress)
    for name in MADE_ELSEWHERE:
        if (file := results / f"{name}.json").exists():
            found[name] = load_evaluation(file)
    return {name: found[name] for name in NAMES if name in found}


def markdown(found: Mapping[str, Evaluation]) -> Iterator[str]:
    """The card's quality section, line by line."""
    scores = {name: score_evaluation(evaluation) for name, evaluation in found.items()}
    total = next(iter(scores.values())).total
    yield (
        f"Test split, {total} mails; 95 % intervals (accuracy: Wilson, macro-F1: bootstrap). A text counts only if it "
        "is exactly the label; with labels scored, the label that the model finds likeliest as its whole answer counts."
    )
    yield from ("", "| what | accuracy | right | macro-F1 |", "|---|---|---|---|")
    for name, score in scores.items():
        right = f"{score.correct} of {score.total}"
        yield f"| {NAMES[name]} | {_interval(score.accuracy)} | {right} | {_interval(score.macro_f1)} |"
    yield from ("", *_comparisons(found))
    yield from ("", "| label, as served | mails | precision | recall | F1 |", "|---|---|---|---|---|")
    for row in scores["as_served"].classes:
        yield f"| {row.label} | {row.support} | {row.precision:.3f} | {row.recall:.3f} | {row.f1:.3f} |"


def _interval(value: Interval) -> str:
    return f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _comparisons(found: Mapping[str, Evaluation]) -> Iterator[str]:
    served = predictions_of(found["as_served"])
    for other in ("tfidf_logistic", "base_few_shot", "base_few_shot_scored", "finetune_torch", "whole_vocabulary"):
        if other in found:
            earlier = predictions_of(found[other])
            paired = compare(served, earlier)
            flips = sum(served[item][1] != earlier[item][1] for item in served.keys() & earlier.keys())
            yield (
                f"- As served minus {NAMES[other]}: {_interval(paired.difference)} (paired, Newcombe; exact McNemar "
                f"p = {paired.p_value:.2g}); {flips} answers differ."
            )


def figures(scores: Mapping[str, ClassificationScore]) -> dict[str, object]:
    """All scores as plain values, for a file."""
    return {name: {"what": NAMES[name], **asdict(score)} for name, score in scores.items()}


def quality(scores: Mapping[str, ClassificationScore]) -> str:
    """The same accuracies as the `[[quality]]` entries of a model.toml."""
    entries = [
        Accuracy(
            what=NAMES[name],
            split="test",
            correct=score.correct,
            total=score.total,
            interval_low=round(score.accuracy.low, 4),
            interval_high=round(score.accuracy.high, 4),
        )
        for name, score in scores.items()
    ]
    return tomli_w.dumps({"quality": [entry.model_dump() for entry in entries]})


def with_part(card: str, name: str, text: str) -> str:
    """Replace the part of the card between the two marks of `name`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    return f"{card.partition(begin)[0]}{begin}\n{text}{end}{card.partition(end)[2]}"


def main() -> None:
    """Measure what is missing, write the figures and the picture, print the card's table."""
    results = recipe_file("results")

    def progress(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", file=sys.stderr)

    found = measure(results, Store(), progress)
    scores = {name: score_evaluation(evaluation) for name, evaluation in found.items()}
    save_json(results / "figures.json", figures(scores))
    served = scores["as_served"]
    title = f"email-triage as served: {served.correct} of {served.total} test mails right"
    confusion_picture(served, title, results / "confusion.png")
    text = "\n".join(markdown(found)) + "\n"
    write_atomic(results / "figures.md", text)
    write_atomic(results / "quality.toml", quality(scores))
    card = recipe_file("README.md")
    written = with_part(card.read_text(encoding="utf-8"), FIGURES, text)
    write_atomic(card, with_part(written, LADDER, render_quality(read_quality(card.parent)) + "\n"))
    print(text, end="")
    print(f"figures, picture and the entries for model.toml are in {results}", file=sys.stderr)


if __name__ == "__main__":
    main()
