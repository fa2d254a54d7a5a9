"""`deskside bench soak`: a server under twice its capacity in clients, with kills of its engine, until it is idle.

The load is closed: every client sends its next request when the last one has ended, so the number of clients bounds the
open requests.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import typer
from pydantic import Field

from benchmarks.load.servers import RunningServer, free_port, read_counters, recipe_file, serve_command, serving
from benchmarks.load.workload import labels_of, read_examples
from benchmarks.record import now_text, results_file, save_json, this_machine
from models.common.console import NamedProgress, page, show_progress
from models.common.options import JsonOption, with_options
from models.common.record import Record
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store

from .checks import SNAPSHOTS, EngineKill, MemorySample, SoakCheck, SoakRun, check, kill_engine, sample_memory
from .client import TIMEOUT_S, RequestOutcome, SoakClient

MEMORY_EVERY_S = 5.0
CANARY_EVERY_S = 5.0
CANARY_AGAIN_S = 0.1
# As Retry-After asks.
REFUSED_PAUSE_S = 1.0
RESTART_S = 60.0
QUIET_S = 60.0
# Shares of the load in which kills fall: the last engine's memory is then watched for half of the soak.
KILL_SHARES = (0.1, 0.45)
CANARY = "Subject: Cheap loans\n\nLowest rates ever, click here to apply now, no credit check!!!"
GAUGES = tuple(f"deskside_{name}" for name in ("live", "running", "waiting", "kv_cells_used", "kv_cells_total"))
FAILED = 1
MARKS = {True: "ok", False: "FAILED", None: "not checked"}


class SoakSettings(Record):
    """The options of `deskside bench soak`."""

    minutes: float = Field(default=30.0, gt=0, description="Length of the load.")
    model: str = Field(default=DEFAULT_MODEL, description="The model that is served.")
    slots: int = Field(default=8, ge=1, description="Answers the server writes at the same time.")
    queue: int = Field(default=8, ge=1, description="Answers that may wait; small, so that the server must refuse.")
    overload: float = Field(default=2.0, gt=1, description="Clients as a multiple of slots and queue.")
    kills: int = Field(default=2, ge=0, description="kill -9 of the engine's process, at random times.")
    seed: int = Field(default=0, description="Seed of the requests and of the times of the kills.")
    out: Path | None = Field(default=None, description="JSON file (default: results/soak-<time>.json).")


@with_options(settings=SoakSettings)
def soak_command(settings: SoakSettings, as_json: JsonOption = False) -> None:
    """Load a server at twice its capacity, with disconnects, bad requests and kills of its engine, and check it."""
    out = settings.out or results_file("soak")
    with show_progress() as progress:
        run = soak(settings, out.with_suffix(".log"), progress)
    checks = check(run)
    shown = [line.model_dump(mode="json") for line in checks]
    save_json(out, run.model_dump(mode="json") | {"checks": shown})
    if as_json:
        print(json.dumps({"checks": shown, "out": str(out)}, ensure_ascii=False, indent=2))
    else:
        _print(run, checks)
    print(f"all outcomes: {out}; the server's own output: {out.with_suffix('.log')}", file=sys.stderr)
    if any(line.passed is False for line in checks):
        raise typer.Exit(FAILED)


def soak(settings: SoakSettings, log: Path, progress: NamedProgress) -> SoakRun:
    """Start a server, load and watch it, return the record. Raises ServerFailed when the server does not start."""
    port = free_port()
    stored = Store().resolve(settings.model)
    flags = ["--slots", str(settings.slots), "--queue", str(settings.queue)]
    command = serve_command(str(stored.folder if stored.manifest else stored.gguf), port, flags)
    log.parent.mkdir(parents=True, exist_ok=True)
    with serving(command, port, log_file=log) as server:
        return asyncio.run(_Soak(settings, server, progress).run())


class _Soak:
    """One soak against a running server."""

    def __init__(self, settings: SoakSettings, server: RunningServer, progress: NamedProgress) -> None:
        self._settings = settings
        self._server = server
        self._progress = progress
        self._load_s = 60 * settings.minutes
        self._outcomes: list[RequestOutcome] = []
        self._kills: list[EngineKill] = []
        self._memory: list[MemorySample] = []
        self._canaries: list[str] = []
        self._canary_body: dict[str, object] = {"messages": [{"role": "user", "content": CANARY}], "temperature": 0}
        self._began = 0.0

    async def run(self) -> SoakRun:
        given = self._settings
        examples = read_examples(recipe_file("data", "test.jsonl.gz"))
        mails, labels = [example.text for example in examples], labels_of(examples)
        capacity = given.slots + given.queue
        count = round(given.overload * capacity)
        # A server may close an idle connection at the moment it is used again: that would count as a lost request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        started = now_text()
        url = self._server.base_url
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as http:
            self._canary_body["choice"] = list(labels)
            self._began = asyncio.get_running_loop().time()
            await self._ask_canary(http)
            clients = [SoakClient(http, mails, labels, given.seed * 1000 + number) for number in range(count)]
            async with asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(self._user(client))
                group.create_task(self._watch(http))
                group.create_task(self._canary(http))
                group.create_task(self._killer(http))
            gauges, ready = await self._quiet(http)
            await self._ask_canary(http)
        return SoakRun(
            started_at=started, machine=this_machine(), model=given.model, minutes=given.minutes, seed=given.seed,
            clients=count, capacity=capacity, wanted_kills=given.kills, load_s=self._load_s,
            outcomes=tuple(self._outcomes), kills=tuple(self._kills), memory=tuple(self._memory),
            canaries=tuple(self._canaries), gauges=gauges, ready_at_end=ready,
        )  # fmt: skip

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    async def _user(self, client: SoakClient) -> None:
        while self._now() < self._load_s:
            outcome = await client.send(self._began)
            self._outcomes.append(outcome)
            if outcome.end == "refused":
                await asyncio.sleep(REFUSED_PAUSE_S)

    async def _watch(self, http: httpx.AsyncClient) -> None:
        assert self._server.pid is not None
        while self._now() < self._load_s:
            held = (await self._gauges(http, SNAPSHOTS)).get(SNAPSHOTS, 0.0)
            self._memory.append(sample_memory(self._server.pid, self._now(), held))
            self._progress("soak, seconds", int(self._now()), int(self._load_s))
            await asyncio.sleep(MEMORY_EVERY_S)
        self._progress("soak, seconds", int(self._load_s), int(self._load_s))

    async def _canary(self, http: httpx.AsyncClient) -> None:
        while self._now() < self._load_s:
            answered = await self._ask_canary(http)
            await asyncio.sleep(CANARY_EVERY_S if answered else CANARY_AGAIN_S)

    async def _ask_canary(self, http: httpx.AsyncClient) -> bool:
        """Send the fixed request; True when it was answered. A refusal or a kill is no fault, a lost request is."""
        began = self._now()
        try:
            response = await http.post("/chat/completions", json=self._canary_body)
        except httpx.HTTPError as error:
            detail = f"{type(error).__name__}: {error}"
            lost = RequestOutcome(
                kind="canary", started_s=began, ended_s=self._now(), end="broken", accepted=True, detail=detail
            )
            self._outcomes.append(lost)
            return False
        if response.status_code == 200:
            self._canaries.append(str(response.json()["choices"][0]["message"]["content"]))
        return response.status_code == 200

    async def _killer(self, http: httpx.AsyncClient) -> None:
        chance = random.Random(self._settings.seed)
        times = sorted(chance.uniform(*KILL_SHARES) * self._load_s for _ in range(self._settings.kills))
        for time_s in times:
            await asyncio.sleep(max(0.0, time_s - self._now()))
            assert self._server.pid is not None
            killed = kill_engine(self._server.pid)
            if killed is None:
                return
            at_s = self._now()
            self._kills.append(EngineKill(at_s=at_s, pid=killed, ready_after_s=await self._ready_after(http, at_s)))

    async def _ready_after(self, http: httpx.AsyncClient, at_s: float) -> float | None:
        """Seconds until /health is ready again after a "not ready", or after a second without one."""
        seen_down = False
        while (waited := self._now() - at_s) < RESTART_S:
            ready = (await http.get(self._root("/health"))).status_code == 200
            seen_down = seen_down or not ready
            if ready and (seen_down or waited > 1.0):
                return waited
            await asyncio.sleep(0.1)
        return None

    async def _quiet(self, http: httpx.AsyncClient) -> tuple[dict[str, float], bool]:
        """The gauges once no request is live, or after QUIET_S; and the server's readiness."""
        deadline = self._now() + QUIET_S
        while True:
            gauges = await self._gauges(http, *GAUGES)
            if not gauges.get("deskside_live", 0.0) + gauges.get("deskside_running", 0.0) or self._now() > deadline:
                return gauges, (await http.get(self._root("/health"))).status_code == 200
            await asyncio.sleep(0.5)

    async def _gauges(self, http: httpx.AsyncClient, *names: str) -> dict[str, float]:
        return read_counters((await http.get(self._root("/metrics"))).text, names)

    def _root(self, path: str) -> str:
        return self._server.base_url.removesuffix("/v1") + path


def _print(run: SoakRun, checks: Sequence[SoakCheck]) -> None:
    out = page()
    for line in checks:
        out.print(f"{MARKS[line.passed]:<12}{line.name}: {line.found}")
    clients = f"{run.clients} clients at a capacity of {run.capacity}"
    out.print(f"{run.model}, {run.minutes:g} minutes, {clients}, seed {run.seed}")
    kinds = Counter((outcome.kind, outcome.end) for outcome in run.outcomes)
    for kind in sorted({kind for kind, _ in kinds}):
        ends = ", ".join(f"{number} {end}" for (name, end), number in sorted(kinds.items()) if name == kind)
        out.print(f"  {kind}: {ends}")
