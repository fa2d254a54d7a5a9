"""A model with two sets of rotary embeddings computes short prompts alike in a KV cache of any size."""

from pathlib import Path

import numpy as np
import pytest

from convert.errors import VerifyFailed
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.proof.runs import check_runs
from models.store.store import Store
from runtime.config import RuntimeConfig
from runtime.llama.decode import last_logits
from runtime.llama.interface import LoadOptions
from runtime.llama.model import load
from tests.support.convert.hf_tiny import weights, write_folder
from tests.support.convert.tiny import grid
from tests.support.convert.tiny_tokenizers import QWEN2, byte_level, save

from ..test_pipeline import Notes

N_TOKENS = 704
ORIGINAL = 256
TOKENS = list(range(40, 100))


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Phi-4-mini whose rotations change beyond 256 tokens."""
    folder = save(byte_level(QWEN2), tmp_path_factory.mktemp("hf") / "phi")
    wide = {
        name: grid((N_TOKENS, 64), 7, span=500, unit=1000) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    write_folder(folder, "phi3", weights("phi3") | wide, vocab_size=N_TOKENS, eos_token_id=703)
    store, notes = Store(tmp_path_factory.mktemp("store")), Notes()
    stored = convert(ConvertRequest(source=str(folder), name="phi", quantization="F16"), store, notes)
    assert any("256 tokens together" in warning and "--long-prompts" in warning for warning in notes.warnings)
    return stored.gguf


def logits(path: Path, options: LoadOptions) -> tuple[np.ndarray, int]:
    llama = load(path, options)
    try:
        return last_logits(llama, TOKENS), llama.info.n_ctx_train
    finally:
        llama.close()


def test_short_prompts_are_computed_alike_in_a_context_of_any_size(phi: Path) -> None:
    small, _ = logits(phi, LoadOptions(n_ctx=ORIGINAL, n_seq_max=1))
    served, longest = logits(phi, LoadOptions(n_ctx=RuntimeConfig().context, n_seq_max=1))
    np.testing.assert_allclose(served, small, atol=1e-3 * np.ptp(small))
    assert longest == ORIGINAL


def test_long_prompts_get_their_own_rotations_when_asked_for(phi: Path) -> None:
    small, _ = logits(phi, LoadOptions(n_ctx=ORIGINAL, n_seq_max=1))
    long, longest = logits(phi, LoadOptions(n_ctx=RuntimeConfig().context, n_seq_max=1, long_prompts=True))
    assert np.abs(long - small).max() > 0.1 * np.ptp(small)
    assert longest == 1024


def test_a_context_that_computes_otherwise_is_found_before_the_model_is_installed(
    phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_runs(phi, None, None)
    monkeypatch.setattr("runtime.llama.handle.short_set", lambda _: None)
    with pytest.raises(VerifyFailed, match="in a context of 8192 tokens the logits differ by"):
        check_runs(phi, None, None)
