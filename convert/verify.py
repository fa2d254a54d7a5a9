"""The proof that a converted file runs: llama.cpp loads it, answers with finite logits and knows where to stop."""

from pathlib import Path

import numpy as np

from runtime.errors import EngineError
from runtime.llama import Llama, LoadOptions, load
from runtime.llama_prefill import last_logits

from .errors import VerifyFailed
from .template import ChatFormat

_PROBE = "Hello"


def verify_runs(path: Path, chat: ChatFormat) -> None:
    """Load the GGUF at `path` and decode one token after a short text. Raises VerifyFailed saying what is wrong."""
    try:
        llama = load(path, LoadOptions(n_ctx=256, n_batch=64, n_seq_max=1, n_threads=1, gpu_layers=0))
    except EngineError as error:
        raise VerifyFailed(f"the converted file cannot be loaded: {error}") from error
    try:
        _check(llama, chat)
    except EngineError as error:
        raise VerifyFailed(f"the converted file cannot be run: {error}") from error
    finally:
        llama.close()


def _check(llama: Llama, chat: ChatFormat) -> None:
    if llama.info.chat_template != chat.template:
        raise VerifyFailed(
            f"the converted file has another chat template than was written: {llama.info.chat_template!r}"
        )
    if chat.end_of_turn is not None and not llama.tokenizer.is_end(chat.end_of_turn):
        raise VerifyFailed(f"token {chat.end_of_turn} ends a turn, but llama.cpp does not take it for an end")
    check_logits(last_logits(llama, probe(llama)))


def probe(llama: Llama) -> list[int]:
    """The tokens of a short text. Raises VerifyFailed if there are none."""
    tokens = llama.tokenizer.encode(_PROBE, add_special=True, parse_special=False)
    if not tokens:
        raise VerifyFailed(f"the converted file's tokenizer makes no token of {_PROBE!r}")
    return tokens[: llama.info.n_batch]


def check_logits(logits: np.ndarray) -> None:
    """Raise VerifyFailed if the logits, shape (n_vocab,), say nothing."""
    if not np.isfinite(logits).all():
        raise VerifyFailed(f"{int((~np.isfinite(logits)).sum())} of {logits.size} logits are not finite")
    if logits.min() == logits.max():
        raise VerifyFailed(f"all {logits.size} logits are {logits.min():g}: the weights say nothing")
