"""A model's name makes llama.cpp treat special tokens as its tokenizer does, and changes as little as possible."""

import pytest

from convert.tokenizer.spacing import NAME_THAT_STRIPS, general_name, name_part


@pytest.mark.parametrize(
    ("name", "part", "called"),
    [
        ("mails", "", "mails"),
        ("mails", NAME_THAT_STRIPS, "mails (phi-3)"),
        ("My Phi3 Mails", NAME_THAT_STRIPS, "My Phi3 Mails"),
        ("Phi-3-mini", NAME_THAT_STRIPS, "Phi-3-mini"),
        ("like-phi3-and-Phi-3", "", "like-phi 3-and-Phi 3"),
        ("phi-4", "", "phi-4"),
    ],
)
def test_a_name_says_no_more_and_no_less_than_the_vocabulary(name: str, part: str, called: str) -> None:
    assert general_name(name, part) == called
    assert name_part(called) == part
