"""JSON lines, or one JSON array, of flat objects: their keys are the columns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.errors import BadTable

from .encoding import decode
from .table import ReadOptions, TextTable, check_cells

CHAT_KEYS = ({"messages"}, {"conversations"}, {"prompt", "completion"})


def read_json_rows(path: Path, data: bytes, options: ReadOptions) -> TextTable:
    """Read objects. A text stays as it is; every other value becomes compact JSON, and a missing one an empty cell."""
    text, encoding = decode(path, data, options.encoding)
    objects = list(_objects(path, text))
    if not objects:
        raise BadTable(f"{str(path)!r} holds no rows (JSON)")
    columns = tuple(dict.fromkeys(key for _, row in objects for key in row))
    rows = tuple(tuple(_cell(row.get(column)) for column in columns) for _, row in objects)
    lines = tuple(line for line, _ in objects)
    for line, cells in zip(lines, rows, strict=True):
        check_cells(path, line, columns, cells)
    form = f"JSON {'array' if text.lstrip().startswith('[') else 'lines'}, {encoding}"
    return TextTable(path, form, columns, rows, lines)


def is_chat(first: object) -> bool:
    """True if the first line's object is a chat record in one of the forms that are read."""
    return isinstance(first, dict) and any(keys <= first.keys() for keys in CHAT_KEYS)


def first_object(data: bytes) -> object:
    """The object of the first line with text; None if it is none."""
    line = next((line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 50) if line.strip()), b"")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if text.lstrip().startswith("["):
        yield from ((number, _checked(row, path, number)) for number, row in enumerate(_loaded(path, 1, text), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _checked(_loaded(path, number, line), path, number)


def _loaded(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = getattr(error, "lineno", 1) + line - 1
        raise BadTable(f"{str(path)!r}, line {where}: not JSON: {error}") from error


def _checked(row: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadTable(
            f'{str(path)!r}, line {line}: expected an object such as {{"text": …, "label": …}}, '
            f"got {type(row).__name__}"
        )
    return row


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
