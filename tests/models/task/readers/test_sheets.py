"""Parquet and XLSX, where the extra `tables` is installed; without it a message that names the extra."""

import importlib.util
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from models.errors import BadTable
from models.task.readers.read import read_rows
from models.task.readers.table import ReadOptions, TextTable

NEEDS = {"duckdb": "f.parquet", "python_calamine": "f.xlsx"}


def workbook(path: Path, sheets: dict[str, list[list[str | float]]]) -> Path:
    """The smallest XLSX that readers accept: inline texts and numbers."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    links = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    packed = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    numbers = range(1, len(sheets) + 1)
    parts = "".join(
        f'<Override PartName="/xl/worksheets/s{n}.xml" ContentType="{kind}.worksheet+xml"/>' for n in numbers
    )
    with ZipFile(path, "w") as archive:
        archive.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{packed}/content-types"><Default Extension="rels" '
            'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>{parts}</Types>',
        )
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{packed}/relationships"><Relationship Id="r1" Type="{links}/officeDocument" '
            'Target="xl/workbook.xml"/></Relationships>',
        )
        names = "".join(
            f'<sheet name="{name}" sheetId="{n}" r:id="r{n}"/>' for n, name in zip(numbers, sheets, strict=True)
        )
        archive.writestr("xl/workbook.xml", f'<workbook {space} xmlns:r="{links}"><sheets>{names}</sheets></workbook>')
        targets = "".join(
            f'<Relationship Id="r{n}" Type="{links}/worksheet" Target="worksheets/s{n}.xml"/>' for n in numbers
        )
        archive.writestr(
            "xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{packed}/relationships">{targets}</Relationships>'
        )
        for n, rows in zip(numbers, sheets.values(), strict=True):
            body = ""
            for r, cells in enumerate(rows, 1):
                body += f'<row r="{r}">' + "".join(_cell(r, c, value) for c, value in enumerate(cells)) + "</row>"
            archive.writestr(f"xl/worksheets/s{n}.xml", f"<worksheet {space}><sheetData>{body}</sheetData></worksheet>")
    return path


def _cell(row: int, column: int, value: str | float) -> str:
    place = f"{chr(65 + column)}{row}"
    if isinstance(value, str):
        return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{value}</t></is></c>'
    return f'<c r="{place}"><v>{value}</v></c>'


def read(path: Path, sheet: str | None = None) -> TextTable:
    found = read_rows(path, ReadOptions(sheet=sheet))
    assert isinstance(found, TextTable)
    return found


@pytest.mark.parametrize("library", NEEDS)
def test_without_the_extra_its_name_is_said(tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    path = tmp_path / NEEDS[library]
    path.write_bytes(b"PAR1" if library == "duckdb" else b"PK\x03\x04 xl/")
    with pytest.raises(BadTable, match=r"pip install -e '\.\[tables\]'"):
        read_rows(path)


@pytest.mark.skipif(importlib.util.find_spec("python_calamine") is None, reason="needs the extra `tables`")
def test_a_workbook(tmp_path: Path) -> None:
    sheets: dict[str, list[list[str | float]]] = {
        "Empty": [],
        "Mails": [["text", "code"], ["hello\nthere", 3.0], ["bye", 2.5]],
        "Other": [["a", "b"], ["c", "d"]],
    }
    path = workbook(tmp_path / "f.xlsx", sheets)
    first = read(path)
    assert (first.columns, first.rows) == (("text", "code"), (("hello\nthere", "3"), ("bye", "2.5")))
    assert "'Mails' (also: 'Empty', 'Other'; --sheet chooses)" in first.form
    assert read(path, "Other").rows == (("c", "d"),)
    with pytest.raises(
        BadTable, match=r"no sheet 'Mail'; did you mean 'Mails'\? Its sheets: 'Empty', 'Mails', 'Other'"
    ):
        read(path, "Mail")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadTable, match="cannot be read as an Excel workbook"):
        read(path)


@pytest.mark.skipif(importlib.util.find_spec("duckdb") is None, reason="needs the extra `tables`")
def test_a_parquet_file(tmp_path: Path) -> None:
    import duckdb

    path = tmp_path / "a[1]*.parquet"
    with duckdb.connect() as database:
        database.execute("CREATE TABLE t AS SELECT 'hi' AS text, 3 AS n, NULL::TEXT AS none, {'a': 1} AS fields")
        database.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    found = read(path)
    assert (found.columns, found.rows) == (("text", "n", "none", "fields"), (("hi", "3", "", '{"a":1}'),))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadTable, match="cannot be read as Parquet"):
        read(path)
