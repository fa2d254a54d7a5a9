"""The model card and the generation config become `general.*` fields; a bad one costs a warning, not the model."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint.config import general_fields

CARD = """---
license: apache-2.0
license_name: Apache
tags: [mail, triage]
language: [en, de]
base_model: some-org/Base-Model-1B
pipeline_tag: text-generation
---
# A model
"""


def told(
    folder: Path, card: str | bytes | None = None, generation: Any = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    if card is not None:
        (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    if generation is not None:
        (folder / "generation_config.json").write_text(
            generation if isinstance(generation, str) else json.dumps(generation)
        )
    fields, warnings = general_fields(folder, 1_234_567)
    return {key: field.strings if field.length is not None else field.value for key, field in fields.items()}, warnings


def test_a_folder_without_a_card_has_a_name_and_a_size(tmp_path: Path) -> None:
    assert told(tmp_path / "My-Model-2B-Instruct") == (
        {
            "general.name": "My Model 2B Instruct",
            "general.basename": "My-Model",
            "general.finetune": "2b-Instruct",  # "2B" is no size for 1.2 M weights
            "general.size_label": "1.2M",
        },
        (),
    )


def test_the_card_names_licence_tags_and_base(tmp_path: Path) -> None:
    found, warnings = told(tmp_path / "tuned", CARD)
    assert found["general.license"] == "apache-2.0"
    assert found["general.tags"] == [b"mail", b"triage", b"text-generation"]
    assert found["general.languages"] == [b"en", b"de"]
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.name"] == "Base Model 1B"
    assert found["general.base_model.0.organization"] == "Some Org"
    assert warnings == ()


def test_sampling_defaults_are_kept(tmp_path: Path) -> None:
    generation = {"temperature": 0.5, "top_k": 20, "top_p": 0.75, "repetition_penalty": 1.5, "eos_token_id": [1, 2]}
    found, _ = told(tmp_path / "tuned", None, generation)
    sampling = {key: value for key, value in found.items() if ".sampling." in key}
    assert sampling == {
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.75,
        "general.sampling.temp": 0.5,
        "general.sampling.penalty_repeat": 1.5,
    }


@pytest.mark.parametrize(
    ("card", "generation"),
    [
        (b"---\nlicense: \xff\n---\n", None),
        ("---\n{unclosed: [\n---\n", None),
        ("---\nlicense: [1, 2]\n---\n", None),
        ("---\nbase_model: [3]\n---\n" + " " * (1 << 20), None),
        (None, "{no json"),
        (None, "[1]"),
    ],
    ids=["no UTF-8", "no YAML", "odd licence", "too large", "no JSON", "a list"],
)
def test_unusable_files_are_warned_about(tmp_path: Path, card: Any, generation: Any) -> None:
    found, warnings = told(tmp_path / "tuned", card, generation)
    assert found == {"general.name": "tuned", "general.size_label": "1.2M"}
    assert "neither its card nor 'generation_config.json' is used" in warnings[0]


def test_values_of_another_type_are_left_out(tmp_path: Path) -> None:
    card = "---\nlicense: 2024-01-01\ntags: [1, {a: b}]\nname: [x]\nauthor: 3\n---\n"
    found, warnings = told(tmp_path / "tuned", card, {"temperature": "hot", "top_k": 1.5, "top_p": 1e300})
    assert found == {"general.size_label": "1.2M"}
    assert warnings == ()
