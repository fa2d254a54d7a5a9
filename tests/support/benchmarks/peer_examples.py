"""Small comparisons built by hand, for tests that need figures but no server."""

from benchmarks.peers.record import OfflinePass, Pass, PeerRun, Server
from benchmarks.record import MachineRecord, RequestSample

from .examples import sample

MACHINE = MachineRecord(
    system="Linux", cpu="test cpu", processor="AVX2", logical_cores=2, memory_bytes=None, python="3.11", packages={}
)


def made(
    task: str,
    way: str,
    server: str,
    *seconds: float,
    first: float = 0.1,
    repetition: int = 0,
    counters: dict[str, float] | None = None,
    text: str = "spam",
) -> Pass:
    """A pass whose answers begin together and end after `seconds`; the first chunk comes after `first`."""
    samples = tuple(sample(n, first=first, finish=finish, text=text) for n, finish in enumerate(seconds))
    return Pass(
        task=task, way=way, server=server, repetition=repetition, users=16, counters=counters or {}, samples=samples
    )


def offline(server: str, way: str, wall_s: float, *, repetition: int = 0, error: str | None = None) -> OfflinePass:
    """101 mails; a file of one takes 2 s."""
    return OfflinePass(
        server=server, way=way, repetition=repetition, mails=101, wall_s=wall_s, wall_one_s=2.0, right=90, error=error
    )


def peer_run(*passes: Pass, offline: tuple[OfflinePass, ...] = ()) -> PeerRun:
    """A run of these passes, of two repetitions."""
    names = dict.fromkeys(made.server for made in passes)
    servers = tuple(
        Server(name=name, profile="best", settings="16 slots", quantization="Q8_0", size_bytes=1 << 20, sha256="0" * 64)
        for name in names
    )
    return PeerRun(
        started_at="2026-11-22T12:00:00+00:00", machine=MACHINE, peers={"xllamacpp": "1.0"},
        builds={"llama-server (xllamacpp)": "AVX2 = 1"}, threads=2, repetitions=2, quick=True, seed=0,
        examples="test split", servers=servers, passes=passes, offline=offline,
    )  # fmt: skip


def failed(one: RequestSample) -> RequestSample:
    """The same request, not answered."""
    return one.model_copy(update={"error": "HTTP 500"})
