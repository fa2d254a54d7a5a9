"""Examples and prompts are read strictly, and no mail is used twice."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.errors import BadWorkload
from benchmarks.load.servers import recipe_file
from benchmarks.load.workload import (
    LabelledExample,
    answer_limit,
    draw,
    few_shot_prompts,
    labels_of,
    read_examples,
    read_prompt,
    short_prompts,
    template_prompt,
)
from models.manifest import Prompt

EXAMPLES = tuple(LabelledExample(str(i), f"mail {i}", "spam" if i % 2 else "ham") for i in range(100))


def record(text: str, label: str, **more: object) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}], **more}
    )


def test_levels_and_warm_up_share_no_mail() -> None:
    drawn = draw(EXAMPLES, [1, 4, 16], per_level=32, warmup=2, seed=0)
    used = [example.text for level in drawn.levels.values() for example in level]
    used += [example.text for example in drawn.warmup]
    assert list(drawn.levels) == [1, 4, 16]
    assert len(used) == 3 * 32 + 2
    assert len(set(used)) == len(used)
    assert drawn == draw(EXAMPLES, [1, 4, 16], per_level=32, warmup=2, seed=0)
    assert drawn != draw(EXAMPLES, [1, 4, 16], per_level=32, warmup=2, seed=1)


def test_too_few_examples_are_refused_with_what_would_fit() -> None:
    with pytest.raises(BadWorkload, match=r"need 101 different examples.*holds 100.*--requests 32"):
        draw(EXAMPLES, [1, 4, 16], per_level=33, warmup=2, seed=0)


def test_a_repeated_text_or_level_is_refused() -> None:
    with pytest.raises(BadWorkload, match="same text twice"):
        draw((*EXAMPLES, LabelledExample("x", "mail 1", "ham")), [1], per_level=4, warmup=0, seed=0)
    with pytest.raises(BadWorkload, match="different levels"):
        draw(EXAMPLES, [4, 4], per_level=4, warmup=0, seed=0)


def test_the_committed_test_split_suffices_for_the_default_run() -> None:
    examples = read_examples(recipe_file("data", "test.jsonl.gz"))
    assert len(labels_of(examples)) == 8
    draw(examples, [1, 4, 16], per_level=64, warmup=2, seed=0)


def test_texts_that_do_not_repeat_are_no_labels_and_set_the_length() -> None:
    texts = [LabelledExample(str(n), f"mail {n}", f"Dear {n}, " + "thank you. " * 50) for n in range(9)]
    assert labels_of(texts) == ()
    assert len(labels_of(texts, classifies=True)) == 9
    longest = max(len(one.label) for one in texts)
    assert longest // 2 < answer_limit(texts) < longest
    assert answer_limit(EXAMPLES) == len("spam") + 4


def test_what_is_said_before_the_text_is_kept(tmp_path: Path) -> None:
    said = [("system", "Sort."), ("user", "a"), ("assistant", "ham"), ("user", "b"), ("assistant", "spam")]
    messages = [{"role": role, "content": text} for role, text in said]
    (tmp_path / "e.jsonl").write_text(json.dumps({"messages": messages}))
    (example,) = read_examples(tmp_path / "e.jsonl")
    assert (example.text, example.label, example.before) == ("b", "spam", tuple(said[:3]))
    prompt = template_prompt("t", Prompt(system="Be brief."))
    assert prompt.said_before(example) == example.before
    assert prompt.said_before(EXAMPLES[0]) == (("system", "Be brief."),)


def test_examples_are_read_plain_and_compressed(tmp_path: Path) -> None:
    text = record("Hi", "ham ", id="a") + "\n\n" + record("Buy", "spam") + "\n"
    (tmp_path / "e.jsonl").write_text(text)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    expected = (LabelledExample("a", "Hi", "ham"), LabelledExample("3", "Buy", "spam"))
    assert read_examples(tmp_path / "e.jsonl") == expected
    assert read_examples(tmp_path / "e.jsonl.gz") == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1"),
        ('{"messages": []}', "line 1"),
        (record("a", "b") + '\n{"messages": [{"role": "user", "content": "x"}]}', "line 2"),
        (record("a", "b", id="1") + "\n" + record("c", "d", id="1"), "id '1' is that of line 1"),
        ("\n", "no record"),
        ("[]", "line 1"),
    ],
)
def test_bad_examples_are_refused_with_their_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "e.jsonl").write_text(text)
    with pytest.raises(BadWorkload, match=says):
        read_examples(tmp_path / "e.jsonl")


def test_a_torn_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(record("a", "b").encode())[:-6])
    with pytest.raises(BadWorkload, match="cannot be read"):
        read_examples(tmp_path / "e.jsonl.gz")


def test_prompts_need_their_placeholder_once(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("Mail:\n{mail}\nList:\n")
    prompt = read_prompt(path)
    assert prompt.render("a {mail} b") == "Mail:\na {mail} b\nList:"
    assert prompt.render("Mail:\na\nList:") == "Mail:\na\nList:", "it is not put around itself"
    path.write_text("Ticket: {text}\nTeam:")
    assert read_prompt(path).render("a") == "Ticket: a\nTeam:"
    path.write_text("{mail} {mail}")
    with pytest.raises(BadWorkload, match="found 2 times"):
        read_prompt(path)
    path.write_bytes(b"\xef\xbb\xbfTicket: {text}\r\nTeam:")
    assert read_prompt(path).render("a") == "Ticket: a\nTeam:", "as Windows writes it"
    assert template_prompt("t", Prompt(template="<{text}>")).render("x") == "<x>"


def test_the_shared_part_of_a_prompt_is_a_share_of_its_characters() -> None:
    assert template_prompt("t", Prompt(template="1234567890{text}")).shared_share(
        [LabelledExample("a", "12345", "x")]
    ) == pytest.approx(2 / 3)
    assert template_prompt("t", Prompt()).shared_share([LabelledExample("a", "12345", "x")]) == 0


def test_few_shot_prompts_begin_with_examples_of_their_own_and_end_with_a_question() -> None:
    prompts = few_shot_prompts(EXAMPLES, 100, seed=0, chars=200)
    texts = [prompt.text for prompt in prompts]
    assert {len(text) for text in texts} == {200}
    assert len({text[:15] for text in texts}) == 100
    assert all(text.startswith("Mail:\nmail ") and text.endswith("\nList:") for text in texts)
    assert "\nList: spam\n\nMail:" in texts[0]
    assert prompts == few_shot_prompts(EXAMPLES, 100, seed=0, chars=200)
    assert prompts != few_shot_prompts(EXAMPLES, 100, seed=1, chars=200)
    with pytest.raises(BadWorkload, match=r"101 prompts need as many mails, there are 100: use fewer --prompts"):
        few_shot_prompts(EXAMPLES, 101, seed=0)


def test_the_train_splits_mails_suffice_for_few_shot_prompts() -> None:
    mails = read_examples(recipe_file("data", "train.jsonl.gz"))
    prompts = few_shot_prompts(mails, 200, seed=0)
    assert len({prompt.text[:100] for prompt in prompts}) == 200


def test_short_prompts_differ_from_their_first_words_on() -> None:
    prompts = short_prompts(EXAMPLES, 250, chars=6)
    assert len({prompt.text.split()[0] for prompt in prompts}) == 250
    assert prompts[249].text == "250. mail 5"
