"""The cost of a thousand answers, hosted and local, and the number of requests after which a fine-tune pays off.

Hosted prices are those of genai-prices for the day of the run, else of a table of our own (`data/hosted_prices.csv`),
which has the source and the date of every row. A result holds both prices, and a disagreement is reported. Every local
cost that is not measured is an assumption with a default and an option, and the report prints all of them. Where the
long prompt always stays cheaper, the break-even is "never".
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from models.common.record import Record

from .errors import BadAssumption

SECONDS_PER_YEAR = 365.25 * 24 * 3600
JOULES_PER_KWH = 3.6e6
DISAGREEMENT = 0.01
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


@dataclass(frozen=True, slots=True)
class CallPrice:
    """The price of a hosted call: dollars per million tokens, or genai-prices' for `model` at `url` on a day."""

    source: str
    input: float = 0.0
    output: float = 0.0
    model: str = ""
    url: str = ""
    day: date | None = None

    def of(self, prompt: int, completion: int, cached: int = 0) -> float:
        """Dollars for a call. Raises LookupError if genai-prices does not know the model."""
        if self.day is None:
            return (prompt * self.input + completion * self.output) / 1e6
        library: Any = import_module("genai_prices")
        usage = library.Usage(input_tokens=prompt, cache_read_tokens=cached, output_tokens=completion)
        at = datetime.combine(self.day, time(12), UTC)
        priced = library.calc_price(usage, self.model, provider_api_url=self.url, genai_request_timestamp=at)
        return float(priced.total_price)


def known_price(model: str, url: str, on: date) -> CallPrice | None:
    """The library's price of a model at an API; None for an unknown one, or without the library."""
    if find_spec("genai_prices") is None:
        return None
    price = CallPrice(f"genai-prices {version('genai-prices')}, {on}", model=model, url=url, day=on)
    try:
        price.of(1000, 10)
    except LookupError:
        return None
    return price


class Assumptions(Record):
    """Assumptions about local costs, in US dollars, watts and hours.

    Only busy seconds are charged, for energy and for the machine, which exists anyway. The fine-tune costs money and
    the hours that it takes *more* than writing a prompt.
    """

    power_watts: float = Field(default=45.0, description="Assumed: power of the whole machine under load, W.")
    price_kwh: float = Field(default=0.30, description="Assumed: electricity, $ per kWh.")
    machine_price: float = Field(default=800.0, description="Assumed: price of the machine, $.")
    machine_years: float = Field(default=4.0, description="Assumed: years over which the machine is written off.")
    finetune_price: float = Field(default=25.0, description="Assumed: price of the fine-tune, once, $.")
    finetune_hours: float = Field(
        default=4.0, description="Assumed: hours of work it takes more than writing a prompt."
    )
    hour_price: float = Field(default=50.0, description="Assumed: an hour of work, $.")
    monthly_requests: float = Field(default=10_000.0, description="Assumed: requests a month.")

    @property
    def finetune_total(self) -> float:
        """Dollars spent once: the fine-tune's price and its hours."""
        return self.finetune_price + self.finetune_hours * self.hour_price


def check(assumptions: Assumptions) -> None:
    """Raise BadAssumption naming the first assumption that is out of range."""
    for name, value in assumptions.model_dump().items():
        if not 0 <= value < float("inf"):
            raise BadAssumption(f"{name} must be a number of 0 or more, got {value!r}")
    if assumptions.machine_years == 0 or assumptions.monthly_requests == 0:
        raise BadAssumption("machine_years and monthly_requests must be more than 0")


class Offer(Record):
    """A hosted model at one price variant. Costs are dollars per 1,000 requests."""

    provider: str
    model: str
    variant: str
    source: str
    cost_per_1000: float
    table_cost_per_1000: float
    break_even_requests: float | None
    break_even_months: float | None


class Bill(Record):
    """The local cost beside every offer, cheapest model first, and the assumptions."""

    priced_on: str
    tokens: RequestTokens
    tokens_from: str
    local_seconds_per_request: float
    local_cost_per_1000: float
    assumptions: Assumptions
    offers: tuple[Offer, ...]
    disagreements: tuple[str, ...]


def local_cost(assumptions: Assumptions, seconds_per_request: float) -> float:
    """Dollars for one local request that keeps the machine busy for `seconds_per_request` (1 / requests per second)."""
    energy = assumptions.power_watts * assumptions.price_kwh / JOULES_PER_KWH
    machine = assumptions.machine_price / (assumptions.machine_years * SECONDS_PER_YEAR)
    return seconds_per_request * (energy + machine)


def break_even(once: float, hosted: float, local: float) -> float | None:
    """Requests after which `once` dollars are earned back, at `hosted` and `local` dollars each; None: never."""
    saved = hosted - local
    return once / saved if saved > 0 else None


def make_bill(
    tokens: RequestTokens,
    tokens_from: str,
    seconds_per_request: float,
    assumptions: Assumptions,
    on: date,
    prices: Sequence[Price] | None = None,
) -> Bill:
    """Price one request of `tokens` at every current model and variant, beside its local cost."""
    check(assumptions)
    local = local_cost(assumptions, seconds_per_request)
    rows = current(load_prices() if prices is None else prices, on)
    offers = [offer for row in rows for offer in _offers(row, tokens, local, assumptions, on)]
    standard = {offer.model: offer.cost_per_1000 for offer in offers if offer.variant == "standard"}
    return Bill(
        priced_on=on.isoformat(),
        tokens=tokens,
        tokens_from=tokens_from,
        local_seconds_per_request=seconds_per_request,
        local_cost_per_1000=1000 * local,
        assumptions=assumptions,
        offers=tuple(sorted(offers, key=lambda offer: standard[offer.model])),
        disagreements=tuple(_disagreement(offer) for offer in offers if _differs(offer)),
    )


def _offers(price: Price, tokens: RequestTokens, local: float, assumptions: Assumptions, on: date) -> list[Offer]:
    offers = []
    for variant in VARIANTS:
        table = table_cost(price, tokens, variant)
        library = library_cost(price, tokens, variant, on)
        hosted = table if library is None else library
        requests = break_even(assumptions.finetune_total, hosted, local)
        offers.append(
            Offer(
                provider=price.provider,
                model=price.model,
                variant=variant,
                source=f"table read {price.read}" if library is None else "genai-prices",
                cost_per_1000=1000 * hosted,
                table_cost_per_1000=1000 * table,
                break_even_requests=requests,
                break_even_months=None if requests is None else requests / assumptions.monthly_requests,
            )
        )
    return offers


def _differs(offer: Offer) -> bool:
    return abs(offer.cost_per_1000 - offer.table_cost_per_1000) > DISAGREEMENT * offer.table_cost_per_1000


def _disagreement(offer: Offer) -> str:
    return (
        f"{offer.model} {offer.variant}: genai-prices says ${offer.cost_per_1000:.4f} per 1,000 requests, "
        f"our table ${offer.table_cost_per_1000:.4f}"
    )
