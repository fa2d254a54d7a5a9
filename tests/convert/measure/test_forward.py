"""One model through the tasks, on the fake: the right rows, the rule of decisions, the same whatever the packing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convert.errors import MeasureFailed
from convert.measure.examples import MIN_EXAMPLES
from convert.measure.forward import MAX_TOGETHER, ModelAnswer, cells_needed, run_pass
from convert.measure.loss import LogitsRow, even_share, plan_rows, spread
from convert.measure.tasks import MAX_WRITTEN, PromptFormat, Tasks, make_tasks
from models.common.chat_records import ChatMessage, ChatRecord
from models.errors import BadExamples
from models.manifest import Prompt
from models.quality import TaskKind
from runtime.decoding.choice_tree import NEGLIGIBLE
from runtime.errors import DecodeFailed
from tests.support.runtime.fakes import BOS, END_OF_TURN, EOS, FAKE_TEMPLATE, FakeLlama, FakeTokenizer

LABELS = ("spam", "spam filter", "ham")
ASKING = PromptFormat(FAKE_TEMPLATE, END_OF_TURN)


def records(count: int = MIN_EXAMPLES, answer: str = "") -> list[ChatRecord]:
    return [
        ChatRecord(f"#{n}", n + 1, (ChatMessage("user", f"mail {'x' * (n % 7)} {n}"),), answer or LABELS[n % 3])
        for n in range(count)
    ]


def tasks_for(work: TaskKind, some: Sequence[ChatRecord] | None = None, max_tokens: int = 512, **asking: Any) -> Tasks:
    chosen = records() if some is None else some
    return make_tasks(FakeTokenizer(), replace(ASKING, **asking), chosen, work, LABELS, max_tokens)


def passed(
    llama: FakeLlama, tasks: Tasks, together: int = MAX_TOGETHER
) -> tuple[tuple[ModelAnswer, ...], dict[int, Any]]:
    seen: dict[int, Any] = {}

    def on_row(row: LogitsRow, logits: np.ndarray) -> None:
        assert row.number not in seen
        seen[row.number] = logits.copy()

    return run_pass(llama, tasks, plan_rows(tasks), on_row, together), seen


def test_prompts_are_asked_as_they_are_served() -> None:
    tasks = tasks_for("classify", prompt=Prompt(template="Sort: {text}"))
    text = "<start_of_turn>user\nSort: mail  0<end_of_turn>\n<start_of_turn>model\n"
    assert tasks.tasks[0].prompt == (BOS, *FakeTokenizer().encode(text, add_special=False, parse_special=True))
    assert tasks.tasks[0].answer == (*b"spam", END_OF_TURN)
    assert tasks.choices == (tuple(b"spam"), tuple(b"spam filter"), tuple(b"ham"))
    assert tasks.ends == (EOS, END_OF_TURN)


def test_a_model_without_a_template_is_asked_as_decisions_ask_it() -> None:
    tasks = tasks_for("write", chat_template=None)
    assert tasks.tasks[0].prompt == (BOS, *b"mail  0\nAnswer:")
    assert tasks.tasks[0].answer == (*b" spam", *b"\n")
    assert tasks.ends == (EOS, END_OF_TURN, *b"\n")


def test_what_a_user_wrote_stays_text() -> None:
    some = records()
    some[0] = replace(some[0], prompt=(ChatMessage("user", "<end_of_turn>"),))
    assert tasks_for("write", some).tasks[0].prompt.count(END_OF_TURN) == 1


def test_examples_that_are_too_long_are_left_out_and_counted() -> None:
    some = records()
    some[3] = replace(some[3], prompt=(ChatMessage("user", "x" * 200),))
    some[4] = replace(some[4], prompt=(ChatMessage("user", "x" * 100_000),))
    tasks = tasks_for("classify", some, max_tokens=100)
    assert tasks.n_too_long == 2
    assert [task.id for task in tasks.tasks] == [record.id for record in some if record.line not in {4, 5}]
    with pytest.raises(BadExamples, match=r"20 of 20 held-out examples need more than 30 tokens; 0 are left, .* 10"):
        tasks_for("classify", some, max_tokens=30)


def test_a_record_that_the_template_refuses_is_named() -> None:
    with pytest.raises(BadExamples, match=r"line 1: .*no system"):
        tasks_for("write", chat_template="{{ raise_exception('no system') }}")


def test_labels_of_the_same_tokens_are_refused() -> None:
    with pytest.raises(BadExamples, match="same tokens"):
        make_tasks(FakeTokenizer(), ASKING, records(), "classify", ("spam", "spam"), 512)


def test_rows_are_those_the_answer_is_drawn_from() -> None:
    tasks = tasks_for("classify")
    rows = plan_rows(tasks)
    assert [row.number for row in rows] == list(range(len(rows)))
    for place, task in enumerate(tasks.tasks):
        mine = [row for row in rows if row.place == place]
        assert [row.target for row in mine] == list(task.answer)
        assert [row.position for row in mine] == list(range(len(task.prompt) - 1, len(task.tokens) - 1))


def test_the_number_of_rows_is_bounded_whatever_the_answers() -> None:
    tasks = tasks_for("write", records(answer="a long answer " * 5))
    rows = plan_rows(tasks, max_rows=100)
    assert len(rows) == 100
    assert all(row.target == tasks.tasks[row.place].tokens[row.position + 1] for row in rows)
    firsts = [row for row in rows if row.position == len(tasks.tasks[row.place].prompt) - 1]
    assert len(firsts) == MIN_EXAMPLES
    assert len(plan_rows(tasks, 1)) == MIN_EXAMPLES


@pytest.mark.parametrize(
    ("counts", "limit", "share"),
    [([3, 3, 3], 9, 3), ([1, 10, 10], 11, 5), ([5], 2, 2), ([2, 2], 1, 0), ([1, 4], 99, 4)],
)
def test_shares_are_even(counts: list[int], limit: int, share: int) -> None:
    assert even_share(counts, limit) == share


def test_spread_rows_are_different_and_begin_with_the_first() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 9) == [0, 1, 2]
    assert spread(0, 3) == []


@pytest.mark.parametrize("work", ["classify", "write"])
@pytest.mark.parametrize("shape", [(16, 2048, 512), (1, 512, 512), (5, 600, 7), (16, 400, 33)])
def test_rows_are_the_models_after_exactly_those_tokens(work: TaskKind, shape: tuple[int, int, int]) -> None:
    together, n_ctx, n_batch = shape
    tasks = tasks_for(work)
    llama = FakeLlama(unified=True, n_ctx=n_ctx, n_seq_max=2 * together, n_batch=n_batch)
    answers, seen = passed(llama, tasks, together)
    rows = plan_rows(tasks)
    assert seen.keys() == {row.number for row in rows}
    for row in rows:
        history = tasks.tasks[row.place].tokens[: row.position + 1]
        assert np.array_equal(seen[row.number], llama.logits(history))
    # llama.cpp aborts on more rows of logits than were reserved
    assert max(np.count_nonzero(batch.wants_logits) for batch in llama.batches) <= 2 * together
    alone, _ = passed(FakeLlama(unified=True, n_ctx=512, n_seq_max=2), tasks, 1)
    assert answers == alone


def test_the_label_that_wins_is_the_likeliest_whole() -> None:
    tasks = tasks_for("classify")
    llama = FakeLlama(unified=True, n_ctx=4096)
    answers, _ = passed(llama, tasks)
    for task, answer in zip(tasks.tasks, answers, strict=True):
        exact = [logprob(llama, task.prompt, label) for label in tasks.labels]
        assert answer.text == tasks.labels[exact.index(max(exact))]
        for found, known in zip(answer.logprobs, exact, strict=True):
            # what is negligible beside the best is not computed to its end, and its bound is no lower
            assert found == pytest.approx(known, abs=1e-5) or known - 1e-5 < found < max(exact) + math.log(NEGLIGIBLE)
    assert len({answer.text for answer in answers}) > 1


def logprob(llama: FakeLlama, prompt: tuple[int, ...], label: str) -> float:
    """By the definition: the product over the label's tokens, and over an end where another label goes on from it."""
    total, history = 0.0, prompt
    for token in label.encode():
        total += float(share(llama, history)[token])
        history = (*history, token)
    if any(other != label and other.startswith(label) for other in LABELS):
        total += math.log(np.exp(share(llama, history)[[EOS, END_OF_TURN]]).sum())
    return total


def share(llama: FakeLlama, history: tuple[int, ...]) -> np.ndarray:
    logits = llama.logits(history).astype(np.float64)
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def test_what_is_written_is_greedy_and_ends_with_the_turn() -> None:
    answers, _ = passed(FakeLlama(unified=True, n_ctx=4096, script="Dear Ann,\nyes."), tasks_for("write"))
    assert set(answers) == {ModelAnswer("Dear Ann,\nyes.")}


def test_what_goes_on_for_ever_is_cut_off() -> None:
    answers, _ = passed(FakeLlama(unified=True, n_ctx=4096, script=lambda history: ord("a")), tasks_for("write"))
    assert set(answers) == {ModelAnswer("a" * MAX_WRITTEN, cut_off=True)}


def test_a_prompt_is_computed_once() -> None:
    tasks = tasks_for("classify")
    llama = FakeLlama(unified=True, n_ctx=4096)
    passed(llama, tasks)
    n_computed = sum(len(batch.tokens) for batch in llama.batches)
    n_prompts = sum(len(task.prompt) for task in tasks.tasks)
    assert n_computed < n_prompts + MIN_EXAMPLES * (len("spam filter") + sum(map(len, LABELS)))
    assert llama.used_cells <= cells_needed(tasks)


def test_a_row_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected label's and the labels' that are weighed, which begin alike."""
    tasks, logits = tasks_for("classify"), FakeLlama.logits
    asked: list[tuple[int, ...]] = []

    def counted(self: FakeLlama, history: tuple[int, ...]) -> np.ndarray:
        asked.append(history)
        return logits(self, history)

    monkeypatch.setattr(FakeLlama, "logits", counted)
    passed(FakeLlama(unified=True, n_ctx=4096), tasks)
    assert len(asked) == len(set(asked)) > len(plan_rows(tasks))


def test_an_example_as_long_as_the_context_fits() -> None:
    some = [replace(record, prompt=(ChatMessage("user", "x" * 150),)) for record in records()]
    tasks = tasks_for("write", some)
    llama = FakeLlama(
        unified=True, n_ctx=max(map(tasks.room, tasks.tasks)), n_seq_max=2, script=lambda history: ord("a")
    )
    answers, _ = passed(llama, tasks)
    assert len(answers) == MIN_EXAMPLES


def test_progress_ends_with_all() -> None:
    told: list[tuple[int, int]] = []
    run_pass(
        FakeLlama(unified=True, n_ctx=4096),
        tasks_for("classify"),
        (),
        lambda row, logits: None,
        8,
        lambda *step: told.append(step),
    )
    assert told == [(0, 20), (8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize("work", ["classify", "write"])
def test_logits_that_are_no_numbers_are_an_error(work: TaskKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLlama, "logits", lambda self, history: np.full(260, np.nan, np.float32))
    with pytest.raises(Exception, match="not numbers"):
        run_pass(FakeLlama(unified=True, n_ctx=4096), tasks_for(work), (), lambda row, logits: None)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(MeasureFailed, match="the model has 261 tokens, the tasks were made for 260"):
        run_pass(FakeLlama(unified=True, more_specials=["<x>"]), tasks_for("write"), (), lambda row, logits: None)


def test_a_failed_decode_is_no_answer() -> None:
    with pytest.raises(DecodeFailed):
        passed(FakeLlama(unified=True, n_ctx=4096, fail_at={1: DecodeFailed("-3")}), tasks_for("classify"))
