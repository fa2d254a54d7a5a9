"""The door to llama.cpp with the real model: what is reported, how text becomes tokens and back, what is refused."""

import threading
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import BatchInvalid, EngineError, InvalidRequest, LoadFailed, NoKvSlot
from runtime.llama.interface import Batch, LoadOptions
from runtime.llama.model import Llama, load, load_tokenizer

pytestmark = pytest.mark.model


def batch(n_tokens: int, *, seq_id: int = 0, start: int = 0, rows: int = 1) -> Batch:
    wants = np.zeros(n_tokens, np.int8)
    wants[n_tokens - rows :] = 1
    positions = np.arange(start, start + n_tokens, dtype=np.int32)
    return Batch(np.full(n_tokens, 1000, np.int32), positions, np.full(n_tokens, seq_id), wants)


def test_what_is_loaded_is_told(base: Llama) -> None:
    info = base.info
    assert (info.architecture, info.n_vocab, info.n_ctx, info.n_batch) == ("gemma3", 262_144, 256, 128)
    assert info.backend.endswith(")") or info.backend == "CPU"
    assert info.n_threads >= 1
    assert info.size_bytes > 200_000_000
    assert info.metadata["tokenizer.ggml.model"] == "llama"


def test_text_and_control_tokens(base: Llama) -> None:
    tokenizer = base.tokenizer
    text = "Grüße, 世界 😀\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text, add_special=True, parse_special=True)) == text
    assert tokenizer.encode("<end_of_turn>", add_special=False, parse_special=True) == [106]
    assert 106 not in tokenizer.encode("<end_of_turn>", add_special=False, parse_special=False)
    assert tokenizer.encode("x", add_special=True, parse_special=False)[0] == tokenizer.bos == 2
    assert (tokenizer.token_bytes(106), tokenizer.token_bytes(106, special=True)) == (b"", b"<end_of_turn>")
    assert {1, 106} <= set(tokenizer.end_tokens)
    assert "<end_of_turn>" in tokenizer.special_texts
    assert tokenizer.encode("", add_special=False, parse_special=False) == []


def test_a_vocabulary_can_be_loaded_alone(base_gguf: Path, base: Llama) -> None:
    tokenizer = load_tokenizer(base_gguf)
    assert tokenizer.encode("hello", add_special=True, parse_special=False) == base.tokenizer.encode(
        "hello", add_special=True, parse_special=False
    )


def test_tokens_that_are_not_there_are_refused(base: Llama) -> None:
    with pytest.raises(InvalidRequest, match="262144"):
        base.tokenizer.token_bytes(262_144)
    with pytest.raises(InvalidRequest, match="surrogate"):
        base.tokenizer.encode("a\ud800", add_special=False, parse_special=False)


def test_the_tokenizer_serves_many_threads(base: Llama) -> None:
    expected = base.tokenizer.encode("many threads at once " * 20, add_special=True, parse_special=True)
    found: list[list[int]] = []

    def work() -> None:
        for _ in range(20):
            found.append(base.tokenizer.encode("many threads at once " * 20, add_special=True, parse_special=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 80


def test_logits_come_for_the_rows_that_want_them(base: Llama) -> None:
    assert base.decode(batch(5, rows=0)).shape == (0, 262_144)
    assert base.decode(batch(3, start=5, rows=2)).shape == (2, 262_144)


def test_a_shared_prefix_gives_the_logits_of_a_fresh_run(base: Llama) -> None:
    base.decode(batch(40))
    fresh = base.decode(batch(2, start=40))[0].copy()
    base.copy_prefix(0, 1, 40)
    shared = base.decode(batch(2, seq_id=1, start=40))[0]
    assert np.abs(fresh - shared).max() < 1
    assert fresh.argmax() == shared.argmax()


@pytest.mark.parametrize(
    ("bad", "named"),
    [(batch(0, rows=0), "0 tokens"), (batch(129), "129"), (batch(40, rows=9), "9 rows"), (batch(2, start=7), "-1")],
    ids=["empty", "too-many-tokens", "too-many-rows", "position-gap"],
)
def test_bad_batches_are_refused_and_change_nothing(base: Llama, bad: Batch, named: str) -> None:
    base.decode(batch(2))
    with pytest.raises(BatchInvalid, match=named):
        base.decode(bad)
    assert base.decode(batch(1, start=2)).shape == (1, 262_144)


def test_a_full_cache_is_no_kv_slot_and_can_be_freed(base: Llama) -> None:
    base.decode(batch(128, rows=0))
    base.decode(batch(127, start=128, rows=0))
    with pytest.raises(NoKvSlot, match="2 tokens"):
        base.decode(batch(2, seq_id=1))
    base.remove(0, 128)
    base.decode(batch(2, seq_id=1))


def test_a_damaged_file_says_why(base_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with base_gguf.open("rb") as whole:
        cut.write_bytes(whole.read(20_000_000))
    with pytest.raises(LoadFailed, match=r"cut\.gguf.*not within the file bounds"):
        load(cut)


def test_closing_twice_is_harmless_and_use_afterwards_is_an_error(base_gguf: Path) -> None:
    llama = load(base_gguf, LoadOptions(n_ctx=256, n_batch=32, n_seq_max=2, n_threads=1))
    tokenizer = llama.tokenizer
    llama.close()
    llama.close()
    for use in (
        lambda: llama.decode(batch(1)),
        llama.clear,
        lambda: llama.remove(0),
        lambda: llama.copy_prefix(0, 1, 1),
    ):
        with pytest.raises(EngineError, match="closed"):
            use()
    assert tokenizer.decode(tokenizer.encode("still there", add_special=False, parse_special=False)) == "still there"
