"""Rows survive what spreadsheets and editors do to files; the unreadable is refused with place and cure."""

import gzip
import json
from pathlib import Path

import pytest

from models.common.chat_records import ChatRecord
from models.errors import BadTable
from models.task.readers.read import read_rows
from models.task.readers.table import MAX_CELL_CHARACTERS, ReadOptions, TextTable
from tests.support.models.tasks import csv_text

ROWS = [("Grüße aus Köln,\r\nbitte zurückrufen", "später"), ('er sagte "nein"; und ging', "früher"), ("drei", "später")]


def table(path: Path, **options: object) -> TextTable:
    read = read_rows(path, ReadOptions(**options))  # type: ignore[arg-type]
    assert isinstance(read, TextTable)
    return read


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(BadTable) as caught:
        read_rows(path, ReadOptions(**options))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "UTF-8"),
        ("utf-8-sig", "UTF-8 with BOM"),
        ("cp1252", "Windows-1252"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16-LE"),
        ("utf-16-be", "UTF-16-BE"),
    ],
)
def test_encoding_separator_and_header_are_guessed(tmp_path: Path, separator: str, encoding: str, shown: str) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(csv_text(ROWS, separator=separator).encode(encoding))
    read = table(path)
    assert read.columns == ("text", "label")
    assert read.rows == tuple(ROWS), "line breaks, quotes and umlauts as they were"
    assert read.lines == (2, 4, 5), "a quoted line break is inside its row"
    assert read.form.startswith(f"{shown}, separator ")


def test_every_guess_can_be_overruled(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes("text;a,b\nfünf;sechs,7\n".encode("iso-8859-15"))
    assert table(path, separator=";").columns == ("text", "a,b")
    assert table(path, separator=",").columns == ("text;a", "b")
    assert table(path, header=False, separator="semicolon").rows[0] == ("text", "a,b")
    path.write_bytes("text;label\nПривет;ja\n".encode("koi8-r"))
    assert table(path, encoding="koi8-r").rows == (("Привет", "ja"),)


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        (["hello there,spam", "bye,ham", "again,spam"], ("column 1", "column 2")),
        (["1,2", "3,4"], ("column 1", "column 2")),
        (["text,class", "hello,spam"], ("text", "class")),
    ],
)
def test_a_header_is_told_from_rows(tmp_path: Path, lines: list[str], columns: tuple[str, ...]) -> None:
    (tmp_path / "f.csv").write_text("\n".join(lines))
    assert table(tmp_path / "f.csv").columns == columns


def test_tabs_need_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "f.tsv").write_text('text\tlabel\n"open quote\tx\nplain\ty\n')
    assert table(tmp_path / "f.tsv").rows == (('"open quote', "x"), ("plain", "y"))


def test_empty_columns_and_lines_of_a_spreadsheet_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("text,label,\nhello,a,\n,,\nbye,b,\n")
    read = table(tmp_path / "f.csv")
    assert (read.columns, read.rows, read.lines) == (("text", "label"), (("hello", "a"), ("bye", "b")), (2, 4))


@pytest.mark.parametrize("packed", [False, True])
def test_json_rows(tmp_path: Path, packed: bool) -> None:
    objects = [{"text": "a\u2028b", "fields": {"n": 1}}, {"text": "c", "fields": None, "more": True}]
    text = "\n".join(json.dumps(one, ensure_ascii=False) for one in objects)
    path = tmp_path / "f.jsonl"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    read = table(path)
    assert (read.columns, read.lines) == (("text", "fields", "more"), (1, 2))
    assert read.rows == (("a\u2028b", '{"n":1}', ""), ("c", "", "true"))
    (tmp_path / "array.json").write_text(json.dumps(objects))
    assert table(tmp_path / "array.json").rows == read.rows


def test_chat_records_stay_chat_records(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "f.jsonl").write_text(json.dumps(record))
    read = read_rows(tmp_path / "f.jsonl")
    assert isinstance(read, tuple)
    assert [type(one) for one in read] == [ChatRecord]


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"", {}, "is empty"),
        (b" \n\n", {}, "is empty"),
        (b"text,label\n", {}, "header and no rows"),
        (b"text,label\na,b\nc,d,e\n", {}, "line 3: 3 cells, where line 1 has 2"),
        (b'text,label\na,b\n"open,d\ne,f\n', {}, "line 3: a quote is opened here and never closed"),
        (b"text,text\na,b\n", {}, "two columns 'text'"),
        (b"text,label\n\x81\x8d,b\n", {}, "cannot be guessed: byte 81 in line 2"),
        (b"text,label\n\xfc,b\n", {"encoding": "utf-8"}, "is not utf-8: byte fc in line 2"),
        (b"text,label\na,b\n", {"encoding": "utf-9"}, "--encoding 'utf-9' is unknown"),
        (b"text,label\na,b\n", {"separator": "::"}, "--separator takes one character"),
        (b"\x00\x01\x02\x03\x00\x00\x00\xff" * 9, {}, "is binary"),
        (b"\xff\x01\x02\x03,\n" * 9, {}, "is binary"),
        (b"%PDF-1.7 \n", {}, "is a PDF"),
        (b'{"text": 1}\n[2]\n', {}, "line 2: expected an object"),
        (b'{"text": 1}\n{"text"\n', {}, "line 2: not JSON"),
    ],
)
def test_each_fault_has_a_message_of_its_own(
    tmp_path: Path, content: bytes, options: dict[str, object], says: str
) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes(content)
    assert says in refusal(path, **options)
    assert path.read_bytes() == content


def test_a_cell_of_a_megabyte_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text(f"text,label\nshort,a\n{'x' * (1 << 20)},b\n")
    said = refusal(path)
    assert "line 3, 'text': the cell has 1,048,576 characters" in said
    assert f"{MAX_CELL_CHARACTERS:,}" in said


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("Subject,Category\nhello,a\n")
    read = table(tmp_path / "f.csv")
    assert read.column("category") == ("a",), "case does not matter"
    with pytest.raises(BadTable, match=r"no column 'Catgory'; did you mean 'Category'\? Its columns: 'Subject', 'Cat"):
        read.column("Catgory")
