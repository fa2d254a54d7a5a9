"""The text of a file: its bytes unpacked and decoded, in the encoding given or guessed."""

import codecs
import gzip
import zlib
from pathlib import Path

from models.common.chat_records import MAX_FILE_BYTES
from models.common.file_kinds import is_gzip
from models.errors import BadTable

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Control characters that texts rarely hold. A file that is not UTF-8 is taken for Windows-1252 if it has few of them.
MAX_CONTROL = 0.005
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\x0b\x0c\x1a\x1b"))
_SHOWN = {"utf-8-sig": "UTF-8 with BOM", "utf-8": "UTF-8", "cp1252": "Windows-1252"}


def read_bytes(path: Path) -> bytes:
    """The file's content, unpacked if it is gzip. Raises BadTable if it is missing, empty or too large."""
    try:
        with gzip.open(path, "rb") if is_gzip(path) else path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError as error:
        raise BadTable(f"{str(path)!r} is a folder; give one of its files") from error
    except FileNotFoundError as error:
        raise BadTable(f"there is no file {str(path)!r}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadTable(f"{str(path)!r} cannot be read: {error}") from error
    if not data.strip():
        raise BadTable(f"{str(path)!r} is empty")
    if len(data) > MAX_FILE_BYTES:
        raise BadTable(f"{str(path)!r} exceeds the limit of {MAX_FILE_BYTES} bytes; a part of it suffices")
    return data


def decode(path: Path, data: bytes, encoding: str | None = None) -> tuple[str, str]:
    """The text and the encoding's name, as shown. Raises BadTable with the place of the first bad byte."""
    if encoding is not None:
        name = _known(encoding)
        if name == "utf-8":
            name = "utf-8-sig"  # a mark at the beginning is no character
    else:
        name = _guess(path, data)
    try:
        text = data.decode(name)
    except (UnicodeDecodeError, UnicodeError) as error:
        place = getattr(error, "start", 0)
        line = data.count(b"\n", 0, place) + 1
        raise BadTable(
            f"{str(path)!r} is not {encoding or name}: byte {data[place : place + 1].hex()} in line {line} does not "
            "fit; without --encoding it is guessed"
        ) from error
    if "\0" in text:
        raise BadTable(f"{str(path)!r} holds NUL characters when read as {name}; give the right --encoding")
    return text.removeprefix("\ufeff"), encoding or _SHOWN.get(name, name.upper())


def _known(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError as error:
        raise BadTable(
            f"--encoding {encoding!r} is unknown; try utf-8, utf-16, windows-1252, iso-8859-15, gb18030 or shift_jis"
        ) from error


def _guess(path: Path, data: bytes) -> str:
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    head = data[:4096]
    if b"\0" in head:
        # Latin text in UTF-16 has a zero in every second byte: at odd places if the low byte comes first.
        even, odd = head[::2].count(0), head[1::2].count(0)
        if max(even, odd) > 0.3 * len(head) / 2 and min(even, odd) < 0.1 * max(even, odd):
            return "utf-16-le" if odd > even else "utf-16-be"
        raise BadTable(f"{str(path)!r} is binary, or text in an unusual encoding: then give --encoding")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    else:
        return "utf-8"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError as error:
        place = error.start
        line = data.count(b"\n", 0, place) + 1
        raise BadTable(
            f"the encoding of {str(path)!r} cannot be guessed: byte {data[place]:02x} in line {line} fits neither "
            "UTF-8 nor Windows-1252. Give --encoding, such as iso-8859-1, gb18030 or shift_jis"
        ) from error
    if len(data) - len(data.translate(None, _CONTROL)) > MAX_CONTROL * len(data):
        raise BadTable(f"{str(path)!r} is binary, or text in an unusual encoding: then give --encoding")
    return "cp1252"
