"""The ways without training, and their figures: nearest text, first sentence, phrase, and the committed results."""

import json
from pathlib import Path

import pytest

from models.debian_synopsis import figures
from models.debian_synopsis.baseline import read_answers
from models.debian_synopsis.data.prompts import HOME, read_split, text_of
from models.debian_synopsis.figures import N_SAMPLES, WAYS, samples_table, score_synopses, table
from models.debian_synopsis.first_sentence import LIMIT, first_phrase, first_sentence
from models.debian_synopsis.rules import Draft
from models.task.words.nearest import Nearest

TEXTS = ("a fast web server", "a web browser", "mail server", "chess game for two", "chess game for two")


def test_the_nearest_text_shares_the_rarest_words() -> None:
    index = Nearest(TEXTS)
    assert index.find("Chess!", 9) == [3, 4], "ties are in the order of the texts"
    assert index.find("browser for the web", 1) == [1]
    assert index.find("server", 2) == [2, 0], "a short text counts more"
    assert index.find("nothing of it", 3) == []


@pytest.mark.parametrize(
    ("description", "sentence", "phrase"),
    [
        ("Foo is a fast editor. It edits.", "Foo is a fast editor.", "fast editor"),
        (
            "This package provides the e.g. library of Foo\nMore.",
            "This package provides the e.g. library of Foo",
            "e.g. library of Foo",
        ),
        (
            "An editor for long texts, which is fast.",
            "An editor for long texts, which is fast.",
            "editor for long texts",
        ),
        (
            "Foo is an editor for texts.\nThis package contains the development files.",
            "Foo is an editor for texts.",
            "editor for texts - development files",
        ),
        (
            "Foo is an editor for texts.\nHere is all that is needed by users who want to read the documentation.",
            "Foo is an editor for texts.",
            "editor for texts - documentation",
        ),
    ],
)
def test_a_first_sentence_becomes_a_phrase(description: str, sentence: str, phrase: str) -> None:
    assert first_sentence(description) == sentence
    assert first_phrase(description) == phrase


def test_a_phrase_is_never_too_long() -> None:
    assert all(len(first_phrase(text_of(record))) <= LIMIT for record in read_split("test"))


def test_scores_count_each_verdict() -> None:
    drafts = [Draft("a", "About a.", "fast editor"), Draft("b", "About b.", "an editor.")]
    score = score_synopses(drafts, ["fast editor", "fast web server"])
    assert score.rouge == (1.0, 0.0)
    assert (score.right, score.conforming) == ((True, False), (True, False))
    assert score.kept["no article first"] == score.kept["no full stop at the end"] == 0.5
    mean, exact, conforming = score.intervals
    assert (mean.estimate, exact.estimate, conforming.estimate) == (0.5, 0.5, 0.5)
    assert mean.low <= 0.5 <= mean.high
    shown = table({"one": score, "other": score_synopses(drafts, ["x", "y"])})
    assert "| one | 0.500 [" in shown
    assert "- one minus other: ROUGE-L 0.500 [" in shown


def test_samples_go_from_the_best_answer_to_the_worst() -> None:
    records = read_split("test")
    answers = {one.id: one.answer if place % 2 else "a | b" for place, one in enumerate(records)}
    lines = samples_table(records, answers).splitlines()[2:]
    rows = [line.replace("\\|", "/").strip("| ").split(" | ") for line in lines]
    assert len(rows) == len({row[0] for row in rows}) == N_SAMPLES
    scores = [float(row[-1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert (scores[0], scores[-1]) == (1.0, 0.0)
    assert rows[-1][2] == "a / b"
    assert samples_table(records[::-1], answers).splitlines()[2:] == lines, "no matter in which order they come"


def test_answers_of_a_batch_are_read_by_id(tmp_path: Path) -> None:
    texts = {"meson": " build system\n", "zoo": "\n\nanimals \nmore", "none": " \n"}
    lines = [{"custom_id": name, "response": {"body": {"choices": [{"text": text}]}}} for name, text in texts.items()]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_answers(path) == {"meson": "build system", "zoo": "animals", "none": ""}


RESULTS = sorted(path.stem for path in (HOME / "results").glob("*.json"))


def test_the_results_are_of_known_ways() -> None:
    assert {"first_sentence", "first_phrase", "nearest", "base_few_shot"} <= set(RESULTS) <= set(WAYS)


@pytest.mark.parametrize("name", RESULTS)
def test_each_way_has_an_answer_to_every_test_record(name: str) -> None:
    kept = json.loads((HOME / "results" / f"{name}.json").read_text(encoding="utf-8"))
    records = read_split("test")
    assert [(one["id"], one["label"]) for one in kept["predictions"]] == [(one.id, one.answer) for one in records]


def test_the_cards_figures_are_those_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[Path, str] = {}
    monkeypatch.setattr(figures, "write_atomic", written.__setitem__)
    figures.main()
    assert written == {figures.CARD: figures.CARD.read_text(encoding="utf-8")}
