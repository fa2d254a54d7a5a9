"""`deskside bench` and `deskside eval` as a person runs them: they start the real model's server and stop it again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.store.store import StoredModel

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300

pytestmark = pytest.mark.model


def deskside(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_bench_measures_the_fine_tune_against_the_replay(email_triage: StoredModel, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    arms = ["--arms", "fine-tune,hosted", "--quick", "--out", str(out)]
    done = deskside("bench", "--model", str(email_triage.folder), *arms)
    assert done.returncode == 0, done.stderr
    assert "hosted (replayed)" in done.stdout
    run: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    samples = [sample for level in run["arms"][0]["levels"] for sample in level["samples"]]
    assert len(samples) == 2 * 6
    assert {sample["text"] for sample in samples} <= set(run["workload"]["labels"])
    for sample in samples:
        assert sample["scheduled_s"] <= sample["sent_s"] <= sample["deltas_s"][0] <= sample["finished_s"]
        assert sample["completion_tokens"] >= 2
    # Bare mails share their first few template tokens only: nothing was answered from an earlier request.
    assert sum(s["cached_tokens"] for s in samples) < 0.3 * sum(s["prompt_tokens"] for s in samples)


def test_eval_asks_the_model_as_it_was_trained(email_triage: StoredModel, tmp_path: Path) -> None:
    assert email_triage.manifest is not None
    examples = tmp_path / "two.jsonl"
    examples.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]})
            + "\n"
            for text, label in (
                ("Subject: CASH NOW\n\nClick here to get rich!", "spam"),
                ("Subject: hi\n\nhello", "fork"),
            )
        ),
        encoding="utf-8",
    )
    done = deskside("eval", str(email_triage.folder), "--examples", str(examples), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] == 2
    assert {item["prediction"] for item in found["predictions"]} <= set(email_triage.manifest.labels)
