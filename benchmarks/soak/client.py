"""The soak's clients: requests of many kinds, each checked to its last event.

An accepted request has exactly one end. Streaming: one `[DONE]`, or one error event, or this client disconnects. Not
streaming: one whole response. Everything else is `broken`, with the reason in the detail.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Literal

import httpx

from benchmarks.load.client import sse_events
from models.common.record import Record

End = Literal["answered", "refused", "rejected", "failed", "left", "broken"]
TIMEOUT_S = 180.0
REPLY_TOKENS = 48
SLOW_READ_S = 0.2
# Kind of request -> its weight in the draw.
KINDS = {
    "chat": 3,
    "chat stream": 3,
    "choice": 2,
    "decisions": 2,
    "completion stream": 2,
    "leave in prefill": 2,
    "leave in decode": 2,
    "slow reader": 1,
    "bad": 2,
}
BAD: tuple[tuple[str, bytes], ...] = (
    ("/chat/completions", b"{not json"),
    ("/chat/completions", b"[]"),
    ("/chat/completions", b'{"messages": []}'),
    ("/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}'),
    ("/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "no_such_field": 1}'),
    ("/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000}'),
    ("/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}'),
    ("/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "grammar": "start: %%%"}'),
    ("/chat/completions", b'{"messages": [{"role": "user", "content": "' + b"long " * 20000 + b'"}]}'),
    ("/chat/completions", b'{"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]}'),
    ("/completions", b'{"prompt": 5}'),
    ("/decisions", b'{"input": "x", "questions": []}'),
    ("/no/such/route", b"{}"),
)


class RequestOutcome(Record):
    """The end of one request. `accepted`: the server answered 200, or the client disconnected before the status."""

    kind: str
    started_s: float
    ended_s: float
    end: End
    accepted: bool
    detail: str = ""


class StreamAccount:
    """Counts the terminal events of one stream."""

    def __init__(self) -> None:
        self.deltas = self.done = self.errors = self.after_end = 0
        self.finished: dict[int, int] = {}

    def take(self, data: str) -> None:
        """Count one event. Raises ValueError when it is neither `[DONE]` nor JSON."""
        if self.done or self.errors:
            self.after_end += 1
        if data == "[DONE]":
            self.done += 1
            return
        event = json.loads(data)
        if event.get("error"):
            self.errors += 1
        for choice in event.get("choices") or ():
            self.deltas += 1
            if choice.get("finish_reason"):
                index = int(choice.get("index", 0))
                self.finished[index] = self.finished.get(index, 0) + 1

    def verdict(self) -> tuple[End, str]:
        """The end of a stream that the server has closed, and why it is broken."""
        counts = f"{self.done} [DONE], {self.errors} error events, finish reasons {self.finished}"
        if self.after_end:
            return "broken", f"{self.after_end} events after the end: {counts}"
        if (self.done, self.errors) == (0, 1):
            return "failed", "error event"
        if (self.done, self.errors) == (1, 0) and self.finished and set(self.finished.values()) == {1}:
            return "answered", ""
        return "broken", f"no single terminal event: {counts}"


class SoakClient:
    """One user: draws a kind of request and a mail, sends it, and records its end."""

    def __init__(self, http: httpx.AsyncClient, mails: list[str], labels: tuple[str, ...], seed: int) -> None:
        self._http = http
        self._mails = mails
        self._labels = labels
        self._chance = random.Random(seed)

    async def send(self, began: float) -> RequestOutcome:
        """Send one request. `began` is the event loop's time at the start of the soak."""
        kind = self._chance.choices(list(KINDS), list(KINDS.values()))[0]
        started = asyncio.get_running_loop().time() - began
        try:
            async with asyncio.timeout(TIMEOUT_S):
                end, accepted, detail = await self._send(kind)
        except TimeoutError:
            end, accepted, detail = "broken", True, f"no end within {TIMEOUT_S:g} s"
        except (httpx.HTTPError, ValueError, KeyError) as error:
            end, accepted, detail = "broken", True, f"{type(error).__name__}: {error}"[:200]
        ended = asyncio.get_running_loop().time() - began
        return RequestOutcome(kind=kind, started_s=started, ended_s=ended, end=end, accepted=accepted, detail=detail)

    async def _send(self, kind: str) -> tuple[End, bool, str]:
        if kind == "bad":
            return await self._bad()
        if kind in ("chat", "choice", "decisions"):
            return await self._whole(kind)
        if kind == "leave in prefill":
            return await self._leave_early()
        return await self._stream(kind)

    def _body(self, kind: str) -> tuple[str, dict[str, Any]]:
        mail = self._chance.choice(self._mails)
        if kind == "decisions":
            choices = [{"value": label} for label in self._labels]
            return "/decisions", {"input": mail, "questions": [_question(choices)]}
        if kind == "completion stream":
            return "/completions", {"prompt": mail, "max_tokens": REPLY_TOKENS, "stream": True}
        fields: dict[str, Any] = {"messages": [{"role": "user", "content": mail}]}
        if kind == "choice":
            fields |= {"choice": list(self._labels)}
        if kind in ("slow reader", "leave in decode", "leave in prefill"):
            fields |= {"max_tokens": REPLY_TOKENS, "ignore_eos": True}
        if kind not in ("chat", "choice"):
            fields |= {"stream": True}
        return "/chat/completions", fields

    async def _whole(self, kind: str) -> tuple[End, bool, str]:
        path, body = self._body(kind)
        response = await self._http.post(path, json=body)
        if response.status_code == 200:
            answer = response.json()
            whole = answer.get("choices") or answer.get("answers")
            return ("answered", True, "") if whole else ("broken", True, f"an answer without content: {answer!r}"[:200])
        return _refusal(response.status_code, response.json())

    async def _bad(self) -> tuple[End, bool, str]:
        path, body = self._chance.choice(BAD)
        headers = {"content-type": "application/json"}
        response = await self._http.post(path, content=body, headers=headers)
        if response.status_code == 200:
            return "broken", True, f"accepted an invalid body: {body[:80]!r}"
        end, accepted, detail = _refusal(response.status_code, response.json())
        return ("rejected", False, "") if end == "rejected" else (end, accepted, detail)

    async def _leave_early(self) -> tuple[End, bool, str]:
        path, body = self._body("leave in prefill")
        try:
            async with asyncio.timeout(self._chance.uniform(0.0, 0.3)):
                response = await self._http.post(path, json=body)
        except TimeoutError:
            return "left", True, ""
        if response.status_code == 200:
            return "answered", True, ""
        return _refusal(response.status_code, response.json())

    async def _stream(self, kind: str) -> tuple[End, bool, str]:
        path, body = self._body(kind)
        account = StreamAccount()
        pause_s = SLOW_READ_S if kind == "slow reader" else 0.0
        leave_after = self._chance.randint(1, 8) if kind == "leave in decode" else None
        async with self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                return _refusal(response.status_code, json.loads(await response.aread()))
            async with aclosing(sse_events(response, pause_s=pause_s)) as events:
                async for event in events:
                    account.take(event)
                    if leave_after is not None and account.deltas >= leave_after:
                        return "left", True, ""
        end, detail = account.verdict()
        return end, True, detail


def _question(choices: list[dict[str, str]]) -> dict[str, Any]:
    return {"type": "choice", "instructions": "Which list?", "choices": choices}


def _refusal(status: int, body: Mapping[str, Any]) -> tuple[End, bool, str]:
    """The end that an error response means. With any status it must have OpenAI's error shape."""
    error = body.get("error")
    if not isinstance(error, dict) or not error.get("message"):
        return "broken", False, f"HTTP {status} without an error object"
    if status == 429:
        return "refused", False, ""
    if status >= 500:
        return "failed", True, f"HTTP {status} {error.get('code')}"
    return "rejected", False, f"HTTP {status}: {error['message']}"[:200]
