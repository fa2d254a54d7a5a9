"""What of a streamed answer goes out together."""

import asyncio
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from runtime.openai.answer import TextAnswer, TextCall
from runtime.requests import Event, Finished, Request, SamplingParams, TextDelta, Usage
from runtime.server.stream import ServerSentEvents, encode
from runtime.serving.call import Call
from runtime.worker.inflight import Stream

REQUEST = Request("c-0", (1, 2), SamplingParams(max_tokens=3))
CHAT = TextCall("c", "chat", "toy", 0, "f", (REQUEST,), 1, stream=True, include_usage=True)
CALL = Call("c", (REQUEST,), partial(TextAnswer, CHAT), streams=True)
STEPS: tuple[tuple[Event, ...], ...] = (
    (TextDelta("c-0", "he", (3,)),),
    (TextDelta("c-0", "llo", (4,)), Finished("c-0", "stop", Usage(2, 0, 3))),
)


async def bodies(steps: Sequence[Sequence[Event]]) -> list[bytes]:
    """The pieces sent when the events of a step arrive together, and each step after the last was sent."""
    stream = Stream(["c-0"], lambda _: None)
    left, sent, gone = list(steps), list[bytes](), asyncio.Event()

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.extend([message["body"]] if "body" in message else [])
        for event in left.pop(0) if left else ():
            stream.put(event)

    await ServerSentEvents(CALL, stream)({"type": "http"}, receive, send)
    return sent


def test_the_events_of_a_step_are_sent_in_one_piece_and_none_waits_for_the_next_step() -> None:
    first, second = asyncio.run(bodies(STEPS))
    assert first.count(b"data: ") == 2  # who speaks, and the first text
    assert b'"content":"he"' in first
    assert second.count(b"data: ") == 4  # text, why it ended, usage, [DONE]
    assert second.endswith(b"data: [DONE]\n\n")
    opening, *_ = asyncio.run(bodies(((), *STEPS)))
    assert opening.count(b"data: ") == 1
    assert b'"role":"assistant"' in opening


# What `str.splitlines` ends a line at: Python's clients, and others that split by Unicode.
SEPARATORS = [chr(code) for code in range(sys.maxunicode + 1) if len(f"a{chr(code)}b".splitlines()) > 1]


def test_no_reader_takes_a_character_of_an_answer_for_the_end_of_a_line() -> None:
    text = "".join(f"a{separator}" for separator in SEPARATORS) + "ü\U0001f600"
    steps: tuple[tuple[Event, ...], ...] = ((TextDelta("c-0", text, (3,)), Finished("c-0", "stop", Usage(2, 0, 1))),)
    sent = b"".join(asyncio.run(bodies(steps))).decode()
    events = [json.loads(line[6:]) for line in sent.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]) == text
    assert "ü\U0001f600" in sent, "other characters stay as they are"
    assert len(encode({"text": text}).decode().splitlines()) == 1
