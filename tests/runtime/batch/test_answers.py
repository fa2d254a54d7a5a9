"""Batches through the real engine and supervisor, with the toy model behind the seam."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.batch.lines import URLS
from runtime.batch.run import BatchCounts, BatchJob, BatchRun, EngineAnswerer, open_files, queue_for
from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import DecodeFailed, EngineDown
from runtime.prompt.prompter import Prompter
from runtime.serving.model import ServedModel
from runtime.serving.routes import ROUTES
from tests.support.runtime.engine_thread import supervising
from tests.support.runtime.fakes import FAKE_TEMPLATE, FakeLlama

WINDOW = 8


def reason(failed: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's error object in a line of the errors file."""
    error: dict[str, Any] = failed["response"]["body"]["error"]
    return error


def chat(custom_id: str, text: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: str, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 6} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def decision(custom_id: str, mail: str, **fields: Any) -> dict[str, Any]:
    choices = [{"value": label} for label in ("spam", "spamassassin", "fork")]
    body = {"input": mail, "questions": [{"type": "choice", "instructions": "Which?", "choices": choices}]} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/decisions", "body": body}


@contextmanager
def serving(llama: FakeLlama, *, queue: int = queue_for(WINDOW)) -> Iterator[ServedModel]:
    prompter = Prompter(llama.tokenizer, FAKE_TEMPLATE, llama.info.n_ctx)
    with supervising(Engine(llama, EngineOptions(step_tokens=64, max_running=4)), queue=queue) as supervisor:
        yield ServedModel("toy", None, supervisor, prompter, llama.tokenizer, llama.info, Grammars(llama.tokenizer))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(source: Path, output: Path, served: ServedModel) -> BatchCounts:
    async def go() -> BatchCounts:
        job = BatchJob(source, output, served.name, "0", WINDOW)
        with open_files(job) as files:
            batch = BatchRun(job, files, EngineAnswerer(served), lambda counts: None)
            await batch.run()
            return batch.counts

    return asyncio.run(go())


def bodies(output: Path) -> dict[str, Mapping[str, Any]]:
    lines = map(json.loads, output.read_text().splitlines())
    return {line["custom_id"]: line["response"]["body"] for line in lines}


def choices(output: Path) -> dict[str, Any]:
    return {custom_id: body["choices"] for custom_id, body in bodies(output).items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    records = [chat(f"c{n}", f"mail number {n}") for n in range(20)]
    records += [completion(f"t{n}", f"once upon {n}", temperature=0) for n in range(10)]
    return write(tmp_path / "in.jsonl", records)


def test_answers_do_not_depend_on_what_else_is_in_the_file(source: Path, tmp_path: Path) -> None:
    with serving(FakeLlama()) as served:
        counts = run(source, tmp_path / "together.jsonl", served)
    assert (counts.answered, counts.failed) == (30, 0)
    assert counts.completion_tokens > 0
    together = choices(tmp_path / "together.jsonl")
    for record in map(json.loads, source.read_text().splitlines()[::7]):
        alone = tmp_path / "alone.jsonl"
        alone.unlink(missing_ok=True)
        with serving(FakeLlama()) as served:
            run(write(tmp_path / "one.jsonl", [record]), alone, served)
        assert choices(alone) == {record["custom_id"]: together[record["custom_id"]]}


def test_embedding_lines_stand_beside_the_others(tmp_path: Path) -> None:
    def embedding(custom_id: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}

    records = [
        embedding("one", input="a mail"),
        chat("chat", "hello"),
        embedding("two", input=["a mail", "x"]),
        embedding("bad", input="x", seed=1),
    ]
    with serving(FakeLlama()) as served:
        counts = run(write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", served)
    assert (counts.answered, counts.failed) == (3, 1)
    answers = bodies(tmp_path / "out.jsonl")
    assert [len(answers[name]["data"]) for name in ("one", "two")] == [1, 2]
    assert answers["one"]["data"][0] == answers["two"]["data"][0]
    assert answers["two"]["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    [error] = map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())
    assert (error["custom_id"], reason(error)["param"]) == ("bad", "seed")


def test_what_one_line_gets_wrong_is_its_own_affair(tmp_path: Path) -> None:
    records = [
        chat("good", "hello"),
        chat("model", "hello", model="another"),
        chat("named", "hello", model="toy"),
        chat("field", "hello", colour="red"),
        chat("long", "x" * 600),
        completion("range", "hello", temperature=9),
    ]
    with serving(FakeLlama()) as served:
        counts = run(write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", served)
    assert (counts.answered, counts.failed) == (2, 4)
    assert set(bodies(tmp_path / "out.jsonl")) == {"good", "named"}
    errors = map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())
    assert {e["custom_id"]: (e["line"], reason(e)["param"], reason(e)["code"]) for e in errors} == {
        "model": (2, "model", "model_not_found"),
        "field": (4, "colour", "unknown_parameter"),
        "long": (5, "messages", "context_length_exceeded"),
        "range": (6, "temperature", "invalid_value"),
    }


def test_every_url_of_a_line_is_a_route() -> None:
    assert set(URLS) == set(ROUTES) - {"/v1/responses"}


def test_decisions_are_answered_beside_chats_and_resumed(tmp_path: Path) -> None:
    records = [decision(f"d{n}", f"mail number {n}") for n in range(12)] + [chat("c", "hello")]
    records += [decision("seed", "hello", seed=3), decision("other", "hello", model="another")]
    source, output = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    with serving(FakeLlama(fail_at={12: DecodeFailed("fatal")})) as served, pytest.raises(EngineDown):
        run(source, output, served)
    n_before = len(output.read_text().splitlines())
    assert 0 < n_before < 13
    with serving(FakeLlama()) as served:
        counts = run(source, output, served)
    assert (counts.skipped, counts.answered, counts.failed) == (n_before, 13 - n_before, 2)
    answered = bodies(output)
    assert answered.keys() == {*(f"d{n}" for n in range(12)), "c"}
    [answer] = answered["d3"]["answers"]
    assert [item["value"] for item in answer["probabilities"]] == ["spam", "spamassassin", "fork"]
    assert sum(item["probability"] for item in answer["probabilities"]) == pytest.approx(1)
    errors = map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())
    assert {(e["custom_id"], reason(e)["param"]) for e in errors} == {("seed", "seed"), ("other", "model")}


def test_the_tokens_of_decisions_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [decision("a", "a mail of some length"), decision("b", "another")])
    with serving(FakeLlama()) as served:
        counts = run(source, tmp_path / "out.jsonl", served)
    usages = [body["usage"] for body in bodies(tmp_path / "out.jsonl").values()]
    assert counts.prompt_tokens == sum(usage["input_tokens"] for usage in usages) > 0
    assert counts.completion_tokens == sum(usage["output_tokens"] for usage in usages) > 0
    assert counts.cached_tokens == sum(usage["input_tokens_details"]["cached_tokens"] for usage in usages)


def test_many_choices_wait_for_room_and_are_answered(tmp_path: Path) -> None:
    records = [chat(f"r{n}", f"hello {n}", n=3, max_tokens=2) for n in range(12)]
    with serving(FakeLlama(), queue=2) as served:
        counts = run(write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", served)
    assert (counts.answered, counts.failed) == (12, 0)
    assert all(len(body["choices"]) == 3 for body in bodies(tmp_path / "out.jsonl").values())


def test_a_broken_engine_stops_the_run_and_the_next_one_finishes_it(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with serving(FakeLlama(fail_at={25: DecodeFailed("fatal")})) as served, pytest.raises(EngineDown):
        run(source, output, served)
    before = bodies(output)
    assert 0 < len(before) < 30
    with serving(FakeLlama()) as served:
        counts = run(source, output, served)
    assert (counts.skipped, counts.answered, counts.failed) == (len(before), 30 - len(before), 0)
    with serving(FakeLlama()) as served:
        run(source, tmp_path / "whole.jsonl", served)
    assert choices(output) == choices(tmp_path / "whole.jsonl")


def test_a_cancelled_run_frees_the_engine(source: Path, tmp_path: Path) -> None:
    async def cancel_soon(served: ServedModel) -> None:
        job = BatchJob(source, tmp_path / "out.jsonl", served.name, "0", WINDOW)

        def on_progress(counts: BatchCounts) -> None:
            if counts.answered == 5:
                task.cancel()

        with open_files(job) as files:
            run = BatchRun(job, files, EngineAnswerer(served), on_progress)
            task = asyncio.create_task(run.run())
            with pytest.raises(asyncio.CancelledError):
                await task
        await served.supervisor.drain(30)

    with serving(FakeLlama()) as served:
        asyncio.run(cancel_soon(served))
        assert served.supervisor.live == 0
    assert (served.supervisor.stats().running, served.supervisor.stats().waiting) == (0, 0)
