"""A model's README.md, rendered from its manifest and quality.json. Pure; missing figures read "not measured"."""

import re
from collections.abc import Iterator, Sequence

from models.common.machine import mebibytes
from models.manifest import Accuracy, Artefact, Manifest
from models.quality import Answers, Candidate, Loss, MeanScore, Quality, Shape, Speed, Trim

from .calibration import render_calibration
from .markdown import table
from .plot import PLOT_FILE
from .training import render_training

_NOTHING = "–"
_LOSS_HEAD = ("File", "Size", "KL mean", "KL 99 %", "Top-1 agreement", "Perplexity ratio")
_ANSWERS_HEAD = ("Difference, 95 % interval", "Answers changed", "Verdict")


def render_card(manifest: Manifest, measured: Quality | None = None, *, chats: bool = True) -> str:
    """The model card as Markdown. `measured` is the model's `quality.json`, if there is one.

    `chats`: it has a chat template; without one it continues texts only.
    """
    sections = [
        f"# {manifest.name}\n\n{manifest.description or 'No description was given.'}",
        _run(manifest, chats=chats),
        _prompt(manifest),
        _origin(manifest),
        _licence(manifest),
        "## The training\n\n" + render_training(manifest.training) if manifest.training is not None else "",
        "## Files\n\n" + _files(manifest.artefacts),
        "## Quality\n\n" + _quality(manifest.quality) if manifest.quality or measured is None else "",
        "## Automatic answers\n\n" + render_calibration(manifest.calibration)
        if manifest.calibration is not None
        else "",
        "## The choice of the file\n\n" + render_quality(measured) if measured is not None else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_quality(quality: Quality) -> str:
    """The card's section about the choice of the file, without its heading."""
    parts = [
        choice_summary(quality),
        f"![Speed, loss and size of each file]({PLOT_FILE})" if _has_plot(quality) else "",
        table((*_LOSS_HEAD, quality.metric or "Accuracy", *_ANSWERS_HEAD), _loss_rows(quality)),
        _speed_table(quality),
        "\n".join(_reasons(quality.candidates)),
        _trimmed(quality.trim) if quality.trim is not None else "",
        _how(quality),
    ]
    return "\n\n".join(part for part in parts if part)


def choice_summary(quality: Quality) -> str:
    """The reason for the choice, in one sentence of Markdown."""
    chosen = next(one for one in quality.candidates if one.name == quality.chosen)
    work = {"classify": "classifying", "write": "writing"}[quality.work]
    if quality.overruled:
        return f"**{chosen.name} was asked for by name; the choice was overruled.** {_sentence(chosen.reason)}"
    return f"**{chosen.name} was chosen for {work}**: {_sentence(chosen.reason)}"


def _loss_rows(quality: Quality) -> Iterator[Sequence[str]]:
    for one in quality.candidates:
        mark = "**" if one.name == quality.chosen else ""
        verdict = "**chosen**, overruled" if mark and quality.overruled else f"{mark}{one.verdict}{mark}"
        yield (f"{mark}{one.name}{mark}", mebibytes(one.size_bytes), *_loss(one.loss), *_answers(one.answers), verdict)
    if quality.noise is not None:
        flips = _NOTHING if quality.noise_flips is None else str(quality.noise_flips)
        flips += "" if quality.noise_examples is None else f" of {quality.noise_examples}"
        scored = _score(quality.noise_score) if quality.noise_score is not None else (_NOTHING, _NOTHING)
        yield ("noise floor", _NOTHING, *_loss(quality.noise), *scored, flips, _NOTHING)
    if quality.base_distance is not None:
        yield ("the base", _NOTHING, *_loss(quality.base_distance), *[_NOTHING] * 4)


def _loss(loss: Loss | None) -> Sequence[str]:
    if loss is None:
        return [_NOTHING] * 4
    return (
        f"{loss.kl_mean:.2g}",
        f"{loss.kl_p99:.2g}",
        f"{loss.top1_agreement:.1%}",
        f"{loss.perplexity_ratio:.4f}",
    )


def _answers(answers: Answers | None) -> Sequence[str]:
    if answers is None:
        return [_NOTHING] * 3
    flips = f"{answers.flips} ({answers.flips / answers.total:.1%})"
    if answers.score is not None:
        return (*_score(answers.score), flips)
    share = answers.correct / answers.total
    return (
        f"{share:.3f} ({answers.correct} of {answers.total})",
        f"{answers.difference_low:+.3f} to {answers.difference_high:+.3f} (p = {answers.p_value:.2g})",
        flips,
    )


def _score(score: MeanScore) -> tuple[str, str]:
    return f"{score.mean:.3f}", f"{score.difference_low:+.3f} to {score.difference_high:+.3f}"


def _speed_table(quality: Quality) -> str:
    widths = sorted({n for one in quality.candidates if one.speed for n in one.speed.decode_tokens_per_s})
    measured = [(one, one.speed) for one in quality.candidates if one.speed is not None]
    if not measured:
        return "Speed was not measured."
    head = ("File", "Prefill, tok/s", *(f"Decode ×{n}, tok/s" for n in widths), "Peak memory", "Examples/s")
    return table(head, (_speed_row(one, speed, widths, quality.chosen) for one, speed in measured))


def _speed_row(one: Candidate, speed: Speed, widths: Sequence[int], chosen: str) -> Sequence[str]:
    mark = "**" if one.name == chosen else ""
    decode = (f"{speed.decode_tokens_per_s[n]:.0f}" if n in speed.decode_tokens_per_s else _NOTHING for n in widths)
    samples = speed.score_samples_per_s
    spread = f" ({min(samples):.3g} to {max(samples):.3g})" if len(samples) > 1 else ""
    score = _NOTHING if one.score_per_s is None else f"{one.score_per_s:.3g}{spread}"
    return (
        f"{mark}{one.name}{mark}",
        f"{speed.prefill_tokens_per_s:.0f}",
        *decode,
        mebibytes(speed.peak_memory_bytes),
        score,
    )


def _reasons(candidates: Sequence[Candidate]) -> Iterator[str]:
    for one in candidates:
        if one.verdict not in {"chosen", "within budget"}:
            yield f"- {one.name} {_is(one.verdict)}: {_sentence(one.reason)}"
        if one.overrides:
            yield f"- {one.name} is mixed: " + ", ".join(f"`{override}`" for override in one.overrides)


def _is(verdict: str) -> str:
    return f"is {verdict}" if verdict in {"over budget", "unjudged"} else verdict


def _trimmed(trim: Trim) -> str:
    agreement = (
        f" The trimmed model gave the untrimmed model's likeliest answer for {trim.greedy_agreement:.1%} of them."
        if trim.greedy_agreement is not None
        else ""
    )
    return (
        f"The vocabulary was cut from {trim.tokens_before:,} tokens to {trim.tokens_after:,}. The "
        f"remaining tokens cover {trim.covered_tokens:.1%} of the tokens of the held-out examples, and "
        f"{trim.covered_examples:.1%} of these examples completely; other words are spelled in smaller pieces."
        f"{agreement}"
    )


def _how(quality: Quality) -> str:
    lines = [
        f"- Budget: mean KL divergence ≤ {quality.budget.kl_mean:g} nats, {_answer_budget(quality)}",
        f"- Examples: {quality.held_out_examples} held out of `{quality.examples_file}` (sha256 "
        f"`{quality.examples_sha256}`), {quality.calibration_examples} others for the importance matrix.",
    ]
    if quality.noise is not None:
        on = f", on {quality.noise_examples} of the examples" if quality.noise_examples is not None else ""
        lines.append(
            f"- Noise floor: F16 against itself in another batch shape{on}. Differences below it mean nothing."
        )
    if quality.base_check:
        lines.append(f"- Fine-tune kept: {quality.base_check}")
    lines.append(f"- Machine: {quality.machine}.{_shape(quality.shape, quality.work) if quality.shape else ''}")
    return "How it was measured:\n\n" + "\n".join(lines)


def _answer_budget(quality: Quality) -> str:
    if quality.metric is None:
        return (
            f"answers changed ≤ {quality.budget.flips:.0%}, accuracy not lower at 95 % on the paired test (exact "
            "McNemar; the interval is Newcombe's). All compared with F16."
        )
    return (
        f"mean {quality.metric} of the answers, each against its example's own, not lower at 95 % (paired bootstrap "
        "over the examples) and by more than F16 differs from itself. All compared with F16. Two texts may be equally "
        "good: a changed answer alone is no loss."
    )


def _shape(shape: Shape, work: str) -> str:
    task = "its answer scored" if work == "classify" else "its answer written"
    return (
        f" {shape.threads} threads, {shape.rounds} rounds in turns, each file in a process of its own; medians. An "
        f"example is {shape.prompt_tokens} tokens of prompt and {shape.answer_tokens} of answer, {task}, "
        f"one prompt after the other in steps of at most {shape.step_tokens} tokens."
    )


def _has_plot(quality: Quality) -> bool:
    return any(one.score_per_s is not None for one in quality.candidates)


def _sentence(reason: str) -> str:
    return reason + "." if reason and not reason.endswith(".") else reason


def run_commands(manifest: Manifest, *, chats: bool) -> list[str]:
    """The commands that run the model."""
    base = manifest.base.name if manifest.kind == "adapter" and manifest.base is not None else ""
    name = f"{base}:{manifest.name}" if base else manifest.name
    commands = [f"deskside serve {name}     # an OpenAI-compatible server on 127.0.0.1:8080"]
    if chats:
        commands.append(f"deskside chat {name}      # in the terminal")
    return [*commands, f"deskside batch in.jsonl out.jsonl --model {name}"]


def _run(manifest: Manifest, *, chats: bool) -> str:
    text = "## Run it\n\n" + _fenced("\n".join(run_commands(manifest, chats=chats)), "sh")
    if chats:
        return text
    return f"{text}\n\nIt has no chat template: it continues texts (`/v1/completions`), and answers no messages."


def _prompt(manifest: Manifest) -> str:
    lines = []
    if manifest.prompt.template != "{text}":
        lines.append("Ask it as it was trained, with your text in place of `{text}`:\n")
        lines.append(_fenced(manifest.prompt.template) + "\n")
    if manifest.prompt.system:
        lines.append("Its system message, as it was trained:\n")
        lines.append(_fenced(manifest.prompt.system) + "\n")
    if manifest.prompt.max_text_tokens is not None:
        lines.append(f"It reads the first {manifest.prompt.max_text_tokens} tokens of a text, as it was trained.\n")
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
    if manifest.conversion is not None and manifest.conversion.keep:
        lines.append(
            f"- Vocabulary: cut to {manifest.conversion.keep:,} tokens; words that are none of them are spelled in "
            "smaller pieces, which costs time, and accuracy where a text is unlike those it was cut by"
        )
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
            (f"`{file.file}`", file.quantization, mebibytes(file.size_bytes, 1), f"`{file.sha256}`")
            for file in artefacts
        ),
    )


def _quality(measured: Sequence[Accuracy]) -> str:
    return _accuracies(measured) if measured else "Not measured. Try it on your own examples before you rely on it."


def _accuracies(measured: Sequence[Accuracy]) -> str:
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
