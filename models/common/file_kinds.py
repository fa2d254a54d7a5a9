"""Recognise a file that was given in the place of another by its first bytes, name it, and say how to turn it.

Used where a file cannot be read, so that the message speaks of a CSV file, not of "line 1 column 1".
"""

import csv
import gzip
import io
import json
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal[
    "missing", "folder", "empty", "gzip", "xlsx", "zip", "parquet", "gguf", "safetensors", "pdf", "sqlite", "utf-16",
    "json array", "json lines", "json", "csv", "text", "binary",
]  # fmt: skip
HEAD_BYTES = 1 << 16
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"PAR1", "parquet"),
    (b"GGUF", "gguf"),
    (b"%PDF", "pdf"),
    (b"SQLite format 3", "sqlite"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_NAMES: dict[Kind, str] = {
    "missing": "no file", "folder": "a folder", "empty": "an empty file", "gzip": "a gzip file",
    "xlsx": "an Excel workbook (XLSX)", "zip": "a zip archive", "parquet": "a Parquet file", "gguf": "a GGUF file",
    "safetensors": "a safetensors file", "pdf": "a PDF", "sqlite": "an SQLite database", "utf-16": "a text in UTF-16",
    "json array": "one JSON array", "json lines": "JSON lines", "json": "JSON", "csv": "a CSV file",
    "text": "a text file", "binary": "a binary file",
}  # fmt: skip
_DELIMITERS = ",;\t|"
# Names of columns that hold the text and the answer, likeliest first.
TEXT_NAMES = ("text", "prompt", "input", "question", "message", "mail", "body", "content", "instruction")
ANSWER_NAMES = ("label", "answer", "completion", "output", "response", "class", "category", "target")


@dataclass(frozen=True)
class FileKind:
    """A file's kind, and the head of its text where it has one."""

    path: Path
    kind: Kind
    head: str = ""

    @property
    def name(self) -> str:
        """The kind in words, with its article."""
        return _NAMES[self.kind]

    def to_records(self) -> str:
        """Return the command that makes JSONL of chat records of it; empty where there is none to name."""
        if self.kind == "csv":
            text, answer = self._columns()
            said = f'[{{"role":"user","content":r[{text!r}]}},{{"role":"assistant","content":r[{answer!r}]}}]'
            return self._from_csv(f'{{"messages":{said}}}')
        return self._to_lines("--examples")

    def to_requests(self) -> str:
        """Return the command that makes a batch's requests of it; empty where there is none to name."""
        if self.kind == "csv":
            text, _ = self._columns()
            body = f'{{"messages":[{{"role":"user","content":r[{text!r}]}}]}}'
            url = '"method":"POST","url":"/v1/chat/completions"'
            return self._from_csv(f'{{"custom_id":str(n),{url},"body":{body}}}')
        return self._to_lines("batch")

    def _from_csv(self, made: str) -> str:
        delimiter = self._delimiter()
        how = "" if delimiter == "," else f",delimiter={delimiter!r}"
        opened = f"open({str(self.path)!r},encoding='utf-8-sig',newline='')"
        return self._python(
            f"import csv,json; [print(json.dumps({made})) for n,r in enumerate(csv.DictReader({opened}{how}),1)]"
        )

    def _to_lines(self, option: str) -> str:
        path, name = shlex.quote(str(self.path)), str(self.path)
        then = f", then give the CSV to {option}"
        if self.kind == "json array":
            opened = f"open({name!r},encoding='utf-8')"
            return self._python(f"import json; [print(json.dumps(r)) for r in json.load({opened})]")
        if self.kind == "gzip":
            return f"gunzip -c {path} > {self._target()}"
        if self.kind == "utf-16":
            return f"iconv -f UTF-16 -t UTF-8 {path} > {self._target()}"
        if self.kind == "xlsx":
            return f"libreoffice --headless --convert-to csv {path}   (or save it as CSV){then}"
        if self.kind == "parquet":
            target = str(self.path.with_suffix(".csv"))
            table = f"import pandas; pandas.read_parquet({name!r}).to_csv({target!r},index=False)"
            return f"python3 -c {shlex.quote(table)}   (needs pandas and pyarrow){then}"
        return ""

    def _python(self, code: str) -> str:
        return f"python3 -c {shlex.quote(code)} > {self._target()}"

    def _target(self) -> str:
        whole = self.path.with_suffix("") if self.path.suffix == ".gz" else self.path
        target = whole.with_suffix(".jsonl")
        return shlex.quote(str(target if target != self.path else self.path.with_suffix(".new.jsonl")))

    def _delimiter(self) -> str:
        line = self.head.split("\n", 1)[0]
        return max(_DELIMITERS, key=line.count)

    def _columns(self) -> tuple[str, str]:
        """The columns that look like text and answer; else the first and the last."""
        columns = next(csv.reader(io.StringIO(self.head), delimiter=self._delimiter()), ["text", "label"])
        lower = {column.strip().lower(): column for column in reversed(columns)}
        text = next((lower[name] for name in TEXT_NAMES if name in lower), columns[0])
        return text, next((lower[name] for name in ANSWER_NAMES if name in lower and lower[name] != text), columns[-1])


def file_kind(path: Path) -> FileKind:
    """Recognise what lies at `path`. Never raises: what cannot be opened is "missing"."""
    if path.is_dir():
        return FileKind(path, "folder")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return FileKind(path, "missing")
    if not head:
        return FileKind(path, "empty")
    if head.startswith(b"PK\x03\x04"):
        return FileKind(path, "xlsx" if b"xl/" in head or path.suffix.lower() == ".xlsx" else "zip")
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return FileKind(path, kind)
    if len(head) > 9 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 27:
        return FileKind(path, "safetensors")
    try:
        # A character may be cut in two at the end of the head.
        text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "strict" if len(head) < HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return FileKind(path, "binary" if b"\0" in head else "text")
    return FileKind(path, "binary" if "\0" in text else _text_kind(text), text)


def _text_kind(text: str) -> Kind:
    start = text.lstrip()
    if start.startswith("["):
        return "json array" if start[1:].lstrip()[:1] == "{" else "text"
    if start.startswith("{"):
        first = start.split("\n", 1)[0]
        try:
            json.loads(first)
        except ValueError:
            return "json"
        return "json lines"
    rows = [line for line in text.splitlines()[:20] if line.strip()]
    for delimiter in _DELIMITERS:
        counts = [len(row) for row in csv.reader(io.StringIO("\n".join(rows)), delimiter=delimiter)]
        if len(counts) > 1 and counts[0] > 1 and counts[1] == counts[0]:
            return "csv"
    return "text"


def is_gzip(path: Path) -> bool:
    """True if the file is compressed by gzip, under any name. Raises OSError."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def first_line(path: Path) -> bytes:
    """The first line that is not blank, at most HEAD_BYTES of it; empty if the file cannot be read."""
    try:
        with gzip.open(path, "rb") if is_gzip(path) else path.open("rb") as file:
            return next((line for line in iter(lambda: file.readline(HEAD_BYTES), b"") if line.strip()), b"")
    except (OSError, EOFError, zlib.error):
        return b""
