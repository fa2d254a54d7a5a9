"""Debian's written rules as checks: each accepts what the rule allows and refuses what it forbids."""

import pytest

from models.debian_synopsis.data.prompts import read_split, text_of
from models.debian_synopsis.rules import LIMIT, RULES, Draft, broken, conforms

DESCRIPTION = "Meson is a build system. It is a build system that is fast.\nThis package contains everything."
GOOD = (
    "high-productivity build system",
    "Qt build system, etc.",
    "build system for U.S.A.",
    "A/V build system",
    "meson-like build system",
    "build system (documentation)",
    "Node.js build system",
    "build system that is an extension of make"[:20],
)
BAD = {
    "one line": ("build\nsystem", "", " build system", "build system "),
    "fewer than 80 characters": ("build system " * 7, "x " * (LIMIT // 2)),
    "more than one word": ("build",),
    "not the package's name first": ("meson build system", "Meson, the build system"),
    "no article first": ("a build system", "An able build system", "the build system"),
    "no full stop at the end": ("build system.", "fast build system!"),
    "not a sentence": (
        "This package is for builds",
        "It builds systems",
        "Meson is a build system",
        "fast build system. Builds all",
    ),
    "not a verb phrase": ("provides builds", "Contains all build files"),
    "not the first words of the description": ("Meson is a build system", "meson is a build system."),
    "no needless capital": ("Build system, fast",),
}


@pytest.mark.parametrize("synopsis", GOOD)
def test_a_good_synopsis_keeps_every_rule(synopsis: str) -> None:
    assert broken(Draft("meson", DESCRIPTION, synopsis)) == []


@pytest.mark.parametrize(("name", "synopsis"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_each_rule_refuses_what_it_forbids(name: str, synopsis: str) -> None:
    draft = Draft("meson", DESCRIPTION, synopsis)
    assert name in broken(draft)
    required = {rule.name for rule in RULES if rule.required}
    assert conforms(draft) == (not required & set(broken(draft)))


def test_every_rule_is_tried_and_has_a_source() -> None:
    assert set(BAD) == {rule.name for rule in RULES}
    assert all(rule.source.startswith(("Policy", "Developer's Reference")) for rule in RULES)


def test_the_limit_is_exact() -> None:
    assert broken(Draft("p", "", "ab " + "x" * (LIMIT - 4))) == []
    assert broken(Draft("p", "", "ab " + "x" * (LIMIT - 3))) == ["fewer than 80 characters"]


def test_a_rule_that_maintainers_often_break_is_not_required() -> None:
    """More than one in ten of their own synopses: then it is information, not a rule that anybody keeps."""
    drafts = [Draft(one.id, text_of(one), one.answer) for one in read_split("train")]
    for rule in RULES:
        kept = sum(map(rule.holds, drafts)) / len(drafts)
        assert rule.required == (kept >= 0.9), (rule.name, kept)
