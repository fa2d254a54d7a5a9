"""What a benchmark should say against its own numbers."""

from collections.abc import Iterator

from models.common.stats import NEEDED

from .record import Arm, Level, Run

LOAD_PER_CORE = 0.25
REUSED_SHARE = 0.5
SHORT_PROMPT_TOKENS = 600


def warnings(run: Run) -> tuple[str, ...]:
    """Reasons to doubt the run: errors, too few requests, a busy machine, prompts the server had seen before."""
    return (*_busy(run), *(warning for arm in run.arms for warning in _arm(arm)))


def _busy(run: Run) -> Iterator[str]:
    """Only the very first level tells: later ones see the load average of the benchmark itself."""
    levels = [level for arm in run.arms for level in arm.levels]
    cores = run.machine.logical_cores
    if levels and levels[0].load_before is not None and levels[0].load_before > LOAD_PER_CORE * cores:
        yield (
            f"the machine was busy before the run (load average {levels[0].load_before:.1f} on {cores} cores): "
            "times are too long, read ratios"
        )


def _arm(arm: Arm) -> Iterator[str]:
    for level in arm.levels:
        where = f"{arm.name} at {level.concurrency}"
        if failed := [sample.error for sample in level.samples if sample.error]:
            yield f"{where}: {len(failed)} of {len(level.samples)} requests failed, the first with: {failed[0]}"
        if len(level.samples) < NEEDED[90]:
            yield f"{where}: {len(level.samples)} requests are too few for a p90 (needs {NEEDED[90]})"
        if _seen_before(arm, level):
            yield f"{where}: the server knew most of each prompt already; was it asked the same mails before?"


def _seen_before(arm: Arm, level: Level) -> bool:
    """Bare mails share next to nothing: many cached tokens mean that a prompt was reused. Long prompts do share."""
    whole = [s for s in level.samples if s.error is None and s.prompt_tokens and s.cached_tokens is not None]
    prompt = sum(s.prompt_tokens or 0 for s in whole)
    if not whole or prompt > SHORT_PROMPT_TOKENS * len(whole):
        return False
    return sum(s.cached_tokens or 0 for s in whole) > REUSED_SHARE * prompt
