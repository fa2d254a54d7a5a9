"""Cost against sums done by hand."""

from datetime import date
from pathlib import Path

import pytest

from benchmarks.cost import (
    PRICES,
    Assumptions,
    Price,
    RequestTokens,
    break_even,
    check,
    current,
    library_cost,
    load_prices,
    local_cost,
    make_bill,
    table_cost,
)
from benchmarks.errors import BadAssumption

DAY = date(2026, 11, 22)
TOKENS = RequestTokens(prompt=2000, shared=1500, completion=20)
PRICE = Price("nobody", "made-up", 1.0, 0.1, 5.0, 0.5, 2.5, None, "", "2026-11-22 read")
FREE = Price("nobody", "free", 0.0, 0.0, 0.0, 0.0, 0.0, None, "", "2026-11-22 read")


def test_table_cost_by_hand() -> None:
    assert table_cost(PRICE, TOKENS, "standard") == pytest.approx((2000 * 1.0 + 20 * 5.0) / 1e6)
    assert table_cost(PRICE, TOKENS, "cached") == pytest.approx((500 * 1.0 + 1500 * 0.1 + 20 * 5.0) / 1e6)
    assert table_cost(PRICE, TOKENS, "batch") == pytest.approx((2000 * 0.5 + 20 * 2.5) / 1e6)


def test_local_cost_by_hand() -> None:
    given = Assumptions(power_watts=100, price_kwh=0.36, machine_price=3155.76, machine_years=1)
    # 100 W at $0.36/kWh is 1e-5 $/s; $3155.76 over one year of 31,557,600 s is 1e-4 $/s.
    assert local_cost(given, 0.5) == pytest.approx(0.5 * (1e-5 + 1e-4))


def test_break_even_and_never() -> None:
    assert break_even(100, hosted=0.002, local=0.001) == pytest.approx(100_000)
    assert break_even(100, hosted=0.001, local=0.001) is None
    assert break_even(100, hosted=0.001, local=0.002) is None
    assert break_even(0, hosted=0.002, local=0.001) == 0


def test_the_known_sums_of_november_2026() -> None:
    # 10,000 requests of 2,000 tokens in and 20 out: $2.1 with the cheapest current model, $42 (rounded) with gpt-4.1.
    rows = {price.model: price for price in load_prices()}
    plain = RequestTokens(prompt=2000, shared=0, completion=20)
    assert 10_000 * table_cost(rows["gpt-6-luna"], plain, "standard") == pytest.approx(2.1)
    assert 10_000 * table_cost(rows["gpt-4.1"], plain, "standard") == pytest.approx(41.6)


def test_a_price_table_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    saved = tmp_path / "prices.csv"
    saved.write_text(PRICES.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_prices(saved) == load_prices()


def test_the_table_and_the_library_agree_on_every_current_model() -> None:
    pytest.importorskip("genai_prices")
    compared = 0
    for price in current(load_prices(), DAY):
        for variant in ("standard", "cached", "batch"):
            found = library_cost(price, TOKENS, variant, DAY)
            if found is not None:
                assert found == pytest.approx(table_cost(price, TOKENS, variant), rel=0.01), (price.model, variant)
                compared += 1
    assert compared > 20


def test_retiring_models_and_hosted_fine_tunes_are_left_out() -> None:
    models = {price.model for price in current(load_prices(), DAY)}
    assert "gpt-6-luna" in models
    assert not models & {"gpt-4.1-nano", "gpt-5-nano", "ft:gpt-4.1-2025-04-14"}


def test_a_bill_says_never_where_local_costs_more() -> None:
    given = Assumptions(finetune_price=100, finetune_hours=0, monthly_requests=1000)
    bill = make_bill(TOKENS, "a test", 0.5, given, DAY, [PRICE, FREE])
    offers = {(offer.model, offer.variant): offer for offer in bill.offers}
    assert offers["free", "standard"].break_even_requests is None
    saved = 0.0021 - bill.local_cost_per_1000 / 1000
    assert offers["made-up", "standard"].break_even_requests == pytest.approx(100 / saved)
    assert offers["made-up", "standard"].break_even_months == pytest.approx(100 / saved / 1000)
    assert offers["made-up", "standard"].source.startswith("table")
    assert [offer.model for offer in bill.offers] == ["free"] * 3 + ["made-up"] * 3


@pytest.mark.parametrize("wrong", [{"power_watts": -1.0}, {"machine_years": 0.0}, {"hour_price": float("nan")}])
def test_senseless_assumptions_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadAssumption, match=next(iter(wrong))):
        check(Assumptions(**wrong))
