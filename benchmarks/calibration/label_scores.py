"""The served model's log-probability of each label, for each held-out example of a task, as one small file.

    deskside serve email-triage
    python -m benchmarks.calibration.label_scores email-triage --out models/email_triage/results/label_scores.json

The examples are those of the validation and test splits. `/v1/decisions` gives shares among the labels. Their
logarithms differ from the log-probabilities by one number for each example, on which no calibrated probability depends.
"""

import argparse
import asyncio
import math
import sys
from pathlib import Path

import httpx

from benchmarks.errors import ServerFailed
from models.calibration.fit import LabelScores, ScoredExample
from models.common.chat_records import ChatRecord
from models.common.console import ProgressBars
from models.common.files import write_atomic
from models.task.task import open_task, text_of

SPLITS = ("validation", "test")
AT_ONCE = 8
DIGITS = 4
TIMEOUT_S = 600.0
# The logarithm that a probability of zero is kept as: JSON has no infinity.
LEAST = -99.0


async def collect(url: str, task_name: str) -> LabelScores:
    """Ask the server about every held-out example. Raises ServerFailed and what reading the task does."""
    task = open_task(task_name)
    labels = task.spec.labels
    asked = [(split, record) for split in SPLITS for record in task.records(split)]
    window, done = asyncio.Semaphore(AT_ONCE), 0
    with ProgressBars(transient=True) as bars:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:

            async def one(split: str, record: ChatRecord) -> ScoredExample:
                nonlocal done
                async with window:
                    logprobs = await _logprobs(client, text_of(record), labels)
                done += 1
                bars.update("scoring the labels", done, len(asked))
                return ScoredExample(id=record.id, split=split, label=record.answer, logprobs=logprobs)

            listed = (await client.get("models")).raise_for_status().json()["data"][0]
            examples = await asyncio.gather(*(one(split, record) for split, record in asked))
    return LabelScores(model=listed["id"], labels=labels, examples=tuple(examples))


async def _logprobs(client: httpx.AsyncClient, text: str, labels: tuple[str, ...]) -> tuple[float, ...]:
    question = {"type": "choice", "instructions": "Which label?", "choices": [{"value": label} for label in labels]}
    answer = await client.post("decisions", json={"input": text, "questions": [question]})
    if answer.status_code != httpx.codes.OK:
        raise ServerFailed(f"the server answered {answer.status_code}: {answer.text[:300]}")
    shares = {one["value"]: one["probability"] for one in answer.json()["answers"][0]["probabilities"]}
    return tuple(round(max(LEAST, math.log(p)) if (p := shares[label]) else LEAST, DIGITS) for label in labels)


def main() -> None:
    """Read the options, ask, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a task's name or folder")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1/", help="the server; its first model is asked")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    chosen = parser.parse_args()
    scores = asyncio.run(collect(chosen.url, chosen.task))
    write_atomic(chosen.out, scores.dump())
    print(f"{chosen.out}: {len(scores.examples)} examples of {scores.model}", file=sys.stderr)


if __name__ == "__main__":
    main()
