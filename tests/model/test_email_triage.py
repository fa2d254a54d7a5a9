"""The default model keeps what its card promises: the whole test split as one batch, against the card's own figures."""

import gzip
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from models.manifest import read_manifest
from models.store.store import StoredModel

ROOT = Path(__file__).parents[2]
HOME = ROOT / "models" / "email_triage"
AS_SERVED = "fine-tune as served"
# Floating point depends on the shape of a batch: so many of the mails may be near-ties that fall the other way.
NEAR_TIES = 5
# Single answers may differ in both directions: the card was made on a processor with AMX, where llama.cpp computes
# prompts. By our own products (AMD EPYC) six do.
FLIPS = 9
# Bounds a hang; on an idle machine it takes two minutes.
DEADLINE_S = 3600

pytestmark = pytest.mark.model


def read_test_split() -> list[dict[str, Any]]:
    with gzip.open(HOME / "data" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def run_batch(mails: list[dict[str, Any]], model: StoredModel, folder: Path) -> dict[str, str]:
    """Each mail's answer, by id."""
    source, output = folder / "mails.jsonl", folder / "labels.jsonl"
    body = {"temperature": 0, "max_tokens": 12}
    source.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": mail["id"],
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body | {"messages": mail["messages"][:1]},
                }
            )
            + "\n"
            for mail in mails
        ),
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "runtime.cli.main", "batch", str(source), str(output)]
    command += ["--model", str(model.folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE_S)
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {a["custom_id"]: a["response"]["body"]["choices"][0]["message"]["content"] for a in answers}


@pytest.mark.timeout(DEADLINE_S)
def test_the_whole_test_split_as_a_batch_scores_what_the_card_says(email_triage: StoredModel, tmp_path: Path) -> None:
    assert email_triage.manifest is not None
    (promised,) = (one for one in email_triage.manifest.quality if one.what == AS_SERVED)
    mails = read_test_split()
    answers = run_batch(mails, email_triage, tmp_path)
    assert answers.keys() == {mail["id"] for mail in mails}
    correct = sum(answers[mail["id"]] == mail["messages"][1]["content"] for mail in mails)
    assert promised.total == len(mails)
    assert abs(correct - promised.correct) <= NEAR_TIES
    kept = json.loads((HOME / "results" / "as_served.json").read_text(encoding="utf-8"))["predictions"]
    flips = [item["id"] for item in kept if answers[item["id"]] != item["prediction"]]
    assert len(flips) <= FLIPS, f"answers that differ from those the card was made of: {flips}"


def test_card_and_manifest_say_what_was_measured() -> None:
    measured = tomllib.loads((HOME / "results" / "quality.toml").read_text(encoding="utf-8"))["quality"]
    assert [one.model_dump() for one in read_manifest(HOME).quality] == measured
    assert (HOME / "results" / "figures.md").read_text(encoding="utf-8") in (HOME / "README.md").read_text("utf-8")
