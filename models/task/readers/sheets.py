"""Parquet and Excel files, by libraries of the extra `tables`: DuckDB, and python-calamine (a reader in Rust).

The two take 72 MB, where polars with fastexcel takes 198 and pyarrow with openpyxl 172, and both are kept well.
"""

import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from models.errors import BadTable, did_you_mean

from .table import ReadOptions, TextTable, check_cells, table_of

INSTALL = ".venv/bin/pip install -e '.[tables]'"


def read_parquet(path: Path, options: ReadOptions) -> TextTable:
    """Read a Parquet file's columns. Raises BadTable, also if the extra is not installed."""
    try:
        import duckdb
    except ImportError as error:
        raise BadTable(f"{str(path)!r} is a Parquet file; to read it: {INSTALL}") from error
    # Nothing is fetched: Parquet is part of the library. A name with * or [ is a name, not a pattern.
    offline = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    literal = re.sub(r"([*?\[])", r"[\1]", str(path))
    try:
        with duckdb.connect(":memory:", config=offline) as database:
            result = database.execute("SELECT * FROM read_parquet(?)", [literal])
            columns = tuple(str(field[0]) for field in result.description)
            rows = tuple(tuple(_cell(value) for value in row) for row in result.fetchall())
    except duckdb.Error as error:
        raise BadTable(f"{str(path)!r} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    if not rows:
        raise BadTable(f"{str(path)!r} holds no rows (Parquet)")
    for number, cells in enumerate(rows, 1):
        check_cells(path, number, columns, cells)
    return TextTable(path, "Parquet", columns, rows, tuple(range(1, len(rows) + 1)))


def read_workbook(path: Path, options: ReadOptions) -> TextTable:
    """Read one sheet of an Excel workbook: the one named, else the first that has rows. Raises BadTable."""
    try:
        import python_calamine
    except ImportError as error:
        raise BadTable(f"{str(path)!r} is an Excel workbook; to read it: {INSTALL}, or save it as CSV") from error
    try:
        workbook = python_calamine.load_workbook(str(path))
        names = list(workbook.sheet_names)
        if options.sheet is not None and options.sheet not in names:
            shown = ", ".join(repr(name) for name in names)
            near = did_you_mean(options.sheet, names) or "."
            raise BadTable(f"{str(path)!r} has no sheet {options.sheet!r}{near} Its sheets: {shown}")
        read = {
            name: workbook.get_sheet_by_name(name).to_python() for name in ([options.sheet] if options.sheet else names)
        }
    except (python_calamine.CalamineError, OSError) as error:
        raise BadTable(f"{str(path)!r} cannot be read as an Excel workbook: {error}") from error
    filled = [name for name, rows in read.items() if rows]
    if not filled:
        raise BadTable(f"{str(path)!r} holds no rows ({len(names)} empty sheets)")
    sheet = filled[0]
    others = (
        f" (also: {', '.join(repr(name) for name in names if name != sheet)}; --sheet chooses)" if names[1:] else ""
    )
    rows = [(number, [_cell(value) for value in cells]) for number, cells in enumerate(read[sheet], 1)]
    return table_of(path, f"XLSX, sheet {sheet!r}{others}", rows, options.header)


def _cell(value: Any) -> str:
    """A cell as text: whole numbers without `.0`, dates as ISO 8601, lists and structs as JSON."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Sequence | dict) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str, separators=(",", ":"))
    return str(value)
