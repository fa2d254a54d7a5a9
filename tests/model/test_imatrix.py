"""An importance matrix of the real model: every matrix of every layer, and what shares its inputs has the same one."""

from pathlib import Path

import numpy as np
import pytest

from convert.quantize.imatrix import collect
from models.gguf.header import read_header
from models.store.store import StoredModel
from runtime.llama.model import load_tokenizer

pytestmark = pytest.mark.model

MAILS = (
    "Does anyone know why rpm refuses to rebuild this package? It worked before the update.",
    "Congratulations! You have been selected to receive a free holiday, reply now.",
)


def test_it_holds_every_layer_of_the_fine_tune(email_triage: StoredModel, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(email_triage.gguf)
    sequences = [tokenizer.encode(mail, add_special=True, parse_special=False) for mail in MAILS]
    told: list[tuple[int, int]] = []
    found = collect(email_triage.gguf, sequences, tmp_path / "found", lambda done, total: told.append((done, total)))
    tensors = read_header(email_triage.gguf).tensors
    matrices = {name for name, info in tensors.items() if name.startswith("blk.") and len(info.shape) == 2}
    assert found.entries.keys() == matrices
    total = sum(map(len, sequences))
    assert told[-1] == (total, total)
    for name, entry in found.entries.items():
        assert entry.sums.shape == (1, tensors[name].shape[-1])
        assert entry.counts == [total]
        assert (entry.sums >= 0).all()
        assert entry.sums.max() > 2 * entry.sums.mean(), f"{name} weighs all its columns alike"
    for layer in (0, 17):
        for same in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
            first, *others = (found.entries[f"blk.{layer}.{part}.weight"].sums for part in same)
            for other in others:
                np.testing.assert_array_equal(first, other)
