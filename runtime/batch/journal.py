"""The files of a batch: answers are appended whole, so that a run killed at any moment can be resumed.

The answers file is its own journal. Each line's id is made from the request it answers and from the model's files, so
a resumed run can tell what is done, and can refuse to mix the answers of another input or another model into it.
Files that cannot be used together are refused before anything is loaded.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from models.common.file_kinds import file_kind, first_line
from runtime.errors import BatchRefused
from runtime.openai.wire import to_json

from .lines import BadLine, BatchLine, key_of, read_lines

ID_PREFIX = "batch_req_"
_FIRST_BYTES = b'{"id": "' + ID_PREFIX.encode()


def errors_path(output: Path) -> Path:
    """The file of the failed lines: `answers.jsonl` -> `answers.errors.jsonl`."""
    name = output.name.removesuffix(".jsonl")
    return output.with_name(f"{name}.errors.jsonl")


def check_files(source: Path, output: Path) -> None:
    """Raise BatchRefused unless `source` can be read twice and `output` is a file of its own."""
    if not source.is_file():
        found = "a folder" if source.is_dir() else "not a regular file"
        raise BatchRefused(f"input {str(source)!r} is {found} (a resumed run reads it again); give a file of requests")
    _require_requests(source)
    for target in (output, errors_path(output)):
        if target.exists() and not target.is_file():
            raise BatchRefused(f"output {str(target)!r} is not a regular file")
        if target.exists() and source.samefile(target):
            raise BatchRefused(f"input and output are the same file, {str(source)!r}; choose another output file")
    if not output.parent.is_dir():
        raise BatchRefused(f"the folder of output {str(output)!r} does not exist")
    if not os.access(output.parent, os.W_OK):
        raise BatchRefused(f"the folder of output {str(output)!r} cannot be written")


def _require_requests(source: Path) -> None:
    """Raise BatchRefused if `source` holds something else than requests, as a whole: every line would fail."""
    given, name = file_kind(source), str(source)
    if given.kind not in {"json lines", "json", "text", "empty"}:
        command = given.to_requests()
        hint = f". This makes requests of it:\n  {command}" if command else ""
        raise BatchRefused(f"input {name!r} is {given.name}, not JSON lines of requests{hint}")
    try:
        first = json.loads(first_line(source))
    except (ValueError, RecursionError):
        return
    if isinstance(first, dict) and not first.keys() & {"custom_id", "url", "body"}:
        form = next((form for form in ("messages", "conversations", "prompt") if form in first), None)
        if form is not None:
            raise BatchRefused(
                f"input {name!r} holds records with {form!r}, as for examples, not requests; a line of a batch is "
                '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […]}}'
            )


def answer_record(line: BatchLine, weights: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's line for a request answered by the files of the hash `weights`."""
    response = {"status_code": 200, "request_id": f"req_{line.fingerprint}", "body": body}
    known = {"id": f"{ID_PREFIX}{line.fingerprint}-{weights}", "custom_id": line.custom_id}
    return {**known, "response": response, "error": None}


def error_record(line: BatchLine | BadLine, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's line for a request that was refused or failed; beside it, first, the input line's number (from 1)."""
    response = {"status_code": status, "request_id": f"req_{line.fingerprint}", "body": body}
    known = {"id": ID_PREFIX + line.fingerprint, "custom_id": line.custom_id}
    return {"line": line.number, **known, "response": response, "error": None}


class JsonlFile:
    """A file of JSON lines, locked for one process, which appends each line by one write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise BatchRefused(f"{str(path)!r} is being written by another process; wait for it to end") from None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. A kill leaves either none of it, or a torn tail that the next run cuts off.

        A full disk leaves none of it: another line may still come to stand after this one.
        """
        rest = memoryview(to_json(json.dumps(record, ensure_ascii=False)) + b"\n")
        whole = os.fstat(self._fd).st_size
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            self.cut(whole)
            raise

    def cut(self, size: int) -> None:
        """Drop everything after the first `size` bytes."""
        os.ftruncate(self._fd, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush the file to the disk and release it."""
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)


class ErrorsFile:
    """The lines that failed in this run. Each run replaces the file, since it judges every open line again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: JsonlFile | None = None
        if path.exists():
            _require_ours(path)

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        return self

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; the file is made by the first."""
        if self._file is None:
            self._file = JsonlFile(self._path)
        self._file.append(record)

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def resume(answers: JsonlFile, model: str, weights: str) -> dict[int, int]:
    """Read the answers of earlier runs: key of the custom_id -> fingerprint. Cuts off a torn last line.

    Raises BatchRefused if the file is not a batch's, or holds answers of another model or of other `weights`.
    """
    done: dict[int, int] = {}
    size = 0
    with answers.path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                if not (raw.startswith(_FIRST_BYTES) or _FIRST_BYTES.startswith(raw)):
                    raise _foreign(answers.path, number)
                answers.cut(size)
                break
            answer = _read_answer(answers.path, number, raw)
            where = f"{str(answers.path)!r} line {number} is an answer of"
            if answer.model != model:
                raise BatchRefused(f"{where} model {answer.model!r}, not of {model!r}; choose another output file")
            if answer.weights != weights:
                raise BatchRefused(
                    f"{where} other files than those that {model!r} has now (hash {answer.weights or 'not kept'}, now "
                    f"{weights}); choose another output file, or give the model of then"
                )
            done[answer.key] = answer.fingerprint
            size += len(raw)
    return done


def require_same_input(source: Path, max_line_bytes: int, done: Mapping[int, int], output: Path) -> None:
    """Raise BatchRefused unless every answer in `output` belongs to a request in `source`, unchanged."""
    missing = dict(done)
    for line in read_lines(source, max_line_bytes):
        if isinstance(line, BatchLine) and missing.get(line.key) == int(line.fingerprint, 16):
            del missing[line.key]
    if missing:
        raise BatchRefused(
            f"{len(missing)} of the {len(done)} answers in {str(output)!r} belong to requests that {str(source)!r} "
            "does not hold (or holds changed); resume with the same input, or choose another output file"
        )


class _Answer(NamedTuple):
    """The request and the model that a line of the answers file belongs to; earlier versions kept no `weights`."""

    key: int
    fingerprint: int
    model: str
    weights: str


def _read_answer(path: Path, number: int, raw: bytes) -> _Answer:
    try:
        record = json.loads(raw)
        custom_id, model = record["custom_id"], record["response"]["body"]["model"]
        if record["id"].startswith(ID_PREFIX) and isinstance(model, str):
            fingerprint, _, weights = record["id"].removeprefix(ID_PREFIX).partition("-")
            return _Answer(key_of(custom_id), int(fingerprint, 16), model, weights)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise _foreign(path, number)


def _require_ours(path: Path) -> None:
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    if first and not first.startswith(b'{"line": '):
        raise _foreign(path, 1)


def _foreign(path: Path, number: int) -> BatchRefused:
    return BatchRefused(f"{str(path)!r} line {number} was not written by a batch; choose another output file")
