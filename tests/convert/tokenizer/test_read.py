"""A folder's tokenizer becomes the GGUF's fields; settings that llama.cpp cannot reproduce are refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf.vocab import SpecialVocab

from convert.errors import TemplateInvalid, TokenizerInvalid
from convert.proof.parity import check_tokenizer, encode_both, open_pair
from convert.tokenizer.pieces import TOKEN_FLAGS, TokenType, config_tokens
from convert.tokenizer.read import VocabularyFields, read_vocabulary
from convert.tokenizer.special import ENDS_BY_TEXT
from runtime.llama.model import load_tokenizer
from tests.support.convert import tiny_tokenizers as tiny

LAST = 703  # the highest id of the tiny byte-level vocabulary


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tiny.save(tiny.byte_level(tiny.LLAMA3), tmp_path_factory.mktemp("saved"))
    raw: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert max(token["id"] for token in raw["added_tokens"]) == LAST
    return raw


@pytest.fixture
def folder(tmp_path: Path, saved: Mapping[str, Any]) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    configure(tmp_path, bos_token="<s>", eos_token="</s>")
    return tmp_path


def configure(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def value(vocabulary: VocabularyFields, key: str) -> Any:
    field = vocabulary.fields.get(f"tokenizer.ggml.{key}")
    return None if field is None else field.value


def change_model(folder: Path, saved: Mapping[str, Any], **changes: Any) -> None:
    tiny.edit(folder, {"model": {**saved["model"], **changes}})


def test_fields_of_a_byte_level_tokenizer(folder: Path) -> None:
    vocabulary = read_vocabulary(folder, {}, LAST + 3)
    tokens, kinds = (vocabulary.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert vocabulary.size == LAST + 3
    assert (tokens.strings or [])[-6:] == [b"<s>", b"</s>", b"<|im_start|>", b"<|im_end|>", b"[PAD704]", b"[PAD705]"]
    assert (kinds.numbers or ())[-6:] == (TokenType.CONTROL,) * 4 + (TokenType.UNUSED,) * 2
    assert (value(vocabulary, "bos_token_id"), value(vocabulary, "eos_token_id")) == (LAST - 3, LAST - 2)
    assert value(vocabulary, "add_bos_token") is False
    assert vocabulary.warnings == ("the folder has no chat template",)


def test_both_spellings_of_merges_are_the_same(folder: Path, saved: Mapping[str, Any]) -> None:
    pairs = read_vocabulary(folder, {}, 704).fields["tokenizer.ggml.merges"]
    change_model(folder, saved, merges=[" ".join(pair) for pair in saved["model"]["merges"]])
    assert read_vocabulary(folder, {}, 704).fields["tokenizer.ggml.merges"] == pairs


@pytest.mark.parametrize(
    ("family", "digits", "name"),
    [("granite", True, "refact"), ("llama", True, "smollm"), ("stablelm", False, "stablelm2")],
)
def test_a_family_keeps_llama_cpps_own_name_for_its_pattern(
    family: str, digits: bool, name: str, tmp_path: Path
) -> None:
    tokenizer = tiny.byte_level(None, digits=True) if digits else tiny.byte_level(tiny.QWEN2)
    vocabulary = read_vocabulary(tiny.save(tokenizer, tmp_path), {"model_type": family}, 800)
    assert value(vocabulary, "pre") == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (tiny.LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n"), "dbrx"),
        (tiny.LLAMA3.replace("?", "?+", 1).replace("(?+i", "(?i"), "dbrx"),
        (tiny.LLAMA3.replace(tiny.CONTRACTIONS, "'(?i:[sdmt]|ll|ve|re)"), "dbrx"),
        (tiny.QWEN2.replace(r"|\p{N}|", r"|\p{N}{1}|"), "qwen2"),
    ],
)
def test_a_pattern_is_known_in_any_spelling(folder: Path, saved: Mapping[str, Any], spelling: str, name: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": spelling}, "behavior": "Removed", "invert": True}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tiny.edit(folder, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_only]}})
    assert value(read_vocabulary(folder, {}, 704), "pre") == name


BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
REFUSED_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown pattern": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}},
        r"splits text by '\\\\w\+', which is none of llama.cpp's .* --gguf",
    ),
    "another behaviour": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": tiny.LLAMA3}, "behavior": "Removed", "invert": False}},
        "llama.cpp cannot reproduce",
    ),
    "a space before all": ({"pre_tokenizer": {**BYTES_ONLY, "add_prefix_space": True}}, "add_prefix_space"),
    "no regex at all": ({"pre_tokenizer": BYTES_ONLY}, "splits text by nothing"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "has no pre-tokenizer"),
    "another kind": ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "'BertPreTokenizer', which llama.cpp cannot"),
    "a normalizer": ({"normalizer": {"type": "Lowercase"}}, "prepares text by .*Lowercase.* --gguf"),
    "NFKC in a row": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        "NFKC",
    ),
}


@pytest.mark.parametrize("name", REFUSED_STEPS)
def test_steps_that_llama_cpp_cannot_reproduce_are_refused_by_name(folder: Path, name: str) -> None:
    change, message = REFUSED_STEPS[name]
    tiny.edit(folder, change)
    with pytest.raises(TokenizerInvalid, match=message):
        read_vocabulary(folder, {}, 704)


MOST_MERGES = 1000
REFUSED_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"type": "WordPiece"}, "is a 'WordPiece' tokenizer; known are BPE and Unigram"),
    "word ends": ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix = '</w>'"),
    "no merges": ({"merges": []}, "has no merges"),
    "a torn merge": ({"merges": ["a b", "c"]}, "merge 1 is 'c', two pieces are needed"),
    "too many merges": ({"merges": ["a b"] * (MOST_MERGES + 1)}, f"has 1001 merges, the limit is {MOST_MERGES}"),
    "no tokens": ({"vocab": {}}, "has 0 tokens"),
    "an id twice": ({"vocab": {"a": 0, "b": 0}}, "gives the id 0 to 'a' and to 'b'"),
    "an id that is none": ({"vocab": {"a": -1}}, "gives token 'a' the id -1"),
    "a huge id": ({"vocab": {"a": 1 << 60}}, "gives token 'a' the id"),
    "an added token's id": ({"vocab": {"a": LAST}}, f"gives the id {LAST} to 'a' and to the added"),
    "one text twice": ({"vocab": {"a": 0, "</s>": 1}}, "spells token 1 and token 701 alike: '</s>'"),
    "bytes without byte tokens": ({"byte_fallback": True}, "no token '<0x00>'"),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_a_malformed_model_is_refused(
    folder: Path, saved: Mapping[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.tokenizer.tokenizer_json.MAX_MERGES", MOST_MERGES)  # millions take seconds to parse
    changes, message = REFUSED_MODELS[name]
    change_model(folder, saved, **changes)
    with pytest.raises(TokenizerInvalid, match=message):
        read_vocabulary(folder, {}, 704)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([{"id": 5}], "has the added token"),
        ([{"id": "5", "content": "<x>"}], "has the added token"),
        ([{"id": 900, "content": "<x>"}, {"id": 900, "content": "<y>"}], "gives the id 900 to '<x>' and to '<y>'"),
    ],
)
def test_malformed_added_tokens_are_refused(folder: Path, added: list[Any], message: str) -> None:
    tiny.edit(folder, {"added_tokens": added})
    with pytest.raises(TokenizerInvalid, match=message):
        read_vocabulary(folder, {}, 1000)


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(TokenizerInvalid, match="token ids up to 703, the model has 700 rows"):
        read_vocabulary(folder, {}, 700)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[]", "holds a list"),
    ],
)
def test_broken_json_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerInvalid, match=message):
        read_vocabulary(folder, {}, 704)


def test_a_folder_without_a_tokenizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerInvalid, match=r"neither 'tokenizer.json' nor 'tokenizer.model'; vocab.json alone"):
        read_vocabulary(tmp_path, {}, 10)


def test_a_file_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.tokenizer.pieces.MAX_FILE_BYTES", 100)
    with pytest.raises(TokenizerInvalid, match="the limit is 100"):
        read_vocabulary(folder, {}, 704)


def test_added_tokens_are_control_or_user_defined(folder: Path, saved: Mapping[str, Any]) -> None:
    more = [("<tool>", False), ("<|quiet|>", False), ("▁▁", False), ("<end>", True)]
    tokens = [{"id": LAST + 1 + n, "content": text, "special": special} for n, (text, special) in enumerate(more)]
    tiny.edit(folder, {"added_tokens": [*saved["added_tokens"], *tokens]})
    vocabulary = read_vocabulary(folder, {}, LAST + 5)
    assert (vocabulary.fields["tokenizer.ggml.tokens"].strings or [])[-4:] == [b"<tool>", b"<|quiet|>", b"  ", b"<end>"]
    kinds = (vocabulary.fields["tokenizer.ggml.token_type"].numbers or ())[-4:]
    assert kinds == (TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.CONTROL)


@pytest.mark.parametrize(
    ("texts", "listed", "places", "warned"),
    [
        (["<a>"], [704], {"eos": 701, "eot": 704}, ""),
        (["<a>", "<b>"], [704, 705], {"eos": 701, "eot": 704, "eom": 705}, ""),
        (["<|eot_id|>", "<a>", "<b>"], [704, 705, 706], {"eos": 701, "eot": 705, "eom": 706}, ""),
        (
            ["<a>", "<b>", "<c>"],
            [704, 705, 706],
            {"eos": 701, "eot": 704, "eom": 705},
            "no field left for the end tokens '<c>'",
        ),
    ],
)
def test_every_id_that_ends_an_answer_ends_it_in_llama_cpp(
    folder: Path, saved: Mapping[str, Any], texts: list[str], listed: list[int], places: dict[str, int], warned: str
) -> None:
    tokens = [{"id": LAST + 1 + n, "content": text, "special": True} for n, text in enumerate(texts)]
    tiny.edit(folder, {"added_tokens": [*saved["added_tokens"], *tokens]})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [701, *listed]}))
    vocabulary = read_vocabulary(folder, {"eos_token_id": 701}, 704 + len(texts))
    found = {place: value(vocabulary, f"{place}_token_id") for place in ("eos", "eot", "eom")}
    assert {place: index for place, index in found.items() if index is not None} == places
    assert any(warned in warning for warning in vocabulary.warnings)
    ends = set(load_tokenizer(tiny.vocabulary_gguf(folder / "v.gguf", vocabulary)).end_tokens)
    assert {701, *listed} - ends == ({706} if warned else set())


def test_llama_cpp_still_knows_the_same_ends_by_their_texts(folder: Path, saved: Mapping[str, Any]) -> None:
    for text in sorted(ENDS_BY_TEXT - set(tiny.SPECIAL)):
        tiny.edit(folder, {"added_tokens": [*saved["added_tokens"], {"id": 704, "content": text, "special": True}]})
        gguf = tiny.vocabulary_gguf(folder / "v.gguf", read_vocabulary(folder, {"eos_token_id": 0}, 705))
        assert load_tokenizer(gguf).is_end(704), text


def test_the_templates_mark_ends_a_turn(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    vocabulary = read_vocabulary(folder, {}, 704)
    assert value(vocabulary, "eot_token_id") == LAST
    assert vocabulary.fields["tokenizer.chat_template"].value == "{{ messages[0]['content'] }}<|im_end|>"


@pytest.mark.parametrize("named", [704, [701, 704]], ids=str)
def test_an_end_beyond_the_vocabulary_is_left_out_and_told(folder: Path, named: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    vocabulary = read_vocabulary(folder, {"eos_token_id": named}, 704)
    assert value(vocabulary, "eos_token_id") == 701
    told = [warning for warning in vocabulary.warnings if "eos_token_id" in warning]
    assert told == ["eos_token_id names 704, which is left out: the vocabulary has 704 tokens"]
    configure(folder)
    if named == 704:
        with pytest.raises(TokenizerInvalid, match=r"eos_token_id names 704, .*; no token ends an answer"):
            read_vocabulary(folder, {"eos_token_id": named}, 704)


@pytest.mark.parametrize("config", [{"eos_token_id": [-1]}, {"eos_token_id": "</s>"}], ids=str)
def test_an_end_that_is_no_id_is_refused(folder: Path, config: dict[str, Any]) -> None:
    with pytest.raises(TokenizerInvalid, match="eos_token_id names"):
        read_vocabulary(folder, config, 704)


def test_a_vocabulary_without_an_end_is_refused(folder: Path) -> None:
    configure(folder)
    with pytest.raises(TokenizerInvalid, match="no token ends an answer"):
        read_vocabulary(folder, {}, 704)


def test_a_vocabulary_without_bos_gets_eos_for_it(folder: Path) -> None:
    configure(folder, eos_token={"content": "</s>", "special": True}, add_bos_token=True)
    vocabulary = read_vocabulary(folder, {"pad_token_id": 700}, 704)
    tokenizer = load_tokenizer(tiny.vocabulary_gguf(folder / "v.gguf", vocabulary))
    assert (tokenizer.bos, tokenizer.adds_bos) == (701, False)
    assert value(vocabulary, "padding_token_id") == 700


def around(*single: str) -> dict[str, Any]:
    template = [{"Sequence": {"id": "A"}} if text == "$A" else {"SpecialToken": {"id": text}} for text in single]
    return {"type": "TemplateProcessing", "single": template, "pair": []}


@pytest.mark.parametrize(
    ("post_processor", "config", "model"),
    [
        (None, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_end|>"}, {}),
        ({"type": "ByteLevel"}, {"bos_token": "<s>", "eos_token": "</s>"}, {}),
        (around("<s>", "$A"), {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, {}),
        (around("<s>", "$A", "</s>"), {"bos_token": "<s>", "eos_token": "</s>"}, {}),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, around("<s>", "$A")]}, {"bos_token": "<s>"}, {}),
        (None, {"eos_token": "</s>", "unk_token": "<s>", "add_bos_token": True}, {"bos_token_id": 702}),
    ],
)
def test_the_gguf_librarys_own_reader_finds_the_same_tokens(
    folder: Path, post_processor: dict[str, Any] | None, config: dict[str, Any], model: dict[str, Any]
) -> None:
    model = {"eos_token_id": 701, **model}
    tiny.edit(folder, {"post_processor": post_processor})
    configure(folder, **config)
    (folder / "config.json").write_text(json.dumps(model))
    vocabulary, judge = read_vocabulary(folder, model, 704), SpecialVocab(folder, n_vocab=704)
    names = {"unk": "unknown", "pad": "padding"}
    for role, index in judge.special_token_ids.items():
        assert value(vocabulary, f"{names.get(role, role)}_token_id") == index, role
    for role in ("bos", "eos"):
        assert value(vocabulary, f"add_{role}_token") is judge.add_special_token.get(role, False), role


def test_the_post_processor_precedes_tokenizer_config_as_in_transformers(folder: Path) -> None:
    tiny.edit(folder, {"post_processor": {"type": "ByteLevel"}})
    configure(folder, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    vocabulary = read_vocabulary(folder, {}, 704)
    assert value(vocabulary, "add_bos_token") is False
    assert "add_bos_token = True, tokenizer.json the opposite" in vocabulary.warnings[0]


def test_composed_unicode_is_warned_about(folder: Path) -> None:
    tiny.edit(folder, {"normalizer": {"type": "NFC"}})
    assert any("send composed text" in warning for warning in read_vocabulary(folder, {}, 704).warnings)


def test_tokens_that_strip_space_are_warned_about(folder: Path, saved: Mapping[str, Any]) -> None:
    swallowing = [{**token, "rstrip": True} for token in saved["added_tokens"]]
    tiny.edit(folder, {"added_tokens": swallowing})
    vocabulary = read_vocabulary(folder, {}, 704)
    assert vocabulary.name_part == ""
    assert any("4 tokens strip white space" in warning for warning in vocabulary.warnings)


def test_phi_3s_stripping_tokens_need_its_name(tmp_path: Path) -> None:
    folder = tiny.save(tiny.sentence_bpe(), tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(token["id"] for token in raw["added_tokens"]) + 1
    raw["added_tokens"].append({"id": last, "content": "<|endoftext|>", "special": True})
    for token in raw["added_tokens"]:
        token["rstrip"] = token["content"] not in {"<unk>", "<s>", "<|endoftext|>"}
    tiny.edit(folder, raw)
    vocabulary = read_vocabulary(folder, {}, last + 1)
    assert vocabulary.name_part == "phi-3"
    tokenizer = load_tokenizer(tiny.vocabulary_gguf(folder / "v.gguf", vocabulary))
    spaced, bare = (tokenizer.encode(f"<|im_end|>{gap}a", add_special=False, parse_special=True) for gap in ("\n", ""))
    assert spaced == bare


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        ({"type": "Sequence", "normalizers": [PREPEND, MARKS]}, None, True),
        (MARKS, None, False),
        (
            MARKS,
            {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
            False,
        ),
        (None, METASPACE | {"prepend_scheme": "always"}, True),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
        (None, METASPACE | {"prepend_scheme": "first"}, True),
    ],
)
def test_each_form_of_the_space_prefix(
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None, prefix: bool, tmp_path: Path
) -> None:
    folder = tiny.save(tiny.sentence_bpe(), tmp_path)
    tiny.edit(folder, {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer})
    assert value(read_vocabulary(folder, {}, 1000), "add_space_prefix") is prefix


def test_a_space_before_the_first_text_only_depends_on_the_chat_template(tmp_path: Path) -> None:
    folder = tiny.save(tiny.sentence_bpe(), tmp_path)
    tiny.edit(folder, {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    vocabulary = read_vocabulary(folder, {}, 1000)
    assert value(vocabulary, "add_space_prefix") is False
    assert any("never is written, and chats begin with it" in warning for warning in vocabulary.warnings)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, MARKS]}},
        {"normalizer": None, "pre_tokenizer": METASPACE | {"split": True}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": None, "pre_tokenizer": None},
    ],
    ids=["NFKC", "split", "charsmap", "no marks"],
)
def test_spacing_that_llama_cpp_cannot_reproduce_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.save(tiny.sentence_bpe(), tmp_path)
    tiny.edit(folder, change)
    with pytest.raises(TokenizerInvalid, match="--gguf"):
        read_vocabulary(folder, {}, 1000)


def test_pairs_that_only_llama_cpp_joins_are_warned_about(tmp_path: Path) -> None:
    folder = tiny.save(tiny.sentence_bpe(), tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["merges"].pop()
    tiny.edit(folder, raw)
    assert any(
        "1 pairs of pieces that no merge joins" in warning for warning in read_vocabulary(folder, {}, 1000).warnings
    )


def test_a_malformed_template_file_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateInvalid, match="cannot be read"):
        read_vocabulary(folder, {}, 704)


def test_the_map_of_special_tokens_counts_beside_an_old_config(tmp_path: Path) -> None:
    """transformers reads it unless the config lists its added tokens, as versions since 4.34 do."""
    folder = tiny.save(tiny.byte_level(tiny.QWEN2), tmp_path, eos_token="</s>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert value(read_vocabulary(folder, {}, 704), "eos_token_id") == 703
    config = {"eos_token": "</s>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert value(read_vocabulary(folder, {}, 704), "eos_token_id") == 701


def test_tokens_that_only_the_config_adds_are_in_the_vocabulary(tmp_path: Path) -> None:
    """As transformers loads them: those that tokenizer.json lacks, and the flags of those that it has."""
    folder = tiny.save(tiny.byte_level(tiny.QWEN2), tmp_path, eos_token="<|im_end|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "704": {"content": "[mine]", "special": True},
        "700": {"content": "<s>", "special": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    gguf = tiny.vocabulary_gguf(tmp_path / "v.gguf", read_vocabulary(folder, {}, 720))
    pair = open_pair(gguf, folder)
    assert encode_both(pair, "a[mine]b<s>c")[0] == encode_both(pair, "a[mine]b<s>c")[1]
    assert 704 in encode_both(pair, "a[mine]b<s>c")[0]
    assert "<s>" not in pair.tokenizer.special_texts
    check_tokenizer(pair, [])
    config["added_tokens_decoder"] = {"x": {"content": "[mine]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerInvalid, match="has the added token 'x'"):
        read_vocabulary(folder, {}, 720)


def test_tokens_that_both_files_have_alike_are_not_added_again() -> None:
    """Each addition rebuilds the search for all of them: half a minute for the 6,400 of a Gemma."""
    flags = dict.fromkeys(TOKEN_FLAGS, False)
    added = [{"id": 3, "content": "<a>", **flags}, {"id": 4, "content": "<b>", **flags}]
    decoder = {
        "3": {"content": "<a>", **flags},
        "4": {"content": "<b>", **flags, "lstrip": True},
        "5": {"content": "<c>"},
    }
    found = config_tokens(added, {"added_tokens_decoder": decoder})
    assert [(entry["content"], entry["id"]) for entry in found] == [("<b>", 4), ("<c>", 5)]
    assert config_tokens(added, {}) == []
