"""From the raw samples of a run to everything that is said about it. Pure: no clock and no network."""

from datetime import date

from .arms import BASE, FINE_TUNE, HOSTED
from .cost import Assumptions, Bill, make_bill
from .prices import Tokens
from .record import Run
from .sanity import warnings
from .summary import Statistics, summarise


def derive(run: Run, assumptions: Assumptions) -> tuple[Run, Statistics, Bill | None]:
    """The run with its statistics, bill and warnings filled in from its samples."""
    statistics = summarise(run)
    bill = _bill(run, statistics, assumptions)
    derived = {
        "statistics": statistics.model_dump(mode="json"),
        "cost": bill.model_dump(mode="json") if bill else None,
        "warnings": warnings(run),
    }
    return run.model_copy(update=derived), statistics, bill


def _bill(run: Run, statistics: Statistics, assumptions: Assumptions) -> Bill | None:
    """None when the run has no fine-tune, or no arm that counted the few-shot prompt's tokens."""
    pairs = list(zip(run.arms, statistics.arms, strict=True))
    rates = [level.requests_per_s for arm, figures in pairs if arm.name == FINE_TUNE for level in figures.levels]
    counted = [(arm, f) for arm, f in pairs if arm.name in {HOSTED, BASE} and f.mean_prompt_tokens is not None]
    if not counted or not rates or max(rates) == 0:
        return None
    # A measured hosted arm counts with the tokenizer that is billed; the local base is the next best.
    arm, figures = min(counted, key=lambda pair: pair[0].name != HOSTED)
    prompt = figures.mean_prompt_tokens or 0.0
    tokens = Tokens(prompt=prompt, shared=arm.shared_share * prompt, completion=figures.mean_completion_tokens or 0.0)
    source = f"{arm.model}'s tokenizer (the shared part by its share of characters)"
    return make_bill(tokens, source, 1 / max(rates), assumptions, date.fromisoformat(run.started_at[:10]))
