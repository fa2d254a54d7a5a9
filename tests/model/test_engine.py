"""The engine on the real model. Invariants, not prose: what batching, sharing, cancelling and seeds must not change."""

import numpy as np
import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.llama.interface import Batch
from runtime.llama.model import Llama
from runtime.requests import Event, Failed, Finished, Request, SamplingParams, TextDelta, TokenLogprob

pytestmark = pytest.mark.model

# The same tokens in a batch of another shape move a logit by up to 0.95: a greedy choice within this is a tie.
NEAR_TIE = 1.0
GREEDY = SamplingParams(8, temperature=0, logprobs=2, ignore_eos=True)
PROMPTS = [
    "The capital of France is",
    "Subject: meeting moved\n\nHi all, the meeting moved to Thursday at ten. Please",
    "1, 2, 3, 4, 5,",
    "Dear support team, since the update this morning my printer",
]


@pytest.fixture(scope="module")
def alone(loaded_base: Llama) -> list[list[TokenLogprob]]:
    """The answer to each of PROMPTS, asked one by one."""
    return [written(run_alone(loaded_base, prompt), "x") for prompt in PROMPTS]


def run_alone(llama: Llama, prompt: str, params: SamplingParams | None = None) -> list[Event]:
    llama.clear()
    return run(Engine(llama), ask(llama, "x", prompt, params or GREEDY))


def ask(llama: Llama, name: str, text: str, params: SamplingParams = GREEDY) -> Request:
    return Request(name, tuple(llama.tokenizer.encode(text, add_special=True, parse_special=False)), params)


def run(engine: Engine, *requests: Request) -> list[Event]:
    for request in requests:
        engine.add(request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    failed = [event for event in events if isinstance(event, Failed)]
    assert not failed
    assert sorted(e.request_id for e in events if isinstance(e, Finished)) == sorted(r.id for r in requests)
    return events


def written(events: list[Event], name: str) -> list[TokenLogprob]:
    return [p for e in events if isinstance(e, TextDelta) and e.request_id == name for p in e.logprobs]


def ids(events: list[Event], name: str) -> list[int]:
    return [t for e in events if isinstance(e, TextDelta) and e.request_id == name for t in e.token_ids]


def cached(events: list[Event], name: str) -> int:
    return next(e.usage.cached_tokens for e in events if isinstance(e, Finished) and e.request_id == name)


def agree(left: list[TokenLogprob], right: list[TokenLogprob]) -> bool:
    """Whether two greedy answers are the same up to the first near-tie; after it they may go apart."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if a.token != b.token:
            return min(p.top[0][2] - p.top[1][2] for p in (a, b)) < NEAR_TIE
    return True


def test_answers_in_a_batch_are_the_answers_alone(base: Llama, alone: list[list[TokenLogprob]]) -> None:
    events = run(Engine(base), *(ask(base, str(i), prompt) for i, prompt in enumerate(PROMPTS)))
    together = [written(events, str(i)) for i in range(len(PROMPTS))]
    assert [agree(a, b) for a, b in zip(alone, together, strict=True)] == [True] * len(PROMPTS)
    assert sum(a[0].token == b[0].token for a, b in zip(alone, together, strict=True)) >= len(PROMPTS) - 1


def test_equal_requests_at_once_get_equal_answers(base: Llama) -> None:
    events = run(Engine(base), *(ask(base, str(i), PROMPTS[0]) for i in range(8)))
    first = written(events, "0")
    assert all(agree(first, written(events, str(i))) for i in range(8))


def test_a_seed_repeats_alone_and_in_company(base: Llama) -> None:
    params = SamplingParams(8, temperature=0.7, seed=42, ignore_eos=True)
    asked = ask(base, "seeded", PROMPTS[1], params)
    first = ids(run(Engine(base), asked), "seeded")
    base.clear()
    assert ids(run(Engine(base), asked), "seeded") == first
    base.clear()
    other = ask(base, "other", PROMPTS[1], SamplingParams(8, temperature=0.7, seed=43, ignore_eos=True))
    assert ids(run(Engine(base), other), "other") != first
    base.clear()
    company = [ask(base, str(i), prompt, params) for i, prompt in enumerate(PROMPTS)]
    # other shapes move the logits: the draws agree until one falls between two tokens
    assert ids(run(Engine(base), asked, *company), "seeded")[0] == first[0]


def test_a_shared_prefix_changes_nothing_and_is_reported(base: Llama) -> None:
    instruction = (
        "Sort each mail into billing, sales or support. Answer with one word only, please: which is it?\n\n" * 2
    )
    prompts = [instruction + prompt for prompt in PROMPTS[:3]]
    alone = [written(run_alone(base, prompt), "x") for prompt in prompts]
    base.clear()
    engine = Engine(base, EngineOptions())
    events = run(engine, *(ask(base, str(i), prompt) for i, prompt in enumerate(prompts)))
    assert all(agree(a, written(events, str(i))) for i, a in enumerate(alone))
    shared = len(ask(base, "", instruction).prompt) - 2
    assert [cached(events, str(i)) >= shared for i in range(3)] == [False, True, True]
    again = run(engine, ask(base, "again", prompts[2]))
    assert cached(again, "again") == len(ask(base, "", prompts[2]).prompt) - 2
    assert agree(alone[2], written(again, "again"))


def test_cancel_frees_the_cells_and_leaves_the_neighbour_alone(base: Llama, alone: list[list[TokenLogprob]]) -> None:
    engine = Engine(base, EngineOptions())
    for name, prompt in (("kept", PROMPTS[0]), ("gone", PROMPTS[1])):
        engine.add(ask(base, name, prompt))
    events = engine.step() + engine.step()
    before = engine.stats().kv_cells_used
    engine.cancel("gone")
    assert engine.stats().kv_cells_used < before
    while engine.has_work:
        events += engine.step()
    assert agree(alone[0], written(events, "kept"))
    engine.rest()
    assert engine.stats().kv_cells_used == 0


def test_no_kv_slot_still_answers_everyone(base: Llama, alone: list[list[TokenLogprob]]) -> None:
    occupy(base, seq_id=7, n_tokens=216)  # behind the engine's back: llama_decode will really return 1
    engine = Engine(base, EngineOptions(max_running=4))
    events = run(engine, *(ask(base, str(i), prompt) for i, prompt in enumerate(PROMPTS)))
    assert all(agree(a, written(events, str(i))) for i, a in enumerate(alone))
    assert engine.stats().preemptions_total > 0


def occupy(llama: Llama, *, seq_id: int, n_tokens: int) -> None:
    for start in range(0, n_tokens, 108):
        positions = np.arange(start, start + 108, dtype=np.int32)
        llama.decode(Batch(positions + 1000, positions, np.full(108, seq_id), np.zeros(108, np.int8)))
