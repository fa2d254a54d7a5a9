"""An OpenAI-compatible server for tests: streams an answer for each prompt, or the fault that the prompt names."""

import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import uvicorn

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Any, Send], Awaitable[None]]


class StandIn:
    """Answers every prompt with `answer(prompt)`, one chunk a character; keeps the bodies and where they came from.

    A prompt that holds one of these words gets that fault: `HTTP500`, `DROP` (the connection breaks mid-stream),
    `ERROREVENT`, `NOFINISH`, `GARBAGE`. The first `n_refused` requests get HTTP 429 with Retry-After 7. A decision's
    choices have the probabilities `chances(prompt)`, else none.
    """

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.clients: list[tuple[str, int]] = []
        self.gets = 0
        self.n_refused = 0
        self.chances: Callable[[str], dict[str, float]] | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        """Answer one request."""
        if scope["method"] == "GET":
            self.gets += 1
            pages = {"/metrics": f"deskside_steps_total {self.gets}\n".encode(), "/health": b'{"restarts": 1}'}
            page = pages.get(scope["path"], b'{"data": [{"id": "stand-in"}]}')
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": page})
            return
        request = await read_json(receive)
        self.bodies.append(request)
        self.paths.append(scope["path"])
        self.headers.append(dict(scope["headers"]))
        self.clients.append(tuple(scope["client"]))
        if self.n_refused:
            self.n_refused -= 1
            await send({"type": "http.response.start", "status": 429, "headers": [(b"retry-after", b"7")]})
            await send({"type": "http.response.body", "body": b"slow down"})
            return
        if scope["path"].endswith("/decisions"):
            await self._decide(str(request["input"]), send)
            return
        chat = scope["path"].endswith("/chat/completions")
        prompt = request["messages"][-1]["content"] if chat else request["prompt"]
        if "HTTP500" in prompt:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "broken"}}'})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for event in self._events(prompt, chat=chat):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if "DROP" in prompt:
            raise ConnectionAbortedError("the stand-in drops the connection")
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _decide(self, prompt: str, send: Send) -> None:
        broken = "HTTP500" in prompt
        first: dict[str, Any] = {"choice": self.answer(prompt)}
        if self.chances is not None:
            shares = self.chances(prompt)
            first = {"choice": max(shares, key=shares.__getitem__)}
            first["probabilities"] = [{"value": label, "probability": share} for label, share in shares.items()]
        answer = {"answers": [first], "usage": {"input_tokens": 7, "output_tokens": 1}}
        await send({"type": "http.response.start", "status": 500 if broken else 200, "headers": []})
        await send({"type": "http.response.body", "body": b"broken" if broken else json.dumps(answer).encode()})

    def _events(self, prompt: str, *, chat: bool) -> Iterator[bytes]:
        text = self.answer(prompt)
        for character in text:
            yield _event({"choices": [{"delta": {"content": character}} if chat else {"text": character}]})
        if "ERROREVENT" in prompt:
            yield _event({"error": {"message": "the engine died"}})
        elif "GARBAGE" in prompt:
            yield b"data: {not json\n\n"
        elif "NOFINISH" not in prompt and "DROP" not in prompt:
            yield _event({"choices": [{"delta": {}, "text": "", "finish_reason": "stop"}]})
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text) + 1}
            yield _event({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 3}}})


async def read_json(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> dict[str, Any]:
    """The JSON object that a request's body holds."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return dict(json.loads(body))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextmanager
def running(app: App) -> Iterator[str]:
    """Run the stand-in on a free local port; yields its base URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "the stand-in did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(20)
