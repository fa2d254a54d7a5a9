"""The first decode of a converted file, in a child process."""

from dataclasses import replace
from pathlib import Path

import pytest

from convert.errors import SourceInvalid, VerifyFailed
from convert.gguf_writer import write_head
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.proof.runs import check_kind, verify_runs
from convert.tokenizer.chat_template import ChatFormat
from models.gguf.fields import Field
from models.gguf.header import read_header
from models.store.store import Store
from tests.support.convert.tiny import END, write_model

from ..test_pipeline import Notes

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


def test_a_kind_that_is_not_served_is_told_before_any_work(tmp_path: Path) -> None:
    """A Mamba, of which llama.cpp needs its own sizes to read even the vocabulary."""
    header = read_header(write_model(tmp_path / "base.gguf", "llama"))
    sizes = {"conv_kernel": 4, "inner_size": 128, "state_size": 16, "time_step_rank": 4}
    fields = {
        **{key.replace("llama.", "mamba."): field for key, field in header.fields.items()},
        **{f"mamba.ssm.{key}": Field.uint32(size) for key, size in sizes.items()},
        "general.architecture": Field.string("mamba"),
    }
    path = tmp_path / "mamba.gguf"
    write_head(path, fields, 32)
    with pytest.raises(SourceInvalid, match=r"recurrent models cannot share prefixes, .* of one of these families"):
        check_kind(replace(header, path=path, fields=fields))
    store, notes = Store(tmp_path / "home"), Notes()
    with pytest.raises(SourceInvalid, match="recurrent models cannot share prefixes"):
        convert(ConvertRequest(source=str(path), name="mine"), store, notes)
    assert not [stage for stage in notes.stages if stage.startswith("write")]
