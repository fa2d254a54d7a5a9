"""Every stage broken on purpose, under every kind of work, beside neighbours that are not to blame."""

import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from runtime.decoding.grammar import GrammarState
from runtime.errors import (
    BatchInvalid,
    Cancelled,
    DecodeAborted,
    DecodeFailed,
    EngineError,
    GrammarFailed,
    NoKvSlot,
    ShuttingDown,
    TokenizeFailed,
)
from tests.support.runtime.broken_stage import MARK, Heard, Kind, Outcome, Scene, alone, play
from tests.support.runtime.fakes import FAKE_TEMPLATE, FakeTokenizer
from tests.support.runtime.serving import wait_until

TEXT = f"{MARK} is what the victim says. " * 6
MESSAGES = [{"role": "user", "content": TEXT}]
WRITTEN = {"temperature": 0, "max_tokens": 24}
QUESTION = {"type": "choice", "instructions": "Which?", "choices": [{"value": "red"}, {"value": "blue"}]}
CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
KINDS = {
    "chat": Kind(CHAT, {"messages": MESSAGES, **WRITTEN}),
    "chat-stream": Kind(CHAT, {"messages": MESSAGES, **WRITTEN, "stream": True}),
    "completion": Kind(COMPLETION, {"prompt": TEXT, **WRITTEN, "n": 2}, 2),
    "response": Kind(RESPONSE, {"input": TEXT, "temperature": 0, "max_output_tokens": 24, "stream": True}),
    "decision": Kind("/v1/decisions", {"input": TEXT, "questions": [QUESTION] * 6}),
    "embedding": Kind("/v1/embeddings", {"input": [TEXT] * 3, "encoding_format": "base64"}),
}
STREAMED = ("chat-stream", "response")
# The victim's steps at which trouble comes: the first of many that compute its prompt, and a later one.
FIRST, LATER = 0, 5

each_kind = pytest.mark.parametrize("name", KINDS)
at_each_place = pytest.mark.parametrize("nth", [FIRST, LATER], ids=["first step", "later step"])


@pytest.fixture(scope="module")
def shared() -> Iterator[Scene]:
    """A scene for all troubles that a server outlives."""
    with Scene().on() as scene:
        yield scene


def refused(outcome: Outcome, status: int, code: str) -> None:
    """The call got one error and no more."""
    assert outcome.told == Heard(status, error=code)
    assert outcome.errors == []


def require_failed(outcome: Outcome, name: str, error: type[Exception]) -> None:
    """The call failed with `error`; the client was told of it once, in the stream or by the status.

    All its requests did, but those that were cancelled since nobody would be told their answers any more.
    """
    kinds = [type(error) for error in outcome.errors]
    assert len(kinds) == KINDS[name].n
    assert {error} <= set(kinds) <= {error, Cancelled}
    assert outcome.told is not None
    assert outcome.told.error is not None
    assert (outcome.told.status == 200) == (name in STREAMED)


def require_whole(outcome: Outcome, kind: Kind, script: str | None = None) -> None:
    """The call was answered as it is answered alone."""
    assert outcome.errors == [None] * kind.n
    assert outcome.told is not None
    assert outcome.told.like(alone(kind, script))


@pytest.mark.parametrize("name", ["chat", "chat-stream", "response", "decision"])
def test_a_template_that_raises(name: str) -> None:
    template = f"{{% if '{MARK}' in messages[-1]['content'] %}}{{{{ 1 // 0 }}}}{{% endif %}}{FAKE_TEMPLATE}"
    with Scene(template=template).on() as scene:
        refused(play(scene, KINDS[name], accepted=False), 500, "template_failed")


@each_kind
@pytest.mark.parametrize(
    ("error", "code"), [(TokenizeFailed("broken"), "tokenize_failed"), (ZeroDivisionError(), "internal_error")]
)
def test_a_tokenizer_that_raises(
    shared: Scene, name: str, error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = FakeTokenizer.encode

    def breaking(self: FakeTokenizer, text: str, **options: bool) -> list[int]:
        if MARK in text:
            raise error
        return encode(self, text, **options)

    monkeypatch.setattr(FakeTokenizer, "encode", breaking)
    refused(play(shared, KINDS[name], accepted=False), 500, code)


@each_kind
@at_each_place
@pytest.mark.parametrize("error", [NoKvSlot("1"), DecodeAborted("2"), BatchInvalid("-1")], ids=["1", "2", "-1"])
def test_a_decode_that_fails_once_is_done_again(shared: Scene, name: str, nth: int, error: EngineError) -> None:
    shared.arm(lambda *_: error, nth)
    require_whole(play(shared, KINDS[name]), KINDS[name])


@each_kind
@pytest.mark.parametrize("error", [NoKvSlot("1"), DecodeAborted("2"), BatchInvalid("-1")], ids=["1", "2", "-1"])
def test_decodes_that_fail_for_one_request_alone_end_that_one_alone(
    shared: Scene, name: str, error: EngineError
) -> None:
    shared.arm(lambda *_: error, LATER, lasting=True)
    require_failed(play(shared, KINDS[name]), name, type(error))


@each_kind
@at_each_place
def test_a_fatal_decode_ends_everyone_once(name: str, nth: int) -> None:
    with Scene().on() as scene:
        scene.arm(lambda *_: DecodeFailed("-3"), nth)
        outcome = play(scene, KINDS[name], unharmed=name == "embedding")
    if name == "embedding":  # its context is another one: what failed once is done again
        require_whole(outcome, KINDS[name])
    else:
        require_failed(outcome, name, DecodeFailed)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "embedding"])
def test_a_cache_that_is_full_in_the_middle_makes_the_newest_wait(
    shared: Scene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(scene: Scene, _: int) -> None:
        llama = scene.llama
        monkeypatch.setattr(llama, "cells_hidden", llama.info.n_ctx - llama.used_cells - 1)

    n_before = shared.running.supervisor.stats().preemptions_total
    shared.arm(fill, LATER)
    require_whole(play(shared, KINDS[name]), KINDS[name])
    assert shared.running.supervisor.stats().preemptions_total > n_before


@pytest.mark.parametrize("name", ["chat", "chat-stream", "completion", "response"])
def test_a_grammar_that_fails_in_mid_answer(shared: Scene, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = GrammarState.allowed
    n_asked: dict[GrammarState, int] = {}

    def breaking(self: GrammarState) -> np.ndarray:
        n_asked[self] = n_asked.get(self, 0) + 1
        if n_asked[self] == 4:
            raise GrammarFailed("broken")
        return allowed(self)

    monkeypatch.setattr(GrammarState, "allowed", breaking)
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 20}}, "required": ["a"]}
    formatted: dict[str, Any] = {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}
    grammar = formatted if name == "response" else {"regex": "[a-z]{20}"}
    shared.arm(None, 0)
    outcome = play(shared, replace(KINDS[name], body=KINDS[name].body | grammar))
    require_failed(outcome, name, GrammarFailed)
    written = [event for victim in shared.victims for event in shared.observed.events[victim][:-1]]
    assert written or name != "chat-stream"


def leave(scene: Scene, _: int = 0) -> None:
    """The victim's client goes, and the engine stands still until its owner knows."""
    scene.connection.close()
    wait_until(lambda: set(scene.victims) <= set(scene.observed.cancelled))


@each_kind
@at_each_place
def test_a_client_that_leaves_at_work(shared: Scene, name: str, nth: int) -> None:
    shared.arm(leave, nth)
    outcome = play(shared, KINDS[name], stays=False)
    assert [type(error) for error in outcome.errors] == [Cancelled] * KINDS[name].n


@each_kind
def test_a_client_that_leaves_while_it_waits(name: str) -> None:
    with Scene().on(slots=1) as scene:
        outcome = play(scene, KINDS[name], stays=False, before=lambda: leave(scene))
    assert [type(error) for error in outcome.errors] == [Cancelled] * KINDS[name].n
    assert not any(scene.observed.events[victim][:-1] for victim in scene.victims)
    assert not any(ord(MARK) in batch.tokens for batch in scene.llama.batches)


@pytest.mark.parametrize("name", STREAMED)
def test_a_slow_reader_holds_nobody_up_and_is_told_all(name: str) -> None:
    script = "a long story " * 50
    longer: dict[str, Any] = {"max_tokens": 1000, "logprobs": True, "top_logprobs": 9}
    if name == "response":
        longer = {"max_output_tokens": 1000}
    kind = replace(KINDS[name], body=KINDS[name].body | longer)
    with Scene(script=script).on() as scene:
        listener = scene.running.server.servers[0].sockets[0]
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        # Everyone has ended, yet one answer is not out.
        stalled = lambda: wait_until(lambda: scene.at_work == (0, 1))  # noqa: E731
        require_whole(play(scene, kind, between=stalled, buffer_bytes=4096), kind, script)


def stop(scene: Scene, _: int) -> None:
    """The server is told to stop, and has waited in vain for as long as it may."""
    running = scene.running
    running.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: running.supervisor.state == "draining")
    for _ in range(5):  # the event loop has gone round: what the end of the wait brings about is done
        assert running.http.get("/health").status_code == 503


@each_kind
@at_each_place
def test_a_shutdown_that_cannot_wait(name: str, nth: int) -> None:
    with Scene().on() as scene:
        scene.arm(stop, nth)
        outcome = play(scene, KINDS[name], unharmed=False)
    require_failed(outcome, name, ShuttingDown)
