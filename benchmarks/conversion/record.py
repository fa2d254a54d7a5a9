"""The records of a comparison of converters, the JSON file that holds them, and the aims it is judged by."""

from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import Field

from benchmarks.record import MachineRecord, load_record
from models.common.record import Record

MAX_WALL, MAX_MEMORY, MAX_INSTALL = 0.5, 0.5, 0.2


class ConvertSettings(Record):
    """The options of `deskside bench convert`."""

    model: str = Field(default="gemma-3-270m", description="The installed Gemma 3 that the checkpoint is made from.")
    repetitions: int = Field(default=3, ge=1, description="Times each converter runs, in turn, once warmed up.")
    oracle: Path = Field(default=Path(".oracle"), description="Folder of llama.cpp's converter, from `make oracle`.")
    folder: Path = Field(default=Path(".bench-convert"), description="The checkpoint and the converted files.")
    out: Path | None = Field(default=None, description="JSON file (default: results/convert-<time>.json).")


class ConverterSample(Record):
    """One timed run of one converter: wall time, CPU time and peak resident memory of all its processes together.

    `peak_bytes` counts shared pages once; it is at least the high-water mark of the largest process.
    """

    converter: Literal["deskside", "llama.cpp"]
    wall_s: float
    cpu_s: float
    peak_bytes: int
    load_before: float | None = None


class InstallSize(Record):
    """The disk space of a converter.

    `loaded`: its own code and the distributions that it imports while it converts. `installed`: everything that its
    installation brings, used or not (Deskside's server and engine, for example).
    """

    converter: Literal["deskside", "llama.cpp"]
    versions: dict[str, str]
    loaded_bytes: int
    installed_bytes: int


class ConvertRun(Record):
    """One run of `deskside bench convert`. `equal_tensors` of `tensors` are equal in both files, byte for byte."""

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
    """A ratio of Deskside's value to llama.cpp's and its upper limit. The values are in `unit`."""

    name: str
    unit: str
    deskside: float
    llama_cpp: float
    limit: float

    @property
    def ratio(self) -> float:
        """Deskside's value over llama.cpp's."""
        return self.deskside / self.llama_cpp

    @property
    def reached(self) -> bool:
        """True if the ratio is within the limit."""
        return self.ratio <= self.limit


def load_convert_run(path: Path) -> ConvertRun:
    """Read a run's file. Raises BadRecord naming the file and the first wrong field."""
    return load_record(path, ConvertRun, "is not a comparison of converters")


def judge(run: ConvertRun) -> tuple[ConversionAim, ...]:
    """Compare medians of wall time and peak memory, and install sizes, with their aims."""

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
