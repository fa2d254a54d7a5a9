"""Small records built by hand, for tests that need samples but no server."""

from benchmarks.record import Arm, BenchRun, Level, MachineRecord, RequestSample, Workload

LABELS = ("ham", "spam")


def sample(
    number: int = 0,
    *,
    label: str = "spam",
    text: str = "spam",
    start: float = 0.0,
    error: str | None = None,
    first: float = 0.1,
    finish: float = 0.3,
    prompt: int = 1000,
) -> RequestSample:
    """An answer of three tokens: scheduled at `start`, first token after `first` s, whole after `finish` s."""
    return RequestSample(
        id=f"mail-{number}", label=label, scheduled_s=start, sent_s=start + 0.01,
        deltas_s=(start + first, start + (first + finish) / 2), finished_s=start + finish, text=text,
        prompt_tokens=prompt, cached_tokens=prompt // 2, completion_tokens=3, error=error,
    )  # fmt: skip


def arm(name: str = "fine-tune", levels: dict[int, list[RequestSample]] | None = None, **facts: object) -> Arm:
    """An arm with these samples at these concurrency levels."""
    made = tuple(Level(concurrency=c, load_before=0.0, samples=tuple(s)) for c, s in (levels or {}).items())
    given = {"kind": "measured", "model": "m", "prompt": "short prompt", "endpoint": "/v1/x", **facts}
    return Arm.model_validate({"name": name, **given, "levels": made})


def run_of(*arms: Arm) -> BenchRun:
    """A run on a machine with two cores."""
    machine = MachineRecord(
        system="Linux", cpu="test cpu", logical_cores=2, memory_bytes=None, python="3.11", packages={}
    )
    work = Workload(examples="test.jsonl", sha256="0" * 64, available=100, requests_per_level=64, concurrency=(1, 4),
                    seed=0, labels=LABELS)  # fmt: skip
    return BenchRun(started_at="2026-11-22T12:00:00+00:00", machine=machine, workload=work, arms=arms)
