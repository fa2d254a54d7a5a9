"""`model.toml` survives the round trip, and a malformed one is refused by the name of its field."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.errors import BadManifest
from models.manifest import Accuracy, Adapter, Artefact, Base, Manifest, Prompt, dump_manifest, read_manifest

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
HASHES = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
WORDS = st.text(max_size=40)
SHARES = st.floats(min_value=0, max_value=1)


@st.composite
def qualities(draw: st.DrawFn) -> Accuracy:
    total = draw(st.integers(1, 10_000))
    low, high = sorted((draw(SHARES), draw(SHARES)))
    correct = draw(st.integers(0, total))
    return Accuracy(
        what=draw(WORDS), split=draw(WORDS), correct=correct, total=total, interval_low=low, interval_high=high
    )


ARTEFACTS = st.builds(
    Artefact,
    file=st.from_regex(r"[A-Za-z0-9_-]{1,20}\.gguf", fullmatch=True),
    quantization=WORDS,
    size_bytes=st.integers(1, 2**62),
    sha256=HASHES,
)
MANIFESTS = st.builds(
    Manifest,
    name=NAMES,
    description=WORDS,
    task=st.sampled_from(["write", "general"]),
    licence=WORDS,
    licence_notice=WORDS,
    source=WORDS,
    base=st.none() | st.builds(Base, name=WORDS, source=WORDS, revision=WORDS, sha256=HASHES),
    adapter=st.none() | st.builds(Adapter, path=WORDS, sha256=st.none() | HASHES, rank=st.none() | st.integers(1, 512)),
    prompt=st.builds(Prompt, template=WORDS.map(lambda text: text.replace("{text}", "") + "{text}")),
    labels=st.lists(WORDS, unique=True, max_size=5).map(tuple),
    artefacts=st.lists(ARTEFACTS, max_size=3).map(tuple),
    quality=st.lists(qualities(), max_size=3).map(tuple),
)


@given(MANIFESTS)
def test_a_manifest_read_back_is_the_same(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    file = tmp_path_factory.mktemp("manifest") / "model.toml"
    file.write_text(dump_manifest(manifest), encoding="utf-8")
    assert read_manifest(file) == manifest
    assert read_manifest(file.parent) == manifest


GOOD = 'name = "tiny"\nlicence = "MIT"\n'
ARTEFACT = '[[artefacts]]\nfile = "a.gguf"\nquantization = "Q8_0"\nsize_bytes = 4\nsha256 = "{}"\n'.format("0" * 64)
QUALITY = '[[quality]]\nwhat = "w"\nsplit = "s"\ncorrect = 1\ntotal = 2\ninterval_low = 0.1\ninterval_high = 0.9\n'


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('licence = "MIT"', "name"),
        ('name = "tiny"', "licence"),
        ('name = "../tiny"\nlicence = "MIT"', "name"),
        ('name = "tiny\\n"\nlicence = "MIT"', "name"),
        (GOOD + 'colour = "red"', "colour"),
        (GOOD + "schema_version = 2", "schema_version"),
        (GOOD + 'task = "sing"', "task"),
        (GOOD + 'task = "classify"', "labels"),
        (GOOD + 'labels = ["a", "a"]', "labels"),
        (GOOD + '[prompt]\ntemplate = "nothing to fill"', "prompt.template"),
        (GOOD + '[base]\nname = "b"\nsha256 = "0123"', "base.sha256"),
        (GOOD + ARTEFACT.replace("a.gguf", "../a.gguf"), "artefacts.0"),
        (GOOD + ARTEFACT.replace("= 4", "= 0"), "artefacts.0.size_bytes"),
        (GOOD + QUALITY.replace("correct = 1", "correct = 3"), "quality.0"),
        (GOOD + QUALITY.replace("0.9", "1.5"), "quality.0.interval_high"),
        (GOOD + QUALITY.replace("0.1", "0.95"), "interval_low"),
        ("name = ", "Invalid value"),
    ],
)
def test_a_malformed_manifest_is_refused_by_its_field(tmp_path: Path, text: str, field: str) -> None:
    file = tmp_path / "model.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadManifest) as refused:
        read_manifest(file)
    assert field in str(refused.value)
    assert repr(str(file)) in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_manifest_saved_on_windows_is_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "model.toml"
    file.write_text((GOOD + ARTEFACT).replace("\n", "\r\n"), encoding=encoding, newline="")
    assert read_manifest(file).artefacts[0].file == "a.gguf"


def test_a_missing_manifest_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(BadManifest, match=r"model\.toml"):
        read_manifest(tmp_path / "model.toml")


def test_an_adapter_names_its_base_and_has_one_file() -> None:
    artefact = Artefact(file="a.gguf", quantization="F16", size_bytes=1, sha256="a" * 64)
    base = Base(name="base", sha256="b" * 64)
    adapter = Manifest(kind="adapter", name="mail", licence="MIT", base=base, artefacts=(artefact,))
    assert 'kind = "adapter"' in dump_manifest(adapter)
    for wrong in ({"base": None}, {"artefacts": ()}, {"artefacts": (artefact, artefact)}):
        with pytest.raises(ValidationError, match="needs a base and exactly one artefact"):
            Manifest.model_validate(adapter.model_dump() | wrong)
