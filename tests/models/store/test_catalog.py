"""The catalogue that comes with Deskside is sound, and a malformed one is refused by entry and field."""

from pathlib import Path

import pytest

from models.errors import BadCatalog, DownloadFailed, ModelNotFound
from models.manifest import read_manifest
from models.store.catalog import DistributionFiles, DistributionPart, HubFile, load_catalog, parse_source

ENTRY = """
[[models]]
name = "tiny"
description = "d"
licence = "MIT"
file = "tiny.gguf"
quantization = "Q8_0"
size_bytes = 4
sha256 = "{hash}"
sources = ["hf://team/tiny/tiny.gguf@main"]
""".replace("{hash}", "0" * 64)
RECIPE = '[[models]]\nname = "made"\ndescription = "d"\nlicence = "MIT"\nrecipe = "made"\n'


def test_the_base_model_has_a_hash_and_both_kinds_of_source() -> None:
    entry = load_catalog().get("gemma-3-270m")
    assert (entry.size_bytes, entry.quantization) == (253113024, "Q4_K_M")
    assert entry.sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    kinds = [type(parse_source(source)) for source in entry.sources]
    assert kinds == [DistributionFiles, HubFile]
    assert "Gemma Terms of Use" in entry.licence_notice


def test_every_recipe_of_the_catalogue_is_there() -> None:
    catalog = load_catalog()
    recipes = [entry for name in catalog.names() if (entry := catalog.get(name)).recipe]
    assert [entry.name for entry in recipes] == ["email-triage"]
    for entry in recipes:
        manifest = read_manifest(entry.recipe_folder())
        assert manifest.name == entry.name
        assert manifest.artefacts == ()
        assert manifest.licence == entry.licence


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match=r"'nope'.*email-triage, gemma-3-270m.*hf://"):
        load_catalog().get("nope")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY.replace('"tiny"', '"../tiny"'), r"models\.0\.name"),
        (ENTRY.replace("0000", "zzzz"), r"models\.0.*sha256"),
        (ENTRY.replace("= 4", "= 0"), r"models\.0.*size_bytes"),
        (ENTRY.replace('"tiny.gguf"', '"a/tiny.gguf"'), "plain file name"),
        (ENTRY.replace("hf://", "ftp://"), r"models\.0\.sources.*'ftp://"),
        (ENTRY.replace('sources = ["hf://team/tiny/tiny.gguf@main"]', ""), "either sources or a recipe"),
        (ENTRY + 'recipe = "tiny"', "either sources or a recipe"),
        (ENTRY + 'colour = "red"', "colour"),
        (RECIPE + 'sha256 = "0"', "no sha256"),
        (RECIPE.replace('recipe = "made"', 'recipe = "../made"'), r"models\.0\.recipe"),
        (ENTRY + ENTRY, "names must differ"),
        ("models = ", "cannot be read"),
    ],
)
def test_a_malformed_catalogue_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "catalog.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadCatalog, match=message):
        load_catalog(file)


def test_sources_are_read() -> None:
    assert parse_source("hf://a/b/c/d.gguf@v1") == HubFile("a/b", "c/d.gguf", "v1")
    assert parse_source("hf://a/b/d.gguf") == HubFile("a/b", "d.gguf", "main")
    parts = parse_source("dist://one/x/a.00\n  dist://two/x/a.01")
    assert parts == DistributionFiles((DistributionPart("one", "x/a.00"), DistributionPart("two", "x/a.01")))
    assert parse_source(str(parts)) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tiny",
        "hf://a/b",
        "hf://a/b/../../c.gguf",
        "hf://a/b//c.gguf",
        "dist://one",
        "dist://one/../x",
        "hf://a b/c/d",
    ],
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(DownloadFailed) as refused:
        parse_source(text)
    assert repr(text) in str(refused.value)
