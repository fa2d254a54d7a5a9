"""Examples are read unchanged; a bad one is refused with its line."""

import gzip
import json
from pathlib import Path

import pytest

from models.common import chat_records
from models.common.chat_records import ChatMessage, ChatRecord, read_chat_records
from models.errors import BadExamples


def record(*messages: tuple[str, object], **more: object) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages], **more})


GOOD = record(("user", "Hi"), ("assistant", "ham"))


def test_records_are_read_plain_and_packed(tmp_path: Path) -> None:
    whole = record(("system", "Sort."), ("user", "Buy\u2028now"), ("assistant", " spam\n"), id="a").replace(
        "\\u2028", "\u2028"
    )
    text = "\ufeff" + whole + "\n\n" + GOOD + "\n"
    (tmp_path / "e.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    expected = (
        ChatRecord("a", 1, (ChatMessage("system", "Sort."), ChatMessage("user", "Buy\u2028now")), "spam"),
        ChatRecord("3", 3, (ChatMessage("user", "Hi"),), "ham"),
    )
    assert read_chat_records(tmp_path / "e.jsonl") == expected
    assert read_chat_records(tmp_path / "e.jsonl.gz") == expected


FORMS = {
    "prompt and completion": {"prompt": "Buy", "completion": " spam"},
    "of messages": {
        "prompt": [{"role": "user", "content": "Buy"}],
        "completion": [{"role": "assistant", "content": "spam"}],
    },
    "ShareGPT": {"conversations": [{"from": "human", "value": "Buy"}, {"from": "gpt", "value": "spam"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_other_tools_write_is_read(tmp_path: Path, form: str) -> None:
    (tmp_path / "e.jsonl").write_text(json.dumps(FORMS[form]))
    assert read_chat_records(tmp_path / "e.jsonl") == (ChatRecord("1", 1, (ChatMessage("user", "Buy"),), "spam"),)


def test_a_packed_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_bytes(gzip.compress(GOOD.encode()))
    assert read_chat_records(tmp_path / "e.jsonl")[0].answer == "ham"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a chat record"),
        ("[" * 100_000, "not a chat record"),
        ("[]", "expected an object"),
        ('{"messages": []}', "expected an object"),
        ('{"prompt": "a", "completion": 3}', "expected an object"),
        ('{"conversations": [{"from": "human"}, 3]}', r"messages\[0\] needs a role"),
        ('{"messages": ["Hi"]}', r"messages\[0\] is str"),
        (record(("user", "Hi"), ("assistant", None)), r"messages\[1\] needs a role and a content"),
        (record(("user", "Hi")), "must be the assistant's.*got role 'user'"),
        (record(("user", "Hi"), ("assistant", " \n")), "answer is empty"),
        (record(("assistant", "Hi")), "there is no message before"),
        (record(("user", "\ud800"), ("assistant", "x")), r"messages\[0\].content holds half a surrogate"),
        (record(("user", "Hi"), ("assistant", "x"), id="1"), "id '1' is that of line 1"),
        ("x" * 2000, "longer than the limit of 1000 bytes"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str) -> None:
    monkeypatch.setattr(chat_records, "MAX_LINE_BYTES", 1000 if line.startswith("x") else 1 << 20)
    file = tmp_path / "e.jsonl"
    file.write_text(GOOD + "\n" + line + "\n" + GOOD + "\n")
    with pytest.raises(BadExamples, match=f"e.jsonl', line 2: .*{says}"):
        read_chat_records(file)


def test_invalid_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(BadExamples, match=r"line 2: .*utf-8"):
        read_chat_records(tmp_path / "e.jsonl")


def test_a_small_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_records, "MAX_FILE_BYTES", 1000)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress((GOOD + "\n").encode() * 100))
    with pytest.raises(BadExamples, match="exceeds the limit of 1000 bytes"):
        read_chat_records(tmp_path / "e.jsonl.gz")


@pytest.mark.parametrize("damage", ["torn", "changed", "plain", "missing"])
def test_a_file_that_cannot_be_unpacked_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "e.jsonl.gz"
    packed = bytearray(gzip.compress((GOOD + "\n").encode() * 3))
    packed[10] ^= 0xFF if damage == "changed" else 0
    contents = {"torn": bytes(packed[:-6]), "changed": bytes(packed), "plain": GOOD.encode()}
    if damage in contents:
        file.write_bytes(contents[damage])
    with pytest.raises(BadExamples, match=r"e.jsonl.gz' cannot be read"):
        read_chat_records(file)


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text("\n \n")
    with pytest.raises(BadExamples, match="hold no record"):
        read_chat_records(tmp_path / "e.jsonl")
