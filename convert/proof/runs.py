"""Prove that a converted file runs: llama.cpp loads it, gives finite logits and knows the end of a turn.

A LoRA GGUF runs if the logits of its base change with it.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.child import Child, read_job, tell
from convert.errors import SourceInvalid, VerifyFailed
from convert.families import BY_ARCHITECTURE
from models.gguf.header import Header
from runtime.errors import EngineError
from runtime.llama.decode import last_logits
from runtime.llama.handle import short_set
from runtime.llama.interface import LoadOptions
from runtime.llama.model import Llama, load, require_servable

if TYPE_CHECKING:
    from convert.tokenizer.chat_template import ChatFormat

# Long enough for rotary embeddings to matter, which do nothing at the first position.
_PROBE = "Hello, how are you? " * 2
# Of the logits' spread: a context's size may change how llama.cpp cuts its sums.
_SAME_LOGITS = 1e-2


def verify_runs(path: Path, chat: "ChatFormat", meanwhile: Callable[[], None] = lambda: None) -> None:
    """Load the GGUF at `path` and decode one token after a short text, in a child process, which may abort.

    Calls `meanwhile` while the child works. Raises VerifyFailed with the reason.
    """
    job = {"file": str(path), "template": chat.template, "end_of_turn": chat.end_of_turn}
    with Child("convert.proof.runs", job) as child:
        meanwhile()
        code, complaint = child.wait(lambda done, total: None)
    if code != 0:
        end = f"llama.cpp ended with {signal.Signals(-code).name}: " if code < 0 else ""
        raise VerifyFailed(f"{end}{complaint}")


def check_kind(header: Header) -> None:
    """Raise SourceInvalid for a GGUF of a kind that is not served, before any work is done.

    A family of ours needs no look: llama.cpp reads the whole vocabulary for it.
    """
    if header.architecture in BY_ARCHITECTURE or not header.path.is_file():
        return
    try:
        require_servable(header.path)
    except EngineError as error:
        families = ", ".join(sorted(BY_ARCHITECTURE))
        raise SourceInvalid(f"{error}. Fine-tune a base of one of these families instead: {families}") from error


def check_runs(path: Path, template: str | None, end_of_turn: int | None) -> None:
    """The check of `verify_runs`, in this process."""
    # Repacked weights would be in memory twice.
    options = LoadOptions(n_ctx=256, n_batch=64, n_seq_max=1, n_threads=1, gpu_layers=0, repack=False)
    try:
        rotates_by_length = short_set(path) is not None  # reads the head: before the weights are in memory
        llama = load(path, options)
    except EngineError as error:
        raise VerifyFailed(f"the converted file cannot be loaded: {error}") from error
    try:
        logits = _check(llama, template, end_of_turn)
    except EngineError as error:
        raise VerifyFailed(f"the converted file cannot be run: {error}") from error
    finally:
        llama.close()
    if rotates_by_length:
        from runtime.config import RuntimeConfig  # the child needs no settings for any other file

        _check_context(path, replace(options, n_ctx=RuntimeConfig().context), logits)


def _check_context(path: Path, served: LoadOptions, expected: np.ndarray) -> None:
    """Raise VerifyFailed unless the model computes the same in a context of the size that is served.

    For files from which llama.cpp takes other weights in a larger context: a model is wrong there without an error.
    """
    try:
        llama = load(path, served)
    except EngineError as error:
        raise VerifyFailed(f"the converted file cannot be loaded as it is served: {error}") from error
    try:
        found = last_logits(llama, probe(llama))
    finally:
        llama.close()
    if not np.allclose(found, expected, rtol=0, atol=_SAME_LOGITS * float(np.ptp(expected))):
        raise VerifyFailed(
            f"in a context of {served.n_ctx} tokens the logits differ by {float(np.abs(found - expected).max()):g} "
            "from those in a small one: llama.cpp takes other rotary embeddings there"
        )


def _check(llama: Llama, template: str | None, end_of_turn: int | None) -> np.ndarray:
    """The logits after the probe, checked like the rest."""
    if llama.info.chat_template != template:
        raise VerifyFailed(
            f"the converted file has another chat template than the one written: {llama.info.chat_template!r}"
        )
    if end_of_turn is not None and not llama.tokenizer.is_end(end_of_turn):
        raise VerifyFailed(f"token {end_of_turn} ends a turn, but llama.cpp does not know it as an end token")
    logits = np.array(last_logits(llama, probe(llama)))
    check_logits(logits)
    return logits


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
        _check_applied(llama, ends, is_zero=is_zero)
    except EngineError as error:
        raise VerifyFailed(f"the adapter's file cannot be run on its base: {error}") from error
    finally:
        llama.close()


def _check_applied(llama: Llama, ends: Sequence[int], *, is_zero: bool) -> None:
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


def probe(llama: Llama) -> list[int]:
    """The tokens of a short text. Raises VerifyFailed if there are none."""
    tokens = llama.tokenizer.encode(_PROBE, add_special=True, parse_special=False)
    if not tokens:
        raise VerifyFailed(f"the converted file's tokenizer makes no token of {_PROBE!r}")
    return tokens[: llama.info.n_batch]


def check_logits(logits: np.ndarray) -> None:
    """Raise VerifyFailed if logits, shape (n_vocab,), are not finite or are all equal."""
    if not np.isfinite(logits).all():
        raise VerifyFailed(f"{int((~np.isfinite(logits)).sum())} of {logits.size} logits are not finite")
    if logits.min() == logits.max():
        raise VerifyFailed(f"all {logits.size} logits are {logits.min():g}: the weights say nothing")


def main() -> int:
    """Check the file of the job on standard input. An error is one line on standard output and exit code 1."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # if llama.cpp aborts, its reason must be the last line
    job = read_job()
    try:
        check_runs(Path(job["file"]), job["template"], job["end_of_turn"])
    except VerifyFailed as error:
        tell(str(error).replace("\n", " "))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
