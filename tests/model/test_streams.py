"""Streams on the real model: a token's bits depend on its own sequence alone, and memory is taken for tokens only.

Of the default model's Q8_0 and Q4_0 weights llama.cpp computes any number of rows alike; of the base's Q4_K and Q6_K
it does so in groups of 16, up to which chunks are filled. Our own products of prompts compute each row by itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest

from models.store.store import StoredModel
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.kv_cache.prefix_cache import ALIGN
from runtime.llama.handle import describe_prompts
from runtime.llama.interface import Batch, LoadOptions
from runtime.llama.model import Llama, load
from runtime.requests import SamplingParams

from .test_drafts import COPY
from .test_engine import ask, run

pytestmark = pytest.mark.model

WINDOW = 512  # Gemma 3's


OPTIONS = LoadOptions(n_ctx=8192, n_batch=256, n_seq_max=8, n_outputs=16, n_threads=1, streams=True)


@pytest.fixture(scope="module", params=["email-triage", "base", "email-triage own", "base own"])
def loaded(request: pytest.FixtureRequest, email_triage: StoredModel, base_gguf: Path) -> Llama:
    name, _, own = str(request.param).partition(" ")
    if own and describe_prompts().startswith("by llama.cpp:"):
        pytest.skip(describe_prompts())
    path = email_triage.gguf if name == "email-triage" else base_gguf
    return load(path, replace(OPTIONS, prefill="own" if own else "stock"))


@pytest.fixture
def llama(loaded: Llama) -> Llama:
    loaded.clear()
    return loaded


def tokens(n_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1000, 12000, n_tokens).astype(np.int32)


def decode(llama: Llama, *parts: tuple[int, int, np.ndarray]) -> np.ndarray:
    """The logits after the last token of each part: (sequence id, position, tokens), filled up as the engine does."""
    group = llama.info.row_group
    widths = [len(part) if len(part) == 1 else -(-len(part) // group) * group for _, _, part in parts]
    batch = Batch(
        np.concatenate([np.resize(part, width) for (_, _, part), width in zip(parts, widths, strict=True)]),
        np.concatenate([np.arange(p[1], p[1] + width, dtype=np.int32) for p, width in zip(parts, widths, strict=True)]),
        np.concatenate([np.full(width, p[0], np.int32) for p, width in zip(parts, widths, strict=True)]),
        np.concatenate([np.arange(width) == len(p[2]) - 1 for p, width in zip(parts, widths, strict=True)]),
        rows=max(widths) == 1,
    )
    logits = np.array(llama.decode(batch))
    for seq_id, start, part in parts:
        llama.remove(seq_id, start + len(part))
    return logits


def test_the_rows_computed_together_are_found_out(loaded: Llama, email_triage: StoredModel) -> None:
    alike = loaded.info.size_bytes < email_triage.gguf.stat().st_size or "Deskside" in loaded.info.backend
    assert loaded.info.row_group == (1 if alike else 16)
    assert loaded.row_block == 1
    of_any = 16 if loaded.info.size_bytes < email_triage.gguf.stat().st_size else 3
    assert loaded.info.rows_alike == (of_any if "Deskside" in loaded.info.backend else 1)


def compute(llama: Llama, seq_id: int, start: int, part: np.ndarray, cuts: Iterable[int] = ()) -> np.ndarray:
    """The logits after `part`, computed in pieces that end at `cuts` and at every 256 tokens."""
    ends = sorted({*cuts, *range(256, len(part), 256), len(part)})
    for at, end in zip([0, *ends], ends, strict=False):
        logits = decode(llama, (seq_id, start + at, part[at:end]))
    return np.array(logits[0])


def test_a_prompt_has_the_same_bits_however_it_is_cut_and_wherever_it_lies(llama: Llama) -> None:
    prompt = tokens(300)
    expected = compute(llama, 0, 0, prompt)
    compute(llama, 1, 0, tokens(200, 1))
    for seq_id, cuts in {5: (2,), 2: (100, 102), 7: (298,), 4: (128, 256)}.items():
        assert np.array_equal(compute(llama, seq_id, 0, prompt, cuts), expected), cuts


def test_an_answer_has_the_same_bits_beside_others(llama: Llama) -> None:
    prompt, said = tokens(100), tokens(3, 1)
    compute(llama, 0, 0, prompt)
    alone = [decode(llama, (0, 100 + k, said[k : k + 1]))[0] for k in range(3)]
    for seq_id in range(8):
        compute(llama, seq_id, 0 if seq_id else 103, prompt if seq_id == 4 else tokens(40 + seq_id, seq_id))
    # Of K-quants, four rows and more round apart from fewer.
    is_k_quant = "gemma3 270M Q4_K" in llama.info.description
    many: tuple[list[int], ...] = ([2, 6], [], [5]) if is_k_quant else ([2, 3, 5], [], [0, 1, 2, 3, 5, 6, 7])
    for k, others in enumerate(many):
        at = {seq_id: 40 + seq_id if seq_id else 143 for seq_id in others}
        for seq_id in others:
            llama.remove(seq_id, at[seq_id])
        rows = sorted([(4, 100 + k, said[k : k + 1]), *((s, at[s], tokens(1, s)) for s in others)], key=lambda r: r[0])
        place = [row[0] for row in rows].index(4)
        assert np.array_equal(decode(llama, *rows)[place], alone[k])


def test_drafts_change_no_bit_of_an_answer_alone_or_beside_others(llama: Llama) -> None:
    if llama.info.rows_alike == 1:
        pytest.skip("this model's rows differ beside others of their stream: there are no drafts")
    params = SamplingParams(16, temperature=0, logprobs=2, ignore_eos=True)
    texts = (COPY, "1, 2, 3, 1, 2, 3, 1, 2, 3,", "Dear all,")
    asked = [ask(llama, str(n), text, params) for n, text in enumerate(texts)]
    plain = Engine(llama, EngineOptions(max_running=3, max_drafts=0, keep_prefixes=False))
    alone = [run(plain, request) for request in asked]
    plain.rest()
    ticks: Callable[[], float] = count().__next__  # every step takes as long as any other, so that drafts always pay
    drafts = Engine(llama, EngineOptions(max_running=3, keep_prefixes=False), clock=ticks)
    assert [run(drafts, request) for request in asked] == alone
    n_accepted = drafts.stats().draft_tokens_accepted_total
    together = run(drafts, *asked)
    assert [[event for event in together if event.request_id == one.id] for one in asked] == alone
    assert n_accepted > 0
    assert (drafts.stats().draft_tokens_accepted_total > n_accepted) is (llama.info.rows_alike > len(asked))
    drafts.rest()


def test_a_prompt_after_drafts_in_its_stream_is_computed_as_a_prompt(llama: Llama) -> None:
    """Both with all of their logits, so that llama.cpp takes the one's graph for the other."""
    places = np.arange(5, dtype=np.int32)
    prompt = Batch(tokens(5), places, np.zeros(5, np.int32), np.ones(5, np.int8))
    expected = {}
    for rows in (False, True):
        compute(llama, 1, 0, tokens(20))
        expected[rows] = np.array(llama.decode(replace(prompt, rows=rows)))
        llama.clear()
    for rows in (False, True, False):
        assert np.array_equal(llama.decode(replace(prompt, rows=rows)), expected[rows])
        llama.remove(0)


@pytest.mark.parametrize(("whole", "length"), [(WINDOW, 290), (600, 576), (900, 832)])
def test_a_copy_and_a_snapshot_continue_with_the_same_bits(llama: Llama, whole: int, length: int) -> None:
    prompt, more = tokens(whole), tokens(20, 1)
    compute(llama, 0, 0, prompt)
    if whole > WINDOW:
        assert length % ALIGN == 0
        llama.remove(0, length)
    llama.copy_prefix(0, 3, length)
    assert llama.is_whole(3, length)
    assert llama.restore(6, llama.save(0), length)
    llama.remove(0, length)
    expected = compute(llama, 0, length, more)
    assert np.array_equal(compute(llama, 3, length, more), expected)
    assert np.array_equal(compute(llama, 6, length, more), expected)


def test_a_copy_follows_what_its_source_has_become(llama: Llama) -> None:
    compute(llama, 0, 0, tokens(100))
    llama.copy_prefix(0, 1, 100)
    llama.remove(0, 50)
    compute(llama, 0, 50, tokens(30, 1))
    llama.copy_prefix(0, 2, 80)
    more = tokens(10, 2)
    assert np.array_equal(compute(llama, 2, 80, more), compute(llama, 0, 80, more))


@pytest.mark.skipif(not psutil.LINUX, reason="pages are given back on Linux only")
def test_eight_streams_of_8192_cells_take_memory_for_their_tokens_only(llama: Llama) -> None:
    every_cell = 8 * 8192 * 18 * 2 * 256 * 2  # layers, keys and values, width, float16
    before = psutil.Process().memory_info().rss
    for seq_id in range(8):
        compute(llama, seq_id, 0, tokens(64, seq_id))
    held = psutil.Process().memory_info().rss
    llama.clear()
    assert held - before < every_cell / 4
    assert psutil.Process().memory_info().rss < before + (held - before) / 2
