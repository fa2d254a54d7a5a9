"""Coverage is counted in the whole vocabulary's tokens; answers are compared as texts."""

from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.errors import RequestInvalid
from convert.vocabulary import plan_trim
from convert.vocabulary_report import coverage, greedy_agreement
from convert.vocabulary_source import TrimmedSource
from models.gguf_header import read_header
from runtime.llama import LoadOptions, load

from . import tiny
from .test_vocabulary_source import write
from .vocabularies import sentencepiece


def test_tokens_and_whole_examples_are_covered_by_shares() -> None:
    full = sentencepiece({"aa": 0.0, "bb": -1.0, "cc": -2.0, "dd": -3.0})
    plan = plan_trim(full, ["aabb"], 261)
    found = coverage(full, plan, ["aabb", "aacc", "ddcc", "bb"])
    assert (found.tokens, found.examples) == (4 / 7, 2 / 4)
    report = found.report(plan, 0.5)
    assert (report.tokens_before, report.tokens_after) == (263, 261)
    assert (report.covered_tokens, report.covered_examples, report.greedy_agreement) == (4 / 7, 0.5, 0.5)


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_held_out_is_no_coverage(texts: list[str]) -> None:
    full = sentencepiece({"aa": 0.0, "bb": -1.0})
    with pytest.raises(RequestInvalid, match="no text"):
        coverage(full, plan_trim(full, ["aa"], 260), texts)


def test_answers_agree_where_the_likeliest_tokens_are_kept(tmp_path: Path) -> None:
    whole = tiny.write_model(tmp_path / "whole.gguf")
    plan = plan_trim(read_header(whole), ["oe"], 265)
    with Checkpoint(whole) as checkpoint:
        trimmed = write(TrimmedSource(checkpoint, plan), tmp_path / "trimmed.gguf")
    options = LoadOptions(n_ctx=128, n_batch=8, n_seq_max=1, n_threads=1, gpu_layers=0)
    models = load(whole, options), load(trimmed, options)
    steps: list[tuple[int, int]] = []
    prompts = ["oe", "\x07\x08 a prompt of more tokens than a batch", "oeo"]
    same = greedy_agreement(*models, prompts, lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert greedy_agreement(models[0], models[0], prompts, lambda *_: None) == 1
    assert 0 <= same <= 1
    with pytest.raises(RequestInvalid, match="no held-out prompts"):
        greedy_agreement(*models, [], lambda *_: None)
    with pytest.raises(RequestInvalid, match=r"leaves no room .* in a context of"):
        greedy_agreement(*models, ["x" * 1000], lambda *_: None)
    for model in models:
        model.close()
