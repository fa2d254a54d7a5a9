"""The warning about another base: none for other names of the same model."""

from pathlib import Path

import pytest

from convert.lora.adapter import PeftAdapter
from convert.lora.fit import base_warning
from models.gguf.fields import Field
from models.gguf.header import Header


def warning(adapter_base: str, file: str, general_name: str | None = None) -> str | None:
    fields = {"general.name": Field.string(general_name)} if general_name is not None else {}
    return base_warning(PeftAdapter(Path("mine"), "", 4, adapter_base, {}), Header(Path(file), fields, {}, 32))


@pytest.mark.parametrize(
    ("trained_on", "file", "name"),
    [
        ("google/gemma-3-270m", "gemma-3-270m-Q4_K_M.gguf", None),
        ("google/gemma-3-270m", "weights.gguf", "Gemma 3 270M"),
        ("unsloth/gemma-3-270m-unsloth-bnb-4bit", "x/gemma-3-270m.gguf", "?"),
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M/model", None),
        ("gemma-3-270m", "gemma-3-270m-F16.gguf", None),
        ("", "anything.gguf", "Anything"),
        ("/home/me/checkpoints/base", "anything.gguf", "Anything"),
        ("./base", "anything.gguf", None),
    ],
)
def test_the_same_base_or_an_unknown_one_gives_no_warning(trained_on: str, file: str, name: str | None) -> None:
    assert warning(trained_on, file, name) is None


@pytest.mark.parametrize(
    ("trained_on", "file", "name"),
    [
        ("google/gemma-3-270m-it", "gemma-3-270m-Q8_0.gguf", "Gemma 3 270M"),
        ("google/gemma-3-1b-pt", "gemma-3-270m-Q8_0.gguf", None),
        ("meta-llama/Llama-3.2-1B", "Llama-3.1-8B.gguf", None),
    ],
)
def test_another_base_gives_a_warning_with_both_names(trained_on: str, file: str, name: str | None) -> None:
    found = warning(trained_on, file, name)
    assert found is not None
    assert repr(trained_on) in found
    assert repr(name or file) in found
    assert "'mine'" in found
