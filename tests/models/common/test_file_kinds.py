"""A file given in the place of another is recognised and named, and the command that turns it does so."""

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models.common.chat_records import read_chat_records
from models.common.file_kinds import FileKind, file_kind
from models.errors import BadExamples

CSV = 'id,text,label\n1,"Buy, now",spam\n2,Hi,ham\n'
CONTENTS: dict[str, tuple[bytes, str]] = {
    "csv": (CSV.encode(), "a CSV file"),
    "with semicolons": (CSV.replace(",", ";").encode(), "a CSV file"),
    "with tabs": (b"text\tlabel\na\tb\n", "a CSV file"),
    "an array": (b' [\n {"messages": []}]', "one JSON array"),
    "lines": (b'{"a": 1}\n{"a": 2}\n', "JSON lines"),
    "one object": (b'{\n "a": 1}', "JSON"),
    "gzip": (gzip.compress(b"x"), "a gzip file"),
    "parquet": (b"PAR1....", "a Parquet file"),
    "gguf": (b"GGUF....", "a GGUF file"),
    "pdf": (b"%PDF-1.7", "a PDF"),
    "utf-16": ("text".encode("utf-16"), "a text in UTF-16"),
    "text": ("Größe, weit\nund breit".encode(), "a text file"),
    "latin-1": ("Größe\nweit".encode("latin-1"), "a text file"),
    "nothing": (b"", "an empty file"),
    "bytes": (b"\0\1\2\xff", "a binary file"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_recognised_by_its_content(tmp_path: Path, name: str) -> None:
    content, said = CONTENTS[name]
    (tmp_path / "given").write_bytes(content)
    assert file_kind(tmp_path / "given").name == said


def test_workbooks_archives_and_folders_are_told_apart(tmp_path: Path) -> None:
    for name, member in (("book", "xl/workbook.xml"), ("archive", "a.txt")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, "x")
    assert file_kind(tmp_path / "book").name == "an Excel workbook (XLSX)"
    assert file_kind(tmp_path / "archive").name == "a zip archive"
    assert file_kind(tmp_path).name == "a folder"
    assert file_kind(tmp_path / "none").name == "no file"


def shell(command: str, folder: Path) -> None:
    subprocess.run(command.replace("python3", sys.executable, 1), shell=True, check=True, cwd=folder)


def written(folder: Path, content: str, name: str) -> FileKind:
    (folder / name).write_text(content, encoding="utf-8")
    return file_kind(folder / name)


@pytest.mark.parametrize("content", [CSV, CSV.replace(",", ";").replace("Buy;", "Buy,"), "\ufeff" + CSV])
def test_the_command_for_a_csv_makes_chat_records(tmp_path: Path, content: str) -> None:
    given = written(tmp_path, content, "my mails.csv")
    shell(given.to_records(), tmp_path)
    records = read_chat_records(tmp_path / "my mails.jsonl")
    assert [(record.prompt[0].content, record.answer) for record in records] == [("Buy, now", "spam"), ("Hi", "ham")]


def test_the_command_for_a_csv_makes_requests(tmp_path: Path) -> None:
    shell(written(tmp_path, CSV, "mails.csv").to_requests(), tmp_path)
    first, _ = map(json.loads, (tmp_path / "mails.jsonl").read_text().splitlines())
    assert (first["custom_id"], first["url"]) == ("1", "/v1/chat/completions")
    assert first["body"] == {"messages": [{"role": "user", "content": "Buy, now"}]}


def test_the_command_for_an_array_makes_lines(tmp_path: Path) -> None:
    given = written(tmp_path, json.dumps([{"a": 1}, {"a": 2}], indent=1), "all.jsonl")
    shell(given.to_records(), tmp_path)
    assert (tmp_path / "all.new.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("name", ["csv", "an array", "parquet", "gguf"])
def test_wrong_examples_are_named_with_the_command(tmp_path: Path, name: str) -> None:
    content, said = CONTENTS[name]
    (tmp_path / "given").write_bytes(content)
    with pytest.raises(BadExamples, match=f"given' are {said}, not JSON lines of chat records") as refusal:
        read_chat_records(tmp_path / "given")
    assert ("python3 -c" in str(refusal.value)) == (name != "gguf")


def test_a_folder_of_examples_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(BadExamples, match=r"are a folder.*give one of its files: train\.jsonl"):
        read_chat_records(tmp_path)
