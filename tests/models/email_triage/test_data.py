"""The committed mail keeps its contract: split by content, capped, unique, free of what gives the label away."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from models.email_triage.data.prepare import (
    BODY_CHARACTERS,
    CAP_PER_CLASS,
    LABELS,
    MINIMUM_WORDS,
    SPLITS,
    CleanMail,
    body_of,
    capped,
    examples_of,
    label_of,
    normalise,
    parse,
    read_mails,
    subject_of,
    without_duplicates,
    without_list,
    write_jsonl_gz,
)
from models.email_triage.data.prompts import EXAMPLES, few_shot, zero_shot

HOME = Path(__file__).parents[3] / "models" / "email_triage"


def load(split: str) -> list[CleanMail]:
    with gzip.open(HOME / "data" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    examples = []
    for record in records:
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        head, _, body = user["content"].partition("\n\n")
        assert head.startswith("Subject: ")
        examples.append(CleanMail(record["id"], assistant["content"], head.removeprefix("Subject: "), body))
    return examples


@pytest.fixture(scope="module")
def splits() -> dict[str, list[CleanMail]]:
    return {split: load(split) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_the_text_of_a_mail_decides_its_split(splits: dict[str, list[CleanMail]], split: str) -> None:
    assert splits[split]
    for example in splits[split]:
        first = hashlib.sha256(normalise(example.body).encode()).digest()[0] % 5
        assert {0: "test", 1: "validation"}.get(first, "train") == split, example.id


def test_classes_are_known_present_and_capped(splits: dict[str, list[CleanMail]]) -> None:
    counts = Counter(example.label for examples in splits.values() for example in examples)
    assert set(counts) == set(LABELS)
    assert max(counts.values()) <= CAP_PER_CLASS
    for split, examples in splits.items():
        assert {example.label for example in examples} == set(LABELS), split


def test_no_mail_occurs_twice(splits: dict[str, list[CleanMail]]) -> None:
    everyone = [example for examples in splits.values() for example in examples]
    assert len({example.id for example in everyone}) == len(everyone)
    assert len({example.digest for example in everyone}) == len(everyone)
    in_order = sorted(everyone, key=lambda example: example.id)
    assert without_duplicates(in_order) == in_order, "a near-copy was left in"


def test_texts_are_short_and_without_traces_of_the_list(splits: dict[str, list[CleanMail]]) -> None:
    for example in (example for examples in splits.values() for example in examples):
        assert len(example.body) <= BODY_CHARACTERS, example.id
        assert len(normalise(example.body).split()) >= MINIMUM_WORDS, example.id
        text = example.subject + "\n" + example.body
        assert without_list(text) == text, example.id
        assert not any(f"[{label}]" in example.subject.lower() for label in LABELS), example.id


def test_the_data_card_has_the_hash_of_each_file() -> None:
    card = (HOME / "data" / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        digest = hashlib.sha256((HOME / "data" / f"{split}.jsonl.gz").read_bytes()).hexdigest()
        assert f"{digest}  {split}.jsonl.gz" in card


def test_prompts_show_two_train_mails_a_class_and_no_others(splits: dict[str, list[CleanMail]]) -> None:
    train = {example.id: example for example in splits["train"]}
    chosen = [(str(train[mail].record()["messages"][0]["content"]), label) for label, mail in _turns()]  # type: ignore[index]
    assert [train[mail].label for _, mail in _turns()] == [label for label, _ in _turns()]
    assert few_shot(chosen) == (HOME / "prompts" / "few_shot.txt").read_text(encoding="utf-8")
    assert zero_shot() == (HOME / "prompts" / "zero_shot.txt").read_text(encoding="utf-8")
    assert few_shot(chosen).count("{mail}") == zero_shot().count("{mail}") == 1
    assert zero_shot().endswith("\nList:")


def _turns() -> list[tuple[str, str]]:
    return [(label, ids[turn]) for turn in range(2) for label, ids in EXAMPLES.items()]


RAW = b"""From someone@example.org  Thu Aug 22 12:46:39 2002
Subject: [Razor-users] Re: What =?iso-8859-1?q?na=EFve?= filter?
List-Id: <razor-users.example.sourceforge.net>
To: razor-users@lists.sourceforge.net
Content-Type: text/plain; charset=iso-8859-1

On Thursday, Ann Example wrote:
> quoted words of another
I asked razor-users@lists.sourceforge.net about the caf\xe9 filter, see
https://lists.sourceforge.net/lists/listinfo/razor-users for it.

-------------------------------------------------------
This sf.net email is sponsored by: somebody
_______________________________________________
Razor-users mailing list
"""


def test_cleaning_keeps_the_authors_words_only() -> None:
    mail = parse(RAW)
    assert subject_of(mail) == "Re: What naïve filter?"
    assert body_of(mail) == "I asked about the café filter, see\nfor it."
    assert label_of("easy-ham-1/00001", str(mail["List-Id"])) == "razor-users"


def test_html_mail_gives_its_visible_text() -> None:
    raw = b"Content-Type: text/html\n\n<style>p {color: red}</style><p>Buy &amp; win<br>today</p><script>x()</script>"
    assert body_of(parse(raw)) == "Buy & win\ntoday"


@pytest.mark.parametrize(
    ("mail_id", "list_id", "label"),
    [
        ("spam-1/00001", "Irish Linux Users' Group <ilug.linux.ie>", "spam"),
        ("easy-ham-1/00001", "Irish Linux Users' Group <ilug.linux.ie>", "ilug"),
        ("easy-ham-1/00001", "Irish Linux Users' Group social events <social.linux.ie>", None),
        ("easy-ham-1/00001", "", None),
    ],
)
def test_labels(mail_id: str, list_id: str, label: str | None) -> None:
    assert label_of(mail_id, list_id) == label


def test_bodies_of_two_lists_and_near_copies_are_dropped() -> None:
    words = "one two three four five six seven eight nine ten"
    crossposted = [CleanMail("a/1", "fork", "x", words), CleanMail("a/2", "ilug", "x", words.upper() + " 42")]
    assert without_duplicates(crossposted) == []
    first, near = CleanMail("a/1", "fork", "x", words), CleanMail("a/2", "fork", "x", words + " eleven")
    assert without_duplicates([first, near]) == [first]


def test_the_cap_keeps_the_same_mails_whatever_their_order() -> None:
    many = [CleanMail(f"a/{i}", "fork", "x", "word " + chr(97 + i // 26) * 3 + chr(97 + i % 26)) for i in range(300)]
    kept = capped(many)
    assert len(kept) == CAP_PER_CLASS
    assert capped(reversed(many)) == kept


def test_a_package_folder_becomes_the_same_bytes_twice(tmp_path: Path) -> None:
    folder = tmp_path / "package" / "data" / "easy-ham-1"
    folder.mkdir(parents=True)
    (folder / "00001.abc.txt").write_bytes(RAW)
    (folder / "00001.abc.json").write_text("{}")
    found = list(examples_of(read_mails(tmp_path / "package")))
    assert [(example.id, example.label) for example in found] == [("easy-ham-1/00001", "razor-users")]
    digests = {write_jsonl_gz(tmp_path / name, [found[0].record()]) for name in ("one.gz", "two.gz")}
    assert len(digests) == 1
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
