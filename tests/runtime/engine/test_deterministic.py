"""The same answers on a fake that rounds as llama.cpp does: by the width of a chunk, and by where the cells lie."""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
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
    """Logits that depend on the arithmetic of the whole computation, as llama.cpp's do on a CPU with streams.

    A token that is alone in its stream, or a draft, is computed in another way than several, and those of several
    beyond whole groups of `row_group` rows in a third; a batch is cut so that each sequence has as many tokens as the
    shortest.
    Cells that come back from a snapshot beyond the window are summed up in another order, unless they moved by a
    multiple of 64. An embedding depends on its batch's width and its place.
    """

    def _store(self, batch: Batch, count: int) -> np.ndarray:
        rows = []
        tokens = list(zip(batch.tokens.tolist(), batch.seq_ids.tolist(), batch.wants_logits, strict=True))[:count]
        kinds = [0] * len(tokens) if batch.rows else arithmetic(batch.seq_ids.tolist(), self.info.row_group)
        for (token, seq_id, wanted), kind in zip(tokens, kinds, strict=False):
            cells = self._sequences.setdefault(seq_id, [])
            assert self.is_whole(seq_id, len(cells)), f"sequence {seq_id} looks at cells that are gone"
            before = cells[-1].rounding if cells and isinstance(cells[-1], _RoundedCell) else 0
            rounding = hash((before, token, kind)) % 2**31
            cells.append(_RoundedCell(token, self.adapter, rounding=rounding))
            if wanted:
                history = adapted(tuple(cell.token for cell in cells), self.adapter)
                rows.append(self.logits((*history, rounding)))
        return np.stack(rows) if rows else np.empty((0, self.info.n_vocab), np.float32)

    def save(self, seq_id: int) -> np.ndarray:
        roundings = [cell.rounding for cell in self._sequences[seq_id] if isinstance(cell, _RoundedCell)]
        return np.concatenate([super().save(seq_id), np.array(roundings, np.int32).view(np.uint8)])

    def restore(self, seq_id: int, data: np.ndarray, length: int) -> bool:
        whole = len(data) // 12
        if not super().restore(seq_id, data[: 8 * whole], length):
            return False
        moved = whole > self.window and (whole - self.window) % 64
        roundings = data[8 * whole :].view(np.int32)[:length].tolist()
        cells = zip(self._sequences[seq_id], roundings, strict=True)
        self._sequences[seq_id] = [
            _RoundedCell(cell.token, cell.adapter, cell.hollow, rounding + bool(moved)) for cell, rounding in cells
        ]
        return True

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        assert self.restore(target, self.save(source), length), "the engine copies what can be cut"

    def embed(self, batch: Batch, adapter: str | None = None) -> np.ndarray:
        places = np.arange(len(batch.tokens), dtype=np.float32)[:, None]
        rows: np.ndarray = super().embed(batch, adapter) + np.float32(1e-3) * (len(batch.tokens) + places)
        return rows


def arithmetic(seq_ids: list[int], row_group: int) -> list[int]:
    """The way in which each token of a batch is computed: 0 alone, 1 in a whole group of rows, 2 beyond those."""
    left = Counter(seq_ids)
    found: dict[int, list[int]] = {seq_id: [] for seq_id in left}
    while left:
        shortest = min(left.values())
        n_rows = shortest * len(left)
        for place, seq_id in enumerate(left):
            rows = range(place * shortest, (place + 1) * shortest)
            found[seq_id] += [0 if shortest == 1 else 1 + (row >= n_rows - n_rows % row_group) for row in rows]
        left = Counter({seq_id: n - shortest for seq_id, n in left.items() if n > shortest})
    return [found[seq_id].pop(0) for seq_id in seq_ids]


def mail(name: str, text: str, *, shared: int = len(SHARED), adapter: str | None = None, seed: int = 7) -> Request:
    """An answer of 12 tokens with log-probabilities, to a prompt whose first `shared` tokens others have too."""
    params = SamplingParams(12, temperature=0.8, seed=seed, logprobs=3, ignore_eos=True)
    return Request(name, (*SHARED[:shared], *text.encode()), params, adapter)


def scoring(name: str, *texts: str) -> Scoring:
    choices = tuple(tuple(label.encode()) for label in LABELS)
    return Scoring(name, tuple(ScoringPrompt((*SHARED, *text.encode()), choices, (EOS,)) for text in texts))


def engine_of(
    *,
    fast: bool = False,
    step_tokens: int = 512,
    n_ctx: int = 2048,
    window: int | None = None,
    slots: int = 16,
    row_group: int = 1,
    copies: bool = False,
    max_drafts: int | None = None,
) -> Engine:
    """An engine; one that `copies` repeats its prompt, and computes rows alike, so that it makes drafts."""
    llama = RoundingLlama(n_ctx=n_ctx, n_seq_max=slots, adapters=("a",), window=window, row_group=row_group)
    if copies:
        llama.script, llama.info = (lambda history: history[-8]), replace(llama.info, rows_alike=16)
    options = EngineOptions(step_tokens, slots, max_drafts, fast=fast, snapshot_bytes=1 << 20)
    return Engine(llama, options, clock=itertools.count().__next__)


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
    mail("m", "", shared=128),
    mail("m", "!", shared=128),
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


@pytest.mark.parametrize(("window", "row_group"), [(None, 1), (64, 1), (64, 16)])
@pytest.mark.parametrize("slots", [3, 16])
@pytest.mark.parametrize("asked", WORKS)
def test_the_same_request_gets_the_same_answer_whatever_is_cached_or_beside_it(
    asked: Work, slots: int, window: int | None, row_group: int
) -> None:
    first = answer(engine_of(window=window, row_group=row_group), asked)
    engine = engine_of(window=window, slots=slots, row_group=row_group)
    for _ in range(2):
        assert answer(engine, asked) == first
    for neighbour in NEIGHBOURS:  # what each leaves in the cache, and each beside it
        answer(engine, neighbour)
        assert answer(engine, asked) == first
        assert answer(engine, asked, neighbour) == first
    engine.rest()
    assert answer(engine, asked) == first
    assert answer(engine, asked, *NEIGHBOURS) == first
    if isinstance(asked, Request) and len(asked.prompt) > 64:
        assert engine.stats().cached_tokens_total > 0


def test_a_pre_empted_answer_is_written_again_as_it_was() -> None:
    params = SamplingParams(40, temperature=0.8, seed=7, logprobs=3, ignore_eos=True)
    asked = [Request(str(n), (*SHARED[n : 20 + n], n), params) for n in range(6)]
    for copies in (False, True):
        alone = [answer(engine_of(copies=copies, max_drafts=0), one) for one in asked]
        engine = engine_of(n_ctx=130, copies=copies)
        for one in asked:
            engine.add(one)
        events = finish(engine)
        assert engine.stats().preemptions_total > 0
        assert (engine.stats().draft_tokens_accepted_total > 0) is copies
        assert [answer_in(events, one) for one in asked] == alone


def test_a_fast_engine_goes_on_from_cells_that_were_computed_as_an_answer() -> None:
    said = {}
    for fast in (False, True):
        engine = engine_of(fast=fast)
        first = mail("m", "Subject: hello")
        engine.add(first)
        turn = Request("n", (*first.prompt, *ids_of(finish(engine), "m"), *b"More"), first.params)
        said[fast] = [answer(engine, turn), answer(engine_of(fast=fast), turn)]
    assert said[False][0] == said[False][1]
    assert said[True][0] != said[True][1]


@given(
    texts=st.lists(st.text("ab", max_size=150), min_size=1, max_size=5),
    step_tokens=st.sampled_from([16, 40, 512]),
    window=st.sampled_from([None, 0, 64]),
    row_group=st.sampled_from([1, 16]),
)
def test_any_order_of_any_prompts_gives_each_its_own_answer(
    texts: list[str], step_tokens: int, window: int | None, row_group: int
) -> None:
    asked = [mail(str(i), text or "a", shared=7) for i, text in enumerate(texts)]
    alone = [answer(engine_of(window=window, row_group=row_group), one) for one in asked]
    engine = engine_of(step_tokens=step_tokens, window=window, row_group=row_group)
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


def test_the_prompt_of_choices_is_computed_once() -> None:
    engine = engine_of()
    llama = engine._llama
    assert isinstance(llama, RoundingLlama)
    answer(engine, scoring("s", "a mail"))
    assert sum(0 in batch.positions for batch in llama.batches) == 1
    assert len(llama.batches) <= 4
