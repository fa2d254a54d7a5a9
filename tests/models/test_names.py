"""The name that was meant: near by letters, or the only one that begins so."""

import pytest

from models.errors import did_you_mean, nearest

KNOWN = ["email-triage", "gemma-3-270m", "llama-a", "llama-b"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("emailtriage", "email-triage"),
        ("Email_Triage", "email-triage"),
        ("email-traige", "email-triage"),
        ("gemma", "gemma-3-270m"),
        ("gemma-3-270m-it", "gemma-3-270m"),
        ("gpt-9", None),
        ("", None),
        ("--", None),
        ("x" * 100_000, None),
    ],
)
def test_the_nearest_name(name: str, near: str | None) -> None:
    assert nearest(name, KNOWN) == near
    assert did_you_mean(name, KNOWN) == ("" if near is None else f"; did you mean {near!r}?")
