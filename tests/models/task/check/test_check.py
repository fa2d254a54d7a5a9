"""Each finding is found where it was planted, with its count, an example and a command; a clean task has none."""

import json
from collections.abc import Callable, Sequence

import pytest

from models.common.chat_records import ChatMessage, ChatRecord
from models.task.check.check import check_task, dropped_by, findings_of
from models.task.check.finding import Example, Finding
from models.task.check.privacy import mask, personal
from models.task.task import Task, dump_records, open_task, write_text_length
from models.task.task import rows as all_rows
from tests.support.models.tasks import rows

Make = Callable[..., Task]


def found(task: Task, count: Callable[[str], int] | None = None) -> dict[str, Finding]:
    return {
        one.kind: one for one in findings_of(task, [Example(split, record) for split, record in all_rows(task)], count)
    }


def add(task: Task, split: str, pairs: Sequence[tuple[str, str]]) -> None:
    path = task.file(split)
    records = [
        ChatRecord(f"added {n}", n, (ChatMessage("user", text),), answer) for n, (text, answer) in enumerate(pairs)
    ]
    path.write_text(path.read_text() + dump_records(records))


@pytest.fixture
def task(make: Make) -> Task:
    return make(rows(120))


def first(task: Task, split: str = "train") -> tuple[str, str]:
    record = task.records(split)[0]
    return record.prompt[0].content, record.answer


def test_a_clean_task_has_no_findings(task: Task) -> None:
    assert found(task) == {}
    report = check_task(task)
    assert not report.must_mend
    assert report.sizes == {split: len(records) for split, records in task.all_records().items()}
    assert report.word_accuracy == pytest.approx(1, abs=0.02)


def test_leakage_must_be_mended(task: Task) -> None:
    text, answer = first(task, "test")
    near = f"FW: {text} and some more words"
    add(task, "train", [(text.upper() + "!", answer)])
    leak = found(task)["leakage"]
    assert (leak.severity, leak.n, leak.mend) == ("mend", 1, "deskside task apply mails --drop leakage")
    assert [(key.split, key.id) for key in leak.drops] == [("train", "added 0")]
    assert "train:" in leak.examples[0]
    assert "is as test:1:" in leak.examples[0]
    add(task, "validation", [(near, answer)])
    assert {key.split for key in found(task)["leakage"].drops} == {"train", "validation"}
    assert len(dropped_by(task, ["leakage"])) == 2
    assert check_task(task).must_mend


def test_conflicts_and_duplicates(task: Task) -> None:
    text, answer = first(task)
    other = next(label for label in task.spec.labels if label != answer)
    add(task, "train", [(f" {text} ", answer), (text, other)])
    kinds = found(task)
    assert kinds["conflicts"].n == 1
    assert len(kinds["conflicts"].rows) == 3
    assert [key.id for key in kinds["duplicates"].drops] == ["added 0"]
    report = check_task(task)
    assert {row.key for row in report.suspicious[:3]} == set(kinds["conflicts"].rows), "reviewed first"


def test_label_variants_few_and_imbalance(make: Make) -> None:
    pairs = [(text, label if n % 30 else "Billing ") for n, (text, label) in enumerate(rows(150))]
    pairs += [(f"{text} more {n}", "returns") for n in range(6) for text, _ in rows(60, seed=9 + n)]
    kinds = found(make(pairs))
    assert kinds["label variants"].mend == "deskside task apply mails --relabel Billing=billing"
    assert "'Billing'" in kinds["few examples"].examples[0]
    assert "always saying 'returns' is right" in kinds["imbalance"].what


def test_a_text_that_tells_its_label(make: Make) -> None:
    pairs = [(f"{text} {label if label == 'billing' else ''}", label) for text, label in rows(120)]
    told = found(make(pairs))["label in text"]
    assert (told.n, "'billing'" in told.what) == (40, True)


def test_empty_and_long_texts_in_characters_or_tokens(task: Task) -> None:
    add(task, "train", [("…!", "billing"), ("word " * 3000, "billing")])
    kinds = found(task)
    assert (kinds["empty texts"].n, kinds["long texts"].n) == (1, 1)
    assert "characters" in kinds["long texts"].what
    assert "long texts" not in found(task, lambda text: 10)
    assert "3,001 tokens" in found(task, lambda text: len(text.split()) + 1)["long texts"].examples[0]


def test_texts_longer_than_the_task_reads_are_counted_and_dropped_by_nothing(task: Task) -> None:
    add(task, "train", [("word " * 300, "billing")])
    assert "long texts" not in found(task, lambda text: len(text.split()))
    write_text_length(task, 200)
    kinds = found(open_task(str(task.folder)), lambda text: len(text.split()))
    assert "long texts" not in kinds
    assert (kinds["cut texts"].n, kinds["cut texts"].severity, kinds["cut texts"].drops) == (1, "note", ())
    assert "more than 200 tokens" in kinds["cut texts"].what


def test_answers_off_the_schema(make: Make) -> None:
    task = make([(text, json.dumps({"topic": label, "n": n})) for n, (text, label) in enumerate(rows(60))])
    assert "off the schema" not in found(task)
    add(task, "train", [("hello", '{"topic": "billing", "n": "three"}'), ("there", "{")])
    off = found(task)["off the schema"]
    assert (off.n, off.severity) == (2, "mend")
    assert "n: 'three' is not of type 'integer'" in off.examples[0]
    assert "off the form" not in found(task)


def test_answers_written_unlike_served_ones(make: Make) -> None:
    task = make([(text, json.dumps({"topic": label, "n": n})) for n, (text, label) in enumerate(rows(60))])
    add(task, "train", [("a", '{"n":1,"topic":"billing"}'), ("b", '{"topic": "billing", "n": 1}')])
    off = found(task)["off the form"]
    assert (off.n, off.severity) == (2, "look")


def test_answers_off_the_style(make: Make) -> None:
    task = make([(text, f"Answer about {text[:10]}.") for text, _ in rows(60)])
    assert "off the style" not in found(task)
    add(task, "train", [("one", "no capital and no stop"), ("two", "Long. " * 60)])
    said = [one for one in findings_of(task, [Example(s, r) for s, r in all_rows(task)]) if one.kind == "off the style"]
    assert [one.n for one in said] == [1, 1, 1]
    assert "'no capital and no stop'" in said[0].examples[0]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jane.doe+x@mail.example.org please", ["e-mail address"]),
        ("IBAN DE89 3704 0044 0532 0130 00 thanks", ["IBAN"]),
        ("IBAN DE89 3704 0044 0532 0130 01 is wrong", []),
        ("card 4111 1111 1111 1111", ["card number"]),
        ("order 4111 1111 1111 1112", []),
        ("from 192.168.17.4 and 2001:db8::1", ["IP address", "IP address"]),
        ("version 1.2.3 of 999.1.1.1", []),
        ("call +49 30 1234567 or (030) 765 4321", ["phone number", "phone number"]),
        ("on 2026-11-30 at 10:30, 3000 pieces", []),
    ],
)
def test_personal_data_have_their_check_digits(text: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in personal(text)] == kinds


def test_personal_data_are_counted_and_masked(task: Task) -> None:
    add(task, "train", [("ask jane@example.org or joe@example.org", "billing")])
    one = found(task)["personal data"]
    assert (one.n, len(one.rows)) == (2, 1)
    assert "jane" not in "".join(one.examples)
    assert mask("ab-12") == "ab-••"


def test_doubtful_labels_are_a_finding(make: Make) -> None:
    pairs = rows(120)
    pairs[7] = (pairs[7][0], "returns")
    report = check_task(make(pairs))
    assert report.suspicious[0].text == pairs[7][0]
    assert report.suspicious[0].suggested == rows(120)[7][1]
    assert next(one for one in report.findings if one.kind == "doubtful labels").mend == "deskside task review mails"
