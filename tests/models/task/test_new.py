"""From a file to a task: guesses are right and said, refusals have a reason, and the file stays as it was."""

import json
from pathlib import Path

import pytest

from models.errors import BadTable, BadTask
from models.task.check.check import findings_of
from models.task.check.finding import Example
from models.task.new import NewTask, make_task
from models.task.task import open_task, tasks_home
from models.task.task import rows as all_rows
from tests.support.models.tasks import CLASSES, csv_file, csv_text, rows


def test_columns_and_kind_are_guessed(tmp_path: Path) -> None:
    pairs = [(str(n), label, text, "2026-11-30") for n, (text, label) in enumerate(rows())]
    path = tmp_path / "export.csv"
    path.write_text(csv_text(pairs, ("no", "topic", "what they wrote", "day"), ";"), encoding="cp1252")
    before = path.read_bytes()
    made = make_task(NewTask("mails", path, output="topic"))
    found = {what: value for what, value, _ in made.found}
    assert (found["text"], found["answer"], found["kind"]) == ("'what they wrote'", "'topic'", "classify")
    assert "';'" in found["file"]
    assert made.task.spec.labels == tuple(sorted(CLASSES))
    assert sorted(sum(made.sizes.values()) for _ in [0]) == [60]
    assert open_task("mails") == made.task
    assert path.read_bytes() == before
    records = [one for _, one in all_rows(made.task)]
    assert {(one.prompt[0].content, one.answer) for one in records} == set(rows())
    assert {one.id for one in records} == {str(line) for line in range(2, 62)}, "ids are the lines of the file"


def test_a_named_column_wins_over_one_that_repeats(tmp_path: Path) -> None:
    pairs = [(text, "yes", label) for text, label in rows()]
    path = tmp_path / "f.csv"
    path.write_text(csv_text(pairs, ("mail", "read", "label")))
    found = {what: value for what, value, _ in make_task(NewTask("a", path)).found}
    assert (found["text"], found["answer"]) == ("'mail'", "'label'")


def test_several_inputs_are_joined(tmp_path: Path) -> None:
    pairs = [(f"Subject {n}", text, label) for n, (text, label) in enumerate(rows())]
    path = tmp_path / "f.csv"
    path.write_text(csv_text(pairs, ("subject", "body", "label")))
    task = make_task(NewTask("a", path, inputs=("subject", "body"))).task
    texts = {one.prompt[0].content for _, one in all_rows(task)}
    assert texts == {f"{subject}\n\n{body}" for subject, body, _ in pairs}


def test_json_answers_make_an_extraction_with_a_schema(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    objects = [
        {"text": text, "output": {"topic": label, "n": n, "note": None}} for n, (text, label) in enumerate(rows())
    ]
    path.write_text("\n".join(map(json.dumps, objects)))
    task = make_task(NewTask("a", path)).task
    assert (task.spec.kind, task.spec.scorer) == ("extract", "field-f1")
    schema = task.spec.json_schema
    assert schema is not None
    assert schema["properties"]["topic"] == {"type": "string", "enum": sorted(CLASSES)}
    assert schema["properties"]["n"] == {"type": "integer"}
    assert schema["required"] == ["topic", "n", "note"]
    assert open_task("a").spec == task.spec


def test_answers_in_json_have_one_form(tmp_path: Path) -> None:
    """Chat records keep the text of their answers, tables do not; a task's answers are as they will be served."""
    said = []
    for n, (text, label) in enumerate(rows()):
        answer = {"topic": label, "tags": [{"b": "ü", "a": n}], "odd": None}
        turned = dict(reversed(answer.items())) if n % 3 == 2 else answer
        written = json.dumps(turned, indent=n % 2 or None)
        said.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": written}]})
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, said)))
    task = make_task(NewTask("a", path)).task
    records = [one for _, one in all_rows(task)]
    numbers = {one.answer: int(one.id) - 1 for one in records}
    assert len(numbers) == 60
    for form, n in numbers.items():
        assert form == f'{{"topic":"{rows()[n][1]}","tags":[{{"b":"ü","a":{n}}}],"odd":null}}'


def test_a_list_of_choices_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    objects = [
        {"text": text, "output": {"tags": list(CLASSES)[: n % 3], "words": text.split()[:n]}}
        for n, (text, _) in enumerate(rows())
    ]
    path.write_text("\n".join(map(json.dumps, objects)))
    schema = make_task(NewTask("a", path)).task.spec.json_schema
    assert schema is not None
    tags, words = schema["properties"]["tags"], schema["properties"]["words"]
    assert (tags["maxItems"], tags["items"]["enum"]) == (2, sorted(list(CLASSES)[:2]))
    assert "maxItems" not in words, "other texts may have more"


def test_distinct_texts_make_writing(tmp_path: Path) -> None:
    pairs = [(text, f"Answer to {text[:20]}.") for text, _ in rows()]
    task = make_task(NewTask("a", csv_file(tmp_path, pairs), prompt="Answer: {input}")).task
    assert (task.spec.kind, task.spec.prompt, task.spec.labels) == ("write", "Answer: {input}", ())


def test_a_new_task_never_leaks(tmp_path: Path) -> None:
    pairs = rows(90)
    pairs += [(f"{text} Regards, {n}", label) for n, (text, label) in enumerate(pairs[:45])]
    task = make_task(NewTask("a", csv_file(tmp_path, pairs))).task
    found = {one.kind for one in findings_of(task, [Example(split, one) for split, one in all_rows(task)])}
    assert "leakage" not in found


@pytest.mark.parametrize(
    ("pairs", "wanted", "says"),
    [
        (rows(19), {}, "has 19 examples; a task needs 20"),
        (rows(classes=("billing",)), {}, "every answer is 'billing': with one class"),
        (
            [(text, f"{n} {label}") for n, (text, label) in enumerate(rows(300))],
            {"kind": "classify"},
            "300 distinct answers",
        ),
        (rows(), {"kind": "extract"}, "line 2: not JSON"),
        (rows(), {"prompt": "Sort."}, "--prompt must hold {input} once"),
        (rows(), {"inputs": ("label",)}, "--output"),
        ([("the same text", label) for _, label in rows()], {}, "split would be empty"),
    ],
)
def test_a_refusal_has_its_reason_and_leaves_nothing(
    tmp_path: Path, pairs: list[tuple[str, str]], wanted: dict[str, object], says: str
) -> None:
    wanted = {"output": "label"} | wanted
    with pytest.raises((BadTask, BadTable)) as caught:
        make_task(NewTask("a", csv_file(tmp_path, pairs), **wanted))  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert list(tasks_home().glob("*")) == []


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    path = csv_file(tmp_path, rows())
    make_task(NewTask("a", path))
    with pytest.raises(BadTask, match="there is a task 'a' already"):
        make_task(NewTask("a", path))
    with pytest.raises(BadTask, match="a task's name has"):
        make_task(NewTask("../a", path))


def test_rows_without_text_or_answer_are_said(tmp_path: Path) -> None:
    pairs = [*rows(), ("", "billing"), ("lonely text", " ")]
    found = {what: value for what, value, _ in make_task(NewTask("a", csv_file(tmp_path, pairs))).found}
    assert found["left out"] == "2 rows without text or answer: lines 62, 63"
