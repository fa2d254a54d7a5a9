"""Decisions change what they name and nothing else, whole or not at all, and can be undone byte for byte."""

from collections.abc import Callable
from pathlib import Path

import pytest

from models.common import files
from models.errors import BadTask
from models.task.review import decisions as module
from models.task.review.decisions import (
    DecisionFile,
    apply_decisions,
    decision,
    kept,
    read_decisions,
    relabelled,
    undo,
)
from models.task.task import Task, open_task
from models.task.task import rows as all_rows

Make = Callable[..., Task]


def content(task: Task) -> dict[str, bytes]:
    paths = [*(task.folder / "data").iterdir(), task.folder / "task.toml"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def task(make: Make) -> Task:
    return make()


def test_keep_relabel_drop_and_undo(task: Task) -> None:
    before = content(task)
    (_, one), (_, two), (split, three) = list(all_rows(task))[:3]
    to = next(label for label in task.spec.labels if label != two.answer)
    made = [decision(split, one, "drop"), decision(split, two, "relabel", to), decision(split, three, "keep")]
    done = apply_decisions(task, made)
    assert (done.n_kept, done.n_relabelled, done.n_dropped) == (1, 1, 1)
    after = {record.id: record.answer for record in task.records(split)}
    assert one.id not in after
    assert (after[two.id], after[three.id]) == (to, three.answer)
    assert len(kept(task)) == 1
    changed = {name for name, data in content(task).items() if data != before[name]}
    assert changed == {f"{split}.jsonl"}
    assert done.entry is not None
    assert (done.entry / f"{split}.jsonl").read_bytes() == before[f"{split}.jsonl"]
    assert apply_decisions(task, made).n_relabelled == 0, "what is done already is left out"
    undo(task)
    undo(task)
    assert content(task) == before
    assert kept(task) == set()
    with pytest.raises(BadTask, match="nothing was applied"):
        undo(task)


def test_a_decision_on_a_changed_example_changes_nothing(task: Task) -> None:
    rows = list(all_rows(task))
    to = next(label for label in task.spec.labels if label != rows[1][1].answer)
    stale = decision(*rows[1], "drop")
    apply_decisions(task, [decision(*rows[1], "relabel", to)])
    before = content(task)
    with pytest.raises(BadTask, match=r"was changed after it was decided.*nothing was changed"):
        apply_decisions(task, [decision(*rows[0], "drop"), stale])
    with pytest.raises(BadTask, match="has no example 'x'"):
        apply_decisions(task, [stale.model_copy(update={"id": "x", "action": "keep"})])
    assert content(task) == before


def test_an_empty_split_is_refused(task: Task) -> None:
    before = content(task)
    with pytest.raises(BadTask, match="the test split of 'mails' would be empty"):
        apply_decisions(task, [decision("test", one, "drop") for one in task.records("test")])
    assert content(task) == before


def test_a_label_is_renamed_or_merged(task: Task) -> None:
    apply_decisions(task, relabelled(task, [("billing", "money"), ("returns", "money")]))
    again = open_task("mails")
    assert again.spec.labels == ("delivery", "money")
    assert {record.answer for _, record in all_rows(again)} == {"delivery", "money"}
    with pytest.raises(BadTask, match="one class would be left"):
        apply_decisions(again, relabelled(again, [("delivery", "money")]))
    with pytest.raises(BadTask, match=r"has the label 'billing'; labels are 'delivery', 'money'"):
        relabelled(again, [("billing", "x")])
    undo(again)
    assert open_task("mails") == task


def test_a_stopped_run_can_be_repeated(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(task)
    made = relabelled(task, [("billing", "money")])

    def full(path: Path, content: str | bytes) -> None:
        if path.name == "test.jsonl" and path.parent.name == "data":
            raise OSError(28, "No space left on device")
        files.write_atomic(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomic", full)
        with pytest.raises(OSError, match="No space left"):
            apply_decisions(task, made)
    half = open_task("mails")
    assert {"billing", "money"} <= {record.answer for _, record in all_rows(half)}, "it still opens"
    apply_decisions(half, made)
    assert "billing" not in {record.answer for _, record in all_rows(open_task("mails"))}
    undo(open_task("mails"))
    undo(open_task("mails"))
    assert content(task) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no file of decisions"),
        ("{}", "task: Field required"),
        (
            '{"task": "a", "decisions": [{"split": "s", "id": "1", "digest": "", "label": "x", "action": "relabel"}]}',
            "decisions.0: .*'to', the new label",
        ),
        ('{"task": "a", "decisions": [{"action": "burn"}]}', r"decisions.0"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "decisions.json"
    with pytest.raises(BadTask, match="there is no file"):
        read_decisions(path)
    path.write_text(text)
    with pytest.raises(BadTask, match=says):
        read_decisions(path)


def test_a_file_is_read_back(task: Task, tmp_path: Path) -> None:
    file = DecisionFile(task="mails", decisions=(decision(*next(iter(all_rows(task))), "keep"),))
    (tmp_path / "d.json").write_text(file.model_dump_json())
    assert read_decisions(tmp_path / "d.json") == file
