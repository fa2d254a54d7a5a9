"""The options and records of a comparison with peers, and the JSON file: raw samples only, no figures."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.record import MachineRecord, RequestSample, load_record, save_json
from models.common.record import Record

QUICK = {"repetitions": 2, "requests": 16, "reply_requests": 8, "burst": 24, "alone": 4, "offline": 32}
QUICK |= {"people": 6, "turns": 3}
STAGES = ("fine-tune", "base", "cold", "conversations", "offline", "bare", "prompts")


class PeerSettings(Record):
    """The options of `deskside bench peers`. `quick` changes the defaults that make it long."""

    repetitions: int = Field(
        default=3,
        ge=2,
        description="Times each pass is measured, in alternating order (a burst and conversations: at most 2).",
    )
    requests: int = Field(default=48, ge=2, description="Mails labelled in one pass by 16 clients.")
    reply_requests: int = Field(default=24, ge=2, description="64-token replies in one pass by 16 clients.")
    burst: int = Field(default=200, ge=2, description="Mails sent at once to a cold server.")
    alone: int = Field(default=12, ge=2, description="Requests in one pass by one client.")
    people: int = Field(default=12, ge=1, description="People who converse in turn, one request at a time.")
    turns: int = Field(default=4, ge=2, description="Turns of each conversation, with 600 tokens of new text each.")
    warmup: int = Field(default=16, ge=1, description="Requests that warm a server up, for each way of asking.")
    offline: int = Field(default=128, ge=2, description="Mails in a file labelled offline.")
    stages: str = Field(default=",".join(STAGES), description="Parts to run.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of every server (default: all cores).")
    quick: bool = Field(default=False, description="Few requests: a check that everything works, not a measurement.")
    seed: int = Field(default=0, description="Seed of the draw of mails.")
    folder: Path = Field(default=Path(".bench-peers"), description="The peers' venv and the converted models.")
    out: Path | None = Field(default=None, description="JSON file (default: results/peers-<time>.json).")

    def effective(self) -> "PeerSettings":
        """These settings; with `quick`, its numbers replace the defaults."""
        if not self.quick:
            return self
        given = self.model_fields_set
        return self.model_copy(update={name: value for name, value in QUICK.items() if name not in given})


class Server(Record):
    """One server that was measured."""

    name: str
    profile: str
    settings: str
    quantization: str
    size_bytes: int
    sha256: str
    start_s: float | None = None


class Pass(Record):
    """One server answering one slice of a task once. `counters`: the growth of its own counters, by metric name."""

    task: str
    way: str
    server: str
    repetition: int
    users: int
    load_before: float | None = None
    counters: dict[str, float] = Field(default_factory=dict)
    samples: tuple[RequestSample, ...]


class OfflinePass(Record):
    """One file of mails labelled by one process: seconds for all of them, and for a file of one (start and load)."""

    way: str
    server: str
    repetition: int
    mails: int
    wall_s: float
    wall_one_s: float
    right: int
    error: str | None = None


class BarePass(Record):
    """Seconds of the engine at one task and of a bare loop decoding the same batches, by repetition."""

    task: str
    tokens: int
    decodes: int
    engine_s: tuple[float, ...]
    bare_s: tuple[float, ...]


class PromptPass(Record):
    """Seconds in which an engine computed a step of prompts, several times in one process; without a server."""

    file: str
    step: str
    engine: str
    tokens: int
    repetition: int
    seconds: tuple[float, ...]


class PeerRun(Record):
    """One run of `deskside bench peers`."""

    schema_version: Literal[1] = 1
    started_at: str
    finished_at: str | None = None
    machine: MachineRecord
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
    prompts: tuple[PromptPass, ...] = ()


def save_peer_run(path: Path, run: PeerRun) -> None:
    """Write the run's file, whole or not at all."""
    save_json(path, run.model_dump(mode="json"))


def load_peer_run(path: Path) -> PeerRun:
    """Read a run's file. Raises BadRecord naming the file and the first wrong field."""
    return load_record(path, PeerRun, "is not a comparison with peers")
