"""The ways to a synopsis that need no training, on the test split: each answer is kept in `results/`.

    python -m models.debian_synopsis.baseline
    python -m models.debian_synopsis.baseline --answers few_shot answers.jsonl

The first writes the first sentence, the phrase made of it, and the synopsis of the nearest train description. The
second keeps what a base model answered to a batch (`data/prompts.py` says how).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from models.common.chat_records import ChatRecord
from models.common.files import write_atomic
from models.task.words.nearest import Nearest

from .data.prompts import HOME, N_RETRIEVED, WAYS, read_split, text_of
from .first_sentence import first_phrase, first_sentence

NOTES = {
    "zero_shot": "gemma-3-270m, prompts/zero_shot.txt, greedy, the first line with text",
    "few_shot": "gemma-3-270m, prompts/few_shot.txt, greedy",
    "retrieved": f"gemma-3-270m, the {N_RETRIEVED} nearest train records (BM25) as examples, greedy",
}


def save(name: str, records: tuple[ChatRecord, ...], answers: Mapping[str, str], note: str) -> None:
    """Write `results/NAME.json`, in the form of an evaluation: an answer for each record, in their order."""
    predictions = [{"id": one.id, "label": one.answer, "prediction": answers[one.id]} for one in records]
    record = {"labels": [], "predictions": predictions, "note": note}
    (HOME / "results").mkdir(exist_ok=True)
    write_atomic(HOME / "results" / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_answers(path: Path) -> dict[str, str]:
    """The first line with text of each answer of a batch, by custom_id."""
    answers = {}
    with path.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            text = line["response"]["body"]["choices"][0]["text"]
            answers[line["custom_id"]] = next(iter(text.strip().splitlines()), "").strip()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", nargs=2, metavar=("WAY", "FILE"), help=f"answers to keep; a way is one of {WAYS}")
    arguments = parser.parse_args()
    asked = read_split("test")
    if arguments.answers:
        way, path = arguments.answers
        save(f"base_{way}", asked, read_answers(Path(path)), NOTES[way])
        return
    train = read_split("train")
    index = Nearest([text_of(record) for record in train])
    nearest = {one.id: train[index.find(text_of(one), 1)[0]].answer for one in asked}
    save("first_sentence", asked, {one.id: first_sentence(text_of(one)) for one in asked}, "the first sentence")
    save("first_phrase", asked, {one.id: first_phrase(text_of(one)) for one in asked}, "first_sentence.first_phrase")
    save("nearest", asked, nearest, "the synopsis of the nearest train description (BM25)")


if __name__ == "__main__":
    main()
