"""A file beside a reference, through llama.cpp in a process of its own, on models of two layers."""

import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert.errors import MeasureFailed
from convert.measure.compare import (
    MeasuredLoss,
    ReferenceRun,
    compare,
    noise,
    rows_bytes,
    take_reference,
)
from convert.measure.examples import MIN_EXAMPLES
from convert.measure.loss import RowFile, plan_rows
from convert.measure.tasks import EvalTask, Tasks, tasks_of
from models.common.chat_records import ChatMessage, ChatRecord
from models.common.text_scores import rouge_l
from tests.support.convert.tiny import END, TOKENS, write_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}{{ message['content'] }}"
    "<end_of_turn>{% endfor %}{% if add_generation_prompt %}<start_of_turn>{% endif %}"
)
LABELS = ("Hel", "olo", "elo", "oHe", "leH", "loe")


def ignore(done: int, total: int) -> None:
    pass


def records(count: int = MIN_EXAMPLES) -> list[ChatRecord]:
    return [
        ChatRecord(str(n), n + 1, (ChatMessage("user", f"Hello {n}{'lo' * (n % 5)}"),), LABELS[n % 6])
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    return write_model(folder / "full.gguf", template=TEMPLATE)


@pytest.fixture(scope="module")
def tasks(full: Path) -> Tasks:
    return tasks_of(full, records(), "classify", LABELS, end_of_turn=END)


@pytest.fixture(scope="module")
def reference(full: Path, folder: Path, tasks: Tasks) -> ReferenceRun:
    return take_reference(full, tasks, folder / "reference", ignore)


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """Another model with the same vocabulary: its output differs much."""
    changes = {"token_embd.weight": np.random.default_rng(5).normal(0, 0.15, (len(TOKENS), 64)).astype(np.float32)}
    return write_model(folder / "other.gguf", template=TEMPLATE, changes=changes)


def beside(candidate: Path, reference: ReferenceRun) -> MeasuredLoss:
    (measured,) = compare(candidate, (reference,), ignore)
    return measured


def test_a_reference_keeps_its_rows_and_answers(reference: ReferenceRun, tasks: Tasks) -> None:
    assert reference.rows == plan_rows(tasks)
    assert reference.rows_file.stat().st_size == rows_bytes(tasks) == len(reference.rows) * len(TOKENS) * 2
    with RowFile(reference.rows_file, len(TOKENS)) as file:
        for row in reference.rows:
            assert np.exp(file.read(row.number).astype(np.float64)).sum() == pytest.approx(1, abs=5e-3)
    assert len(reference.answers) == MIN_EXAMPLES
    assert {answer.text for answer in reference.answers} <= set(LABELS)
    assert reference.totals.flips == 0
    assert reference.totals.correct == sum(
        answer.text == task.expected for answer, task in zip(reference.answers, tasks.tasks, strict=True)
    )
    assert [path.name for path in reference.rows_file.parent.iterdir()] == ["rows.f16"]


def test_a_file_loses_nothing_against_itself(reference: ReferenceRun) -> None:
    for measured in (beside(reference.model, reference), noise(reference, ignore)):
        assert measured.loss is not None
        assert measured.loss.kl_mean < 1e-4
        assert measured.loss.perplexity_ratio == pytest.approx(1, abs=1e-2)
        assert measured.answers.flips == 0
        assert measured.answers.correct == reference.totals.correct
        assert measured.loss.positions == len(reference.rows)


def test_the_noise_floor_is_that_of_some_examples(reference: ReferenceRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.measure.compare.NOISE_EXAMPLES", 8)
    told: list[tuple[int, int]] = []
    floor = noise(reference, lambda *step: told.append(step))
    assert floor.loss is not None
    assert told[0] == (0, 8)
    assert floor.answers.total == 8
    assert [example.id for example in floor.examples] == [task.id for task in reference.tasks.tasks[:8]]
    assert floor.loss.positions == sum(row.place < 8 for row in reference.rows)
    assert floor.loss.kl_mean < 1e-4


def test_a_quantized_file_loses_little_and_another_model_much(
    reference: ReferenceRun, other: Path, folder: Path, tasks: Tasks
) -> None:
    fine = write_model(folder / "q8.gguf", template=TEMPLATE, kind=gguf.GGMLQuantizationType.Q8_0)
    small, large = beside(fine, reference), beside(other, reference)
    assert small.loss is not None
    assert large.loss is not None
    assert 0 < small.loss.kl_mean < 0.1 * large.loss.kl_mean
    assert small.loss.kl_mean <= small.loss.kl_p99
    assert large.loss.top1_agreement < 0.9
    assert large.answers.flips == sum(
        ours.answer != theirs.text for ours, theirs in zip(large.examples, reference.answers, strict=True)
    )
    assert large.answers.flips > 0
    for example, task in zip(large.examples, tasks.tasks, strict=True):
        assert (example.id, example.expected, example.is_right) == (
            task.id,
            task.expected,
            example.answer == task.expected,
        )
    means = [example.kl_mean for example in large.examples if example.kl_mean is not None]
    weights = [len(task.answer) for task in tasks.tasks]
    assert np.average(means, weights=weights) == pytest.approx(large.loss.kl_mean)


def test_one_pass_serves_several_references(reference: ReferenceRun, other: Path, folder: Path, tasks: Tasks) -> None:
    second = take_reference(other, tasks, folder / "second", ignore)
    near, far = compare(other, (second, reference), ignore)
    assert near.loss is not None
    assert far.loss is not None
    assert near.loss.kl_mean < 1e-4 < far.loss.kl_mean
    assert near.answers.flips == 0
    assert far == beside(other, reference)
    base = take_reference(other, tasks, folder / "beside", ignore, (reference,))
    assert base.beside == (far,)
    with RowFile(base.rows_file, len(TOKENS)) as ours, RowFile(second.rows_file, len(TOKENS)) as theirs:
        assert all((ours.read(row.number) == theirs.read(row.number)).all() for row in base.rows)
    with pytest.raises(MeasureFailed, match="not asked the same"):
        take_reference(other, replace(tasks, ends=()), folder / "beside", ignore, (reference,))
    with pytest.raises(MeasureFailed, match="not asked the same"):
        compare(other, (second, replace(reference, tasks=replace(tasks, ends=()))), ignore)


def test_written_answers_are_compared_as_text(full: Path, other: Path, folder: Path) -> None:
    written = replace(tasks_of(full, records(), "write", end_of_turn=END), max_written=8)
    reference = take_reference(full, written, folder / "written", ignore)
    same, different = beside(full, reference), beside(other, reference)
    assert same.answers.flips == 0
    assert different.answers.flips > 0
    assert different.answers.total == MIN_EXAMPLES
    ours, own = different.answers.score, reference.totals.score
    assert ours is not None
    assert own is not None
    wanted = [task.expected for task in written.tasks]
    assert own.mean == np.mean([rouge_l(text, one.text) for text, one in zip(wanted, reference.answers, strict=True)])
    assert ours.mean == np.mean([rouge_l(one.expected, one.answer) for one in different.examples])
    assert (ours.reference_mean, own.difference_low, own.difference_high) == (own.mean, 0, 0)
    for floor in (same, noise(reference, ignore)):
        assert floor.answers.score is not None
        assert floor.answers.score.difference == 0


def test_labels_have_no_score(reference: ReferenceRun, other: Path) -> None:
    assert reference.totals.score is None
    assert beside(other, reference).answers.score is None


def test_a_file_that_does_not_load_is_that_files_error(reference: ReferenceRun, folder: Path) -> None:
    (folder / "torn.gguf").write_bytes(reference.model.read_bytes()[:5000])
    with pytest.raises(MeasureFailed, match=r"'torn.gguf' cannot be measured: .*cannot be loaded"):
        beside(folder / "torn.gguf", reference)


def test_another_vocabulary_is_that_files_error(reference: ReferenceRun) -> None:
    longer = replace(reference, tasks=replace(reference.tasks, n_vocab=300))
    with pytest.raises(MeasureFailed, match="has 267 tokens, the tasks were made for 300"):
        beside(reference.model, longer)


@pytest.mark.usefixtures("fresh_children")
def test_a_child_that_aborts_is_an_error_and_nothing_more(
    full: Path, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp aborts the process on more outputs than were reserved: stand in for it with a child that does."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'x.cpp:1: GGML_ASSERT(n > 0) failed'\nkill -ABRT $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MeasureFailed, match=r"SIGABRT: x.cpp:1: GGML_ASSERT\(n > 0\) failed"):
        take_reference(full, tasks, tmp_path / "rows", ignore)
    assert list((tmp_path / "rows").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_in_words(
    reference: ReferenceRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert.measure.compare import MeasureJob, RowSet
    from convert.measure.compare_child import do_job
    from tests.support.runtime.fakes import FakeLlama

    llama = FakeLlama(n_ctx=4096)
    small = replace(
        reference.tasks,
        tasks=tuple(EvalTask(str(n), (1, 2, 3), (4, 5), "x") for n in range(10)),
        choices=((4,), (6,), (7,)),
        ends=(5,),
        n_vocab=260,
    )
    monkeypatch.setattr(Path, "open", lambda self, mode: open("/dev/full", "wb", buffering=0))  # noqa: PTH123, SIM115
    with pytest.raises(OSError, match="No space left"):
        do_job(llama, MeasureJob("x", small, 16, keep=RowSet(str(tmp_path / "r"), 260, plan_rows(small))), ignore)


def test_an_interrupt_ends_the_child_and_leaves_nothing(full: Path, tasks: Tasks, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_reference(full, tasks, tmp_path / "rows", interrupt)
    assert list((tmp_path / "rows").iterdir()) == []
