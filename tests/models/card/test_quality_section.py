"""The card shows the whole ladder: every figure, the choice, what overruled it, and how it was measured."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from models.card.card import render_card, render_quality
from models.card.plot import PLOT_FILE, render_plot
from models.card.terminal import print_model
from models.manifest import Manifest
from models.quality import QUALITY_FILE, LossBudget, Quality, read_quality, write_quality
from tests.support.models.ladder import TRIM, candidate, ladder, loss, speed, written_ladder

SVG = "{http://www.w3.org/2000/svg}"


def rows(card: str, first: str) -> list[list[str]]:
    lines = (line for line in card.splitlines() if line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [line for line in cells if line[0].strip("*") == first]


def test_the_ladder_is_on_the_model_card_and_not_without_one() -> None:
    manifest = Manifest(name="tuned", licence="MIT")
    card = render_card(manifest, ladder())
    assert "## The choice of the file" in card
    assert "Not measured" not in card
    assert "Not measured" in render_card(manifest)


def test_every_figure_of_a_candidate_has_its_cell() -> None:
    lost, timed = rows(render_quality(ladder()), "Q4_0")
    assert lost[:6] == ["**Q4_0**", "230 MiB", "0.012", "0.096", "97.0%", "1.0000"]
    assert lost[6:] == ["0.832 (208 of 250)", "-0.024 to +0.016 (p = 1)", "3 (1.2%)", "**chosen**"]
    assert timed == ["**Q4_0**", "402", "61", "122", "140", "700 MiB", "4.5 (4.4 to 4.6)"]


def test_written_answers_show_their_score_in_place_of_accuracy() -> None:
    card = render_quality(written_ladder())
    (head,), (lost, _), (noise,) = rows(card, "File")[:1], rows(card, "Q4_0"), rows(card, "noise floor")
    assert (head[6], lost[6:9]) == ("ROUGE-L", ["0.832", "-0.024 to +0.016", "200 (80.0%)"])
    assert noise[6:9] == ["0.846", "-0.001 to +0.021", "1"]
    assert "Accuracy" not in card
    assert "mean ROUGE-L of the answers, each against its example's own, not lower at 95 %" in card
    assert "McNemar" not in card
    assert "McNemar" in render_quality(ladder())


def shown(quality: Quality) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    print_model(Manifest(name="tuned", licence="MIT"), quality, "", chats=True, console=console)
    return console.export_text()


def test_the_terminal_shows_the_score_with_its_interval() -> None:
    text = shown(written_ladder())
    (lost,) = (line for line in text.splitlines() if line.strip().startswith("Q4_0 ") and "MiB" in line)
    assert lost.split()[4:8] == ["0.832", "-0.004", "[-0.024,", "+0.016]"]
    assert "Accuracy" not in text
    assert "ROUGE-L: mean of the answers" in text
    assert "ROUGE-L" not in shown(ladder())
    assert "Accuracy" in shown(ladder())


def test_the_plot_has_the_intervals_of_scores() -> None:
    picture = render_plot(written_ladder()) or ""
    for part in ("F16, 518 MiB, ROUGE-L 0.836", "Q4_0, 230 MiB, -0.024 to +0.016", "label: ROUGE-L less F16"):
        assert part in picture
    assert "ROUGE-L" not in (render_plot(ladder()) or "")


def test_noise_floor_and_base_have_rows() -> None:
    card = render_quality(ladder())
    (noise,), (base,) = rows(card, "noise floor"), rows(card, "the base")
    assert (noise[2], noise[8]) == ("8e-05", "1")
    assert base[2] == "1.5"
    sampled = render_quality(ladder(noise_examples=32))
    assert rows(sampled, "noise floor")[0][8] == "1 of 32"
    assert "another batch shape, on 32 of the examples." in sampled
    bare = render_quality(ladder(noise=None, noise_flips=None, base_distance=None))
    assert "oise floor" not in bare


def test_verdicts_come_with_their_reasons() -> None:
    card = render_quality(ladder())
    assert "**Q4_0 was chosen for classifying**: the fastest within the budget: 4.5 examples/s." in card
    assert "- Q4_K_M undoes the fine-tune: mean KL divergence 1.4 to the fine-tune, 0.01 to its base." in card
    assert "- IQ4_NL is over budget: mean KL divergence 0.031, the budget is 0.02." in card


def test_an_overruled_choice_says_so() -> None:
    card = render_quality(ladder(overruled=True))
    assert "**Q4_0 was asked for by name; the choice was overruled.**" in card
    assert rows(card, "Q4_0")[0][-1] == "**chosen**, overruled"


def test_the_method_of_measurement_is_described() -> None:
    card = render_quality(ladder(budget=LossBudget(kl_mean=0.05)))
    for part in ("≤ 0.05 nats", "250 held out of `validation.jsonl`", "e" * 64, "AMD EPYC, 2 cores", "3 rounds"):
        assert part in card
    assert "102 tokens of prompt and 3 of answer" in card


def test_a_trimmed_vocabulary_is_described() -> None:
    card = render_quality(ladder(trim=TRIM))
    assert "from 262,144 tokens to 41,042" in card
    assert "96.0% of the tokens" in card
    assert "98.0%" in card
    assert "vocabulary was cut" not in render_quality(ladder())


def test_figures_not_measured_are_not_claimed() -> None:
    bare = candidate("F16", 500, None, verdict="chosen", reason="the only one")
    quality = ladder(candidates=(bare,), chosen="F16", shape=None)
    card = render_quality(quality)
    assert "Speed was not measured." in card
    assert PLOT_FILE not in card
    assert render_plot(quality) is None


def test_the_plot_has_a_dot_and_a_label_for_each_file() -> None:
    picture = render_plot(ladder())
    assert picture is not None
    root = ElementTree.fromstring(picture)
    labels = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "label"]
    assert sorted(map(str, labels)) == sorted(f"{one.name}, {one.size_bytes >> 20} MiB" for one in ladder().candidates)
    by_class = [circle.get("class") for circle in root.iter(f"{SVG}circle") if circle.get("r") != "5"]
    assert sorted(map(str, by_class)) == ["best", "over", "undone", "within", "within"]
    assert picture == render_plot(ladder())


def test_a_faster_file_is_higher_and_a_lossier_one_further_right() -> None:
    root = ElementTree.fromstring(render_plot(ladder()) or "")
    dots = {circle.get("class"): circle for circle in root.iter(f"{SVG}circle") if circle.get("r") != "5"}
    best, over = dots["best"], dots["undone"]
    assert float(best.get("cx", 0)) < float(over.get("cx", 0))
    assert float(best.get("cy", 0)) < float(over.get("cy", 0))
    for circle in dots.values():
        assert 60 <= float(circle.get("cx", 0)) <= 735
        assert 76 <= float(circle.get("cy", 0)) <= 380


def test_crowded_labels_do_not_cover_each_other() -> None:
    crowd = [
        candidate(f"Q{n}_0", 230 + n, 4.5 + n / 100, loss=loss(0.01 + n / 5000), speed=speed(400, 60)) for n in range(5)
    ]
    root = ElementTree.fromstring(render_plot(ladder(candidates=(*ladder().candidates, *crowd))) or "")
    labels = [text for text in root.iter(f"{SVG}text") if text.get("class") == "label"]
    boxes = [(float(t.get("x", 0)), float(t.get("y", 0)), 7 * len(t.text or "")) for t in labels]
    for place, (x, y, _) in enumerate(boxes):
        for other_x, other_y, other_width in boxes[:place]:
            assert abs(y - other_y) >= 11 or x >= other_x + other_width or x + boxes[place][2] <= other_x


@pytest.mark.parametrize("score", [0.004, 5000.0])
def test_a_single_file_can_be_drawn(score: float) -> None:
    alone = candidate("F16", 500, score, loss=loss(0.0), speed=speed(1, 1), verdict="chosen")
    assert "F16, 500 MiB" in (render_plot(ladder(candidates=(alone,), chosen="F16", noise=None)) or "")


def test_a_name_cannot_break_out_of_the_picture() -> None:
    odd = candidate("<script>&", 5, 1.0, loss=loss(0.1), speed=speed(1, 1), verdict="chosen")
    picture = render_plot(ladder(candidates=(odd,), chosen="<script>&")) or ""
    assert "<script>" not in picture
    assert "&lt;script&gt;&amp;" in picture


def test_the_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_quality(tmp_path, ladder(trim=TRIM))
    assert read_quality(tmp_path) == ladder(trim=TRIM)
    write_quality(tmp_path, written_ladder())
    assert read_quality(tmp_path) == written_ladder()


def test_a_report_without_scores_still_reads(tmp_path: Path) -> None:
    """Reports of work to write were made before answers had scores: they show the accuracy that they have."""
    written = ladder(work="write").model_dump(mode="json", exclude={"noise_score"})
    for one in written["candidates"]:
        del one["answers"]["score"]
    (tmp_path / QUALITY_FILE).write_text(json.dumps(written))
    old = read_quality(tmp_path)
    assert old == ladder(work="write")
    assert old.metric is None
    assert "Accuracy" in render_quality(old)
