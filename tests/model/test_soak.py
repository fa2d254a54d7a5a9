"""A quarter of a minute of the soak on the real model: `make soak` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.store.store import StoredModel

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300

pytestmark = pytest.mark.model


def test_a_short_soak_holds(email_triage: StoredModel, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "runtime.cli.main", "bench", "soak", "--minutes", "0.25", "--kills", "1", "--json"]
    command += ["--model", str(email_triage.folder), "--slots", "4", "--queue", "4", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {line["name"]: line["passed"] for line in json.loads(done.stdout)["checks"]}
    assert checks["every request ended exactly once"] is True
    assert checks["nothing is left running or waiting"] is True
    run = json.loads(out.read_text(encoding="utf-8"))
    assert {outcome["end"] for outcome in run["outcomes"]} >= {"answered", "refused", "rejected", "left"}
