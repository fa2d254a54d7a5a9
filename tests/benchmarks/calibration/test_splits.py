"""The promise on email-triage's held-out mails, as kept with the results; and that it would break without a bound."""

import tomllib
from pathlib import Path

import pytest

import models.calibration.fit as fit
from benchmarks.calibration.splits import automatic_answers, kept_promises, part, read_scores
from models.calibration.record import TARGETS, Calibration
from models.manifest import read_manifest

HOME = Path(__file__).parents[3] / "models" / "email_triage"
SCORES = read_scores(HOME / "results" / "label_scores.json")
# Of 100 random halves.
MOST_BROKEN = 5


def test_of_a_hundred_random_halves_at_most_five_break_the_promise() -> None:
    kept = kept_promises(SCORES)
    assert [one.target for one in kept] == list(TARGETS)
    assert all(one.broken <= MOST_BROKEN for one in kept), kept
    assert sum(kept[0].coverage) > 40, "at 0.95 more than 40 % of the answers are automatic"


def test_without_a_bound_the_promise_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "proves_share", lambda right, total, target: total > 0 and right >= target * total)
    assert kept_promises(SCORES, 20, (0.95,))[0].broken > 20 * MOST_BROKEN / 100


def test_the_manifest_has_the_fit_of_the_validation_mails_and_the_test_mails_keep_its_promises() -> None:
    calibration = read_manifest(HOME).calibration
    written = tomllib.loads((HOME / "results" / "calibration.toml").read_text(encoding="utf-8"))["calibration"]
    assert calibration == Calibration.model_validate(written)
    validation, test = (
        part(SCORES, [one for one in SCORES.examples if one.split == split]) for split in ("validation", "test")
    )
    assert calibration == fit.calibrate(validation, source="validation split")
    for promise in calibration.promises:
        right = automatic_answers(promise, test, calibration.temperature)
        assert sum(right) >= promise.target * len(right)
