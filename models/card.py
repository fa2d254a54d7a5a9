"""A model's README.md: everything its manifest knows, for people. Pure; says "not measured" where nothing was."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .manifest import Artefact, Manifest, Quality

_MIB = 1 << 20


def render_card(manifest: Manifest, quality: Mapping[str, Any] | None = None) -> str:
    """The model card as Markdown.

    `quality` adds what the manifest's accuracies do not hold: `method` (one paragraph: how, where and on what it was
    measured), `per_class` ({label: {precision, recall, f1, support}}) and `notes` (sentences). Each is optional.
    """
    sections = [
        f"# {manifest.name}\n\n{manifest.description or 'No description was given.'}",
        _run(manifest),
        _prompt(manifest),
        _origin(manifest),
        _licence(manifest),
        "## Files\n\n" + _files(manifest.artefacts),
        "## Quality\n\n" + _quality(manifest.quality, quality or {}),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _run(manifest: Manifest) -> str:
    return "## Run it\n\n" + _fenced(
        f"deskside serve {manifest.name}     # an OpenAI-compatible server on 127.0.0.1:8080\n"
        f"deskside chat {manifest.name}      # in the terminal\n"
        f"deskside batch in.jsonl out.jsonl --model {manifest.name}",
        "sh",
    )


def _prompt(manifest: Manifest) -> str:
    lines = []
    if manifest.prompt.template != "{text}":
        lines.append("Ask it as it was trained, with your text in place of `{text}`:\n")
        lines.append(_fenced(manifest.prompt.template))
    if manifest.labels:
        lines.append("\nIt answers with one of: " + ", ".join(f"`{label}`" for label in manifest.labels) + ".")
    return "\n".join(["## How to ask", "", *lines]) if lines else ""


def _origin(manifest: Manifest) -> str:
    lines = []
    if manifest.base is not None:
        base = manifest.base
        where = f", from `{base.source}`" if base.source else ""
        revision = f", revision `{base.revision}`" if base.revision else ""
        lines.append(f"- Base model: {base.name}{where}{revision}, sha256 `{base.sha256}`")
    if manifest.adapter is not None:
        rank = f"LoRA of rank {manifest.adapter.rank}" if manifest.adapter.rank is not None else "LoRA"
        digest = f", sha256 `{manifest.adapter.sha256}`" if manifest.adapter.sha256 is not None else ""
        lines.append(f"- Adapter: {rank}, merged into the base{digest}")
    if manifest.source:
        lines.append("- Fetched from: " + ", ".join(f"`{part}`" for part in manifest.source.split()))
    return "\n".join(["## Where it comes from", "", *lines]) if lines else ""


def _licence(manifest: Manifest) -> str:
    notice = f"\n\n> {manifest.licence_notice}" if manifest.licence_notice else ""
    return f"## Licence\n\n{manifest.licence}{notice}"


def _files(artefacts: Sequence[Artefact]) -> str:
    if not artefacts:
        return "Not built yet."
    return _table(
        ("File", "Quantization", "Size", "sha256"),
        (
            (f"`{file.file}`", file.quantization, f"{file.size_bytes / _MIB:.1f} MiB", f"`{file.sha256}`")
            for file in artefacts
        ),
    )


def _quality(measured: Sequence[Quality], report: Mapping[str, Any]) -> str:
    parts = [_accuracies(measured) if measured else "Not measured. Try it on your own examples before you rely on it."]
    if "method" in report:
        parts.append(str(report["method"]))
    if "per_class" in report:
        parts.append(_per_class(report["per_class"]))
    if "notes" in report:
        parts.append("\n".join(f"- {note}" for note in report["notes"]))
    return "\n\n".join(parts)


def _accuracies(measured: Sequence[Quality]) -> str:
    return _table(
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


def _per_class(classes: Mapping[str, Mapping[str, float]]) -> str:
    return _table(
        ("Class", "Precision", "Recall", "F1", "Examples"),
        (
            (f"`{label}`", *(f"{found[key]:.3f}" for key in ("precision", "recall", "f1")), f"{found['support']:.0f}")
            for label, found in classes.items()
        ),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
