"""Plant wrong labels in email-triage's train mails and print how many of them are among the most suspicious.

    OPENBLAS_NUM_THREADS=1 python -m tests.support.models.planted 0 1

One number a seed. A process of its own, since numpy reads the number of threads once, when it is loaded.
"""

import random
import sys
from pathlib import Path

from models.common.chat_records import read_chat_records
from models.task.task import text_of
from models.task.words.doubt import doubts

MAILS = Path(__file__).parents[3] / "models" / "email_triage" / "data" / "train.jsonl.gz"
PLANTED, LOOKED_AT = 48, 100


def found(seed: int) -> int:
    """The planted labels among the LOOKED_AT most suspicious."""
    records = read_chat_records(MAILS)
    names = sorted({record.answer for record in records})
    chance = random.Random(seed)
    labels = [record.answer for record in records]
    wrong = set(chance.sample(range(len(labels)), PLANTED))
    for row in sorted(wrong):
        labels[row] = chance.choice([name for name in names if name != labels[row]])
    judged = doubts([text_of(record) for record in records], labels)
    return len(wrong & set(judged.ranked()[:LOOKED_AT]))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(found(int(argument)))
