"""Prove that a LoRA GGUF runs: llama.cpp applies it to its base, and the logits change."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.errors import VerifyFailed
from runtime.errors import EngineError
from runtime.llama.decode import last_logits
from runtime.llama.model import Llama, LoadOptions, load

from .runs import check_logits, probe


def verify_adapter(base: Path, adapter: Path, ends: Sequence[int], *, is_zero: bool) -> None:
    """Load the adapter on its base and decode one token with and without it. `ends`: the tokens that end its answers.

    Raises VerifyFailed unless the logits are finite and, if not `is_zero`, differ from the base's.
    """
    options = LoadOptions(n_ctx=256, n_batch=64, n_seq_max=1, n_threads=1, gpu_layers=0, adapters={"new": adapter})
    try:
        llama = load(base, options)
    except EngineError as error:
        raise VerifyFailed(f"the adapter's file cannot be loaded on its base: {error}") from error
    try:
        _check(llama, ends, is_zero=is_zero)
    except EngineError as error:
        raise VerifyFailed(f"the adapter's file cannot be run on its base: {error}") from error
    finally:
        llama.close()


def _check(llama: Llama, ends: Sequence[int], *, is_zero: bool) -> None:
    if foreign := [token for token in ends if not llama.tokenizer.is_end(token)]:
        raise VerifyFailed(
            f"token {foreign[0]} ends a turn of this adapter, but not of the base; only a merged model can "
            "change that: leave out --hot"
        )
    tokens = probe(llama)
    bare = last_logits(llama, tokens)
    llama.use_adapter("new")
    tuned = last_logits(llama, tokens)
    check_logits(tuned)
    if np.array_equal(bare, tuned) and not is_zero:
        raise VerifyFailed("the adapter was applied, but the logits are those of the base alone")
