"""What trimming the vocabulary gained: the nouns of the comparison, its JSON file, and its ratios beside their aims."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from .record import Machine, Noun, load_noun

MAX_SIZE, MIN_DECODE = 0.4, 1.8
# One sequence, and as many as a server has slots.
WIDTHS = (1, 16)


class TrimSettings(Noun):
    """What a comparison of the default model with its vocabulary trimmed and whole can be told."""

    kinds: str = Field(
        default="Q8_0-attn-Q4_0,Q8_0,Q4_0,Q4_K_M", description="Quantizations, each measured trimmed and whole."
    )
    keep: int | None = Field(default=None, ge=1, description="Tokens to keep (default: as many as the recipe does).")
    repetitions: int = Field(default=5, ge=1, description="Times each file is measured, in turns.")
    threads: int | None = Field(default=None, ge=1, description="Threads (default: as the server takes).")
    as_stored: bool = Field(
        default=False, description="Compute with weights as they lie in the file, as on a processor without AMX."
    )
    folder: Path = Field(default=Path(".bench-trim"), description="Where the files are made.")
    out: Path | None = Field(default=None, description="Where the JSON goes (default: results/trim-<time>.json).")


class TrimFile(Noun):
    """One file and its speeds, medians over the repetitions; `decode_tokens_per_s` by sequences that write at once."""

    kind: str
    trimmed: bool
    tokens: int
    size_bytes: int
    sha256: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]


class TrimRun(Noun):
    """One run of `deskside bench trim`. Speeds are of examples of `prompt_tokens` and `answer_tokens`."""

    schema_version: Literal[1] = 1
    started_at: str
    machine: Machine
    backend: str
    repetitions: int
    prompt_tokens: int
    answer_tokens: int
    as_stored: bool = False
    files: tuple[TrimFile, ...] = ()


class Ratio(Noun):
    """A figure of the trimmed file over the whole one's of the same quantization. No aim: None."""

    name: str
    value: float
    reached: bool | None = None


def ratios(run: TrimRun) -> Iterator[tuple[TrimFile, TrimFile, tuple[Ratio, ...]]]:
    """(trimmed, whole, its ratios) of each quantization."""
    for trimmed in (file for file in run.files if file.trimmed):
        whole = next(file for file in run.files if file.kind == trimmed.kind and not file.trimmed)
        size = trimmed.size_bytes / whole.size_bytes
        found = [Ratio(name="size", value=size, reached=size <= MAX_SIZE)]
        for width in WIDTHS:
            faster = trimmed.decode_tokens_per_s[width] / whole.decode_tokens_per_s[width]
            found.append(Ratio(name=f"decode ×{width}", value=faster, reached=faster >= MIN_DECODE))
        found.append(Ratio(name="prefill", value=trimmed.prefill_tokens_per_s / whole.prefill_tokens_per_s))
        yield trimmed, whole, tuple(found)


def load_trim_run(path: Path) -> TrimRun:
    """Read a run's file. Raises BadRecord naming the file and the first field that is wrong."""
    return load_noun(path, TrimRun, "is not a comparison of trimmed files")
