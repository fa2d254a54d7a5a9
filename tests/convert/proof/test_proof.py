"""The comparison in a child process: its result reaches the user at once, as an error of the right kind."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from convert.checkpoint.source import open_checkpoint
from convert.errors import TokenizerInvalid, VerifyFailed
from convert.proof.proof import Proof
from models.common.chat_records import read_chat_records
from models.gguf.header import Header
from tests.convert.test_pipeline import Notes
from tests.convert.test_pipeline_folder import checkpoint, examples
from tests.support.convert.tiny_tokenizers import QWEN2, byte_level, save

__all__ = ["checkpoint", "examples"]


@pytest.fixture
def header(checkpoint: Path) -> Header:
    source = open_checkpoint(checkpoint)
    source.close()
    return source.header


def write_on(proof: Proof) -> None:
    """Ask after the comparison as the writing does, with each piece, for two minutes at most."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        proof.check(Notes())
        time.sleep(0.01)


def test_the_comparison_is_reported(checkpoint: Path, examples: Path, header: Header, tmp_path: Path) -> None:
    def told(n_records: int) -> list[str]:
        notes = Notes()
        with closing(Proof(checkpoint)) as proof:
            proof.begin(header, read_chat_records(examples)[:n_records], tmp_path)
            proof.end(notes)
        return notes.notes

    without, three = told(0), told(3)
    assert [note.partition(":")[0] for note in three if ":" in note] == ["tokenizer", "chat template"]
    n_texts, n_prompts = (int(note.split()[1 + place]) for place, note in enumerate((three[0], three[-1])))
    assert n_texts == int(without[0].split()[1]) + 6, "the prompt and the answer of each"
    assert n_prompts == int(without[-1].split()[2]) + 3


def test_a_difference_stops_the_writing(checkpoint: Path, header: Header, tmp_path: Path) -> None:
    other = save(byte_level(QWEN2, size=600), tmp_path / "other", eos_token="<|im_end|>")
    with closing(Proof(other)) as proof:
        proof.begin(header, (), tmp_path)
        with pytest.raises(VerifyFailed, match="the vocabulary is not the checkpoint's"):
            write_on(proof)


def test_a_tokenizer_that_its_own_library_refuses_is_a_tokenizer_error(header: Header, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    with closing(Proof(tmp_path)) as proof:
        proof.begin(header, (), tmp_path)
        with pytest.raises(TokenizerInvalid, match=r"tokenizer\.json' cannot be loaded"):
            proof.end(Notes())


def test_a_child_that_dies_is_a_failure(checkpoint: Path, header: Header, tmp_path: Path) -> None:
    with closing(Proof(checkpoint)) as proof:
        os.kill(proof.pid, signal.SIGKILL)
        proof.begin(header, (), tmp_path)
        with pytest.raises(VerifyFailed, match="the comparison ended with SIGKILL"):
            proof.end(Notes())
