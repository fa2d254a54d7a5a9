"""The nouns of a comparison with peers, and the JSON file that holds them: raw samples, no figure among them."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from .record import Machine, Noun, Sample, load_noun, save_json


class Server(Noun):
    """One server that was measured."""

    name: str
    profile: str
    settings: str
    quantization: str
    size_bytes: int
    sha256: str
    start_s: float | None = None


class Pass(Noun):
    """One server answering one slice of a task once. `counters`: what its own counters grew by, by metric name."""

    task: str
    way: str
    server: str
    repetition: int
    users: int
    load_before: float | None = None
    counters: dict[str, float] = Field(default_factory=dict)
    samples: tuple[Sample, ...]


class OfflinePass(Noun):
    """One file of mails labelled by one process: seconds for all of them, and for a file of one (start and load)."""

    way: str
    server: str
    repetition: int
    mails: int
    wall_s: float
    wall_one_s: float
    right: int
    error: str | None = None


class BarePass(Noun):
    """The engine at one task, and the same batches decoded by a bare loop: seconds of each, by repetition."""

    task: str
    tokens: int
    decodes: int
    engine_s: tuple[float, ...]
    bare_s: tuple[float, ...]


class PeerRun(Noun):
    """One run of `deskside bench peers`."""

    schema_version: Literal[1] = 1
    started_at: str
    finished_at: str | None = None
    machine: Machine
    peers: dict[str, str]
    builds: dict[str, str]
    threads: int
    repetitions: int
    quick: bool
    seed: int
    examples: str
    servers: tuple[Server, ...] = ()
    passes: tuple[Pass, ...] = ()
    offline: tuple[OfflinePass, ...] = ()
    bare: tuple[BarePass, ...] = ()


def save_peer_run(path: Path, run: PeerRun) -> None:
    """Write the run's file, whole or not at all."""
    save_json(path, run.model_dump(mode="json"))


def load_peer_run(path: Path) -> PeerRun:
    """Read a run's file. Raises BadRecord naming the file and the first field that is wrong."""
    return load_noun(path, PeerRun, "is not a comparison with peers")
