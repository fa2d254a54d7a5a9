"""One door to all formats: a file becomes a table of rows, or the chat records that it already holds."""

from pathlib import Path

from models.common.chat_records import ChatRecord, read_chat_records
from models.common.file_kinds import file_kind
from models.errors import BadTable

from .delimited import read_delimited
from .encoding import read_bytes
from .json_rows import first_object, is_chat, read_json_rows
from .table import ReadOptions, TextTable

# Formats that hold no rows, with what to do about them.
_NO_ROWS = {"pdf", "sqlite", "gguf", "safetensors", "zip"}


def read_rows(path: Path, options: ReadOptions | None = None) -> TextTable | tuple[ChatRecord, ...]:
    """Read `path` as what its content is; its name decides only between CSV and TSV.

    Raises BadTable, or BadExamples for a line that is no chat record in a file of such.
    """
    options = options or ReadOptions()
    kind = file_kind(path)
    if kind.kind in _NO_ROWS:
        raise BadTable(f"{str(path)!r} is {kind.name}; give CSV, TSV, JSON lines, chat records, Parquet or XLSX")
    if kind.kind == "parquet":
        from .sheets import read_parquet

        return read_parquet(path, options)
    if kind.kind == "xlsx":
        from .sheets import read_workbook

        return read_workbook(path, options)
    data = read_bytes(path)
    if is_chat(first_object(data)):
        return read_chat_records(path)
    name = path.name.lower().removesuffix(".gz")
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if name.endswith((".jsonl", ".ndjson", ".json")) or start == b"{" or kind.kind == "json array":
        return read_json_rows(path, data, options)
    return read_delimited(path, data, options)
