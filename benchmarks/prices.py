"""Hosted prices with their dates: from genai-prices for the day of the run, else from a table of our own.

The table (`data/hosted_prices.csv`) has the source and the date of every row. A result holds both prices, and a
disagreement is reported.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from models.common.record import Record

PRICES = Path(__file__).parent / "data" / "hosted_prices.csv"
RETIRING_DAYS = 60

Variant = Literal["standard", "cached", "batch"]
VARIANTS: tuple[Variant, ...] = ("standard", "cached", "batch")


class RequestTokens(Record):
    """Mean tokens of one request. `shared` of `prompt` are the same in every request and can be cached."""

    prompt: float
    shared: float
    completion: float


@dataclass(frozen=True, slots=True)
class Price:
    """One row of the price table: dollars per million tokens."""

    provider: str
    model: str
    input: float
    cached_input: float
    output: float
    batch_input: float
    batch_output: float
    shutdown: date | None
    source: str
    read: str


def load_prices(path: Path = PRICES) -> tuple[Price, ...]:
    """The price table, in file order."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return tuple(_price(row) for row in csv.DictReader(file))


def _price(row: dict[str, str]) -> Price:
    return Price(
        provider=row["provider"],
        model=row["model"],
        input=float(row["usd_per_1m_input"]),
        cached_input=float(row["usd_per_1m_cached_input"]),
        output=float(row["usd_per_1m_output"]),
        batch_input=float(row["batch_usd_per_1m_input"]),
        batch_output=float(row["batch_usd_per_1m_output"]),
        shutdown=date.fromisoformat(row["shutdown_date"]) if row["shutdown_date"] else None,
        source=row["primary_source_url"],
        read=row["date"],
    )


def current(prices: Sequence[Price], on: date) -> tuple[Price, ...]:
    """Models that a team can still start with: no hosted fine-tunes, no shutdown within RETIRING_DAYS."""
    last = on + timedelta(days=RETIRING_DAYS)
    return tuple(p for p in prices if not p.model.startswith("ft:") and (p.shutdown is None or p.shutdown > last))


def table_cost(price: Price, tokens: RequestTokens, variant: Variant) -> float:
    """Dollars for one request from the table. `cached`: the shared tokens hit the cache every time."""
    if variant == "batch":
        total = tokens.prompt * price.batch_input + tokens.completion * price.batch_output
    else:
        cached = tokens.shared if variant == "cached" else 0.0
        total = (tokens.prompt - cached) * price.input + cached * price.cached_input + tokens.completion * price.output
    return total / 1e6


def library_cost(price: Price, tokens: RequestTokens, variant: Variant, on: date) -> float | None:
    """Dollars for one request from genai-prices on that day; None for an unknown model or without the library.

    Means are rounded to whole tokens: price tiers by context length apply to one request.
    """
    if find_spec("genai_prices") is None:
        return None
    library: Any = import_module("genai_prices")
    usage = library.Usage(
        input_tokens=round(tokens.prompt),
        cache_read_tokens=round(tokens.shared) if variant == "cached" else 0,
        output_tokens=round(tokens.completion),
    )
    try:
        priced = library.calc_price(
            usage,
            price.model,
            provider_id=price.provider,
            price_context={"processing": "batch"} if variant == "batch" else None,
            genai_request_timestamp=datetime.combine(on, time(12), UTC),
        )
    except LookupError:
        return None
    return float(priced.total_price)
