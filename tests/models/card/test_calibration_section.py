"""The card's section about automatic answers: every target with its proof, or with what is missing; the picture."""

import re
from xml.etree import ElementTree

from models.calibration.record import Bin, Calibration, Promise
from models.card.calibration import promise_told, render_calibration, render_reliability
from models.card.card import render_card
from models.manifest import Manifest

CALIBRATION = Calibration(
    source="mails.jsonl",
    examples=400,
    right=350,
    temperature=1.86,
    ece_before=0.064,
    ece_after=0.021,
    target=0.97,
    promises=(
        Promise(target=0.95, threshold=0.88, automatic=280, right=275, bound=0.9588),
        Promise(target=0.97, threshold=0.97, automatic=200, right=200, bound=0.9817),
        Promise(target=0.99, needed=2072),
        Promise(target=0.995),
    ),
    bins=(Bin(confidence=0.6, right=120, total=200), Bin(confidence=0.95, right=190, total=200)),
    raw_bins=(Bin(confidence=0.8, right=120, total=200), Bin(confidence=0.99, right=190, total=200)),
)


def test_each_target_is_shown_with_its_threshold_share_and_proof() -> None:
    section = render_calibration(CALIBRATION)
    assert "| 0.95 | 0.8800 | 70.0% | 275 of 280 | 0.959 |" in section
    assert "| **0.97** | 0.9700 | 50.0% | 200 of 200 | 0.982 |" in section
    assert "| 0.99 | none | no answer | about 2072 examples would be needed | – |" in section
    assert "| 0.995 | none | no answer | more examples would not help | – |" in section
    assert "350 of 400 held-out examples (mails.jsonl)" in section
    manifest = Manifest(name="toy", licence="none", labels=("a", "b"), calibration=CALIBRATION)
    assert section in render_card(manifest)
    assert "Automatic answers" not in render_card(manifest.model_copy(update={"calibration": None}))


def test_a_promise_in_a_line() -> None:
    told = [promise_told(promise, 400) for promise in CALIBRATION.promises]
    assert told[0] == "0.95: from confidence 0.88, 70% of the answers"
    assert "about 2072 calibration examples would be needed (400 now)" in told[2]
    assert "a better model would" in told[3]


def test_the_picture_has_a_dot_for_each_bin_nearer_the_diagonal_when_calibrated() -> None:
    drawn = render_reliability(CALIBRATION)
    assert drawn is not None
    ElementTree.fromstring(drawn)
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4" class="(\w+)-dot"', drawn)
    assert [style for *_, style in dots] == ["raw", "raw", "fitted", "fitted"]
    bounds = [(56 <= float(x) <= 396, 62 <= float(y) <= 392) for x, y, _ in dots]
    assert bounds == [(True, True)] * 4
    assert render_reliability(CALIBRATION.model_copy(update={"bins": (), "raw_bins": ()})) is None
