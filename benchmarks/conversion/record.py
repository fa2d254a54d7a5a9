"""The nouns of a comparison of converters, the JSON file that holds them, and what the aims make of it."""

from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import Field

from benchmarks.record import MachineRecord, Record, load_record

MAX_WALL, MAX_MEMORY, MAX_INSTALL = 0.5, 0.5, 0.2


class ConvertSettings(Record):
    """What a comparison of converters can be told."""

    model: str = Field(default="gemma-3-270m", description="The installed Gemma 3 the checkpoint is made of.")
    repetitions: int = Field(default=3, ge=1, description="Times each converter runs, in turn, once warmed up.")
    oracle: Path = Field(default=Path(".oracle"), description="Where `make oracle` put llama.cpp's converter.")
    folder: Path = Field(default=Path(".bench-convert"), description="The checkpoint, and what is made of it.")
    out: Path | None = Field(default=None, description="Where the JSON goes (default: results/convert-<time>.json).")


class ConverterSample(Record):
    """One run of one converter: wall time, processor time and peak resident memory, of all its processes together.

    What they share counts once in `peak_bytes`, which is no less than the largest one's own high-water mark.
    """

    converter: Literal["deskside", "llama.cpp"]
    wall_s: float
    cpu_s: float
    peak_bytes: int
    load_before: float | None = None


class InstallSize(Record):
    """What a converter needs on disk.

    `loaded`: the distributions of which it imports something while it converts, its own code included. `installed`:
    these and everything else that comes with them, whatever it is for: Deskside's server and engine, say.
    """

    converter: Literal["deskside", "llama.cpp"]
    versions: dict[str, str]
    loaded_bytes: int
    installed_bytes: int


class ConvertRun(Record):
    """One run of `deskside bench convert`. `equal_tensors` of `tensors` are the same in both files, byte for byte."""

    schema_version: Literal[1] = 1
    started_at: str
    machine: MachineRecord
    checkpoint: str
    parameters: int
    checkpoint_bytes: int
    commands: dict[str, str]
    needs: tuple[InstallSize, ...]
    tensors: int
    equal_tensors: int
    conversions: tuple[ConverterSample, ...] = ()


class ConversionAim(Record):
    """One ratio, Deskside's to llama.cpp's, and the most it should be. The values are in the unit that is named."""

    name: str
    unit: str
    deskside: float
    llama_cpp: float
    limit: float

    @property
    def ratio(self) -> float:
        """Deskside's share of llama.cpp's."""
        return self.deskside / self.llama_cpp

    @property
    def reached(self) -> bool:
        """Whether the ratio is within the limit."""
        return self.ratio <= self.limit


def judge(run: ConvertRun) -> tuple[ConversionAim, ...]:
    """The medians of wall time and of peak memory, and the sizes, beside their aims."""

    def middle(converter: str, name: str) -> float:
        return float(median(getattr(one, name) for one in run.conversions if one.converter == converter))

    needs = {one.converter: one for one in run.needs}
    ours, theirs = needs["deskside"], needs["llama.cpp"]
    gib, mib = 1 << 30, 1 << 20
    return (
        ConversionAim(
            name="wall time",
            unit="s",
            deskside=middle("deskside", "wall_s"),
            llama_cpp=middle("llama.cpp", "wall_s"),
            limit=MAX_WALL,
        ),
        ConversionAim(
            name="peak memory",
            unit="GiB",
            deskside=middle("deskside", "peak_bytes") / gib,
            llama_cpp=middle("llama.cpp", "peak_bytes") / gib,
            limit=MAX_MEMORY,
        ),
        ConversionAim(
            name="install size, what converting loads",
            unit="MiB",
            deskside=ours.loaded_bytes / mib,
            llama_cpp=theirs.loaded_bytes / mib,
            limit=MAX_INSTALL,
        ),
        ConversionAim(
            name="install size, all that comes with it",
            unit="MiB",
            deskside=ours.installed_bytes / mib,
            llama_cpp=theirs.installed_bytes / mib,
            limit=MAX_INSTALL,
        ),
    )


def load_convert_run(path: Path) -> ConvertRun:
    """Read a run's file. Raises BadRecord naming the file and the first field that is wrong."""
    return load_record(path, ConvertRun, "is not a comparison of converters")
