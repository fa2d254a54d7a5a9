"""The chat template of a converted model: the right one of several, and Gemma's exactly as fine-tunes are trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from convert.errors import TemplateInvalid
from convert.tokenizer.chat_template import choose_format, folder_format
from models.gguf.fields import Field
from models.gguf.header import Header, read_header
from tests.support.convert.tiny import END, write_model


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(write_model(tmp_path_factory.mktemp("base") / "tiny.gguf"))


def render(header: Header, messages: Sequence[Mapping[str, object]], prompt: bool = True) -> str:
    """As Hugging Face and the runtime set Jinja up."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    template = choose_format(header, None).template
    assert template is not None
    return environment.from_string(template).render(
        messages=messages, bos_token="<bos>", eos_token="<eos>", add_generation_prompt=prompt
    )


def message(role: str, content: object = "hi") -> dict[str, object]:
    return {"role": role, "content": content}


def test_gemmas_turns_are_the_training_format(header: Header) -> None:
    mail = "Subject: x\n\n  two spaces, a {{ brace }} and an end"
    asked = render(header, [message("user", f"\n{mail}  \n")])
    assert asked == f"<bos><start_of_turn>user\n{mail}<end_of_turn>\n<start_of_turn>model\n"
    trained = render(header, [message("user", mail), message("assistant", "fork")], prompt=False)
    assert trained == asked + "fork<end_of_turn>\n"


def test_a_system_message_goes_into_the_first_user_turn(header: Header) -> None:
    turns = [message("system", "Be brief."), message("user", "a"), message("assistant", "b"), message("user", "c")]
    assert render(header, turns) == (
        "<bos><start_of_turn>user\nBe brief.\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    )


_USER, _MODEL, _END = "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"


@pytest.mark.parametrize(
    ("roles", "written"),
    [
        ("u u", f"{_USER}u0\n\nu1{_END}"),
        ("s", f"{_USER}s0{_END}"),
        ("s s u", f"{_USER}s0\n\ns1\n\nu2{_END}"),
        ("u s", f"{_USER}u0\n\ns1{_END}"),
        ("u s u", f"{_USER}u0\n\ns1\n\nu2{_END}"),
        ("u a s", f"{_USER}u0{_END}{_MODEL}a1{_END}{_USER}s2{_END}"),
        ("u s a", f"{_USER}u0\n\ns1{_END}{_MODEL}a2{_END}"),
        ("u a a u", f"{_USER}u0{_END}{_MODEL}a1\n\na2{_END}{_USER}u3{_END}"),
        ("a u", f"{_MODEL}a0{_END}{_USER}u1{_END}"),
    ],
)
def test_gemmas_turns_alternate_whatever_the_conversation(header: Header, roles: str, written: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    turns = [message(names[role], f"{role}{place}") for place, role in enumerate(roles.split())]
    assert render(header, turns) == f"<bos>{written}{_MODEL}"
    assert render(header, turns, prompt=False) == f"<bos>{written}"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([message("tool")], "Unknown role tool"),
        ([message("user", [{"type": "text", "text": "x"}])], "must be text"),
    ],
)
def test_gemmas_template_rejects_what_it_cannot_write(
    header: Header, messages: Sequence[Mapping[str, object]], reason: str
) -> None:
    with pytest.raises(jinja2.TemplateError, match=reason):
        render(header, messages)


def test_the_adapters_template_precedes_the_sources_and_gemmas(tmp_path: Path, header: Header) -> None:
    with_own = read_header(write_model(tmp_path / "own.gguf", template="source {{ messages }}"))
    assert choose_format(with_own, tmp_path).template == "source {{ messages }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config {{ messages }}"}))
    assert choose_format(with_own, tmp_path).template == "config {{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages }}\n")
    chosen = choose_format(with_own, tmp_path)
    assert chosen.template == "file {{ messages }}"
    assert "hold different chat templates" in chosen.warnings[0]
    assert "start_of_turn" in str(choose_format(header, None).template)


def test_a_named_template_is_found(tmp_path: Path, header: Header) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d {{ messages }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert choose_format(header, tmp_path).template == "d {{ messages }}"


def test_the_end_of_turn_is_the_mark_the_template_writes(tmp_path: Path, header: Header) -> None:
    assert choose_format(header, None).end_of_turn == END
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert choose_format(header, tmp_path).end_of_turn is None
    told = Header(header.path, {**header.fields, "tokenizer.ggml.eot_token_id": Field.uint32(5)}, {}, 32)
    assert choose_format(told, tmp_path).end_of_turn == 5


def test_a_model_without_a_template_is_warned_about() -> None:
    chosen = choose_format(Header(Path("m.gguf"), {}, {}, 32), None)
    assert chosen.template is None
    assert "no chat template was found" in chosen.warnings[0]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chat_template.jinja", b"{% for", "malformed"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
        ("chat_template.jinja", b"x" * (2 << 20), "has 2097152 bytes, the limit is 1048576"),
        ("tokenizer_config.json", b"{", "is not valid JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_an_unusable_template_is_refused(
    tmp_path: Path, header: Header, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TemplateInvalid) as caught:
        choose_format(header, tmp_path)
    assert reason in str(caught.value)
    assert name in str(caught.value)


def test_a_template_file_precedes_the_config(tmp_path: Path) -> None:
    assert folder_format(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "configured"}))
    found = folder_format(tmp_path)
    assert found is not None
    assert (found.template, found.warnings) == ("configured", ())
    (tmp_path / "chat_template.jinja").write_text("\n filed\n")
    found = folder_format(tmp_path)
    assert found is not None
    assert found.template == "\n filed"  # what stands before is written by the template, the last line break is not
    assert "different chat templates; the first is used" in found.warnings[0]


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_is_read_after_the_tokenizers(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": "processed"}))
    found = folder_format(tmp_path)
    assert found is not None
    assert (found.template, found.warnings, found.origin) == ("processed", (), str(tmp_path / name))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "configured"}))
    found = folder_format(tmp_path)
    assert found is not None
    assert found.template == "configured"
    assert found.warnings == (f"'tokenizer_config.json' and '{name}' hold different chat templates; the first is used",)


def test_the_default_of_several_templates_is_taken_with_a_warning_of_the_rest(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    found = folder_format(tmp_path)
    assert found is not None
    assert found.template == "plain"
    assert found.warnings == ("chat templates of other names are left out, a GGUF has one: rag, tool_use",)


def test_generation_tags_are_accepted(header: Header, tmp_path: Path) -> None:
    template = "{%- generation -%} {{ messages[0]['content'] }} {%- endgeneration %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    assert choose_format(header, tmp_path).template == template


def test_a_long_list_of_tokens_beside_the_template_is_read(tmp_path: Path) -> None:
    listed = {str(index): {"content": f"<unused{index}>" + " " * 180} for index in range(6000)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x", "added_tokens_decoder": listed}))
    found = folder_format(tmp_path)
    assert found is not None
    assert found.template == "x"
