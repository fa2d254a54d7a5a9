"""Every family converted by us and by llama.cpp's own converter: the same tensors, metadata, tokens and logits."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.gguf.fields import read_fields
from runtime.config import RuntimeConfig
from runtime.llama.decode import last_logits
from runtime.llama.interface import LoadOptions
from runtime.llama.model import load

from .allowances import allowed
from .conftest import ToGguf
from .decoding import all_logits, encode
from .families import BY_NAME, CASES
from .ours import Kind, read_tensors, spelled

pytestmark = pytest.mark.oracle

CONVERTED = [case.name for case in CASES if case.converter]
LONGROPE = [case.name for case in CASES if "long_factor" in (case.config.get("rope_scaling") or {})]
MAX_RELATIVE_ERROR = 1e-3


@pytest.mark.parametrize("kind", ["f16", "f32"])
@pytest.mark.parametrize("name", CONVERTED)
def test_tensors_are_equal_byte_for_byte(name: str, kind: Kind, references: Path, ours: ToGguf) -> None:
    theirs, made = read_tensors(references / "ref" / f"{name}-{kind}.gguf"), read_tensors(ours(name, kind))
    assert made.keys() == theirs.keys()
    differing = [tensor for tensor in theirs if made[tensor] != theirs[tensor]]
    assert not differing, [(tensor, made[tensor][:2], theirs[tensor][:2]) for tensor in differing]


@pytest.mark.parametrize("kind", ["f16", "f32"])
@pytest.mark.parametrize("name", CONVERTED)
def test_metadata_is_equal_key_by_key(name: str, kind: Kind, references: Path, ours: ToGguf) -> None:
    theirs, made = read_fields(references / "ref" / f"{name}-{kind}.gguf"), read_fields(ours(name, kind))
    differing = {
        key: (spelled(made, key), spelled(theirs, key))
        for key in sorted(theirs.keys() | made.keys())
        if theirs.get(key) != made.get(key) and not allowed(key, made, theirs)
    }
    assert not differing, f"key: (ours, llama.cpp's): {differing}"


@pytest.mark.parametrize(("name", "length"), [(case.name, length) for case in CASES for length in case.lengths])
def test_logits_are_those_of_transformers(name: str, length: int, references: Path, ours: ToGguf) -> None:
    """The largest difference of a logit, over the largest logit: of float32 weights, in llama.cpp and in torch."""
    saved = np.load(references / "ref" / f"{name}-{length}.npz")
    logits = all_logits(ours(name, "f32"), saved["tokens"])
    error = float(np.abs(logits - saved["logits"]).max() / np.abs(saved["logits"]).max())
    assert error < MAX_RELATIVE_ERROR


@pytest.mark.parametrize("name", BY_NAME)
def test_texts_become_the_tokens_of_the_tokenizers_library(name: str, references: Path, ours: ToGguf) -> None:
    expected: dict[str, list[int]] = json.loads((references / "ref" / f"{name}-ids.json").read_text())
    path = ours(name, "f16")
    differing = {text: (ids, found) for text, ids in expected.items() if (found := encode(path, text)) != ids}
    assert not differing, f"text: (tokenizers', llama.cpp's): {differing}"


@pytest.mark.parametrize("name", LONGROPE)
def test_short_prompts_keep_their_logits_in_the_context_that_is_served(
    name: str, references: Path, ours: ToGguf
) -> None:
    """transformers rotates by the prompt's length, llama.cpp by the context's; keys and values are float16 here."""
    saved = np.load(references / "ref" / f"{name}-40.npz")
    llama = load(ours(name, "f32"), LoadOptions(n_ctx=RuntimeConfig().context, n_seq_max=1))
    try:
        found = last_logits(llama, saved["tokens"].tolist())
    finally:
        llama.close()
    expected = saved["logits"][-1]
    assert float(np.abs(found - expected).max() / np.abs(expected).max()) < 10 * MAX_RELATIVE_ERROR
