"""The decoder computes what the engine computes, for every covered family; others are refused by name."""

from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint.source import open_checkpoint
from convert.errors import ArchitectureUnknown, SourceInvalid
from convert.training.base import COVERED, read_shape
from tests.support.convert.hf_tiny import CONFIGS, N_VOCAB, open_tiny, write_folder
from tests.support.convert.tiny import write_model as write_tiny
from tests.support.convert.trained import engine_logits, jax_logits, tiny_gguf, weights_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def text_tokens(n: int, n_vocab: int) -> np.ndarray:
    return np.random.default_rng(1).integers(3, n_vocab, n)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_agrees_with_the_engine(tmp_path: Path, family: str) -> None:
    path = tiny_gguf(tmp_path, family)
    tokens = text_tokens(48, N_VOCAB)  # three windows of Gemma's
    wanted = engine_logits(path, tokens, 20)
    found = jax_logits(path, tokens, 20)
    # the engine rounds keys and values to float16
    assert np.abs(found - wanted).max() < 0.01 * wanted.std()
    assert np.abs(np.roll(found, 1, axis=0) - wanted).max() > wanted.std()  # the bound can tell


def test_training_all_layers_changes_nothing_before_the_first_step(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, "gemma3")
    tokens = text_tokens(30, N_VOCAB)
    frozen, trained = (jax_logits(path, tokens, 4, n_trained=n) for n in (1, 2))
    assert np.allclose(frozen, trained, atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(FAMILIES)))
def test_other_families_are_refused_by_name(tmp_path: Path, family: str) -> None:
    checkpoint = open_tiny(write_folder(tmp_path / family, family))
    with pytest.raises(ArchitectureUnknown, match=f"'{checkpoint.header.architecture}'.*{COVERED[0]}.*--adapter"):
        read_shape(checkpoint.header)
    checkpoint.close()


def test_a_model_of_experts_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "experts.gguf", "llama", experts=4))
    with pytest.raises(SourceInvalid, match=r"expert_count.* 4: mixtures of experts"):
        read_shape(checkpoint.header)


def test_yarn_is_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    path = tiny_gguf(tmp_path, "mistral", rope_scaling=scaling)
    with pytest.raises(SourceInvalid, match=r"rope.scaling.type' 'yarn': only linear"):
        weights_of(path)


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(2, np.float32)}
    path = write_tiny(tmp_path / "more.gguf", "llama", changes=extra)
    with pytest.raises(SourceInvalid, match=r"blk\.0\.attn_sinks\.weight.*leave out"):
        weights_of(path)
