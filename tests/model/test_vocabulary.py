"""The real vocabulary of 262,144 tokens, cut by the default model's own examples."""

import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.checkpoint.source import GgufCheckpoint
from convert.trim.plan import TrimmedCheckpoint, TrimPlan, coverage, plan_trim, tokenizer_of
from models.gguf.header import Header, read_header
from runtime.llama.tokenizer import Tokenizer

pytestmark = pytest.mark.model

KEEP = 16_384
TEXTS = st.text(max_size=40) | st.text("eaoit nshrdlu.,\n<>_0123", max_size=60)


def mails(split: str) -> Iterator[str]:
    data = files("models.email_triage").joinpath(f"data/{split}.jsonl.gz").read_bytes()
    for line in gzip.decompress(data).decode().splitlines():
        mail, label = (message["content"] for message in json.loads(line)["messages"])
        yield f"<bos><start_of_turn>user\n{mail}<end_of_turn>\n<start_of_turn>model\n{label}<end_of_turn>\n"


@pytest.fixture(scope="module")
def header(base_gguf: Path) -> Header:
    return read_header(base_gguf)


@pytest.fixture(scope="module")
def plan(header: Header) -> TrimPlan:
    return plan_trim(header, mails("train"), KEEP)


@pytest.fixture(scope="module")
def tokenizers(header: Header, plan: TrimPlan) -> tuple[Tokenizer, Tokenizer]:
    return tokenizer_of(header), tokenizer_of(header, plan.fields)


def test_as_many_stay_as_asked_for_and_most_of_unseen_mail_is_covered(header: Header, plan: TrimPlan) -> None:
    assert len(plan.kept) == KEEP
    train, test = coverage(header, plan, mails("train")), coverage(header, plan, mails("test"))
    assert (train.tokens, train.examples) == (1, 1)
    assert test.tokens > 0.9


def test_special_tokens_move_together(tokenizers: tuple[Tokenizer, Tokenizer], plan: TrimPlan) -> None:
    before, after = tokenizers
    marks = "<bos><start_of_turn><end_of_turn><eos><pad><unk>"
    moved = plan.new_ids[before.encode(marks, add_special=False, parse_special=True)]
    assert after.encode(marks, add_special=False, parse_special=True) == moved.tolist()
    assert [plan.new_ids[token] for token in before.end_tokens] == list(after.end_tokens)
    assert [after.bos, after.eos] == plan.new_ids[[before.bos or 0, before.eos or 0]].tolist()


def alike(before: Tokenizer, after: Tokenizer, plan: TrimPlan, text: str) -> bool:
    """Whether the text is covered; if so, it has to be read alike."""
    whole = before.encode(text, add_special=False, parse_special=True)
    mapped = plan.new_ids[whole]
    if (mapped < 0).any():
        return False
    assert after.encode(text, add_special=False, parse_special=True) == mapped.tolist()
    return True


def test_mails_that_are_covered_are_read_alike(tokenizers: tuple[Tokenizer, Tokenizer], plan: TrimPlan) -> None:
    words = [word for mail in mails("test") for word in mail.split("\n")]
    assert sum(alike(*tokenizers, plan, text) for text in words) > len(words) / 3


@settings(max_examples=300)
@given(text=TEXTS)
def test_any_text_that_is_covered_is_read_alike(
    tokenizers: tuple[Tokenizer, Tokenizer], plan: TrimPlan, text: str
) -> None:
    alike(*tokenizers, plan, text)


def test_texts_made_of_kept_tokens_are_read_alike(tokenizers: tuple[Tokenizer, Tokenizer], plan: TrimPlan) -> None:
    before, after = tokenizers
    random = np.random.default_rng(4)
    texts = [before.decode(random.choice(plan.kept, 6).tolist()) for _ in range(3000)]
    assert sum(alike(before, after, plan, text) for text in texts) > 1500


def test_the_embedding_keeps_its_rows(base_gguf: Path, plan: TrimPlan) -> None:
    with closing(GgufCheckpoint(base_gguf)) as checkpoint:
        source = TrimmedCheckpoint(checkpoint, plan)
        info = checkpoint.header.tensors["token_embd.weight"]
        rows = np.concatenate([slab for _, slab in source.slabs(source.header.tensors[info.name])])
        assert rows.shape == (KEEP, 640)
        for start, slab in checkpoint.slabs(info):
            inside = (plan.kept >= start) & (plan.kept < start + len(slab))
            np.testing.assert_array_equal(rows[inside], slab[plan.kept[inside] - start])
