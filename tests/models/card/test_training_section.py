"""The card tells how a model was trained: its curve, the epoch that was kept, and the depths that were tried."""

from xml.etree import ElementTree

import pytest

from models.card.card import render_card
from models.card.training import CURVE_FILE, render_curve, render_training
from models.manifest import Manifest, dump_manifest, read_manifest
from models.training import Epoch, Training, TriedDepth

SVG = "{http://www.w3.org/2000/svg}"
TRAINING = Training(
    task="mails",
    machine="a processor",
    method="lora",
    examples=952,
    validation_examples=296,
    base_depth=18,
    depth=18,
    layers=9,
    learning_rate=5e-4,
    batch=8,
    seed=7,
    seconds=630,
    cpu_seconds=1200,
    best_epoch=2,
    epochs=(
        Epoch(train_loss=1.5, loss=0.9, accuracy=0.74),
        Epoch(train_loss=0.5, loss=0.4, accuracy=0.871),
        Epoch(train_loss=0.3, loss=0.5, accuracy=0.868),
    ),
    losses=(9.0, *(2.0 - 0.05 * step for step in range(30))),
)
DEPTHS = (
    TriedDepth(layers=18, correct=258, total=296, examples_per_s=10.0, seconds=630),
    TriedDepth(
        layers=9,
        correct=252,
        total=296,
        difference_low=-0.06,
        difference_high=0.018,
        p_value=0.33,
        examples_per_s=19.5,
        seconds=800,
    ),
)


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_training_is_on_the_card() -> None:
    manifest = Manifest(name="tuned", licence="MIT", training=TRAINING)
    card = render_card(manifest)
    assert "## The training" in card
    assert "## The training" not in render_card(Manifest(name="tuned", licence="MIT"))
    assert "Low-rank adapters in the top 9 of 18 layers, trained on 952 examples of the task `mails`" in card
    assert "It took 10.5 minutes (20.0 of processor time) on a processor." in card


def test_a_manifest_with_a_training_reads_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("manifest") / "model.toml"
    changes = {"depth": 9, "depths": DEPTHS, "probe": (0.5, 0.84)}
    manifest = Manifest(name="tuned", licence="MIT", training=TRAINING.model_copy(update=changes))
    path.write_text(dump_manifest(manifest))
    assert read_manifest(path) == manifest


def test_every_epoch_has_its_line_and_the_kept_one_is_marked() -> None:
    head, *lines = rows(render_training(TRAINING))
    assert head[-1] == "Validation accuracy"
    assert lines[0] == ["1", "1.500", "0.900", "0.740"]
    assert lines[1] == ["**2**", "**0.500**", "**0.400**", "**0.871**"]
    written = TRAINING.model_copy(update={"epochs": (Epoch(train_loss=1.0, loss=0.5),), "best_epoch": 1})
    assert rows(render_training(written))[1][-1] == "**–**"


def test_the_depths_that_were_tried_are_a_ladder() -> None:
    cut = TRAINING.model_copy(update={"depth": 9, "depths": DEPTHS, "probe": (0.5, 0.84)})
    text = render_training(cut)
    assert "all of 9 layers, which are left of the base's 18" in text
    whole, half = rows(text)[-2:]
    assert whole == ["18 of 18", "0.872 (258 of 296)", "–", "10 (1.00×)", "10.5 min"]
    assert half[:2] == ["**9 of 18**", "**0.851 (252 of 296)**"]
    assert half[2:4] == ["**-0.060 to +0.018 (p = 0.33)**", "**19.5 (1.95×)**"]
    assert "0.500, 0.840" in text
    assert "Layers" not in render_training(TRAINING)


def test_the_curve_is_drawn_inside_its_frame() -> None:
    curve = render_curve(TRAINING)
    assert curve is not None
    root = ElementTree.fromstring(curve)
    loss, held = root.findall(f"{SVG}polyline")
    assert len(loss.attrib["points"].split()) == len(TRAINING.losses)
    assert len(held.attrib["points"].split()) == len(TRAINING.epochs)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for line in (loss, held):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 60 <= y <= height
    assert [one.attrib["class"] for one in root.findall(f"{SVG}circle")] == ["held-dot", "best", "held-dot"]
    assert "87.1% right" in curve
    heights = [float(point.split(",")[1]) for point in loss.attrib["points"].split()]
    assert heights[1:] == sorted(heights[1:]), "a falling loss falls in the picture"
    assert CURVE_FILE in render_training(TRAINING)


def test_without_losses_there_is_no_picture() -> None:
    bare = TRAINING.model_copy(update={"losses": ()})
    assert render_curve(bare) is None
    assert CURVE_FILE not in render_training(bare)
