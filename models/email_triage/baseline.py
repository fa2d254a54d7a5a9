"""A linear classifier on the same mails: the baseline that a language model has to beat.

    .venv/bin/pip install -e '.[recipe]'  (models/email_triage/recipe.py says how without CUDA)
    .venv/bin/python -m models.email_triage.baseline

TF-IDF of words and word pairs, logistic regression, trained on the train split; its strength is chosen on the
validation split, and the test split is scored once. The predictions are kept for the figures of the model's card.
"""

import gzip
import json
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

HOME = Path(__file__).parent
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)


def read_split(name: str) -> tuple[list[str], list[str], list[str]]:
    """Ids, mails and labels of a split."""
    with gzip.open(HOME / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    texts = [[turn["content"] for turn in record["messages"]] for record in records]
    return [record["id"] for record in records], [mail for mail, _ in texts], [label for _, label in texts]


def classifier(strength: float) -> Pipeline:
    """An untrained classifier; `strength` is the inverse of the regularisation (scikit-learn's C)."""
    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(features, LogisticRegression(C=strength, max_iter=1000))


def main() -> None:
    """Train, choose, score the test split once, write `results/tfidf_logistic.json`."""
    _, train_mails, train_labels = read_split("train")
    _, validation_mails, validation_labels = read_split("validation")
    ids, mails, labels = read_split("test")
    trained = {strength: classifier(strength).fit(train_mails, train_labels) for strength in STRENGTHS}
    accuracy = {strength: trained[strength].score(validation_mails, validation_labels) for strength in STRENGTHS}
    best = max(STRENGTHS, key=accuracy.__getitem__)
    print({strength: round(value, 4) for strength, value in accuracy.items()}, "->", best, file=sys.stderr)
    predicted = trained[best].predict(mails)
    record = {
        "labels": sorted(set(train_labels)),
        "predictions": [
            {"id": mail_id, "label": label, "prediction": str(answer)}
            for mail_id, label, answer in zip(ids, labels, predicted, strict=True)
        ],
        "note": f"TF-IDF of words and word pairs, logistic regression, C={best} chosen on the validation split",
    }
    (HOME / "results").mkdir(exist_ok=True)
    (HOME / "results" / "tfidf_logistic.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
