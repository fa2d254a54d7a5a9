"""The deterministic engine on a fake that rounds as llama.cpp does: by the batch, and by where the cells lie."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.engine.options import WHOLE_CHUNK, EngineOptions
from runtime.llama.interface import Batch
from runtime.requests import (
    Embedded,
    Embedding,
    Event,
    Finished,
    Request,
    SamplingParams,
    Scored,
    Scoring,
    ScoringPrompt,
    Work,
)
from tests.support.runtime.fakes import EOS, FakeLlama, _Cell, adapted

from .test_engine import ends, ids_of

SHARED = tuple(b"Sort each mail into one of the lists. " * 4)[:150]
LABELS = ("spam", "spamassassin", "fork", "forks", "ilug")


@dataclass(eq=False)
class _RoundedCell(_Cell):
    rounding: int = 0


class RoundingLlama(FakeLlama):
    """Logits that depend on the whole computation, so that any other way to the same tokens gives other logits.

    A cell's rounding is a hash of the cells before it, of its batch's width and its place there, and of the cells in
    use. A row's is that and the number of rows; an embedding's is its batch's width and its place.
    """

    def _store(self, batch: Batch, count: int) -> np.ndarray:
        shape = (len(batch.tokens), self.used_cells, self.adapter)
        rows = []
        for place, (token, seq_id, wanted) in enumerate(
            list(zip(batch.tokens.tolist(), batch.seq_ids.tolist(), batch.wants_logits, strict=True))[:count]
        ):
            cells = self._sequences.setdefault(seq_id, [])
            before = tuple(cell.rounding for cell in cells if isinstance(cell, _RoundedCell))
            cells.append(_RoundedCell(token, self.adapter, {seq_id}, rounding=hash((before, place, shape)) % 2**31))
            if wanted:
                history = adapted(tuple(cell.token for cell in cells), self.adapter)
                rounding = hash((before, place, shape, int(batch.wants_logits.sum()))) % 2**31
                rows.append(self.logits((*history, rounding)))
        return np.stack(rows) if rows else np.empty((0, self.info.n_vocab), np.float32)

    def embed(self, batch: Batch, adapter: str | None = None) -> np.ndarray:
        places = np.arange(len(batch.tokens), dtype=np.float32)[:, None]
        rows: np.ndarray = super().embed(batch, adapter) + np.float32(1e-3) * (len(batch.tokens) + places)
        return rows


def mail(name: str, text: str, *, shared: int = len(SHARED), adapter: str | None = None, seed: int = 7) -> Request:
    """An answer of 12 tokens with log-probabilities, to a prompt whose first `shared` tokens others have too."""
    params = SamplingParams(12, temperature=0.8, seed=seed, logprobs=3, ignore_eos=True)
    return Request(name, (*SHARED[:shared], *text.encode()), params, adapter)


def scoring(name: str, *texts: str) -> Scoring:
    choices = tuple(tuple(label.encode()) for label in LABELS)
    return Scoring(name, tuple(ScoringPrompt((*SHARED, *text.encode()), choices, (EOS,)) for text in texts))


def engine_of(*, deterministic: bool = True, step_tokens: int = 512, n_ctx: int = 2048) -> Engine:
    llama = RoundingLlama(n_ctx=n_ctx, adapters=("a",))
    return Engine(llama, EngineOptions(step_tokens, max_drafts=None, deterministic=deterministic))


def finish(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


def answer(engine: Engine, asked: Work, *neighbours: Work) -> object:
    """What `asked` gets, to the last bit, when `neighbours` are asked at the same time."""
    for work in (*neighbours[::2], asked, *neighbours[1::2]):
        engine.add(work)
    return answer_in(finish(engine), asked)


def answer_in(events: list[Event], asked: Work) -> object:
    end = ends(events)[asked.id]
    if isinstance(end, Embedded):
        return end.vectors.tobytes()
    if isinstance(end, Scored):
        return end.logprobs
    assert isinstance(end, Finished)
    deltas = [event for event in events if event.request_id == asked.id and event is not end]
    return ids_of(events, asked.id), [logprob for delta in deltas for logprob in getattr(delta, "logprobs", ())]


WORKS: list[Work] = [
    mail("m", "Subject: hello"),
    mail("m", "", shared=2 * WHOLE_CHUNK),
    mail("m", "!", shared=2 * WHOLE_CHUNK),
    mail("m", "Subject: hello", adapter="a"),
    mail("short", "x", shared=1),
    scoring("s", "a mail"),
    scoring("s", "one mail", "another mail", "x" * 80),
    Embedding("e", (tuple(b"a text"), tuple(b"a longer text " * 4), tuple(b"x"))),
]
NEIGHBOURS: list[Work] = [
    mail("n1", "Subject: hello again"),
    mail("n2", "x" * 200),
    mail("n3", "Subject: hello", adapter="a"),
    scoring("n4", "a mail", "an other"),
    mail("n5", "", shared=5),
    Embedding("n6", (tuple(b"a text of another"), tuple(b"y" * 40))),
]


@pytest.mark.parametrize("asked", WORKS)
def test_the_same_request_gets_the_same_answer_whatever_is_cached_or_beside_it(asked: Work) -> None:
    first = answer(engine_of(), asked)
    engine = engine_of()
    for _ in range(2):
        assert answer(engine, asked) == first
    for neighbour in NEIGHBOURS:  # what each leaves in the cache, and each beside it
        answer(engine, neighbour)
        assert answer(engine, asked) == first
        assert answer(engine, asked, neighbour) == first
    assert answer(engine, asked, *NEIGHBOURS) == first
    if isinstance(asked, Request) and len(asked.prompt) > WHOLE_CHUNK:
        assert engine.stats().cached_tokens_total > 0


@pytest.mark.parametrize("asked", [WORKS[0], WORKS[5], WORKS[7]])
def test_without_it_the_fake_shows_the_difference(asked: Work) -> None:
    first = answer(engine_of(deterministic=False), asked)
    engine = engine_of(deterministic=False)
    assert [answer(engine, asked), answer(engine, asked, *NEIGHBOURS)] != [first, first]


@given(texts=st.lists(st.text("ab", max_size=150), min_size=1, max_size=5), step_tokens=st.sampled_from([16, 40, 512]))
def test_any_order_of_any_prompts_gives_each_its_own_answer(texts: list[str], step_tokens: int) -> None:
    asked = [mail(str(i), text or "a", shared=7) for i, text in enumerate(texts)]
    alone = [answer(engine_of(step_tokens=step_tokens), one) for one in asked]
    engine = engine_of(step_tokens=step_tokens)
    for one in asked:
        engine.add(one)
    events = finish(engine)
    assert [answer_in(events, one) for one in asked] == alone
    assert [answer(engine, one) for one in reversed(asked)] == alone[::-1]


def test_a_neighbour_that_is_cancelled_half_way_changes_nothing() -> None:
    asked = mail("m", "Subject: hello")
    first = answer(engine_of(), asked)
    for n_steps in range(1, 8):
        engine = engine_of()
        engine.add(mail("gone", "Subject: hello, you"))
        for _ in range(n_steps):
            engine.step()
        engine.add(asked)
        events = engine.cancel("gone") + finish(engine)
        assert answer_in(events, asked) == first


def test_prompts_are_computed_in_whole_chunks_alone_and_the_rest_is_found() -> None:
    engine = engine_of()
    llama = engine._llama
    assert isinstance(llama, RoundingLlama)
    answer(engine, mail("0", "Subject: hello"))
    answer(engine, mail("1", "Subject: bye"), mail("2", "Subject: bye, bye"))
    widths = [len(batch.tokens) for batch in llama.batches]
    rows = [1] * 11
    assert widths == [64, 64, 36, *rows, 39, *rows, 34, *rows]
    assert all(len(set(batch.seq_ids.tolist())) == 1 for batch in llama.batches)


def test_the_prompt_of_choices_is_computed_once() -> None:
    engine = engine_of()
    llama = engine._llama
    assert isinstance(llama, RoundingLlama)
    answer(engine, scoring("s", "a mail"))
    starts = [int(batch.positions[0]) for batch in llama.batches]
    assert starts.count(0) == starts.count(WHOLE_CHUNK) == 1, "branches begin after the prompt's whole chunks"
    assert len(starts) > 4, "there were branches"
