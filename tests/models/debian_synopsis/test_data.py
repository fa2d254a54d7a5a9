"""The committed synopses keep their contract: one record of a family, split by content, no near-copies, whole texts."""

import gzip
import hashlib
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from models.common.chat_records import ChatRecord
from models.debian_synopsis.data import prepare
from models.debian_synopsis.data.prepare import (
    CHARACTERS,
    PER_SECTION,
    SPLITS,
    Package,
    capped,
    normalise,
    of_stated_length,
    one_of_each_family,
    read_packages,
    stanzas,
    unwrapped,
    without_near_copies,
    without_transitional,
    write_jsonl_gz,
)
from models.debian_synopsis.data.prompts import (
    EXAMPLES,
    HOME,
    MARK,
    N_RETRIEVED,
    few_shot_examples,
    prompt_with,
    prompts_for,
    read_split,
    request,
    text_of,
)


def package(
    description: str, synopsis: str = "tool", name: str = "tool", source: str = "", section: str = ""
) -> Package:
    return Package(name, source or name, section or "utils", synopsis, description)


def as_package(record: ChatRecord) -> Package:
    return package(text_of(record), record.answer, record.id)


@pytest.fixture(scope="module")
def splits() -> dict[str, tuple[ChatRecord, ...]]:
    return {split: read_split(split) for split in SPLITS}


@pytest.fixture(scope="module")
def everything(splits: dict[str, tuple[ChatRecord, ...]]) -> list[Package]:
    return [as_package(record) for records in splits.values() for record in records]


@pytest.mark.parametrize("split", SPLITS)
def test_the_description_decides_the_split(splits: dict[str, tuple[ChatRecord, ...]], split: str) -> None:
    assert splits[split]
    assert {as_package(record).split for record in splits[split]} == {split}


def test_there_are_at_most_three_thousand_and_each_family_is_in_one_split(everything: list[Package]) -> None:
    assert len(everything) <= 3000
    assert len({one.name for one in everything}) == len(everything)
    assert len({normalise(one.synopsis) for one in everything}) == len(everything)
    in_order = sorted(everything, key=lambda one: (one.digest[::-1], one.name))
    assert without_near_copies(in_order) == in_order, "a near-copy was left in"


def test_descriptions_are_whole_and_synopses_are_one_line(everything: list[Package]) -> None:
    assert of_stated_length(everything) == everything
    assert without_transitional(everything) == everything
    assert all(len(one.synopsis.splitlines()) == 1 for one in everything)


def test_the_data_card_has_the_hash_and_the_size_of_each_file(splits: dict[str, tuple[ChatRecord, ...]]) -> None:
    card = (HOME / "data" / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        digest = hashlib.sha256((HOME / "data" / f"{split}.jsonl.gz").read_bytes()).hexdigest()
        assert f"{digest}  {split}.jsonl.gz" in card
        assert f"| {split} | {len(splits[split]):,} |" in card
    assert f"at most {PER_SECTION} of a section" in card


def test_the_prompts_are_those_of_the_program(splits: dict[str, tuple[ChatRecord, ...]]) -> None:
    shown = few_shot_examples(splits["train"])
    assert [one.id for one in shown] == list(EXAMPLES)
    assert prompt_with(shown) == (HOME / "prompts" / "few_shot.txt").read_text(encoding="utf-8")
    assert prompt_with([]) == (HOME / "prompts" / "zero_shot.txt").read_text(encoding="utf-8")
    assert prompt_with(shown).count(MARK) == prompt_with([]).count(MARK) == 1


def test_retrieved_examples_are_train_records_with_the_nearest_last(splits: dict[str, tuple[ChatRecord, ...]]) -> None:
    train, asked = splits["train"][:200], splits["train"][7:8]
    (prompt,) = prompts_for("retrieved", train, asked)
    assert prompt.count("\nSynopsis: ") == N_RETRIEVED
    question = f"Description:\n{text_of(asked[0])}\nSynopsis:"
    assert prompt.endswith(f"{question} {asked[0].answer}\n\n{question}"), "a text is nearest to itself"
    line = request("retrieved", asked[0], prompt)
    assert (line["custom_id"], "stop" in line["body"]) == (asked[0].id, True)  # type: ignore[operator]
    assert "stop" not in request("zero_shot", asked[0], prompt)["body"]  # type: ignore[operator]


INDEX = """\
Package: libeg-doc
Source: libeg2 (2.1-3)
Section: contrib/doc
Description: exemplification library -  documentation
Description-md5: 0123

Package: stranger
Section: utils
Description-md5: 9999
"""
TEXTS = """\
Package: libeg-doc
Description-md5: 4567
Description-en: another version
 of the text

Package: libeg-doc
Description-md5: 0123
Description-en: exemplification library -  documentation
 libeg gives examples
 of everything, as there are:
  * short ones
  * long   ones
 .
 This package contains
 the documentation.
"""


def test_an_index_and_its_descriptions_become_packages() -> None:
    (found,) = read_packages(INDEX.splitlines(keepends=True), TEXTS.splitlines(keepends=True))
    assert (found.name, found.source, found.section) == ("libeg-doc", "libeg2", "doc")
    assert found.synopsis == "exemplification library - documentation"
    assert found.description == (
        "libeg gives examples of everything, as there are:\n* short ones\n* long ones\n"
        "This package contains the documentation."
    )
    assert found.family == "libeg"


def test_a_stanza_may_end_the_file_without_a_blank_line() -> None:
    assert list(stanzas(["A: 1", " more", "B:", "", "", "A: 2"])) == [{"A": "1\n more", "B": ""}, {"A": "2"}]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (" one\n two\n", "one two"),
        (" one\n .\n .\n two", "one\ntwo"),
        (" list:\n - a\n - b\n   of b\n", "list:\n- a\n- b\nof b"),
        ("   shown\n   as it is\n and joined\n on", "shown\nas it is\nand joined on"),
    ],
)
def test_paragraphs_are_joined_and_verbatim_lines_are_not(field: str, text: str) -> None:
    assert unwrapped(field) == text


@pytest.mark.parametrize(
    ("source", "family"),
    [
        ("llvm-toolchain-14", "llvm-toolchain"),
        ("boost1.81", "boost"),
        ("gcc-12", "gcc"),
        ("meson", "meson"),
        ("389", "389"),
    ],
)
def test_versions_of_a_source_are_one_family(source: str, family: str) -> None:
    assert package("x", source=source).family == family


def test_one_package_of_a_family_and_of_a_synopsis_is_kept_in_any_order() -> None:
    several = [
        package("first text", "a first", "a-dev", "a-1"),
        package("second text", "a second", "a-doc", "a-2"),
        package("third text", "B!", "b"),
        package("fourth text", "b", "c"),
    ]
    kept = one_of_each_family(several)
    assert [one.family for one in kept].count("a") == 1
    assert len(kept) == 2
    assert one_of_each_family(reversed(several)) == kept


def test_near_copies_and_transitional_packages_are_dropped() -> None:
    words = "one two three four five six seven eight nine ten"
    first, near, other = package(words), package(words + " eleven", name="b"), package(words[::-1], name="c")
    assert without_near_copies([first, near, other]) == [first, other]
    empty = package("This is a transitional package. It can be removed.")
    assert without_transitional([first, empty]) == [first]


def test_lengths_and_sections_are_bounded() -> None:
    shortest, longest = CHARACTERS
    texts = ["x" * n for n in (shortest - 1, shortest, longest, longest + 1)]
    assert of_stated_length(map(package, texts)) == [package(text) for text in texts[1:3]]
    many = [package("x", section=section) for section in ["net"] * (PER_SECTION + 5) + ["web"] * 3]
    assert Counter(one.section for one in capped(many)) == {"net": PER_SECTION, "web": 3}


def test_the_program_writes_the_same_bytes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXTS.replace("short ones", "short ones, of which there are so many that this line is long enough")
    (tmp_path / "Packages").write_text(INDEX, encoding="utf-8")
    with lzma.open(tmp_path / "Translation-en.xz", "wt", encoding="utf-8") as file:
        file.write(text)
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        arguments = ["prepare", "Packages", "Translation-en.xz", "--out", name]
        monkeypatch.setattr("sys.argv", arguments)
        monkeypatch.chdir(tmp_path)
        prepare.main()
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    lines = [json.loads(line) for content in written[0].values() for line in gzip.decompress(content).splitlines()]
    assert [line["id"] for line in lines] == ["libeg-doc"]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    digests = {write_jsonl_gz(tmp_path / name, [{"id": "a"}]) for name in ("one.gz", "two.gz")}
    assert len(digests) == 1
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
