"""Long texts are cut at the end of a token, once, and inside the template around them."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import Prompt
from runtime.errors import InvalidRequest
from runtime.prompt.cut import cut_messages, cut_text
from tests.support.runtime.fakes import FakeTokenizer

LIMIT = 8


class Greedy(FakeTokenizer):
    """Merges pairs of the letter a, from the left: a beginning may be read as other tokens than in the whole."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return super().encode(text.replace("aa", "\x01"), add_special=add_special, parse_special=parse_special)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        return b"aa" if token == 1 else super().token_bytes(token, special=special)


class Spaced(FakeTokenizer):
    """Puts a space before every text."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return super().encode(f" {text}", add_special=add_special, parse_special=parse_special)


class Lower(FakeTokenizer):
    """Spells no capital letter."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return super().encode(text.lower(), add_special=add_special, parse_special=parse_special)


class Unsteady(FakeTokenizer):
    """A text that ends with x has many more tokens than it spells."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = super().encode(text, add_special=add_special, parse_special=parse_special)
        return tokens + [0] * 20 if text.endswith("x") else tokens


TOKENIZERS: Sequence[FakeTokenizer] = (FakeTokenizer(), Greedy(), Spaced(), Lower(), Unsteady())


def n_tokens(text: str, tokenizer: FakeTokenizer) -> int:
    return len(tokenizer.encode(text, add_special=False, parse_special=False))


@settings(deadline=None)
@given(text=st.text(alphabet="aaab ZéxX€😀", max_size=400), limit=st.integers(LIMIT, 40))
def test_what_is_left_is_a_beginning_that_is_not_cut_again(text: str, limit: int) -> None:
    for tokenizer in TOKENIZERS:
        kept = cut_text(text, limit, tokenizer)
        assert text.startswith(kept)
        assert n_tokens(kept, tokenizer) <= limit
        assert cut_text(kept, limit, tokenizer) == kept
        if n_tokens(text, tokenizer) <= limit and not isinstance(tokenizer, Unsteady):
            assert kept == text


def test_as_many_tokens_are_left_as_may_be() -> None:
    assert cut_text("0123456789", LIMIT, FakeTokenizer()) == "01234567"
    assert cut_text("aa" * 10, LIMIT, Greedy()) == "aa" * LIMIT
    assert cut_text("0123456789", LIMIT, Spaced()) == "0123456"
    assert cut_text("ABCDEFGHIJ", LIMIT, Lower()) == "ABCDEFGH"
    assert cut_text("1234567éé", LIMIT, FakeTokenizer()) == "1234567", "no half character"


def test_the_beginning_decides_however_long_the_text_is() -> None:
    """Tokenising may be quadratic: of a megabyte only a beginning is read."""
    read: list[int] = []

    class Counting(FakeTokenizer):
        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            read.append(len(text))
            return super().encode(text, add_special=add_special, parse_special=parse_special)

    assert cut_text("word " * 200_000, LIMIT, Counting()) == "word wor"
    assert max(read) < 1000


def test_the_template_stays_and_each_of_the_users_texts_is_cut() -> None:
    prompt = Prompt(template="Mail: {text} Label:", system="Sort.", max_text_tokens=LIMIT)
    said = prompt.messages([("user", "0123456789"), ("assistant", "a longer answer"), ("user", "short")])
    cut = cut_messages(said, prompt, FakeTokenizer())
    assert [message["content"] for message in cut.messages] == [
        "Sort.",
        "Mail: 01234567 Label:",
        "a longer answer",
        "Mail: short Label:",
    ]
    assert cut.n_cut == 1
    assert cut_messages(cut.messages, prompt, FakeTokenizer()).messages == cut.messages
    bare = cut_messages([{"role": "user", "content": "0123456789"}], prompt, FakeTokenizer())
    assert bare.messages == [{"role": "user", "content": "01234567"}]


def test_without_a_length_the_messages_are_the_same_objects() -> None:
    said = Prompt().messages([("user", "word " * 1000)])
    assert cut_messages(said, Prompt(), FakeTokenizer()).messages is said


def test_half_a_surrogate_is_the_requests_error() -> None:
    with pytest.raises(InvalidRequest):
        cut_text("\ud800" + "a" * 20, LIMIT, FakeTokenizer())
