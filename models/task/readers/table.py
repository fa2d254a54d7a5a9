"""The rows of a file of any format: columns, cells as text, and the line each row began on."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.common.record import Record
from models.errors import BadTable, did_you_mean

# No model here reads a tenth of this: such a cell is a quote that is never closed, or a file in a cell.
MAX_CELL_CHARACTERS = 500_000
MAX_HEADER_CHARACTERS = 80


class ReadOptions(Record):
    """A user's statements about a file; None is guessed. `header`: the first row names the columns."""

    encoding: str | None = None
    separator: str | None = None
    header: bool | None = None
    sheet: str | None = None


@dataclass(frozen=True, slots=True)
class TextTable:
    """Rows as read. `lines[i]` is the line (or row) of the file on which `rows[i]` begins, from 1.

    `form` describes the file as it was understood, for the user to see.
    """

    path: Path
    form: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    def column(self, name: str) -> tuple[str, ...]:
        """The cells of a column. Raises BadTable naming the columns there are."""
        exact = [place for place, column in enumerate(self.columns) if column == name]
        loose = [place for place, column in enumerate(self.columns) if _plain(column) == _plain(name)]
        if not exact and len(loose) != 1:
            raise BadTable(self._no_column(name))
        place = (exact or loose)[0]
        return tuple(row[place] for row in self.rows)

    def _no_column(self, name: str) -> str:
        shown = ", ".join(repr(column) for column in self.columns[:30])
        more = f" and {len(self.columns) - 30} more" if len(self.columns) > 30 else ""
        hint = did_you_mean(name, self.columns) or "."
        few = "; if that is one column too few, give --separator" if len(self.columns) == 1 else ""
        return f"{str(self.path)!r} has no column {name!r}{hint} Its columns: {shown}{more}{few}"


def _plain(name: str) -> str:
    return name.strip().casefold()


def table_of(path: Path, form: str, rows: Sequence[tuple[int, Sequence[str]]], header: bool | None = None) -> TextTable:
    """Make a table of (line, cells). `header` None: guessed from the first row.

    Columns without a name and without a cell are left out. Raises BadTable for a row of another length than the
    first, a cell that is too long, two columns of one name, and a file without rows.
    """
    filled = [(line, tuple(cells)) for line, cells in rows if any(cell.strip() for cell in cells)]
    if not filled:
        raise BadTable(f"{str(path)!r} holds no rows ({form})")
    width = len(filled[0][1])
    for line, cells in filled:
        if len(cells) != width:
            raise BadTable(_ragged(path, line, len(cells), width, filled[0][0]))
    named = _looks_like_header([cells for _, cells in filled[:200]]) if header is None else header
    names = tuple(cell.strip() for cell in filled[0][1]) if named else tuple(f"column {n + 1}" for n in range(width))
    body = filled[1:] if named else filled
    if not body:
        raise BadTable(f"{str(path)!r} holds a header and no rows ({form}); if that line is a row, give --no-header")
    kept = [place for place in range(width) if names[place] or any(cells[place].strip() for _, cells in body)]
    names = tuple(name or f"column {place + 1}" for place, name in enumerate(names))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadTable(f"{str(path)!r} has two columns {twice!r}; rename one, or give --no-header")
    for line, cells in body:
        check_cells(path, line, names, cells)
    form += ", first row is the header" if named else ", no header"
    return TextTable(
        path,
        form,
        tuple(names[place] for place in kept),
        tuple(tuple(cells[place] for place in kept) for _, cells in body),
        tuple(line for line, _ in body),
    )


def check_cells(path: Path, line: int, names: Sequence[str], cells: Sequence[str]) -> None:
    """Raise BadTable for a cell that is too long."""
    for name, cell in zip(names, cells, strict=True):
        if len(cell) > MAX_CELL_CHARACTERS:
            raise BadTable(
                f"{str(path)!r}, line {line}, {name!r}: the cell has {len(cell):,} characters, limit "
                f"{MAX_CELL_CHARACTERS:,}; shorten it, or look for a quote that is opened there and never closed"
            )


def _looks_like_header(rows: Sequence[Sequence[str]]) -> bool:
    """True if the first row reads as names: short, no numbers, and no cell again in its column."""
    first = [cell.strip() for cell in rows[0]]
    given = [cell for cell in first if cell]
    if not given or any(len(cell) > MAX_HEADER_CHARACTERS for cell in given):
        return False
    if any(cell.replace(".", "", 1).replace("-", "", 1).isdigit() or "\n" in cell for cell in given):
        return False
    below = [{row[place].strip() for row in rows[1:]} for place in range(len(first))]
    return not any(cell and cell in seen for cell, seen in zip(first, below, strict=True))


def _ragged(path: Path, line: int, n_cells: int, width: int, first_line: int) -> str:
    return (
        f"{str(path)!r}, line {line}: {n_cells} cells, where line {first_line} has {width}. Put quotes around a cell "
        f"that holds the separator or a line break, or give --separator; see: sed -n {line}p {shlex.quote(str(path))}"
    )
