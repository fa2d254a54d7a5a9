"""The hosted baseline without an account: a local server that replays the recorded latencies of a hosted API.

It replays *when* answers arrived and nothing else. Its text is the word "replayed", so accuracy is not measured; the
recording holds whole-call times, so the split into TTFT and TPOT is not known.
"""

import asyncio
import csv
import json
import math
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks.errors import BadWorkload, ServerFailed

RECORDINGS = Path(__file__).parents[1] / "data" / "hosted_latency.csv"
START_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Recording:
    """Recorded whole-call latency quantiles `(probability, ms)`, rising, of one hosted model and task."""

    task: str
    model: str
    host: str
    n_requests: int
    quantiles_ms: tuple[tuple[float, float], ...]
    workload: str
    source: str
    date: str

    def latency_ms(self, probability: float) -> float:
        """The quantile function at `probability` in (0, 1): log-latency linear in the normal score between knots.

        Below the recorded median nothing is known; the slope from p50 to p90 is continued there (a log-normal lower
        half: an assumption). Above the last knot the latency is the recorded maximum.
        """
        knots = [(NormalDist().inv_cdf(p), math.log(ms)) for p, ms in self.quantiles_ms]
        z = min(NormalDist().inv_cdf(probability), knots[-1][0])
        upper = next(i for i in range(1, len(knots)) if z <= knots[i][0])
        (z0, log0), (z1, log1) = knots[upper - 1], knots[upper]
        return math.exp(log0 + (z - z0) * (log1 - log0) / (z1 - z0))


def load_recording(task: str = "classification", path: Path = RECORDINGS) -> Recording:
    """Read the recording of `task`. Raises BadWorkload with the recorded tasks."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    if task not in rows:
        raise BadWorkload(f"no recorded hosted latency for task {task!r}; there is {sorted(rows)}")
    row = rows[task]
    n = int(row["n_requests"])
    quantiles = [(p, float(row[name])) for p, name in ((0.5, "p50_ms"), (0.9, "p90_ms"), (0.95, "p95_ms"))]
    quantiles += [(0.99, float(row["p99_ms"])), (1 - 1 / n, float(row["max_ms"]))]
    facts = {name: row[name] for name in ("task", "model", "host", "workload", "source", "date")}
    return Recording(n_requests=n, quantiles_ms=tuple(quantiles), **facts)


def replay_app(recording: Recording, seed: int) -> Starlette:
    """The server: `/v1/models` and streamed `/v1/chat/completions`, each answer after a drawn latency."""
    chance = random.Random(seed)
    model = replayed_model(recording)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model"}]})

    async def chat(request: Request) -> Response:
        began = time.perf_counter()
        try:
            if not json.loads(await _read(request)).get("stream"):
                raise ValueError("expected a JSON object with stream: true")
        except (ValueError, AttributeError, ClientDisconnect) as error:
            return _refusal(400, f"the replay server streams only: {error}")
        latency_s = recording.latency_ms(chance.random() or 0.5) / 1000
        await asyncio.sleep(max(0.0, began + latency_s - time.perf_counter()))
        choices = [{"index": 0, "delta": {"content": "replayed"}, "finish_reason": None}]
        ending = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        events = [{"id": "replayed", "model": model, "choices": part} for part in (choices, ending)]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return Response(text, media_type="text/event-stream")

    async def missing(request: Request, error: Exception) -> Response:
        return _refusal(404, f"the replay server has no {request.method} {request.url.path!r}")

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={404: missing, 405: missing})


def replayed_model(recording: Recording) -> str:
    """The name under which the server offers the recorded model."""
    return f"replayed:{recording.model}"


async def _read(request: Request) -> bytes:
    """The request's body. Raises ValueError when it is larger than MAX_BODY_BYTES."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"the body exceeds {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _refusal(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status)


@contextmanager
def replaying(recording: Recording, seed: int) -> Iterator[tuple[str, str]]:
    """Run the replay server on a free local port; yields its base URL (`…/v1`) and its model's name.

    A thread and an event loop of its own keep the client's work from delaying its answers.
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = replay_app(recording, seed)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="replay", daemon=True)
    thread.start()
    try:
        deadline = time.perf_counter() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.perf_counter() > deadline:
                raise ServerFailed("the replay server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1", replayed_model(recording)
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT_S)
        listener.close()
