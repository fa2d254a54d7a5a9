"""No text on both sides, the same sides every time, and clear words when the examples do not do."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.measure.examples import (
    MIN_EXAMPLES,
    json_is_compact,
    labels_of,
    prompt_of,
    split_examples,
)
from models.common.chat_records import MAX_LABELS, ChatMessage, ChatRecord
from models.errors import BadExamples
from models.manifest import Prompt


def example(number: int, text: str, answer: str = "ham") -> ChatRecord:
    return ChatRecord(str(number), number, (ChatMessage("user", text),), answer)


def examples(count: int) -> list[ChatRecord]:
    return [example(number, f"mail {number}") for number in range(1, count + 1)]


texts = st.lists(st.integers(0, 60).map(lambda n: f"mail {n}"), min_size=MIN_EXAMPLES, max_size=120)


@given(texts.filter(lambda drawn: len(set(drawn)) >= MIN_EXAMPLES), st.integers(MIN_EXAMPLES // 2, 50))
def test_every_text_is_on_one_side_once(drawn: list[str], max_held_out: int) -> None:
    split = split_examples([example(place, text) for place, text in enumerate(drawn)], max_held_out)
    sides = [[record.prompt[0].content for record in side] for side in (split.calibration, split.held_out)]
    assert sorted(sides[0] + sides[1]) == sorted(set(drawn))
    assert len(sides[1]) == min(max_held_out, len(set(drawn)) // 2)


def test_the_order_of_the_file_does_not_matter() -> None:
    some = examples(90)
    shuffled = some.copy()
    random.Random(1).shuffle(shuffled)
    assert split_examples(some, 30) == split_examples(shuffled, 30)


def test_white_space_does_not_make_another_text() -> None:
    records = [*examples(MIN_EXAMPLES), example(99, " mail 1\n", "spam")]
    split = split_examples(records)
    assert len(split.calibration + split.held_out) == MIN_EXAMPLES
    assert {record.answer for record in split.calibration + split.held_out} == {"ham"}


@pytest.mark.parametrize(
    ("count", "max_held_out", "says"),
    [(19, 200, "hold 19 different prompts in 19 records; at least 20"), (40, 9, "at least 10 .* limit of 9")],
)
def test_too_few_are_refused(count: int, max_held_out: int, says: str) -> None:
    with pytest.raises(BadExamples, match=says):
        split_examples(examples(count), max_held_out)


def test_labels_are_the_models_or_what_was_answered() -> None:
    records = [example(1, "a", "spam"), example(2, "b", "ham"), example(3, "c", "spam")]
    assert labels_of(records) == ("ham", "spam")
    assert labels_of(records, ("spam", "other", "ham")) == ("spam", "other", "ham")


@pytest.mark.parametrize(
    ("answers", "known", "says"),
    [
        (["spam", "eggs"], ("spam", "ham"), "line 2: the answer 'eggs' is none of the model's 2 labels: 'spam', 'ham'"),
        (["spam", "spam"], (), "1 different answers"),
        ([f"label {n}" for n in range(MAX_LABELS + 1)], (), "256 different answers; .* 2 … 255"),
    ],
)
def test_labels_that_cannot_be_chosen_from_are_refused(answers: list[str], known: tuple[str, ...], says: str) -> None:
    with pytest.raises(BadExamples, match=says):
        labels_of([example(n, str(n), answer) for n, answer in enumerate(answers, 1)], known)


def asked(*texts: str, system: str = "") -> list[ChatRecord]:
    first = (ChatMessage("system", system),) if system else ()
    return [ChatRecord(str(n), n, (*first, ChatMessage("user", text)), "ham") for n, text in enumerate(texts)]


PROMPTS: dict[str, tuple[list[ChatRecord], Prompt]] = {
    "bare": (asked("win money", "see you"), Prompt()),
    "words around": (
        asked("Ticket: printer broken.\nTeam:", "Ticket: no mail!\nTeam:"),
        Prompt(template="Ticket: {text}\nTeam:"),
    ),
    "half a word is the text's": (asked("Sort: money", "Sort: more"), Prompt(template="Sort: {text}")),
    "marks alone are the text's": (asked("(one).", "(two)."), Prompt()),
    "a system message": (asked("one", "two", system="Sort."), Prompt(system="Sort.")),
    "two system messages": ([*asked("one", system="A"), *asked("two", system="B")], Prompt()),
    "one within another": (asked("Sort: a", "Sort: a b"), Prompt(template="Sort: {text}")),
    "a placeholder in the words": (asked("{text} = a", "{text} = b"), Prompt()),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_is_what_all_examples_share(name: str) -> None:
    records, expected = PROMPTS[name]
    assert prompt_of(records) == expected
    for record in records:
        said = [(message.role, message.content) for message in record.prompt]
        assert expected.messages(said) == [{"role": role, "content": text} for role, text in said]


@pytest.mark.parametrize(
    ("answers", "compact"),
    [
        (['{"a":1,"b":2}', "[1,2]", '{"a": 1}'], True),
        (['{"a": 1, "b": 2}', "[1, 2]", '{"a":1}'], False),
        (['{"ä": "x, y: z"}'], False),
        (["spam", "{}", "[7]", '{"a": ', "{oops}"], None),
    ],
)
def test_the_examples_show_how_the_model_writes_json(answers: list[str], compact: bool | None) -> None:
    records = [ChatRecord(str(n), n, (ChatMessage("user", "x"),), answer) for n, answer in enumerate(answers)]
    assert json_is_compact(records) is compact
