"""A split as it is asked: which shots, and the chat or the text around each example."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.comparison.asked import as_chat, as_text, choose_shots, require_objects
from benchmarks.errors import BadWorkload
from models.common.chat_records import ChatMessage, ChatRecord
from models.task.task import Task, TaskSpec, rendered, text_of, write_task

LABELS = ("red", "green", "blue")
COLOURS = {"kind": "classify", "labels": LABELS, "scorer": "accuracy"}
WRITE = {"kind": "write", "scorer": "rouge-l"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
EXTRACT = {"kind": "extract", "schema": SCHEMA, "scorer": "field-f1"}


def records(split: str, answers: Sequence[str], n: int = 24) -> list[ChatRecord]:
    """`n` texts of growing length."""
    said = [ChatMessage("user", f"{split} {number}" + " word" * number) for number in range(n)]
    return [ChatRecord(f"{split}-{i}", i + 1, (one,), answers[i % len(answers)]) for i, one in enumerate(said)]


def task_of(folder: Path, answers: Sequence[str], spec: dict[str, Any]) -> Task:
    splits = {split: records(split, answers) for split in ("train", "validation", "test")}
    return write_task(folder / "mine", TaskSpec(**spec), splits)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_shots_are_short_repeat_and_show_every_label_alike(tmp_path: Path, n: int) -> None:
    task = task_of(tmp_path, LABELS, COLOURS)
    shots = choose_shots(task, "test", n)
    assert shots == choose_shots(task, "validation", n)
    counts = Counter(one.answer for one in shots)
    assert max(counts.values()) - min(counts[label] for label in LABELS) <= 1
    train = task.records("train")
    assert len(set(shots)) == n
    assert set(shots) <= set(train)
    assert all(len(text_of(one)) <= median(len(text_of(other)) for other in train) for one in shots)


def test_rare_labels_are_shown_too(tmp_path: Path) -> None:
    task = task_of(tmp_path, ["red"] * 10 + ["green", "blue"], COLOURS)
    assert {one.answer for one in choose_shots(task, "test", 3)} == set(LABELS)
    assert Counter(one.answer for one in choose_shots(task, "test", 6)) == {"red": 2, "green": 2, "blue": 2}


def test_shots_of_the_split_that_is_measured_are_refused(tmp_path: Path) -> None:
    task = task_of(tmp_path, LABELS, COLOURS)
    with pytest.raises(BadWorkload, match="evaluate another, --split test"):
        as_text(task, "train", 2)
    assert len(as_text(task, "train", 0).examples) == 24
    with pytest.raises(BadWorkload, match=r"--shots 25 needs as many examples, the train split of 'mine' has 24"):
        as_chat(task, "test", 25)


def test_a_chat_has_the_shots_as_turns_and_the_prompt_around_every_text(tmp_path: Path) -> None:
    task = task_of(tmp_path, LABELS, {**COLOURS, "prompt": "Colour of: {input}?", "system": "Be brief."})
    asked, shots = as_chat(task, "test", 2), choose_shots(task, "test", 2)
    for example, record in zip(asked.examples, task.records("test"), strict=True):
        system, *turns = example.before
        assert system == (
            "system",
            f"Be brief.\n\nEvery text is answered with one of these labels: {', '.join(LABELS)}.",
        )
        assert turns == [
            said for one in shots for said in (("user", f"Colour of: {text_of(one)}?"), ("assistant", one.answer))
        ]
        assert (asked.prompt.render(example.text), example.label) == (f"Colour of: {text_of(record)}?", record.answer)


def test_without_shots_a_chat_is_what_training_saw(tmp_path: Path) -> None:
    task = task_of(tmp_path, LABELS, {**COLOURS, "prompt": "Colour of: {input}?", "system": "Be brief."})
    asked = as_chat(task, "test", 0)
    for example, record in zip(asked.examples, rendered(task, "test"), strict=True):
        said = [*example.before, ("user", asked.prompt.render(example.text))]
        assert said == [(message.role, message.content) for message in record.prompt]


def test_a_base_continues_the_shots(tmp_path: Path) -> None:
    task = task_of(tmp_path, ["a synopsis"], WRITE)
    asked, shots = as_text(task, "test", 2), choose_shots(task, "test", 2)
    shown = "".join(f"Text:\n{text_of(one)}\nAnswer: a synopsis\n\n" for one in shots)
    for example, record in zip(asked.examples, task.records("test"), strict=True):
        assert asked.prompt.render(example.text) == f"{shown}Text:\n{text_of(record)}\nAnswer:"
    assert asked.fields == {"stop": "\n"}
    assert as_text(task, "test", 0).prompt.render("A text.") == "A text.\nAnswer:"


def test_the_prompts_own_words_take_the_place_of_the_marks(tmp_path: Path) -> None:
    task = task_of(tmp_path, LABELS, {**COLOURS, "prompt": "Mail: {input}\nColour:"})
    (shot,) = choose_shots(task, "test", 1)
    assert as_text(task, "test", 1).prompt.render("new") == (
        f"Every text is answered with one of these labels: {', '.join(LABELS)}.\n\n"
        f"Mail: {text_of(shot)}\nColour: {shot.answer}\n\nMail: new\nColour:"
    )


def test_answers_of_several_lines_do_not_end_at_the_first(tmp_path: Path) -> None:
    asked = as_text(task_of(tmp_path, ["Dear you,\n\nthanks."], WRITE), "test", 1)
    assert asked.fields["stop"] in asked.prompt.before
    assert asked.fields["stop"] not in "Dear you,\n\nthanks."


def test_a_schema_is_requested_in_each_endpoints_own_field(tmp_path: Path) -> None:
    task = task_of(tmp_path, [json.dumps({"n": 1})], EXTRACT)
    chat, text = as_chat(task, "test", 1).fields, as_text(task, "test", 1).fields
    assert chat["response_format"]["type"] == "json_schema"
    assert chat["response_format"]["json_schema"]["schema"] == text["structured_outputs"]["json"] == SCHEMA


def test_what_is_asked_has_an_identity(tmp_path: Path) -> None:
    task = task_of(tmp_path, LABELS, COLOURS)
    digests = {as_chat(task, split, n).sha256 for split in ("test", "validation") for n in (0, 1, 2)}
    assert len(digests) == 6
    assert as_chat(task, "test", 1).sha256 in digests


def test_an_answer_that_is_no_object_is_named(tmp_path: Path) -> None:
    task = task_of(tmp_path, ['{"n": 1}', "[1]"], EXTRACT)
    with pytest.raises(BadWorkload, match=r"'test-1' is no JSON object: '\[1\]'; `deskside task check"):
        require_objects(as_chat(task, "test", 0).examples, task)
