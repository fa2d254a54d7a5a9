"""A model's README.md: everything its manifest knows, for people. Pure; says "not measured" where nothing was."""

import re
from collections.abc import Sequence

from . import quality as ladder
from .card_quality import render_quality
from .card_table import table
from .manifest import Artefact, Manifest, Quality

_MIB = 1 << 20


def render_card(manifest: Manifest, measured: ladder.Quality | None = None) -> str:
    """The model card as Markdown. `measured` is the model's `quality.json`, where its quantization was chosen."""
    sections = [
        f"# {manifest.name}\n\n{manifest.description or 'No description was given.'}",
        _run(manifest),
        _prompt(manifest),
        _origin(manifest),
        _licence(manifest),
        "## Files\n\n" + _files(manifest.artefacts),
        "## Quality\n\n" + _quality(manifest.quality) if manifest.quality or measured is None else "",
        "## The choice of the file\n\n" + render_quality(measured) if measured is not None else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _run(manifest: Manifest) -> str:
    base = manifest.base.name if manifest.kind == "adapter" and manifest.base is not None else ""
    name = f"{base}:{manifest.name}" if base else manifest.name
    return "## Run it\n\n" + _fenced(
        f"deskside serve {name}     # an OpenAI-compatible server on 127.0.0.1:8080\n"
        f"deskside chat {name}      # in the terminal\n"
        f"deskside batch in.jsonl out.jsonl --model {name}",
        "sh",
    )


def _prompt(manifest: Manifest) -> str:
    lines = []
    if manifest.prompt.template != "{text}":
        lines.append("Ask it as it was trained, with your text in place of `{text}`:\n")
        lines.append(_fenced(manifest.prompt.template) + "\n")
    if manifest.labels:
        lines.append("It answers with one of: " + ", ".join(f"`{label}`" for label in manifest.labels) + ".")
    return "\n".join(["## How to ask", "", *lines]) if lines else ""


def _origin(manifest: Manifest) -> str:
    lines = []
    if manifest.base is not None:
        base = manifest.base
        where = f", from {_sources(base.source)}" if base.source else ""
        revision = f", revision `{base.revision}`" if base.revision else ""
        lines.append(f"- Base model: {base.name}{where}{revision}, sha256 `{base.sha256}`")
    if manifest.adapter is not None:
        rank = f"LoRA of rank {manifest.adapter.rank}" if manifest.adapter.rank is not None else "LoRA"
        digest = f", sha256 `{manifest.adapter.sha256}`" if manifest.adapter.sha256 is not None else ""
        how = "applied while the base is served" if manifest.kind == "adapter" else "merged into the base"
        lines.append(f"- Adapter: {rank}, {how}{digest}")
    if manifest.source:
        lines.append(f"- Fetched from: {_sources(manifest.source)}")
    return "\n".join(["## Where it comes from", "", *lines]) if lines else ""


def _sources(source: str) -> str:
    return ", ".join(f"`{part}`" for part in source.split())


def _licence(manifest: Manifest) -> str:
    notice = f"\n\n> {manifest.licence_notice}" if manifest.licence_notice else ""
    return f"## Licence\n\n{manifest.licence}{notice}"


def _files(artefacts: Sequence[Artefact]) -> str:
    if not artefacts:
        return "Not built yet."
    return table(
        ("File", "Quantization", "Size", "sha256"),
        (
            (f"`{file.file}`", file.quantization, f"{file.size_bytes / _MIB:.1f} MiB", f"`{file.sha256}`")
            for file in artefacts
        ),
    )


def _quality(measured: Sequence[Quality]) -> str:
    return _accuracies(measured) if measured else "Not measured. Try it on your own examples before you rely on it."


def _accuracies(measured: Sequence[Quality]) -> str:
    return table(
        ("What", "Split", "Correct", "Accuracy", "95 % interval (Wilson)"),
        (
            (
                one.what,
                one.split,
                f"{one.correct} of {one.total}",
                f"{one.correct / one.total:.3f}",
                f"{one.interval_low:.3f} to {one.interval_high:.3f}",
            )
            for one in measured
        ),
    )


def _fenced(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
