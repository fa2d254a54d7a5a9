"""A batch on the real model, killed half-way: resumed, it holds each answer once, and the same as if left alone."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from models.store.store import StoredModel

ROOT = Path(__file__).parents[2]
MAILS = 24
NEAR_TIE = 1.0  # of a log-probability: how far the same tokens in batches of other shapes may drift apart
DEADLINE_S = 300

pytestmark = pytest.mark.model


def requests() -> list[dict[str, Any]]:
    """The first mails of the test split, asked greedily, with what shows a near-tie."""
    data = ROOT / "models" / "email_triage" / "data" / "test.jsonl.gz"
    with gzip.open(data, "rt", encoding="utf-8") as file:
        mails = [json.loads(next(file)) for _ in range(MAILS)]
    fields = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    return [
        {
            "custom_id": mail["id"],
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": mail["messages"][:1]} | fields,
        }
        for mail in mails
    ]


def write_requests(folder: Path) -> Path:
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests()), encoding="utf-8")
    return source


def start(source: Path, output: Path, model: StoredModel) -> subprocess.Popen[str]:
    # One slot and short steps: answers come one by one, so that a kill lands between them.
    options = ["--model", str(model.folder), "--json", "--slots", "1", "--step-tokens", "128"]
    command = [sys.executable, "-m", "runtime.cli.main", "batch", str(source), str(output), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(source: Path, output: Path, model: StoredModel) -> dict[str, Any]:
    with start(source, output, model) as child:
        out, err = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0, err
    summary: dict[str, Any] = json.loads(out)
    return summary


def wait_for(lines: int, output: Path, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (output.exists() and output.read_bytes().count(b"\n") >= lines):
        assert child.poll() is None, f"ended by itself: {child.stderr and child.stderr.read()}"
        assert time.monotonic() < deadline, f"no {lines} answers in {DEADLINE_S} s"
        time.sleep(0.002)


def answers(output: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line["response"]["body"]["choices"][0] for line in lines}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal answers, or ones that part at a token whose best two alternatives were as good as tied."""
    for left, right in zip(one["logprobs"]["content"], other["logprobs"]["content"], strict=False):
        if left["token"] != right["token"]:
            best, second = (choice["logprob"] for choice in left["top_logprobs"])
            return bool(best - second < NEAR_TIE)
    return bool(one["message"] == other["message"])


def test_a_batch_killed_half_way_is_resumed(email_triage: StoredModel, tmp_path: Path) -> None:
    source, output = write_requests(tmp_path), tmp_path / "out.jsonl"
    with start(source, output, email_triage) as child:
        wait_for(5, output, child)
        child.kill()
    done = output.read_bytes().count(b"\n")
    assert 5 <= done < MAILS
    with output.open("ab") as file:
        file.write(b'{"id": "batch_req_torn by the ki')

    summary = finish(source, output, email_triage)
    assert (summary["answered_before"], summary["answered"], summary["failed"]) == (done, MAILS - done, 0)
    resumed = answers(output)
    assert set(resumed) == {request["custom_id"] for request in requests()}

    finish(source, tmp_path / "alone.jsonl", email_triage)
    alone = answers(tmp_path / "alone.jsonl")
    assert [custom_id for custom_id in alone if not same(alone[custom_id], resumed[custom_id])] == []
    assert email_triage.manifest is not None
    assert {choice["message"]["content"] for choice in alone.values()} <= set(email_triage.manifest.labels)


def test_sigterm_ends_a_batch_cleanly(email_triage: StoredModel, tmp_path: Path) -> None:
    source, output = write_requests(tmp_path), tmp_path / "out.jsonl"
    with start(source, output, email_triage) as child:
        wait_for(2, output, child)
        child.terminate()
        out, err = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130, err
    summary = json.loads(out)
    assert summary["interrupted"]
    assert summary["answered"] == len(answers(output)) < MAILS
    assert "rerun the same command to resume" in err
    assert not (tmp_path / "out.errors.jsonl").exists()
