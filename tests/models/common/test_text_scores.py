"""ROUGE-L: the figures of the package `rouge-score` on ASCII, words of any script, and what it must not depend on."""

import pytest

from models.common.text_scores import rouge_l, words_of


# (expected, given, F1): figures of rouge-score 0.1.2's `rougeL` without stemming, beside the fraction they are.
@pytest.mark.parametrize(
    ("expected", "given", "f1"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", 8 / 12),
        ("GNU R package (documentation)", "documentation of the GNU R package", 6 / 10),
        ("library for reading PST files", "Library, reading: files", 6 / 8),
        ("x86_64 emulator", "emulator x86 64", 4 / 6),
        ("a b c d", "d c b a", 2 / 8),
        ("chess game", "mail server", 0.0),
        ("chess game", "", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_figures_of_the_reference(expected: str, given: str, f1: float) -> None:
    assert rouge_l(expected, given) == pytest.approx(f1)
    assert rouge_l(given, expected) == pytest.approx(f1), "F1 does not know which text is the expected one"


def test_words_of_other_scripts_count() -> None:
    assert words_of("Über-große Wörter, слова 2") == ["über", "große", "wörter", "слова", "2"]
    assert rouge_l("русский словарь", "словарь") == pytest.approx(2 / 3)
