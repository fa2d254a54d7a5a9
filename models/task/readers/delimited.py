"""CSV, TSV and their relatives: separator and header are guessed, quoted line breaks belong to their cell."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Literal

from models.errors import BadTable

from .encoding import decode
from .table import MAX_CELL_CHARACTERS, ReadOptions, TextTable, table_of

SEPARATORS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
_WORDS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
GUESS_CHARACTERS = 1 << 18
GUESS_ROWS = 200

_Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
_CellRows = list[tuple[int, list[str]]]


def read_delimited(path: Path, data: bytes, options: ReadOptions) -> TextTable:
    """Read `data`, the bytes of `path`. Raises BadTable naming the line."""
    text, encoding = decode(path, data, options.encoding)
    separator = _given(options.separator) if options.separator is not None else _guess(path, text)
    quoting = _quoting(text, separator)
    shown = SEPARATORS.get(separator, repr(separator))
    plain = ", quotes are text" if quoting == csv.QUOTE_NONE else ""
    form = f"{encoding}, separator {shown}{plain}"
    return table_of(path, form, _parse(path, text, separator, quoting), options.header)


def _given(separator: str) -> str:
    one = _WORDS.get(separator.lower(), separator)
    if len(one) != 1 or one in '\r\n"':
        raise BadTable(f"--separator takes one character or tab, comma, semicolon, pipe; got {separator!r}")
    return one


def _parse(path: Path, text: str, separator: str, quoting: _Quoting, limit: int | None = None) -> _CellRows:
    # Longer than any cell that is accepted, so that the refusal can say how long it is.
    csv.field_size_limit(max(len(text), MAX_CELL_CHARACTERS) + 1)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=quoting != csv.QUOTE_NONE
    )
    rows: _CellRows = []
    begun = 1
    try:
        for cells in reader:
            rows.append((begun, cells))
            begun = reader.line_num + 1
            if limit is not None and len(rows) >= limit:
                break
    except csv.Error as error:
        why = "a quote is opened here and never closed" if "end of data" in str(error) else str(error)
        raise BadTable(
            f"{str(path)!r}, line {begun}: {why}. A quote inside a quoted cell is written twice; if quotes are "
            "ordinary characters in this file, save it with tabs between the cells"
        ) from error
    return rows


def _quoting(text: str, separator: str) -> _Quoting:
    """Tabs need no quotes: in a TSV file that does not parse with them, they are ordinary characters."""
    if separator != "\t":
        return csv.QUOTE_MINIMAL
    try:
        _parse(Path(), text, separator, csv.QUOTE_MINIMAL)
    except BadTable:
        return csv.QUOTE_NONE
    return csv.QUOTE_MINIMAL


def _guess(path: Path, text: str) -> str:
    """The separator by which most rows have the same number of cells, and more than one; `.tsv` says it itself."""
    if path.name.lower().removesuffix(".gz").endswith((".tsv", ".tab")):
        return "\t"
    head = text[:GUESS_CHARACTERS]
    best, separator = (0.0, 0), ","
    for one in SEPARATORS:
        quoting: _Quoting = csv.QUOTE_NONE if one == "\t" else csv.QUOTE_MINIMAL
        widths = Counter(len(cells) for cells in _lenient(head, one, quoting) if cells)
        if widths:
            width, n_rows = widths.most_common(1)[0]
            score = (n_rows / widths.total(), width) if width > 1 else (0.0, 0)
            if score > best:
                best, separator = score, one
    return separator


def _lenient(text: str, separator: str, quoting: _Quoting) -> list[list[str]]:
    """The first rows; a quote that the end of the head leaves open ends them."""
    csv.field_size_limit(len(text) + 1)
    rows: list[list[str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting)
    for cells in reader:
        rows.append(cells)
        if len(rows) > GUESS_ROWS:
            break
    # The last row may be cut.
    return rows[:-1] if len(text) == GUESS_CHARACTERS or len(rows) > GUESS_ROWS else rows
