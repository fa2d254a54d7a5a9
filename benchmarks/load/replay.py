"""The hosted baseline without an account: a local server that answers as slowly as a hosted API was recorded to.

It replays *when* answers came, and nothing else: its text is the word "replayed", so accuracy is not measured, and the
recording holds whole-call times only, so the split into first and later tokens is not known either.
"""

import asyncio
import csv
import json
import math
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import uvicorn

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

        Under the recorded median nothing is known; the slope from p50 to p90 is continued there (a log-normal lower
        half: an assumption). Above the last knot the recorded maximum is returned.
        """
        knots = [(NormalDist().inv_cdf(p), math.log(ms)) for p, ms in self.quantiles_ms]
        z = min(NormalDist().inv_cdf(probability), knots[-1][0])
        upper = next(i for i in range(1, len(knots)) if z <= knots[i][0])
        (z0, log0), (z1, log1) = knots[upper - 1], knots[upper]
        return math.exp(log0 + (z - z0) * (log1 - log0) / (z1 - z0))


def load_recording(task: str = "classification", path: Path = RECORDINGS) -> Recording:
    """The recording of `task`. Raises BadWorkload naming the tasks there are."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    if task not in rows:
        raise BadWorkload(f"no recorded hosted latency for task {task!r}; there is {sorted(rows)}")
    row = rows[task]
    n = int(row["n_requests"])
    quantiles = [(p, float(row[name])) for p, name in ((0.5, "p50_ms"), (0.9, "p90_ms"), (0.95, "p95_ms"))]
    quantiles += [(0.99, float(row["p99_ms"])), (1 - 1 / n, float(row["max_ms"]))]
    facts = {name: row[name] for name in ("task", "model", "host", "workload", "source", "date")}
    return Recording(n_requests=n, quantiles_ms=tuple(quantiles), **facts)


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ReplayApp:
    """An ASGI application: `/v1/models` and streamed `/v1/chat/completions`, each answer after a drawn latency."""

    def __init__(self, recording: Recording, seed: int) -> None:
        self._recording = recording
        self._random = random.Random(seed)
        self.model = f"replayed:{recording.model}"

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        route = (scope["method"], scope["path"])
        if route == ("GET", "/v1/models"):
            await self._json(send, 200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})
        elif route == ("POST", "/v1/chat/completions"):
            await self._chat(await _read(receive), began, send)
        else:
            await self._refuse(send, 404, f"the replay server has no {scope['method']} {scope['path']!r}")

    async def _chat(self, body: bytes | None, began: float, send: Send) -> None:
        try:
            if body is None or not json.loads(body).get("stream"):
                raise ValueError("expected a JSON object with stream: true")
        except (ValueError, AttributeError) as error:
            await self._refuse(send, 400, f"the replay server streams only: {error}")
            return
        latency_s = self._recording.latency_ms(self._random.random() or 0.5) / 1000
        await asyncio.sleep(max(0.0, began + latency_s - time.perf_counter()))
        choices = [{"index": 0, "delta": {"content": "replayed"}, "finish_reason": None}]
        ending = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        events = [{"id": "replayed", "model": self.model, "choices": part} for part in (choices, ending)]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": text.encode()})

    async def _refuse(self, send: Send, status: int, message: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        await self._json(send, status, {"error": error})

    async def _json(self, send: Send, status: int, value: dict[str, Any]) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})


async def _read(receive: Receive) -> bytes | None:
    """The request's body, or None when the client left or sent more than MAX_BODY_BYTES."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request" or len(body) > MAX_BODY_BYTES:
            return None
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


@contextmanager
def replaying(recording: Recording, seed: int) -> Iterator[tuple[str, str]]:
    """Run the replay server on a free local port; yields its base URL (`…/v1`) and its model's name.

    It has a thread and an event loop of its own, so that the client's work does not delay its answers.
    """
    app = ReplayApp(recording, seed)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="replay", daemon=True)
    thread.start()
    try:
        deadline = time.perf_counter() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.perf_counter() > deadline:
                raise ServerFailed("the replay server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1", app.model
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT_S)
        listener.close()
