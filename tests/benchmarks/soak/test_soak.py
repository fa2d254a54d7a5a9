"""The soak's accounting: what counts as an end, what the checks let pass, and one small soak of a stand-in server."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
import pytest

from benchmarks.load.servers import PROC, children, resident_bytes
from benchmarks.soak.checks import EngineKill, MemorySample, SoakCheck, SoakRun, check, engine_of, sample_memory
from benchmarks.soak.client import KINDS, RequestOutcome, SoakClient, StreamAccount
from tests.support.benchmarks.peer_examples import MACHINE
from tests.support.benchmarks.stand_in import Send, read_json, running

DONE = b"data: [DONE]\n\n"
MIB = 1 << 20


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


FINISH = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
TEXT = event(choices=[{"index": 0, "delta": {"content": "x"}}])
FAULT = event(error={"message": "the engine died"})


@pytest.mark.parametrize(
    ("stream", "end", "detail"),
    [
        (TEXT + FINISH + DONE, "answered", ""),
        (TEXT + FAULT, "failed", "error event"),
        (FAULT, "failed", "error event"),
        (TEXT + FINISH, "broken", "no single terminal event"),
        (TEXT, "broken", "no single terminal event"),
        (b"", "broken", "no single terminal event"),
        (TEXT + DONE, "broken", "no single terminal event"),
        (TEXT + FINISH + FINISH + DONE, "broken", "no single terminal event"),
        (TEXT + FINISH + DONE + DONE, "broken", "after the end"),
        (TEXT + FAULT + DONE, "broken", "after the end"),
        (TEXT + FINISH + DONE + TEXT, "broken", "after the end"),
    ],
)
def test_a_stream_has_exactly_one_end(stream: bytes, end: str, detail: str) -> None:
    account = StreamAccount()
    for data in stream.decode().split("\n\n")[:-1]:
        account.take(data.removeprefix("data: "))
    found, why = account.verdict()
    assert found == end
    assert detail in why


class Server:
    """Answers every request as `answer(path, body)` says: a status and the bytes of the body."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], tuple[int, bytes]]) -> None:
        self.answer = answer
        self.seen = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        try:
            body = await read_json(receive)
        except ValueError:
            body = {}
        self.seen += 1
        status, data = self.answer(scope["path"], body)
        kind = b"text/event-stream" if body.get("stream") and status == 200 else b"application/json"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": data})


def good(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    text = body.get("messages", [{}])[-1:] or [{}]
    if "mail" not in str(text[0].get("content", "") or body.get("prompt", "") or body.get("input", "")):
        return 400, b'{"error": {"message": "no"}}'
    if body.get("stream"):
        return 200, TEXT * 3 + FINISH + DONE
    return 200, b'{"choices": [{}], "answers": [{}]}'


def outcomes(answer: Callable[[str, dict[str, Any]], tuple[int, bytes]], count: int) -> list[RequestOutcome]:
    async def ask(url: str) -> list[RequestOutcome]:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            client = SoakClient(http, ["a mail"], ("ham", "spam"), seed=3)
            return [await client.send(0.0) for _ in range(count)]

    with running(Server(answer)) as url:
        return asyncio.run(ask(url))


def test_a_good_server_breaks_nothing_and_every_kind_is_drawn() -> None:
    found = outcomes(good, 90)
    assert [outcome for outcome in found if outcome.end in ("broken", "failed", "refused")] == []
    assert {outcome.kind for outcome in found} == set(KINDS)
    assert {o.end for o in found if o.kind == "bad"} == {"rejected"}
    assert {o.end for o in found if o.kind == "leave in decode"} <= {"left", "answered"}


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (lambda path, body: (429, b'{"error": {"message": "full"}}'), "refused"),
        (lambda path, body: (503, b'{"error": {"message": "down", "code": "engine_down"}}'), "failed"),
        (lambda path, body: (500, b"oops"), "broken"),
        (lambda path, body: (500, b"{}"), "broken"),
        (lambda path, body: (200, b"{}"), "broken"),
    ],
)
def test_what_is_no_answer_is_named(answer: Callable[[str, dict[str, Any]], tuple[int, bytes]], end: str) -> None:
    assert {outcome.end for outcome in outcomes(answer, 20) if outcome.kind != "leave in prefill"} == {end}


def outcome(end: Any = "answered", started: float = 0.0, ended: float = 1.0) -> RequestOutcome:
    return RequestOutcome(kind="chat", started_s=started, ended_s=ended, end=end, accepted=True, detail="why")


def memory(growth: float, *, seconds: int = 600, engine: int | None = None) -> tuple[MemorySample, ...]:
    """A server of 500 MiB that grows by `growth` MiB over the whole time."""
    return tuple(
        MemorySample(
            at_s=t, server_bytes=int((500 + growth * t / seconds) * MIB), engine_pid=engine, engine_bytes=500 * MIB
        )
        for t in range(0, seconds, 5)
    )


def soaked(**changes: Any) -> SoakRun:
    gauges = {f"deskside_{name}": 0.0 for name in ("live", "running", "waiting")}
    gauges |= {"deskside_kv_cells_used": 2048.0, "deskside_kv_cells_total": 8192.0}
    facts: dict[str, Any] = {
        "started_at": "now", "machine": MACHINE, "model": "m", "minutes": 10, "seed": 0, "clients": 32, "capacity": 16,
        "wanted_kills": 0, "load_s": 600, "outcomes": (outcome(), outcome("refused")), "kills": (),
        "memory": memory(0), "canaries": ("spam", "spam"), "gauges": gauges, "ready_at_end": True,
    }  # fmt: skip
    return SoakRun.model_validate(facts | changes)


def failing(run: SoakRun) -> list[str]:
    return [line.name for line in check(run) if line.passed is False]


def test_a_clean_soak_passes() -> None:
    assert failing(soaked()) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"outcomes": (outcome(), outcome("refused"), outcome("broken"))}, "every request ended exactly once"),
        ({"outcomes": (outcome("refused"), outcome("failed"))}, "requests fail only around a kill"),
        ({"outcomes": (outcome(),)}, "the overload was real: some requests met a full queue"),
        ({"canaries": ("spam", "ham")}, "a fixed request keeps its answer"),
        ({"canaries": ()}, "a fixed request keeps its answer"),
        ({"memory": memory(80)}, "resident memory of the server is flat"),
        ({"ready_at_end": False}, "the server is ready at the end"),
        ({"gauges": {"deskside_live": 1.0, "deskside_running": 0.0, "deskside_waiting": 0.0,
                     "deskside_kv_cells_used": 1.0, "deskside_kv_cells_total": 8.0}},
         "nothing is left running or waiting"),
        ({"gauges": {"deskside_live": 0.0, "deskside_running": 0.0, "deskside_waiting": 0.0,
                     "deskside_kv_cells_used": 3.0, "deskside_kv_cells_total": 8.0}},
         "KV cells are free but for idle prefixes (at most a quarter)"),
        ({"wanted_kills": 1, "kills": (EngineKill(at_s=1, pid=2, ready_after_s=None),)},
         "the engine comes back after kill -9"),
    ],
)  # fmt: skip
def test_each_fault_fails_its_check(changes: dict[str, Any], name: str) -> None:
    assert failing(soaked(**changes)) == [name]


def test_requests_may_fail_around_a_kill() -> None:
    kills = (EngineKill(at_s=100, pid=2, ready_after_s=2.0),)
    near = (outcome("refused"), outcome("failed", 90, 101), outcome("failed", 110, 111))
    assert failing(soaked(outcomes=near, kills=kills, wanted_kills=1)) == []
    far = (*near, outcome("failed", 200, 201), outcome("failed", 10, 20))
    assert failing(soaked(outcomes=far, kills=kills, wanted_kills=1)) == ["requests fail only around a kill"]


def test_the_engines_memory_is_judged_since_its_last_start() -> None:
    before = [m.model_copy(update={"engine_pid": 7, "engine_bytes": 900 * MIB}) for m in memory(0)[:40]]
    after = [m.model_copy(update={"engine_pid": 8}) for m in memory(0)[40:]]
    assert failing(soaked(memory=(*before, *after))) == []
    growing = [m.model_copy(update={"engine_bytes": int((500 + m.at_s / 2) * MIB)}) for m in after]
    name = "resident memory of the engine (since its last start, snapshots left out) is flat"
    assert failing(soaked(memory=(*before, *growing))) == [name]
    filling = [m.model_copy(update={"snapshot_bytes": m.engine_bytes - 400.0 * MIB}) for m in growing]
    assert failing(soaked(memory=(*before, *filling))) == []


def test_a_kill_that_could_not_be_tried_is_not_a_pass() -> None:
    lines: dict[str, SoakCheck] = {line.name: line for line in check(soaked(wanted_kills=2))}
    assert lines["the engine comes back after kill -9"].passed is None


HOLD = "import sys; held = bytearray(int(sys.argv[1]) << 20); print(flush=True); sys.stdin.read()"
PARENT = f"""
import subprocess, sys
def start(mib):
    command = [sys.executable, "-c", {HOLD!r}, mib]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
engine, small = start(sys.argv[1]), start("1")
engine.stdout.readline(), small.stdout.readline()
print(engine.pid, small.pid, flush=True)
sys.stdin.read()
engine.communicate(), small.communicate()
"""


@pytest.mark.skipif(not PROC.exists(), reason="this system has no /proc")
@pytest.mark.parametrize("engine_mib", [90, 1])
def test_the_engine_is_the_servers_largest_child_and_more_than_a_bare_interpreter(engine_mib: int) -> None:
    command = [sys.executable, "-c", PARENT, str(engine_mib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        engine, small = map(int, server.stdout.readline().split())
        assert children(server.pid) == sorted((engine, small))
        seen = sample_memory(server.pid, 4.0)
        assert engine_of(engine) is None, "it has no child"
        server.communicate()
    assert seen.server_bytes > MIB
    if engine_mib > 64:
        assert seen.engine_pid == engine
        assert seen.engine_bytes > engine_mib * MIB
    else:
        assert (seen.engine_pid, seen.engine_bytes) == (None, 0)
    assert (resident_bytes(engine), children(server.pid)) == (0, [])
