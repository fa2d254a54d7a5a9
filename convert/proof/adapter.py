"""Prove that a LoRA GGUF runs: llama.cpp applies it to its base, and the logits change."""

from pathlib import Path

import numpy as np

from convert.errors import VerifyFailed
from convert.tokenizer.chat_template import ChatFormat
from runtime.errors import EngineError
from runtime.llama.decode import last_logits
from runtime.llama.model import Llama, LoadOptions, load

from .runs import check_logits, probe


def verify_adapter(base: Path, adapter: Path, chat: ChatFormat, *, is_zero: bool) -> None:
    """Load the adapter on its base and decode one token with and without it.

    Raises VerifyFailed unless the logits are finite and, if not `is_zero`, differ from the base's.
    """
    options = LoadOptions(n_ctx=256, n_batch=64, n_seq_max=1, n_threads=1, gpu_layers=0, adapters={"new": adapter})
    try:
        llama = load(base, options)
    except EngineError as error:
        raise VerifyFailed(f"the adapter's file cannot be loaded on its base: {error}") from error
    try:
        _check(llama, chat, is_zero=is_zero)
    except EngineError as error:
        raise VerifyFailed(f"the adapter's file cannot be run on its base: {error}") from error
    finally:
        llama.close()


def _check(llama: Llama, chat: ChatFormat, *, is_zero: bool) -> None:
    if chat.end_of_turn is not None and not llama.tokenizer.is_end(chat.end_of_turn):
        raise VerifyFailed(
            f"token {chat.end_of_turn} ends a turn of this adapter, but not of the base; only a merged model can "
            "change that: leave out --hot"
        )
    tokens = probe(llama)
    bare = last_logits(llama, tokens)
    llama.use_adapter("new")
    tuned = last_logits(llama, tokens)
    check_logits(tuned)
    if np.array_equal(bare, tuned) and not is_zero:
        raise VerifyFailed("the adapter was applied, but the logits are those of the base alone")
