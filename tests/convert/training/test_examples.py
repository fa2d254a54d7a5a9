"""Examples become the tokens that are served, in batches that waste little; labels hang behind one prompt."""

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint.source import open_checkpoint
from convert.measure.tasks import Tasks, tasks_of
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.tokenizer.chat_template import TEMPLATE_FIELD
from convert.training.examples import (
    BatchShape,
    LabelBranches,
    TokenBatch,
    TokenRow,
    TrainingData,
    batches_of,
    choose_widths,
    cut_examples,
    lengths_of,
    padded_targets,
    read_data,
    tokenizer_for,
    training_rows,
)
from models.common.chat_records import ChatRecord, read_chat_records
from models.common.console import LineReporter
from models.errors import BadExamples
from models.gguf.header import read_meta
from models.manifest import Manifest, Prompt, dump_manifest
from models.store.store import Store
from runtime.llama.model import load_tokenizer
from runtime.prompt.cut import cut_messages
from runtime.prompt.prompter import Prompter
from tests.support.convert.tiny import write_mails, write_model


def data_of(base: Path, train: tuple[ChatRecord, ...], validation: tuple[ChatRecord, ...] = ()) -> TrainingData:
    checkpoint = open_checkpoint(base)
    try:
        return read_data(checkpoint, train, validation, None, 512)
    finally:
        checkpoint.close()


def row(n_tokens: int, n_targets: int = 2) -> TokenRow:
    return TokenRow(np.arange(n_tokens, dtype=np.int32), np.arange(n_targets, dtype=np.int32))


@pytest.mark.parametrize("with_template", [True, False])
def test_the_tokens_are_those_of_the_converted_model(tmp_path: Path, with_template: bool) -> None:
    """With the base's own chat template, and with Gemma's turns, which conversion gives a base without one."""
    turns = "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}<start_of_turn>model:"
    base = write_model(tmp_path / "base.gguf", template=turns if with_template else None)
    records = read_chat_records(write_mails(tmp_path / "mails.jsonl"))
    store = Store(tmp_path / "store")
    made = convert(ConvertRequest(source=str(base), name="made", quantization="F16"), store, LineReporter())
    served = tasks_of(made.gguf, records, "classify", ("ham", "spam"))
    data = data_of(base, records)
    assert data.train == served
    assert data.labels == ("ham", "spam")
    trained = training_rows(data.train)
    assert [(*one.tokens, one.targets[-1]) for one in trained] == [task.tokens for task in served.tasks]
    assert {int(one.targets[-1]) for one in trained} <= set(served.ends)


def test_cut_texts_are_the_tokens_that_are_served(tmp_path: Path) -> None:
    """From the manifest that training writes: rows of the training, conversion's examples, and a served prompt."""
    prompt = Prompt(template="Sort: {text}!", max_text_tokens=8)
    base = write_model(tmp_path / "base.gguf")
    records = read_chat_records(write_mails(tmp_path / "mails.jsonl"))
    manifest = Manifest(name="made", licence="none", task="classify", labels=("ham", "spam"), prompt=prompt)
    (tmp_path / "model.toml").write_text(dump_manifest(manifest))
    request = ConvertRequest(source=str(base), name="made", quantization="F16", manifest=tmp_path / "model.toml")
    made = convert(request, Store(tmp_path / "store"), LineReporter())
    assert made.manifest is not None
    assert made.manifest.prompt == prompt
    checkpoint = open_checkpoint(base)
    tokenizer = tokenizer_for(checkpoint, records)
    checkpoint.close()
    asked, n_cut = cut_examples(records, prompt, tokenizer)
    assert n_cut == len(records)
    trained = data_of(base, tuple(asked)).train
    assert trained == tasks_of(made.gguf, records, "classify", ("ham", "spam"), made.manifest.prompt)
    assert trained != tasks_of(made.gguf, records, "classify", ("ham", "spam"), Prompt(template="Sort: {text}!"))

    served_by = load_tokenizer(made.gguf)
    template = read_meta(made.gguf).text(TEMPLATE_FIELD)
    body = [{"role": "user", "content": records[0].prompt[0].content}]
    cut = cut_messages(prompt.messages([("user", body[0]["content"])]), prompt, served_by)
    assert Prompter(served_by, template, 512).chat(cut.messages) == trained.tasks[0].prompt


def test_a_prompt_of_both_splits_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf")
    records = read_chat_records(write_mails(tmp_path / "mails.jsonl"))
    with pytest.raises(BadExamples, match="line 30 of the validation examples has the prompt of line 30 of those"):
        data_of(base, records[:30], records[29:])


def test_a_label_that_is_not_trained_on_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf")
    records = read_chat_records(write_mails(tmp_path / "mails.jsonl"))
    ham = tuple(record for record in records if record.answer == "ham")
    spam = tuple(record for record in records if record.answer == "spam")
    with pytest.raises(BadExamples, match="no example to train on has the label 'spam'"):
        data_of(base, ham, spam)


def test_widths_cost_least_of_all_choices() -> None:
    chance = random.Random(3)
    lengths = [chance.randint(10, 90) for _ in range(60)]

    def cost(widths: list[int], shape_cost: int) -> int:
        return shape_cost * len(widths) + sum(min(w for w in widths if w >= length) for length in lengths)

    top = -(-max(lengths) // 8) * 8
    below = range(16, top, 8)
    every = [[*some, top] for count in range(len(below) + 1) for some in combinations(below, count)]
    for shape_cost in (150, 400, 10_000):
        assert cost(choose_widths(lengths, shape_cost), shape_cost) == min(cost(one, shape_cost) for one in every)


def test_batches_hold_every_row_once_in_few_shapes() -> None:
    chance = random.Random(5)
    rows = [row(chance.randint(5, 120)) for _ in range(203)]
    first, second = (batches_of(rows, 8, random.Random(seed)) for seed in (1, 2))
    for batches in (first, second):
        assert sorted(member for batch in batches for member in batch.members) == list(range(203))
        assert all(len(rows[m].tokens) <= batch.shape.width for batch in batches for m in batch.members)
    assert len(first) == len(second) == 26
    assert [one.members for one in first] != [one.members for one in second]
    assert first == batches_of(rows, 8, random.Random(1))
    assert {batch.shape for batch in first} == {batch.shape for batch in second}


def test_long_rows_come_in_smaller_batches() -> None:
    batches = batches_of([row(2000) for _ in range(5)], 8, None)
    assert [(batch.shape.rows, len(batch.members)) for batch in batches] == [(2, 2), (2, 2), (2, 1)]


def test_targets_stand_at_the_ends_of_rows() -> None:
    rows, batch = [row(6, 3), row(5, 1)], TokenBatch(BatchShape(3, 8, 4), (1, 0))
    targets, weights = padded_targets(rows, batch)
    assert targets.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 0]]
    assert weights.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert lengths_of(rows, batch).tolist() == [5, 6, 0]


def test_labels_that_begin_alike_share_columns() -> None:
    tasks = Tasks("classify", (), ("a", "b", "c", "d"), ((1, 2, 3), (1, 2, 4), (5,), (5, 6)), (9,), 12)
    branches = LabelBranches.of(tasks)
    assert branches.paths == ((1,), (5,), (1, 2))
    assert branches.row((7, 8)).tokens.tolist() == [7, 8, 1, 5, 2]
    assert branches.positions(5).tolist() == [0, 1, 2, 2, 3]
    seen = branches.structure(5).astype(int).tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]


def test_a_label_that_another_continues_needs_an_end() -> None:
    tasks = Tasks("classify", (), ("c", "d"), ((5,), (5, 6)), (9,), 12)
    branches = LabelBranches.of(tasks)
    logits = np.full((2, 12), -np.inf, np.float32)
    logits[0, 5] = 0
    logits[1, [6, 9]] = np.log([0.25, 0.75])
    assert np.exp(branches.logprobs((7,), logits)) == pytest.approx([0.75, 0.25])
