"""The GGUF and the checkpoint's own tokenizer give the same ids, and differences are reported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors

from convert.errors import VerifyFailed
from convert.proof.parity import (
    CONVERSATIONS,
    TEXTS,
    TokenizerPair,
    check_template,
    check_tokenizer,
    encode_both,
    open_pair,
)
from convert.tokenizer.chat_template import TEMPLATE_FIELD
from convert.tokenizer.read import read_vocabulary
from models.gguf.fields import Field, read_fields
from tests.support.convert import tiny_tokenizers as tiny

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JSON_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: tiny.byte_level(None),
    "smollm": lambda: tiny.byte_level(None, digits=True),
    "llama-bpe": lambda: tiny.byte_level(tiny.LLAMA3, looks_up=True),
    "dbrx": lambda: tiny.byte_level(tiny.LLAMA3),
    "qwen2": lambda: tiny.byte_level(tiny.QWEN2),
    "default": tiny.sentence_bpe,
}
MODEL_KINDS: dict[str, Callable[[], bytes]] = {
    "llama": tiny.sentence_model,
    "gemma": lambda: tiny.sentence_model(add_dummy_prefix=False, user_defined_symbols=["<tag>", "▁▁", "▁▁▁"]),
    "unigram": lambda: tiny.sentence_model("unigram", normalization_rule_name="nmt_nfkc"),
    "unigram, spaces merged": lambda: tiny.sentence_model("unigram", remove_extra_whitespaces=True),
}


# the first ranges hold what tokens are made of, and characters that no table disagrees about
TEXT = st.text(
    st.characters(max_codepoint=0x2FFF, exclude_categories=["Cs", "Cn"]) | st.sampled_from(" \n'sS1aÉ👍🏽字"),
    max_size=80,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.save(make(), tmp_path_factory.mktemp("kind") / name) for name, make in JSON_KINDS.items()}


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, TokenizerPair]:
    return {name: open_pair(tiny.convert(folder), folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", JSON_KINDS)
def test_every_kind_of_tokenizer_json_tokenises_alike(name: str, folders: dict[str, Path]) -> None:
    gguf = tiny.convert(folders[name])
    steps: list[tuple[int, int]] = []
    parity = check_tokenizer(
        open_pair(gguf, folders[name]), ["A user's own <|im_end|> text."], lambda *step: steps.append(step)
    )
    assert read_fields(gguf)["tokenizer.ggml.pre"].value == name
    assert parity.n_texts > len(TEXTS)
    assert parity.n_tokens > 1000
    assert parity.mismatches == ()
    assert steps[-1] == (parity.n_texts, parity.n_texts)


@pytest.mark.parametrize("name", JSON_KINDS)
@settings(max_examples=40)
@given(text=TEXT)
def test_random_unicode_tokenises_alike(name: str, pairs: dict[str, TokenizerPair], text: str) -> None:
    ours, theirs = encode_both(pairs[name], text)
    assert ours == theirs


@pytest.mark.parametrize("name", MODEL_KINDS)
def test_every_kind_of_tokenizer_model_tokenises_alike(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL_KINDS[name]())
    vocabulary = read_vocabulary(tmp_path, {"bos_token_id": 1, "eos_token_id": 2}, 1000)
    parity = check_tokenizer(open_pair(tiny.vocabulary_gguf(tmp_path / "v.gguf", vocabulary), tmp_path), ["two  words"])
    assert parity.n_tokens > 1000
    assert parity.mismatches == ()


@pytest.mark.parametrize("options", [{}, {"split": False}, {"prepend_scheme": "never"}], ids=str)
def test_unigram_in_tokenizer_json_tokenises_alike(options: dict[str, object], tmp_path: Path) -> None:
    folder = tiny.save(tiny.unigram(tiny.sentence_model("unigram"), **options), tmp_path)
    assert check_tokenizer(open_pair(tiny.convert(folder), folder), ["two  words"]).mismatches == ()


@pytest.mark.parametrize(
    ("pattern", "looks_up", "name"), [(tiny.TEKKEN, True, "tekken"), (tiny.GPT4O, False, "gpt-4o")]
)
def test_an_approximate_pre_tokenizer_is_warned_about(pattern: str, looks_up: bool, name: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.byte_level(pattern, looks_up=looks_up), tmp_path)
    vocabulary = read_vocabulary(folder, {}, 800)
    gguf = tiny.vocabulary_gguf(tmp_path / "v.gguf", vocabulary)
    assert any(f"approximates the pre-tokenizer {name!r}" in warning for warning in vocabulary.warnings)
    parity = check_tokenizer(open_pair(gguf, folder), ["plain English, and naïve café"])
    assert parity.mismatches, "llama.cpp has learned combining marks: the warning can go"
    with pytest.raises(VerifyFailed, match="not the checkpoint's"):
        check_tokenizer(open_pair(gguf, folder), [parity.mismatches[0].text])


def test_another_vocabulary_is_refused_with_the_first_difference(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny.save(tiny.byte_level(tiny.QWEN2), tmp_path)
    tiny.convert(folder)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    del raw["model"]["merges"][40]
    tiny.edit(folder, raw)
    with pytest.raises(VerifyFailed, match=r"differs at token \d+: from \d+ on llama.cpp has \[.*Hugging Face \["):
        check_tokenizer(open_pair(folder / "vocabulary.gguf", folder), [])


def test_bos_and_eos_are_added_as_the_post_processor_says(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level(tiny.LLAMA3)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    )
    folder = tiny.save(tokenizer, tmp_path, add_bos_token=False)
    vocabulary = read_vocabulary(folder, {}, 800)
    assert any("add_bos_token = False" in warning for warning in vocabulary.warnings)
    gguf = tiny.vocabulary_gguf(tmp_path / "v.gguf", vocabulary)
    check_tokenizer(open_pair(gguf, folder), [])
    without = {**vocabulary.fields, "tokenizer.ggml.add_eos_token": Field.boolean(False)}
    wrong = tiny.vocabulary_gguf(tmp_path / "w.gguf", type(vocabulary)(without, vocabulary.size, ()))
    with pytest.raises(VerifyFailed, match="BOS or EOS are not added as in the checkpoint"):
        check_tokenizer(open_pair(wrong, folder), [])


def test_text_is_compared_composed_where_the_tokenizer_composes_it(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level(tiny.QWEN2)
    tokenizer.normalizer = normalizers.NFC()
    folder = tiny.save(tokenizer, tmp_path)
    parity = check_tokenizer(open_pair(tiny.convert(folder), folder), ["cafe\u0301"])
    assert parity.limits == ("texts are compared in composed form (NFC)",)


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}


@pytest.mark.parametrize(
    ("scheme", "template", "limits"),
    [
        ("always", "", ["without spaces at their beginning"]),
        ("first", "", ["without spaces at their beginning"]),
        ("first", "{{ bos_token }}" + CHATML, ["without spaces at their beginning", "as they come after '<s>'"]),
        ("never", "{{ bos_token }}" + CHATML, []),
    ],
)
def test_each_form_of_the_space_prefix_tokenises_alike(
    scheme: str, template: str, limits: list[str], tmp_path: Path
) -> None:
    folder = tiny.save(tiny.sentence_bpe(), tmp_path)
    tiny.edit(folder, {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": scheme}})
    if template:
        with_template(folder, template)
    gguf = tiny.convert(folder)
    parity = check_tokenizer(open_pair(gguf, folder), ["Hello", "  Hello"])
    assert [limit.removeprefix("texts are compared ") for limit in parity.limits] == limits
    assert check_template(open_pair(gguf, folder), []).n_compared == (len(CONVERSATIONS) if template else 0)


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize("make", [lambda: tiny.byte_level(tiny.QWEN2), tiny.sentence_bpe], ids=["bytes", "sentence"])
def test_prompts_are_rendered_and_tokenised_by_hugging_faces_rule(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    folder = with_template(tiny.save(make(), tmp_path), CHATML)
    parity = check_template(
        open_pair(tiny.convert(folder), folder), [CONVERSATIONS[0], [{"role": "user", "content": "</s>"}]]
    )
    assert parity.n_compared == len(CONVERSATIONS) + 1
    assert parity.warnings == ()


def test_bos_occurs_once_before_a_prompt(tmp_path: Path) -> None:
    folder = with_template(
        tiny.save(tiny.byte_level(tiny.LLAMA3), tmp_path, add_bos_token=True), "{{ bos_token }}" + CHATML
    )
    gguf = tiny.convert(folder)
    assert check_template(open_pair(gguf, folder), []).warnings == ()
    with_template(folder, CHATML)
    told = check_template(open_pair(tiny.convert(folder), folder), [])
    assert "the template writes no BOS" in told.warnings[0]


def test_another_template_is_refused(tmp_path: Path) -> None:
    folder = with_template(tiny.save(tiny.byte_level(tiny.LLAMA3), tmp_path), CHATML)
    vocabulary = read_vocabulary(folder, {}, 800)
    changed = {**vocabulary.fields, TEMPLATE_FIELD: Field.string(CHATML.replace("assistant", "model"))}
    gguf = tiny.vocabulary_gguf(tmp_path / "v.gguf", type(vocabulary)(changed, vocabulary.size, ()))
    with pytest.raises(VerifyFailed, match="the rendered prompt is"):
        check_template(open_pair(gguf, folder), [])


def test_a_conversation_that_the_template_refuses_is_skipped(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    folder = with_template(tiny.save(tiny.byte_level(tiny.LLAMA3), tmp_path), strict)
    assert check_template(open_pair(tiny.convert(folder), folder), []).n_compared == len(CONVERSATIONS) - 1


def test_what_is_not_compared_is_counted_and_told(tmp_path: Path) -> None:
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    folder = with_template(tiny.save(tiny.byte_level(tiny.QWEN2), tmp_path), refusing)
    asked = [[{"role": "user", "content": text}] for text in ("yes", "no", "a <|im_start|> b", "</s>")]
    parity = check_template(open_pair(tiny.convert(folder), folder), asked)
    assert parity.n_compared == len(CONVERSATIONS) + 1
    assert [told.partition(": ")[0] for told in parity.skipped] == [
        "1 of 4 conversations are not compared",
        "2 of 4 conversations are not compared",
    ]
    assert "'<|im_start|>'" in parity.skipped[1]


ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}</s>\n"
    "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
PLAIN_TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("template", [ALPACA, PLAIN_TURNS, "{%- for m in messages %}{{ m['content'] }}\n{% endfor %}"])
def test_prompts_that_begin_with_plain_text_begin_with_the_tokenizers_space(template: str, tmp_path: Path) -> None:
    """transformers 5 saves the SentencePiece of a Llama so: a space goes before a text, none after a special token."""
    folder = tiny.save(tiny.sentence_bpe(), tmp_path)
    tiny.edit(folder, {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}})
    with_template(folder, template)
    pair = open_pair(tiny.convert(folder), folder)
    assert check_template(pair, []).n_compared == len(CONVERSATIONS)
    check_tokenizer(pair, ["Hello"])


@pytest.mark.parametrize(
    "start",
    [
        "{{ bos_token }}",
        "\n{{- bos_token }}",
        "{% if bos_token %}{{ bos_token }}{% endif %}\n\n",
        "{{ pad_token }}{{ unk_token }}",
        "{% for m in messages %}{{ bos_token }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("named", [{}, {"pad_token": "<s>"}])
def test_a_template_gets_the_special_tokens_that_transformers_gives_it(
    start: str, named: dict[str, str], tmp_path: Path
) -> None:
    """A Qwen names no BOS, and common templates write it all the same; a GGUF always has one."""
    folder = tiny.save(tiny.byte_level(tiny.QWEN2), tmp_path, bos_token=None, eos_token="<|im_end|>", **named)
    with_template(folder, start + CHATML)
    assert check_template(open_pair(tiny.convert(folder), folder), []).n_compared == len(CONVERSATIONS)
