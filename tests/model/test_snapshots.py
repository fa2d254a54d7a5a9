"""Snapshots of the real model: restored ones continue as computed ones do, and one that cannot be cut is refused."""

from pathlib import Path

import numpy as np
import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.llama.interface import Batch, LoadOptions
from runtime.llama.model import Llama, load
from runtime.requests import Failed, Finished, Request, SamplingParams, TextDelta

pytestmark = pytest.mark.model

WINDOW = 512  # Gemma 3's
# The order of cells and of batches moves a logit by less (see test_engine.py); cells that are missing by 6 and more.
ROUNDING = 2.0


@pytest.fixture(scope="module")
def loaded(base_gguf: Path) -> Llama:
    return load(base_gguf, LoadOptions(n_ctx=2048, n_batch=256, n_seq_max=4, n_threads=1))


@pytest.fixture
def llama(loaded: Llama) -> Llama:
    loaded.clear()
    return loaded


def tokens(n_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1000, 20000, n_tokens).astype(np.int32)


def decode(llama: Llama, seq_id: int, start: int, part: np.ndarray) -> np.ndarray:
    """The logits after the last token."""
    for at in range(0, len(part), 256):
        chunk = part[at : at + 256]
        wants = np.zeros(len(chunk), np.int8)
        wants[-1] = 1
        positions = np.arange(start + at, start + at + len(chunk), dtype=np.int32)
        row = llama.decode(Batch(chunk, positions, np.full(len(chunk), seq_id, np.int32), wants))
    return np.array(row[0])


def test_the_library_says_how_long_a_snapshot_may_be_to_be_cut(llama: Llama) -> None:
    assert llama.info.cut_limit == WINDOW


@pytest.mark.parametrize("n_tokens", [100, WINDOW, 700])
def test_a_restored_sequence_continues_as_the_computed_one(llama: Llama, n_tokens: int) -> None:
    prompt, more = tokens(n_tokens), tokens(20, 1)
    decode(llama, 0, 0, prompt)
    data = llama.save(0)
    expected = decode(llama, 0, n_tokens, more)
    assert llama.restore(1, data, n_tokens)
    assert np.abs(decode(llama, 1, n_tokens, more) - expected).max() < ROUNDING


def test_a_snapshot_within_the_window_can_be_cut(llama: Llama) -> None:
    prompt, more = tokens(WINDOW), tokens(20, 1)
    decode(llama, 0, 0, prompt)
    assert llama.restore(1, llama.save(0), 300)
    llama.remove(0, 300)
    assert np.abs(decode(llama, 1, 300, more) - decode(llama, 0, 300, more)).max() < ROUNDING


def test_a_longer_one_is_refused_at_another_length_and_leaves_nothing_behind(llama: Llama) -> None:
    decode(llama, 0, 0, tokens(700))
    data = llama.save(0)
    assert not llama.restore(1, data, 600)
    assert not llama.restore(1, data[:1000].copy(), 700)
    assert not llama.is_whole(1, 600)
    decode(llama, 1, 0, tokens(50, 2))
    assert llama.is_whole(1, 50)


def test_cells_that_left_the_window_may_be_overwritten_and_are_missed(llama: Llama) -> None:
    """llama.cpp puts new tokens into such cells when its search meets them, whatever the sequence was kept for."""
    decode(llama, 1, 0, tokens(50))
    decode(llama, 0, 0, tokens(800))
    decode(llama, 2, 0, tokens(20))
    llama.remove(1)
    decode(llama, 3, 0, tokens(100, 3))
    assert llama.is_whole(0, 800)
    llama.copy_prefix(0, 1, 550)
    assert not llama.is_whole(1, 550)


def test_prompts_in_turn_are_answered_as_if_each_were_alone(llama: Llama) -> None:
    """There are cells for three, and one more waits at the second turn: it is found where it was or as a snapshot."""
    params = SamplingParams(8, temperature=0, ignore_eos=True)
    engine = Engine(llama, EngineOptions(snapshot_bytes=1 << 28, max_running=2))
    for turn in range(2):
        for seed in range(4):
            prompt = (*tokens(600, seed).tolist(), *(tokens(40, 9).tolist() if turn else ()))
            engine.add(Request("x", tuple(prompt), params))
            events = []
            while engine.has_work:
                events += engine.step()
            assert not [event for event in events if isinstance(event, Failed)]
            end = next(event for event in events if isinstance(event, Finished))
            assert end.usage.cached_tokens in ((576, 600) if turn else (0,))
            assert sum(len(event.token_ids) for event in events if isinstance(event, TextDelta)) == 8
