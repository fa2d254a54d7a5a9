"""Scoring on the fake: the sums a naive enumeration gives, one terminal event on every path, neighbours unharmed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.decoding.choice_tree import NEGLIGIBLE, ChoiceTree
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import (
    BatchInvalid,
    Cancelled,
    ContextTooLong,
    DecodeAborted,
    DecodeFailed,
    EngineError,
    InvalidRequest,
    NoKvSlot,
)
from runtime.requests import (
    MAX_SCORED_CHOICES,
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    Scored,
    Scoring,
    ScoringPrompt,
)
from tests.support.runtime.fakes import BOS, END_OF_TURN, EOS, FAKE_VOCAB, FakeLlama

ENDS = (EOS, END_OF_TURN)
TOO_MANY = tuple((k % 250, k) for k in range(MAX_SCORED_CHOICES + 1))
LABELS = ("spam", "spamassassin", "fork", "forks", "ilug")


def question(prompt: str = "a mail", choices: tuple[str, ...] = LABELS) -> ScoringPrompt:
    return ScoringPrompt((BOS, *prompt.encode()), tuple(tuple(choice.encode()) for choice in choices), ENDS)


def chat(name: str, prompt: str = "hello", tokens: int = 8) -> Request:
    return Request(name, (BOS, *prompt.encode()), SamplingParams(tokens, temperature=0))


def naive(llama: FakeLlama, asked: ScoringPrompt) -> list[float]:
    """Every choice's log-probability, token by token, and its end where another choice continues it."""

    def log_softmax(history: tuple[int, ...]) -> np.ndarray:
        logits = llama.logits(history).astype(np.float64)
        shifted: np.ndarray = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        return shifted

    sums = []
    for choice in asked.choices:
        history, total = asked.prompt, 0.0
        for token in choice:
            total += log_softmax(history)[token]
            history += (token,)
        if any(other[: len(choice)] == choice for other in asked.choices if other != choice):
            total += np.log(np.exp(log_softmax(history)[list(asked.ends)]).sum())
        sums.append(float(total))
    return sums


def assert_right(got: tuple[float, ...], exact: list[float]) -> None:
    """Exact, but for choices far below the best one, of which it is enough to know that."""
    best = max(exact)
    assert max(got) == pytest.approx(best, abs=1e-4)
    for logprob, true in zip(got, exact, strict=True):
        is_bound = true - 1e-4 <= logprob <= best + math.log(NEGLIGIBLE)
        assert is_bound or logprob == pytest.approx(true, abs=1e-4)


def run(engine: Engine, *work: Request | Scoring) -> dict[str, Scored | Finished | Failed]:
    """The terminal event of each; a second one fails the test."""
    for one in work:
        engine.add(one)
    terminal: dict[str, Scored | Finished | Failed] = {}
    for _ in range(5000):
        if not engine.has_work:
            return terminal
        take(terminal, engine.step())
    raise AssertionError(f"still at work: {engine.stats()}")


def take(terminal: dict[str, Scored | Finished | Failed], events: list[Event]) -> None:
    for event in events:
        if isinstance(event, Scored | Finished | Failed):
            assert event.request_id not in terminal
            terminal[event.request_id] = event


def scores(end: Scored | Finished | Failed) -> tuple[tuple[float, ...], ...]:
    assert isinstance(end, Scored), end
    return end.logprobs


def error_of(end: Scored | Finished | Failed) -> Exception:
    assert isinstance(end, Failed), end
    return end.error


def nothing_left(engine: Engine, llama: FakeLlama) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_cells_used == llama.used_cells
    engine.rest()
    assert llama.used_cells == 0


choice_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=12, unique=True).map(tuple)


@settings(max_examples=150)
@given(
    asked=st.lists(st.tuples(st.text("xy", max_size=40), choice_lists), min_size=1, max_size=6),
    script=st.sampled_from([None, "a", "abab"]),
    slots=st.integers(1, 4),
    n_ctx=st.integers(60, 200),
    n_batch=st.integers(3, 64),
)
def test_sums_are_those_of_a_naive_enumeration_whatever_runs_beside(
    asked: list[tuple[str, tuple[str, ...]]], script: str | None, slots: int, n_ctx: int, n_batch: int
) -> None:
    llama = FakeLlama(n_ctx=n_ctx, n_seq_max=2 * slots, n_batch=n_batch, script=script)
    engine = Engine(llama, EngineOptions(max_running=slots))
    questions = tuple(question(prompt, choices) for prompt, choices in asked)
    work: list[Request | Scoring] = [
        chat("c0"),
        Scoring("all", questions),
        *(Scoring(f"s{i}", (q,)) for i, q in enumerate(questions)),
        chat("c1"),
    ]
    ends = run(engine, *work)
    assert ends.keys() == {one.id for one in work}
    for got, one in zip(scores(ends["all"]), questions, strict=True):
        assert_right(got, naive(llama, one))
    for place, one in enumerate(questions):
        assert_right(scores(ends[f"s{place}"])[0], naive(llama, one))
    assert isinstance(ends["c0"], Finished)
    assert isinstance(ends["c1"], Finished)
    nothing_left(engine, llama)
    assert max(int(batch.wants_logits.sum()) for batch in llama.batches) <= llama.info.n_seq_max


def test_the_prompt_is_prefilled_once_and_all_branches_share_one_decode() -> None:
    llama = FakeLlama()
    asked = question("a long mail " * 10)
    end = run(Engine(llama), Scoring("s", (asked,)))["s"]
    assert isinstance(end, Scored)
    assert llama.decodes <= 3
    computed = sum(len(batch.tokens) for batch in llama.batches)
    assert 0 <= computed - len(asked.prompt) - end.usage.completion_tokens < len(asked.choices)  # filled up
    assert (end.usage.prompt_tokens, end.usage.cached_tokens) == (len(asked.prompt), 0)


def test_a_sure_answer_computes_no_other_choice() -> None:
    llama = FakeLlama(script="ilug")
    end = run(Engine(llama), Scoring("s", (question("a note", LABELS),)))["s"]
    assert isinstance(end, Scored)
    assert (llama.decodes, end.usage.completion_tokens) == (2, len("ilu")), "no logits are wanted after the last token"
    assert math.exp(end.logprobs[0][LABELS.index("ilug")]) > 0.99
    assert all(logprob < math.log(NEGLIGIBLE) for logprob in end.logprobs[0][:-1])


def test_choices_of_one_token_cost_nothing_beyond_the_prompt() -> None:
    llama = FakeLlama()
    asked = question("a mail", ("y", "n", "?"))
    end = run(Engine(llama), Scoring("s", (asked,)))["s"]
    assert isinstance(end, Scored)
    assert (llama.decodes, end.usage.completion_tokens) == (1, 0)
    assert sum(len(batch.tokens) for batch in llama.batches) == len(asked.prompt)
    assert end.logprobs[0] == pytest.approx(naive(llama, asked), abs=1e-4)


def row(**logits: float) -> np.ndarray:
    """Logits: those given, by the token's letter, and next to nothing for all others."""
    made = np.full(FAKE_VOCAB, -50, np.float32)
    for letter, logit in logits.items():
        made[ord(letter)] = logit
    return made


def waves_of(tree: ChoiceTree) -> list[str]:
    return [bytes(branch.path).decode() for branch in tree.next_wave()]


def test_a_second_wave_computes_what_the_first_could_not_exclude() -> None:
    """`aa` begins likelier but never continues; `ba` begins at 0.005 % of it, which seems negligible, and wins."""
    tree = ChoiceTree(question("m", ("aa", "ba", "ca")))
    tree.read((), row(a=0, b=math.log(5e-5)))
    assert waves_of(tree) == ["a"]
    tree.read((ord("a"),), row(x=0, a=-30))
    assert waves_of(tree) == ["b"], "c stays negligible"
    tree.read((ord("b"),), row(a=0))
    assert not tree.next_wave()
    assert tree.logprobs()[1] == pytest.approx(math.log(5e-5), abs=1e-3)


def test_there_are_two_waves_at_most() -> None:
    """`aa` dies out, and so would `ba`: the second wave computes `ca` as well rather than leave it to a third."""
    tree = ChoiceTree(question("m", ("aa", "ba", "ca")))
    tree.read((), row(a=0, b=math.log(5e-5), c=math.log(1e-9)))
    assert waves_of(tree) == ["a"]
    tree.read((ord("a"),), row(x=0))
    assert waves_of(tree) == ["b", "c"]
    tree.read((ord("b"),), row(x=0))
    tree.read((ord("c"),), row(a=0))
    assert not tree.next_wave()


def test_a_choice_that_is_known_at_once_is_no_measure_while_another_begins_likelier() -> None:
    """`d`, whole but at 0.1 %, lets everything down to 0.00001 % pass; the likely beginning `a` does not."""
    tree = ChoiceTree(question("m", ("aa", "d", "ba")))
    tree.read((), row(a=0, d=math.log(1e-3), b=math.log(5e-5)))
    assert waves_of(tree) == ["a"]
    tree.read((ord("a"),), row(a=0))
    assert not tree.next_wave()


def test_what_ends_a_choice_counts_only_where_another_goes_on_from_it() -> None:
    """After `ab` comes half an end, half `c`. So `abc` has half; `ab`, alone in needing an end, the other half."""
    tree = ChoiceTree(question("m", ("ab", "abc", "x")))
    tree.read((), row(a=0, x=0))
    tree.read((ord("a"),), row(b=0))
    after = row(c=0)
    after[EOS] = 0
    tree.read((ord("a"), ord("b")), after)
    assert not tree.next_wave()
    assert np.exp(tree.logprobs()) == pytest.approx([0.25, 0.25, 0.5])


def test_a_choice_that_begins_another_needs_no_branch_of_its_own() -> None:
    tree = ChoiceTree(question("m", ("ab", "abcd", "abd", "abde")))
    tree.read((), np.zeros(FAKE_VOCAB, np.float32))
    assert [(bytes(b.path), b.first) for b in tree.next_wave()] == [(b"abc", 1), (b"abd", 3)]


def test_the_same_question_again_finds_its_prompt_and_the_same_sums() -> None:
    llama = FakeLlama()
    engine, asked = Engine(llama), question("a mail of some length")
    first = run(engine, Scoring("s", (asked,)))["s"]
    second = run(engine, Scoring("s", (asked,)))["s"]
    assert isinstance(second, Scored)
    assert second.logprobs == scores(first)
    assert second.usage.cached_tokens == len(asked.prompt) - 2


def test_a_call_of_hundreds_of_questions_does_not_hold_up_a_later_chat() -> None:
    llama = FakeLlama(n_ctx=2048, script="spam")
    engine = Engine(llama, EngineOptions(max_running=4))
    engine.add(Scoring("many", tuple(question(f"mail {k}") for k in range(400))))
    engine.step()
    engine.add(chat("late"))
    terminal: dict[str, Scored | Finished | Failed] = {}
    while "late" not in terminal:
        take(terminal, engine.step())
    assert "many" not in terminal
    assert len(scores(run(engine)["many"])) == 400


@pytest.mark.parametrize("steps", range(4))
def test_cancel_at_any_point_ends_it_once_and_frees_its_cells(steps: int) -> None:
    llama = FakeLlama()
    engine = Engine(llama, EngineOptions(max_running=2))
    engine.add(Scoring("s", (question("one mail"), question("another"), question("a third"))))
    engine.add(chat("c"))
    events = [event for _ in range(steps) for event in engine.step()]
    [failed] = engine.cancel("s")
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, Cancelled)
    assert engine.cancel("s") == []
    ends = run(engine)
    assert "s" not in ends
    assert isinstance(ends.get("c") or events[-1], Finished)
    nothing_left(engine, llama)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("error", [NoKvSlot("1"), DecodeAborted("2"), BatchInvalid("-1")])
def test_a_decode_that_fails_now_and_then_changes_no_sum(error: EngineError, at: int) -> None:
    llama = FakeLlama(fail_at={at: error})
    asked = (question("one mail"), question("another"))
    engine = Engine(llama)
    ends = run(engine, Scoring("s", asked), chat("c"))
    for got, one in zip(scores(ends["s"]), asked, strict=True):
        assert_right(got, naive(llama, one))
    assert isinstance(ends["c"], Finished)
    nothing_left(engine, llama)


def test_no_room_at_all_fails_it_with_the_reason() -> None:
    llama = FakeLlama(n_ctx=64)
    llama.cells_hidden = 60
    engine = Engine(llama)
    assert isinstance(error_of(run(engine, Scoring("s", (question(),)))["s"]), NoKvSlot)
    nothing_left(engine, llama)


def test_a_fatal_decode_fails_it_once() -> None:
    engine = Engine(FakeLlama(fail_at={1: DecodeFailed("-3")}))
    ends = run(engine, Scoring("s", (question("one"), question("two"))), chat("c"))
    assert {type(error_of(end)) for end in ends.values()} == {DecodeFailed}
    assert ends.keys() == {"s", "c"}


def test_logits_that_are_no_numbers_fail_it_and_spare_its_neighbour() -> None:
    class Broken(FakeLlama):
        def logits(self, history: tuple[int, ...]) -> np.ndarray:
            row = super().logits(history)
            return np.full_like(row, np.nan) if history[: len(bad.prompt)] == bad.prompt else row

    bad = question("a bad mail")
    llama = Broken()
    engine = Engine(llama)
    ends = run(engine, Scoring("s", (bad, question("fine"))), Scoring("good", (question("fine"),)))
    assert "not numbers" in str(error_of(ends["s"]))
    assert_right(scores(ends["good"])[0], naive(llama, question("fine")))
    nothing_left(engine, llama)


@pytest.mark.parametrize(
    ("scoring", "error"),
    [
        (Scoring("s", ()), InvalidRequest),
        (Scoring("s", (ScoringPrompt((), ((1,),), ENDS),)), InvalidRequest),
        (Scoring("s", (ScoringPrompt((1,), (), ENDS),)), InvalidRequest),
        (Scoring("s", (ScoringPrompt((1,), ((2,), ()), ENDS),)), InvalidRequest),
        (Scoring("s", (ScoringPrompt((1,), ((2,), (2,)), ENDS),)), InvalidRequest),
        (
            Scoring("s", (ScoringPrompt((1,), TOO_MANY, ENDS),)),
            InvalidRequest,
        ),
        (Scoring("s", (ScoringPrompt((1,), ((FAKE_VOCAB,),), ENDS),)), InvalidRequest),
        (Scoring("s", (ScoringPrompt((1,) * 500, ((2,) * 13,), ENDS),)), ContextTooLong),
    ],
)
def test_what_the_edge_should_have_refused_is_refused(scoring: Scoring, error: type[Exception]) -> None:
    engine = Engine(FakeLlama())
    with pytest.raises(error):
        engine.add(scoring)
    assert not engine.has_work


def test_an_id_is_live_once_whatever_it_asks_for() -> None:
    engine = Engine(FakeLlama())
    engine.add(Scoring("x", (question(),)))
    with pytest.raises(InvalidRequest, match="already live"):
        engine.add(chat("x"))
