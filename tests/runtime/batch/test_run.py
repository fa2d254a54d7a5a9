"""Offline batches without an engine: every line ends in exactly one place, no matter how often the run is stopped."""

import asyncio
import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batch.journal import JsonlFile, errors_path
from runtime.batch.lines import BadLine, BatchLine, count_lines, parse_line, read_lines
from runtime.batch.run import BatchCounts, BatchJob, BatchRun, open_files
from runtime.errors import BatchRefused, EngineDown, InvalidRequest

URL, WEIGHTS = "/v1/chat/completions", "0123456789abcdef"


def request(custom_id: str, text: str = "hello", **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body} | changes


def write(path: Path, records: Sequence[Mapping[str, Any] | str]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def reason(failed: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's error object in a line of the errors file."""
    error: dict[str, Any] = failed["response"]["body"]["error"]
    return error


class Echo:
    """Answers with the request itself. `failing` custom_ids fail; after `lives` answers the engine is gone."""

    def __init__(self, *, failing: Sequence[str] = (), lives: int | None = None, model: str = "m") -> None:
        self.failing = set(failing)
        self.lives = lives
        self.model = model
        self.in_flight = 0
        self.most_in_flight = 0
        self.asked: list[str] = []

    async def answer(self, line: BatchLine) -> dict[str, object]:
        self.asked.append(line.custom_id)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            for _ in range(len(self.asked) % 3 + 4):
                await asyncio.sleep(0)
            self.require_alive()
            if line.custom_id in self.failing:
                raise InvalidRequest("no", param="messages")
            if self.lives is not None:
                self.lives -= 1
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
            return {"model": self.model, "said": line.body["messages"][0]["content"], "usage": usage}
        finally:
            self.in_flight -= 1

    def require_alive(self) -> None:
        if self.lives == 0:
            raise EngineDown("gone")


def run(
    source: Path,
    output: Path,
    echo: Echo | None = None,
    *,
    weights: str = WEIGHTS,
    window: int = 4,
    limit: int = 1 << 20,
) -> BatchCounts:
    echo = echo or Echo()
    job = BatchJob(source, output, echo.model, weights, window, limit)
    with open_files(job) as files:
        batch = BatchRun(job, files, echo, lambda counts: None)
        asyncio.run(batch.run())
        return batch.counts


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [request(f"r{n}", f"text {n} ü") for n in range(30)])


def test_answers_are_openai_lines(source: Path, output: Path) -> None:
    counts = run(source, output)
    assert (counts.answered, counts.failed, counts.skipped, counts.lines) == (30, 0, 0, 30)
    assert (counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens) == (150, 30, 60)
    answers = read(output)
    assert {a["custom_id"]: a["response"]["body"]["said"] for a in answers} == {
        f"r{n}": f"text {n} ü" for n in range(30)
    }
    first = answers[0]
    assert list(first) == ["id", "custom_id", "response", "error"]
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    assert first["id"].startswith("batch_req_")
    assert len({answer["id"] for answer in answers}) == 30
    assert not errors_path(output).exists()


def test_each_answer_is_one_line_for_every_reader(tmp_path: Path, output: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    source = write(tmp_path / "in.jsonl", [request("r\u2028", text), json.dumps(request("x", method="\u2029"))])
    run(source, output)
    (answer,), (error,) = read(output), read(errors_path(output))
    assert (answer["custom_id"], answer["response"]["body"]["said"]) == ("r\u2028", text)
    assert error["custom_id"] == "x"


def test_the_window_bounds_what_is_in_flight(source: Path, output: Path) -> None:
    echo = Echo()
    run(source, output, echo, window=3)
    assert echo.most_in_flight == 3


BAD_LINES = {
    "not json": ("{", None, None),
    "two values": ("{} {}", None, None),
    "an array": ("[]", None, None),
    "a constant": ('{"custom_id": NaN}', None, None),
    "too deep": ("[" * 100_000 + "]" * 100_000, None, None),
    "no custom_id": (json.dumps(request("")), None, "custom_id"),
    "custom_id a number": (json.dumps(request("x") | {"custom_id": 7}), None, "custom_id"),
    "half a character": ('{"custom_id": "\\ud800"}', None, "custom_id"),
    "method": (json.dumps(request("x", method="GET")), "x", "method"),
    "url": (json.dumps(request("x", url="/v1/images/generations")), "x", "url"),
    "no url": (json.dumps({"custom_id": "x", "method": "POST", "body": {}}), "x", "url"),
    "body": (json.dumps(request("x", body=[])), "x", "body"),
    "stream": (json.dumps(request("x", body={"stream": True})), "x", "stream"),
    "unknown field": (json.dumps(request("x", priority=1)), "x", "priority"),
    "half a character in a field's name": (json.dumps(request("x") | {"\ud83d": 1}), "x", None),
    "half a character in the url": (json.dumps(request("x", url="\ud83d")), "x", None),
    "half a character in the body's name": (json.dumps(request("x", body={"\ud83d": 1})), "x", None),
    "half a character deep down": (json.dumps(request("x", body={"a": [{"b": "\udc00"}]})), "x", None),
    "half a character, unescaped": (
        json.dumps(request("\ud83d"), ensure_ascii=False).encode("utf-8", "surrogatepass"),
        None,
        None,
    ),
}


@pytest.mark.parametrize(("line", "custom_id", "param"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_written_down_and_the_others_answered(
    tmp_path: Path, output: Path, line: str | bytes, custom_id: str | None, param: str | None
) -> None:
    source, encoded = write(tmp_path / "in.jsonl", [request("a"), ""]), line.encode() if isinstance(line, str) else line
    source.write_bytes(source.read_bytes() + encoded + b"\n" + json.dumps(request("b")).encode())
    assert run(source, output).failed == 1
    (error,) = read(errors_path(output))
    assert (error["line"], error["custom_id"], reason(error)["param"]) == (3, custom_id, param)
    assert list(error) == ["line", "id", "custom_id", "response", "error"]
    assert error["id"].startswith("batch_req_")
    assert (error["response"]["status_code"], error["error"]) == (400, None)
    assert list(error["response"]) == ["status_code", "request_id", "body"]
    assert list(reason(error)) == ["message", "type", "param", "code"]
    assert {answer["custom_id"] for answer in read(output)} == {"a", "b"}


class Panic(BaseException):
    """As the panic of a library in Rust."""


@pytest.mark.parametrize(
    "fault", [Panic("x"), RecursionError(), InvalidRequest("\ud83d", param="\ud83d"), KeyError("x")]
)
def test_whatever_one_line_raises_the_others_are_answered(
    source: Path, output: Path, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Echo.answer

    async def raising(echo: Echo, line: BatchLine) -> dict[str, object]:
        if line.custom_id == "r3":
            raise fault
        return await answer(echo, line)

    monkeypatch.setattr(Echo, "answer", raising)
    counts = run(source, output)
    assert (counts.answered, counts.failed) == (29, 1)


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_no_depth_is_too_much_for_the_parser(depth: int) -> None:
    line = json.dumps(request("x")).replace('"hello"', "[" * depth + "]" * depth)
    assert isinstance(parse_line(1, line.encode()), BatchLine | BadLine)


@given(st.binary(max_size=60))
def test_no_line_is_too_much_for_the_parser(raw: bytes) -> None:
    assert isinstance(parse_line(1, raw), BadLine)


def test_a_long_line_is_refused_with_its_size(tmp_path: Path, output: Path) -> None:
    long = json.dumps(request("long", "x" * 5000))
    source = write(tmp_path / "in.jsonl", [request("a"), long, request("b")])
    source.write_bytes(source.read_bytes() + b"y" * 2000)
    assert run(source, output, limit=1000).answered == 2
    messages = {error["line"]: reason(error)["message"] for error in read(errors_path(output))}
    assert messages == {
        2: f"the line has {len(long) + 1} bytes, the limit is 1000",
        4: "the line has 2000 bytes, the limit is 1000",
    }


def test_a_duplicate_is_answered_once(tmp_path: Path, output: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request("a", "first"), request("a", "second"), request("a", "first")])
    for _ in range(2):
        assert run(source, output).failed == 2
        assert [answer["response"]["body"]["said"] for answer in read(output)] == ["first"]
        errors = read(errors_path(output))
        assert [(error["line"], reason(error)["code"]) for error in errors] == [
            (2, "duplicate_custom_id"),
            (3, "duplicate_custom_id"),
        ]


def test_windows_files_are_read(tmp_path: Path, output: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(request(name)).encode() for name in "ab"))
    assert count_lines(source) == 2
    assert run(source, output).answered == 2


def test_a_failed_line_is_tried_again_by_the_next_run(source: Path, output: Path) -> None:
    assert run(source, output, Echo(failing=["r3", "r4"])).failed == 2
    assert {error["custom_id"] for error in read(errors_path(output))} == {"r3", "r4"}
    echo = Echo(failing=["r4"])
    counts = run(source, output, echo)
    assert (counts.answered, counts.skipped, counts.failed) == (1, 28, 1)
    assert set(echo.asked) == {"r3", "r4"}
    assert [error["custom_id"] for error in read(errors_path(output))] == ["r4"]
    assert run(source, output).failed == 0
    assert not errors_path(output).exists()


def test_a_dead_engine_stops_the_run_and_blames_no_line(source: Path, output: Path) -> None:
    with pytest.raises(EngineDown):
        run(source, output, Echo(lives=7))
    assert len(read(output)) == 7
    assert not errors_path(output).exists()
    assert run(source, output).skipped == 7
    assert len({answer["custom_id"] for answer in read(output)}) == len(read(output)) == 30


def test_cancelled_it_ends_what_is_in_flight_and_keeps_what_is_written(source: Path, output: Path) -> None:
    echo = Echo()
    job = BatchJob(source, output, "m", WEIGHTS, 4)

    async def cancel_half_way() -> None:
        def on_progress(counts: BatchCounts) -> None:
            if counts.answered == 10:
                task.cancel()

        with open_files(job) as files:
            task = asyncio.create_task(BatchRun(job, files, echo, on_progress).run())
            await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel_half_way())
    assert echo.in_flight == 0
    assert 10 <= len(read(output)) < 30
    run(source, output)
    assert len({answer["custom_id"] for answer in read(output)}) == len(read(output)) == 30


@settings(max_examples=60)
@given(cut=st.integers(0, 10_000))
def test_a_file_cut_at_any_byte_is_resumed(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    source = write(folder / "in.jsonl", [request(f"r{n}", "ü\n") for n in range(6)])
    output = folder / "out.jsonl"
    run(source, output)
    whole = output.read_bytes()
    output.write_bytes(whole[: cut % (len(whole) + 1)])
    run(source, output)
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_disk_that_fills_up_leaves_whole_lines_only(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def half(fd: int, data: memoryview) -> int:
        monkeypatch.setattr(os, "write", full)
        return write(fd, data[:10])

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with JsonlFile(output) as file:
        file.append({"id": 1})
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            file.append({"id": "lost"})
        monkeypatch.setattr(os, "write", write)
        file.append({"id": 2})
    assert read(output) == [{"id": 1}, {"id": 2}]


def test_two_runs_on_one_output(source: Path, output: Path) -> None:
    with JsonlFile(output), pytest.raises(BatchRefused, match="another process"):
        run(source, output)
    assert run(source, output).answered == 30


def test_another_model_is_refused(source: Path, output: Path) -> None:
    run(source, output)
    before = output.read_bytes()
    with pytest.raises(BatchRefused, match="'m', not of 'other'"):
        run(source, output, Echo(model="other"))
    assert output.read_bytes() == before


def test_other_files_under_the_models_name_are_refused(source: Path, output: Path) -> None:
    run(source, output)
    before = output.read_bytes()
    with pytest.raises(BatchRefused, match=f"'m' has now .hash {WEIGHTS}, now fedc"):
        run(source, output, weights="fedc")
    assert output.read_bytes() == before
    output.write_bytes(before.replace(f"-{WEIGHTS}".encode(), b""))
    with pytest.raises(BatchRefused, match="hash not kept"):
        run(source, output)


@pytest.mark.parametrize("change", ["text", "missing"])
def test_another_input_is_refused(source: Path, output: Path, change: str) -> None:
    run(source, output)
    records = [request("r0", "changed"), *read(source)[1:]] if change == "text" else read(source)[1:]
    with pytest.raises(BatchRefused, match="1 of the 30 answers"):
        run(write(source, records), output)


def test_an_input_that_has_grown_is_welcome(source: Path, output: Path) -> None:
    run(source, output)
    write(source, [request("new"), *read(source)])
    counts = run(source, output)
    assert (counts.answered, counts.skipped) == (1, 30)


@pytest.mark.parametrize("content", ["notes", "notes\n", '{"a": 1}\n', '{"id": "batch_req_zz", "custom_id": "a"}\n'])
@pytest.mark.parametrize("which", ["output", "errors"])
def test_a_foreign_file_is_refused_and_untouched(source: Path, output: Path, which: str, content: str) -> None:
    target = output if which == "output" else errors_path(output)
    target.write_text(content)
    with pytest.raises(BatchRefused, match="was not written by a batch"):
        run(source, output)
    assert target.read_text() == content


WRONG_INPUTS = {
    "csv": (b"text,label\na,b\nc,d\n", "is a CSV file.*python3 -c"),
    "array": (b'[{"custom_id": "a"}]', "is one JSON array.*python3 -c"),
    "gzip": (b"\x1f\x8b\x08\x00", "is a gzip file.*gunzip -c"),
    "examples": (b'{"messages": []}\n', "holds records with 'messages', as for examples"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_an_input_that_is_something_else_is_named_and_nothing_written(tmp_path: Path, output: Path, name: str) -> None:
    content, says = WRONG_INPUTS[name]
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(BatchRefused, match=f"(?s){says}"):
        run(tmp_path / "in", output)
    assert not output.exists()


def test_paths_that_cannot_work_are_refused(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for target, message in (
        (source, "same file"),
        (link, "same file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "nowhere" / "out.jsonl", "does not exist"),
    ):
        with pytest.raises(BatchRefused, match=message):
            run(source, target)
    with pytest.raises(BatchRefused, match="not a regular file"):
        run(tmp_path / "missing.jsonl", tmp_path / "out.jsonl")
    assert len(read(source)) == 30


def test_errors_stand_beside_the_answers() -> None:
    assert errors_path(Path("a/out.jsonl")) == Path("a/out.errors.jsonl")
    assert errors_path(Path("out")) == Path("out.errors.jsonl")


def test_lines_are_read_one_at_a_time(source: Path) -> None:
    lines = read_lines(source, 1 << 20)
    first = next(lines)
    assert isinstance(first, BatchLine)
    assert first.custom_id == "r0"
    assert count_lines(source) == 30
