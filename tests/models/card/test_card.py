"""The card shows every field of the manifest, and claims no figure that was not measured."""

from models.card.card import render_card
from models.manifest import Accuracy, Adapter, Base, Conversion, Manifest, Prompt
from tests.support.models.build import artefact

MEASURED = Accuracy(what="As served", split="test", correct=86, total=100, interval_low=0.779, interval_high=0.915)
FULL = Manifest(
    name="triage",
    description="Sorts mail",
    task="classify",
    licence="Gemma Terms of Use",
    licence_notice="Gemma is provided under its terms",
    base=Base(name="gemma-3-270m", source="hf://a/b/c.gguf@main", revision="main", sha256="b" * 64),
    adapter=Adapter(path="adapter", sha256="c" * 64, rank=16),
    prompt=Prompt(template="Which list?\n```\n{text}\n```"),
    labels=("spam", "fork"),
    artefacts=(artefact(),),
    quality=(MEASURED,),
)


def test_every_field_of_the_manifest_is_on_the_card() -> None:
    card = render_card(FULL)
    known = [
        "# triage",
        "Sorts mail",
        "deskside serve triage",
        "Gemma Terms of Use",
        "> Gemma is provided under its terms",
    ]
    known += ["gemma-3-270m", "`hf://a/b/c.gguf@main`", "b" * 64, "LoRA of rank 16", "c" * 64, "`spam`, `fork`"]
    known += ["`tiny.gguf`", "Q8_0", artefact().sha256]
    assert [text for text in known if text not in card] == []


def test_a_model_without_a_template_is_not_said_to_chat() -> None:
    assert "deskside chat triage" in render_card(FULL)
    card = render_card(FULL, chats=False)
    assert "deskside chat" not in card
    assert "has no chat template" in card


def test_a_cut_vocabulary_is_told() -> None:
    assert "Vocabulary" not in render_card(FULL)
    cut = FULL.model_copy(update={"conversion": Conversion(keep=16384)})
    assert "Vocabulary: cut to 16,384 tokens" in render_card(cut)


def test_quality_is_shown_with_its_interval() -> None:
    row = "| As served | test | 86 of 100 | 0.860 | 0.779 to 0.915 |"
    assert row in render_card(FULL)
    assert "Not measured" not in render_card(FULL)


def test_figures_not_measured_are_not_claimed() -> None:
    card = render_card(Manifest(name="bare", licence="MIT"))
    assert "Not measured" in card
    assert "Not built yet" in card
    assert "%" not in card
    assert "Where it comes from" not in card
    assert "How to ask" not in card


def test_a_prompt_with_fences_stays_inside_its_own() -> None:
    assert "````\nWhich list?\n```\n{text}\n```\n````" in render_card(FULL)


def test_a_bar_in_a_cell_does_not_break_the_table() -> None:
    odd = FULL.model_copy(update={"quality": (MEASURED.model_copy(update={"what": "a | b\nc"}),)})
    assert "| a \\| b c | test |" in render_card(odd)
