"""Small tasks for tests: texts of random words with a word that tells their class, in files of any form."""

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path

WORDS = [f"{first}{second}{third}" for first in "bdfgk" for second in "aeiou" for third in ("lam", "ron", "tis", "vex")]
CLASSES = {"billing": "invoice", "delivery": "parcel", "returns": "refund"}


def rows(n: int = 60, seed: int = 0, classes: Sequence[str] = tuple(CLASSES)) -> list[tuple[str, str]]:
    """(text, label) pairs; every text has twelve random words of its own and two that its class is known by."""
    chance = random.Random(seed)
    made = []
    for number in range(n):
        label = classes[number % len(classes)]
        text = [*chance.sample(WORDS, 12), CLASSES[label], f"about{label[:3]}"]
        chance.shuffle(text)
        made.append((" ".join(text), label))
    return made


def csv_text(pairs: Sequence[tuple[str, ...]], header: Sequence[str] = ("text", "label"), separator: str = ",") -> str:
    """The rows as a spreadsheet writes them: CRLF, quotes where needed."""
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator).writerows([tuple(header), *pairs])
    return out.getvalue()


def csv_file(folder: Path, pairs: Sequence[tuple[str, ...]], name: str = "mails.csv") -> Path:
    """A CSV file of the rows, in UTF-8."""
    path = folder / name
    path.write_text(csv_text(pairs), encoding="utf-8", newline="")
    return path
