"""The trainer computes what the engine computes, with the real base on a real text."""

from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint.source import open_checkpoint
from convert.training.base import write_model
from models.common.console import LineReporter
from runtime.llama.model import load_tokenizer
from tests.support.convert.trained import engine_logits, jax_logits

pytestmark = [pytest.mark.model, pytest.mark.finetune]
TEXT = Path(__file__).parents[2] / "models" / "email_triage" / "data" / "README.md"


def test_the_decoder_agrees_with_the_engine(base_gguf: Path, tmp_path: Path) -> None:
    """At F16 the logits spread by 4.7, and the largest difference was 0.04."""
    pytest.importorskip("jax", reason="needs the extra `finetune`")
    checkpoint, path = open_checkpoint(base_gguf), tmp_path / "base.gguf"
    write_model(checkpoint, path, "write F16", LineReporter())
    checkpoint.close()
    text = TEXT.read_text(encoding="utf-8")
    tokens = np.array(load_tokenizer(path).encode(text, add_special=True, parse_special=False)[:200])
    wanted, found = engine_logits(path, tokens, 30), jax_logits(path, tokens, 30)
    assert np.abs(found - wanted).max() < 0.1
    assert (found.argmax(1) == wanted.argmax(1)).all()
