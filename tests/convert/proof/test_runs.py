"""The first decode of a converted file, in a child process."""

from pathlib import Path

import pytest

from convert.errors import VerifyFailed
from convert.proof.runs import verify_runs
from convert.tokenizer.chat_template import ChatFormat
from tests.support.convert.tiny import END, write_model

NO_CHAT = ChatFormat(None, None, "nowhere")


def test_a_sound_file_runs_and_this_process_works_meanwhile(tmp_path: Path) -> None:
    done: list[str] = []
    verify_runs(write_model(tmp_path / "x.gguf"), ChatFormat(None, END, "a test"), lambda: done.append("meanwhile"))
    assert done == ["meanwhile"]


def test_a_file_that_llama_cpp_cannot_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    model = write_model(tmp_path / "x.gguf")
    model.write_bytes(model.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(VerifyFailed, match=r"cannot be loaded.*blk\.1\.ffn_up\.weight"):
        verify_runs(model, NO_CHAT)


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        (ChatFormat("{{ messages }}", None, "a test"), "has another chat template than the one written: None"),
        (ChatFormat(None, END + 1, "a test"), f"token {END + 1} ends a turn, but llama.cpp does not know it"),
    ],
)
def test_a_file_without_its_template_or_end_is_refused(tmp_path: Path, chat: ChatFormat, says: str) -> None:
    with pytest.raises(VerifyFailed, match=says):
        verify_runs(write_model(tmp_path / "x.gguf"), chat)


def test_an_error_meanwhile_is_raised(tmp_path: Path) -> None:
    def fail() -> None:
        raise VerifyFailed("the disk has another")

    with pytest.raises(VerifyFailed, match="the disk has another"):
        verify_runs(write_model(tmp_path / "x.gguf"), NO_CHAT, fail)
