"""Our own products of prompts, in llama.cpp's graphs with real models: taken over, nearer to float32, or left alone."""

import ctypes
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp

from models.store.store import StoredModel
from runtime.errors import LoadFailed
from runtime.llama.handle import describe_prompts
from runtime.llama.interface import Batch, LoadOptions
from runtime.llama.model import Llama, load
from runtime.prefill import prompts
from runtime.prefill.library import Panels
from runtime.prefill.prompts import Race

STOCK = LoadOptions(n_ctx=512, n_batch=256, n_seq_max=2, n_threads=1)
OWN = replace(STOCK, prefill="own")
Loader = Callable[[Path, LoadOptions], Llama]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for libraries and decisions, the same for all tests: a process can load one library only."""
    folder = tmp_path_factory.getbasetemp() / "prefill-home"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(prompts, "default_home", lambda: folder)
    if (state := describe_prompts()).startswith("by llama.cpp:"):
        pytest.skip(state)
    return folder


@pytest.fixture
def loaded() -> Iterator[Loader]:
    models: list[Llama] = []

    def open_model(path: Path, options: LoadOptions) -> Llama:
        models.append(load(path, options))
        return models[-1]

    yield open_model
    for model in models:
        model.close()


def last_logits(llama: Llama, tokens: np.ndarray, seq_id: int = 0) -> np.ndarray:
    n = len(tokens)
    llama.clear()
    batch = Batch(tokens, np.arange(n, dtype=np.int32), np.full(n, seq_id, np.int32), np.arange(n) == n - 1)
    return np.array(llama.decode(batch)[0], np.float64)


def texts(llama: Llama, length: int) -> list[np.ndarray]:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    tokens = np.array(llama.tokenizer.encode(text, add_special=False, parse_special=False), np.int32)
    return [tokens[start : start + length] for start in range(0, 6 * length, length)]


F32, F16 = 0, 1


def in_floats(path: Path, target: Path, kind: int) -> Path:
    """The weights as float32 or rounded to float16."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = kind, True, 2
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return target


@pytest.mark.parametrize("name", ["email-triage", "email-triage in float16", "gemma-3-270m"])
def test_logits_are_no_farther_from_float32(
    name: str, email_triage: StoredModel, base_gguf: Path, tmp_path: Path, loaded: Loader
) -> None:
    """In streams attention is our own too. Of float16 only these: in one cache nearly all of either distance comes from
    llama.cpp's attention."""
    path = base_gguf if name == "gemma-3-270m" else email_triage.gguf
    if name.endswith("float16"):
        path = in_floats(path, tmp_path / "f16.gguf", F16)
    exact = loaded(in_floats(path, tmp_path / "f32.gguf", F32), STOCK)
    asked = texts(exact, 100)
    wanted = [last_logits(exact, tokens) for tokens in asked]
    ways = ((False, "prompts"), (True, "prompts and attention"))
    for streams, made in ways[1:] if name.endswith("float16") else ways:
        stock, own = (loaded(path, replace(way, streams=streams)) for way in (STOCK, OWN))
        assert own.info.backend == stock.info.backend + f", {made} by Deskside"

        def far(llama: Llama) -> float:
            rows = zip(asked, wanted, strict=True)
            return float(np.mean([np.sqrt(np.mean((last_logits(llama, tokens) - row) ** 2)) for tokens, row in rows]))

        assert far(own) <= far(stock)


def test_a_model_with_attention_of_another_kind_keeps_llama_cpps(
    email_triage: StoredModel, loaded: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Panels, "attend", lambda *_, **__: None)
    ways = (replace(STOCK, streams=True), replace(OWN, streams=True))
    stock, own = (loaded(email_triage.gguf, way) for way in ways)
    assert own.info.backend == stock.info.backend + ", prompts by Deskside"
    tokens = texts(stock, 100)[0]
    assert np.abs(last_logits(own, tokens) - last_logits(stock, tokens)).max() < 2


def test_few_rows_are_computed_as_by_stock(email_triage: StoredModel, loaded: Loader) -> None:
    stock, own = loaded(email_triage.gguf, STOCK), loaded(email_triage.gguf, OWN)
    for tokens in texts(stock, prompts.MIN_ROWS - 1):
        assert np.array_equal(last_logits(own, tokens), last_logits(stock, tokens))


def test_two_models_in_one_process_keep_their_own_weights(
    email_triage: StoredModel, base_gguf: Path, loaded: Loader
) -> None:
    tokens = np.arange(300, 364, dtype=np.int32)
    first, second = loaded(base_gguf, OWN), loaded(email_triage.gguf, OWN)
    alone, other = last_logits(first, tokens), last_logits(second, tokens)
    assert len(alone) != len(other)
    assert np.array_equal(last_logits(first, tokens), alone)
    second.close()
    again = loaded(email_triage.gguf, OWN)
    assert np.array_equal(last_logits(again, tokens), other)
    assert np.array_equal(last_logits(first, tokens), alone)


@pytest.mark.parametrize(("stock_ms", "own_ms"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_race_decides_and_is_run_once(
    stock_ms: float,
    own_ms: float,
    email_triage: StoredModel,
    loaded: Loader,
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
) -> None:
    raced = []

    def race(seconds: Callable[[bool], float]) -> Race:
        raced.append(seconds(False))
        raced.append(seconds(True))
        return Race(stock_ms, own_ms)

    monkeypatch.setattr(prompts, "race", race)
    for kept in home.glob("prefill/*.json"):
        kept.unlink()
    stock = loaded(email_triage.gguf, STOCK)
    tokens = texts(stock, 100)[0]
    wanted = last_logits(loaded(email_triage.gguf, OWN) if own_ms < stock_ms else stock, tokens)
    for _ in range(2):
        auto = loaded(email_triage.gguf, replace(STOCK, prefill="auto"))
        assert ("Deskside" in auto.info.backend) is (own_ms < stock_ms)
        assert np.array_equal(last_logits(auto, tokens), wanted)
    assert len(raced) == 2
    (kept,) = home.glob("prefill/*.json")
    assert json.loads(kept.read_text())["own_ms"] == own_ms


def test_without_a_compiler_stock_answers_and_own_is_refused(
    email_triage: StoredModel, loaded: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    tokens = np.arange(300, 400, dtype=np.int32)
    fallen = loaded(email_triage.gguf, replace(STOCK, prefill="auto"))
    assert "Deskside" not in fallen.info.backend
    assert np.array_equal(last_logits(fallen, tokens), last_logits(loaded(email_triage.gguf, STOCK), tokens))
    with pytest.raises(LoadFailed, match=r"prefill is 'own'.*set it to auto or stock"):
        load(email_triage.gguf, OWN)


def test_prompts_of_two_sequences_share_a_step(email_triage: StoredModel, loaded: Loader) -> None:
    own = loaded(email_triage.gguf, OWN)
    first, second = texts(own, 100)[:2]
    alone = last_logits(own, second, seq_id=1)
    own.clear()
    n = len(first) + len(second)
    positions = np.concatenate([np.arange(100), np.arange(100)]).astype(np.int32)
    wanted = np.isin(np.arange(n), (99, 199))
    both = Batch(np.concatenate([first, second]), positions, np.repeat(np.array([0, 1], np.int32), 100), wanted)
    assert np.abs(own.decode(both)[1] - alone).max() < 1
