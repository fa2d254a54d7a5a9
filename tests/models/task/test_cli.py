"""`deskside task …` as a newcomer types it: new, list, show, check, review, apply."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from models.errors import BadTask
from models.task.cli import create_app
from tests.support.models.tasks import CLASSES, csv_file, rows


def run(*words: str) -> Result:
    return CliRunner().invoke(create_app(), words)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pairs = rows(120)
    pairs[7] = (pairs[7][0], "returns")
    pairs.append(pairs[0])
    return csv_file(tmp_path, pairs)


def test_the_whole_way(file: Path, tmp_path: Path) -> None:
    made = run("new", "mails", str(file), "--seed", "3")
    assert made.exit_code == 0
    assert "UTF-8, separator ',', first row is the header" in made.stdout
    assert "'label'" in made.stdout
    assert "guessed; --output" in made.stdout
    assert "next: deskside task check mails" in made.stderr
    assert run("list").stdout.startswith("mails  classify  ")
    described = json.loads(run("show", "mails", "--json").stdout)
    assert described["labels"] == sorted(CLASSES)
    assert sum(described["sizes"].values()) == 121
    assert "classify, scored by accuracy" in run("show", "mails").stdout

    page = tmp_path / "page.html"
    checked = run("check", "mails", "--page", str(page))
    assert checked.exit_code == 0
    assert "look at: duplicates" in checked.stdout
    assert "→ deskside task apply mails --drop duplicates" in checked.stdout
    assert "a word model, no language model" in checked.stdout
    assert "'returns', rather" in checked.stdout
    assert page.is_file()

    assert run("apply", "mails", "--drop", "duplicates").stdout == "mails: 0 relabelled, 1 dropped, 0 kept\n"
    report = json.loads(run("check", "mails", "--json").stdout)
    assert "duplicates" not in {one["kind"] for one in report["findings"]}
    assert run("apply", "mails", "--relabel", "returns=refunds").exit_code == 0
    assert "refunds" in run("show", "mails").stdout
    assert run("apply", "mails", "--undo").exit_code == 0
    assert "refunds" not in run("show", "mails").stdout


def test_review_and_apply_through_the_file(file: Path, home: Path) -> None:
    run("new", "mails", str(file))
    folder = home / "tasks" / "mails"
    assert run("review", "mails").exit_code == 0
    data = json.loads((folder / "review.html").read_text().split('application/json">')[1].split("</script>")[0])
    row = next(row for row in data["rows"] if row["text"] == rows(120)[7][0])
    chosen = {name: row[name] for name in ("split", "id", "digest", "label")}
    chosen |= {"action": "relabel", "to": row["suggested"]}
    (folder / "decisions.json").write_text(json.dumps({"task": "mails", "decisions": [chosen]}))
    assert run("apply", "mails").stdout == "mails: 1 relabelled, 0 dropped, 0 kept\n"
    records = (folder / "data" / f"{row['split']}.jsonl").read_text().splitlines()
    mended = next(one for one in map(json.loads, records) if one["id"] == row["id"])
    assert mended["messages"][-1]["content"] == rows(120)[7][1]
    (folder / "decisions.json").write_text(json.dumps({"task": "other", "decisions": []}))
    assert isinstance(run("apply", "mails").exception, BadTask)


def test_leakage_is_exit_code_3(file: Path, home: Path) -> None:
    run("new", "mails", str(file))
    data = home / "tasks" / "mails" / "data"
    line = json.loads((data / "test.jsonl").read_text().splitlines()[0])
    with (data / "train.jsonl").open("a") as train:
        train.write(json.dumps(line | {"id": "again"}) + "\n")
    assert run("check", "mails").exit_code == 3
    assert run("apply", "mails", "--drop", "leakage").exit_code == 0
    assert run("check", "mails").exit_code == 0


def test_a_damaged_task_does_not_hide_the_others(file: Path, home: Path) -> None:
    run("new", "good", str(file))
    run("new", "torn", str(file))
    (home / "tasks" / "torn" / "task.toml").write_text("[")
    listed = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert (listed["good"]["kind"], listed["torn"]["kind"]) == ("classify", "damaged")
    assert "cannot be read" in listed["torn"]["error"]


def test_wrong_usage(file: Path) -> None:
    run("new", "mails", str(file))
    assert run("apply", "mails", "--relabel", "billing").exit_code == 2
    assert run("apply", "mails", "--undo", "--drop", "leakage").exit_code == 2
    assert isinstance(run("apply", "mails", "--drop", "leakage").exception, BadTask)
    assert isinstance(run("apply", "mails").exception, BadTask)
    written = csv_file(file.parent, [(text, f"About {text}.") for text, _ in rows()], "w.csv")
    run("new", "texts", str(written))
    assert isinstance(run("review", "texts").exception, BadTask)
