"""A model for a terminal: what it is for, how well it does, how to run it, in lines that wrap at any width.

The card (README.md) holds more: every hash, address and measured loss. It is made for a browser.
"""

import re
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table

from models.common.console import page
from models.common.machine import mebibytes
from models.manifest import Accuracy, Manifest
from models.quality import Candidate, Quality

from .calibration import promise_told
from .card import choice_summary, run_commands

_NOTHING = "–"
_DIST = re.compile(r"dist://([^/\s]+)/\S+")


def print_model(
    manifest: Manifest, quality: Quality | None, card: str, *, chats: bool, console: Console | None = None
) -> None:
    """Print a model. `card` is the path of its whole card, or empty; `chats` as for the card."""
    console = console or page()
    console.print(manifest.name)
    for title, parts in _sections(manifest, quality, chats=chats):
        if shown := list(parts):
            console.print()
            if title:
                console.print(title)
            for part in shown:
                console.print(Padding(part, (0, 0, 0, 2), expand=False) if title else part)
    if card:
        console.print()
        console.print("All hashes and measured losses are in its card:")
        console.print(card, soft_wrap=True)


def _sections(
    manifest: Manifest, quality: Quality | None, *, chats: bool
) -> Iterator[tuple[str, Iterator[RenderableType]]]:
    yield "", iter([manifest.description or "No description was given."])
    yield "Quality", _quality(manifest.quality, compared=quality is not None)
    if (calibration := manifest.calibration) is not None:
        told = (promise_told(promise, calibration.examples) for promise in calibration.promises)
        yield "Automatic answers, by the share of them that is right", told
    if quality is not None:
        yield "The choice of the file", _choice(quality)
    yield "Run it", _run(manifest, chats=chats)
    yield "How to ask", _prompt(manifest)
    yield "Files", (f"{file.file}, {file.quantization}, {mebibytes(file.size_bytes, 1)}" for file in manifest.artefacts)
    yield "Where it comes from", _origin(manifest)
    yield "Licence", (text for text in (manifest.licence, manifest.licence_notice) if text)


def _run(manifest: Manifest, *, chats: bool) -> Iterator[str]:
    for command in run_commands(manifest, chats=chats):
        yield re.sub(" +#", "  #", command)
    if not chats:
        yield "It has no chat template: it continues texts (/v1/completions), and answers no messages."


def _quality(measured: Sequence[Accuracy], *, compared: bool) -> Iterator[RenderableType]:
    if not measured:
        if not compared:
            yield "Not measured. Try it on your own examples before you rely on it."
        return
    table = _table("Accuracy [95 %]", "Correct", "What")
    for one in reversed(measured):  # a manifest has the baselines first, the served file last
        share = f"{one.correct / one.total:.3f} [{one.interval_low:.3f}, {one.interval_high:.3f}]"
        table.add_row(share, f"{one.correct} of {one.total}", f"{one.what} ({one.split})")
    yield table


def _choice(quality: Quality) -> Iterator[RenderableType]:
    yield choice_summary(quality).replace("**", "")
    judged = ("Accuracy",) if quality.metric is None else (quality.metric, "Difference [95 %]")
    table = _table("File", "Size", "Examples/s", *judged, "Changed", "Verdict")
    for one in quality.candidates:
        table.add_row(one.name, mebibytes(one.size_bytes), *_measured(one, len(judged)), one.verdict)
    yield table
    if quality.metric is not None:
        yield f"{quality.metric}: mean of the answers, each against its example's own. Difference: to F16's, paired."
    yield f"Changed: answers other than F16's, on {quality.held_out_examples} held-out examples."


def _measured(one: Candidate, n_judged: int) -> Sequence[str]:
    """Rate, judgement of the answers in `n_judged` cells, and share of changed answers."""
    rate = _NOTHING if one.score_per_s is None else f"{one.score_per_s:.3g}"
    answers = one.answers
    if answers is None:
        return [rate, *[_NOTHING] * n_judged, _NOTHING]
    changed = f"{answers.flips / answers.total:.1%}"
    if (score := answers.score) is None:
        return [rate, f"{answers.correct / answers.total:.3f}", changed]
    interval = f"{score.difference:+.3f} [{score.difference_low:+.3f}, {score.difference_high:+.3f}]"
    return [rate, f"{score.mean:.3f}", interval, changed]


def _prompt(manifest: Manifest) -> Iterator[str]:
    if manifest.prompt.template != "{text}":
        yield "As it was trained, with your text in place of {text}:"
        yield manifest.prompt.template
    if manifest.prompt.system:
        yield "With the system message it was trained with:"
        yield manifest.prompt.system
    if manifest.prompt.max_text_tokens is not None:
        yield f"It reads the first {manifest.prompt.max_text_tokens} tokens of a text."
    if manifest.labels:
        yield f"It answers with one of: {', '.join(manifest.labels)}."


def _origin(manifest: Manifest) -> Iterator[str]:
    if manifest.base is not None:
        where = f", from {_source(manifest.base.source)}" if manifest.base.source else ""
        yield f"Base model: {manifest.base.name}{where}"
    if manifest.adapter is not None:
        rank = f"LoRA of rank {manifest.adapter.rank}" if manifest.adapter.rank is not None else "LoRA"
        how = "applied while the base is served" if manifest.kind == "adapter" else "merged into the base"
        yield f"Adapter: {rank}, {how}"
    if manifest.conversion is not None and manifest.conversion.keep:
        yield f"Vocabulary: cut to {manifest.conversion.keep:,} tokens; other words are spelled in smaller pieces"
    if manifest.source:
        yield f"Fetched from: {_source(manifest.source)}"


def _source(source: str) -> str:
    """An address for reading; of parts that come in Python packages, the packages' names."""
    packages = _DIST.findall(source)
    if not packages:
        return source
    last = f" to {packages[-1]}" if len(packages) > 1 else ""
    return f"the package{'s' * (len(packages) > 1)} {packages[0]}{last}"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
