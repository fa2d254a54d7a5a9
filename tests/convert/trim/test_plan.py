"""A text that uses kept tokens only gets the same tokens after the cut, from llama.cpp and from simple tokenizers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import RequestInvalid, TrimImpossible
from convert.trim.fields import KEPT_FIELD
from convert.trim.plan import TrimPlan, plan_trim, tokenizer_of
from models.gguf.fields import Field
from models.gguf.header import Header
from tests.support.convert.vocabularies import (
    BYTES,
    CONTROL,
    NORMAL,
    byte_level,
    header,
    sentencepiece,
    simple_byte_level,
    simple_sentencepiece,
    simple_unigram,
    tokens_of,
    unigram,
)

Simple = Callable[[Header, str], list[bytes]]
LETTERS = "abc"
words = st.text(LETTERS, min_size=1, max_size=12)
texts = st.lists(words, min_size=1, max_size=4)
pieces = st.text(LETTERS, min_size=1, max_size=5)
quick = settings(max_examples=60)


def least(given_header: Header, examples: Sequence[str]) -> int:
    with pytest.raises(RequestInvalid) as refused:
        plan_trim(given_header, examples, 1)
    return int(re.findall(r"at least (\d+)", str(refused.value))[0])


def check(full: Header, examples: Sequence[str], probes: Sequence[str], extra: int, simple: Simple | None) -> TrimPlan:
    """Cut to the least and `extra` more; compare on every probe and on the examples, which are covered whole."""
    keep = min(least(full, examples) + extra, len(tokens_of(full)) - 1)
    plan = plan_trim(full, examples, keep)
    assert len(plan.kept) <= keep
    before, after = tokenizer_of(full), tokenizer_of(full, plan.fields)
    cut = replace(full, fields=plan.fields)
    for text in (*examples, *probes):
        for parse_special in (True, False):
            whole = before.encode(text, add_special=False, parse_special=parse_special)
            mapped = plan.new_ids[whole]
            assert parse_special is False or text in probes or (mapped >= 0).all(), "an example is not covered"
            if (mapped >= 0).all():
                assert after.encode(text, add_special=False, parse_special=parse_special) == mapped.tolist()
        if simple is not None:
            spelled = simple(full, text)
            assert [tokens_of(full)[index] for index in whole] == spelled
            if set(spelled) <= set(tokens_of(cut)):
                assert simple(cut, text) == spelled
    return plan


scored = st.dictionaries(pieces, st.integers(-4, 0).map(float), min_size=4, max_size=24)


@quick
@given(scored, texts, st.lists(words, max_size=30), st.integers(0, 4))
def test_sentencepiece_reads_kept_tokens_alike(
    scores: dict[str, float], examples: list[str], probes: list[str], extra: int
) -> None:
    spare = sentencepiece(scores | {"zz": -9.0, "zzz": -9.0, "yy": -9.0})
    check(spare, examples, probes, extra, simple_sentencepiece)


@quick
@given(scored, texts, st.lists(st.text("<s>ab", max_size=14), max_size=30))
def test_a_control_tokens_text_is_read_alike_where_it_is_plain_text(
    scores: dict[str, float], examples: list[str], probes: list[str]
) -> None:
    markup = {"<s": -1.0, "s>": -2.0, "a<": -1.0, "<a": -3.0, "a>": -3.0, "zz": -9.0, "zzz": -9.0}
    check(sentencepiece(scores | markup, controls=[b"<a>"]), examples, probes, 0, None)


@st.composite
def merges(draw: st.DrawFn) -> list[tuple[str, str]]:
    known, made = list(LETTERS), []
    for _ in range(draw(st.integers(2, 14))):
        pair = (draw(st.sampled_from(known)), draw(st.sampled_from(known)))
        if pair not in made and len("".join(pair)) <= 6:
            made.append(pair)
            known.append("".join(pair))
    return made


@quick
@given(merges(), texts, st.lists(words, max_size=30), st.integers(0, 4), st.data())
def test_byte_level_bpe_reads_kept_tokens_alike(
    made: list[tuple[str, str]], examples: list[str], probes: list[str], extra: int, data: st.DataObject
) -> None:
    nameless = data.draw(st.lists(st.sampled_from([left + right for left, right in made]), max_size=2))
    spare = [("z", "z"), ("zz", "z"), ("y", "y")]
    check(byte_level([*made, *spare], nameless=nameless), examples, probes, extra, simple_byte_level)


@quick
@given(merges(), st.lists(pieces, max_size=6), texts, st.lists(words, max_size=30), st.integers(0, 4))
def test_words_that_are_tokens_are_taken_whole_alike(
    made: list[tuple[str, str]], extra_tokens: list[str], examples: list[str], probes: list[str], extra: int
) -> None:
    full = byte_level([*made, ("z", "z"), ("zz", "z"), ("y", "y")], pre="llama-bpe", extra=extra_tokens)
    check(full, examples, probes, extra, None)


@quick
@given(
    st.dictionaries(pieces, st.integers(-8, -1).map(lambda n: n / 2), min_size=3, max_size=24),
    st.lists(st.text(LETTERS + "d", min_size=1, max_size=3), max_size=2, unique=True),
    texts,
    st.lists(st.text(LETTERS + "d", min_size=1, max_size=10), max_size=30),
    st.integers(0, 4),
)
def test_unigram_reads_kept_tokens_alike(
    scores: dict[str, float], own: list[str], examples: list[str], probes: list[str], extra: int
) -> None:
    scores = {text: score for text, score in scores.items() if text not in own} | {"zz": -1.0, "zzz": -9.0}
    # lower than the unknown token: cut, it would be read as unknown where it lost before
    full = unigram(scores, user_defined=own, unused={} if "d" in own else {"d": -40.0})
    simple = None if own else simple_unigram
    check(full, examples, probes, extra, simple)


TOY = {"a": -9.0, "b": -9.0, "ab": 0.0, "abab": -1.0, "ba": -2.0, "bab": -3.0, "aa": -4.0, "c": -5.0, "cc": -6.0}


def test_the_path_of_a_kept_token_is_kept() -> None:
    plan = plan_trim(sentencepiece(TOY), ["abab"], 266)
    kept = {tokens_of(sentencepiece(TOY))[index] for index in plan.kept}
    assert {b"abab", b"ab", b"a", b"b"} <= kept
    assert plan.n_needed == 259 + 4
    assert len(plan.kept) == 266


def test_the_rest_is_filled_with_the_best_scored_that_a_text_can_become() -> None:
    full = sentencepiece(TOY)
    plan = plan_trim(full, ["c"], 264)
    added = [tokens_of(full)[index] for index in plan.kept if index >= 259]
    assert added == [b"a", b"b", b"ab", b"abab", b"c"]  # by id; "ab" was chosen first, and "a" and "b" for it
    assert len(plan_trim(full, ["c"], 261).kept) == 261, "what does not fit whole leaves its place to others"


def test_the_number_kept_is_rounded_down_to_whole_blocks_of_rows() -> None:
    more = {f"{a}{b}": -100.0 - i for i, (a, b) in enumerate((a, b) for a in "defghij" for b in "klmnopq")}
    assert len(plan_trim(sentencepiece(TOY | more), ["ab"], 300).kept) == 288
    assert len(plan_trim(sentencepiece(TOY | more), ["ab"], 288).kept) == 288
    assert len(plan_trim(sentencepiece(TOY | more), ["ab"], 287).kept) == 287  # 262 are needed, 256 would not do


def test_placeholders_stay_only_where_an_example_or_the_template_writes_them() -> None:
    full = sentencepiece(TOY, controls=[b"<unused0>", b"<unused1>", b"<unused2>", b"<tool>"])
    fields = {**full.fields, "tokenizer.chat_template": Field.string("{{ '<unused2>' }}{{ messages }}")}
    plan = plan_trim(replace(full, fields=fields), ["ab<unused1>"], 268)
    kept = {tokens_of(full)[index] for index in plan.kept}
    assert {b"<unused1>", b"<unused2>", b"<tool>"} <= kept
    assert b"<unused0>" not in kept


def test_placeholders_stay_where_leaving_them_out_could_reorder_overlapping_marks() -> None:
    full = sentencepiece(TOY, controls=[b"<unused0>", b"##|", b"|##"])
    assert b"<unused0>" in {tokens_of(full)[index] for index in plan_trim(full, ["ab"], 268).kept}


def test_every_id_in_the_fields_is_the_new_one() -> None:
    tokens = [*BYTES, *(b"a b c d e f <s> </s> <unk> <eot>".split())]
    types = [*[6] * 256, *[NORMAL] * 6, CONTROL, CONTROL, 2, CONTROL]
    scores = Field.float32_array([*[0.0] * 256, *map(float, range(10))])
    ids = {
        "bos_token_id": 262,
        "eos_token_id": 263,
        "unknown_token_id": 264,
        "eot_token_id": 265,
        "mask_token_id": 9999,
    }
    extra = {name: Field.uint32(value) for name, value in ids.items()}
    suppressed, added = Field.int32_array([256, 258, 265]), Field.string_array([b"<s>", b"a", b"c"])
    full = header("llama", tokens, types, scores=scores, suppress_tokens=suppressed, added_tokens=added, **extra)
    plan = plan_trim(full, ["c"], 261)
    fields, names = plan.fields, tokens_of(replace(full, fields=plan.fields))
    assert names == [*BYTES, b"c", b"<s>", b"</s>", b"<unk>", b"<eot>"]
    assert [fields[f"tokenizer.ggml.{name}"].value for name in list(ids)[:4]] == [257, 258, 259, 260]
    assert "tokenizer.ggml.mask_token_id" not in fields
    assert fields["tokenizer.ggml.suppress_tokens"].numbers == (256, 260)
    assert fields["tokenizer.ggml.added_tokens"].strings == [b"<s>", b"c"]
    assert (fields["tokenizer.ggml.scores"].numbers or ())[256:] == (2.0, 6.0, 7.0, 8.0, 9.0)
    assert (fields["tokenizer.ggml.token_type"].numbers or ())[256:] == (1, 3, 3, 2, 3)
    assert fields["llama.vocab_size"].value == 261
    kept = [int(old) for old in fields[KEPT_FIELD].numbers or ()]
    assert kept == plan.kept.tolist() == [*range(256), 258, 262, 263, 264, 265]
    tokenizer = tokenizer_of(full, fields)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.is_end(258)) == (257, 258, True)


def test_special_tokens_that_llama_takes_by_default_are_written_out() -> None:
    full = sentencepiece(TOY)
    fields = {key: field for key, field in full.fields.items() if not key.endswith("_token_id")}
    silent = replace(full, fields=fields)
    before, plan = tokenizer_of(silent), plan_trim(silent, ["c"], 262)
    after = tokenizer_of(silent, plan.fields)
    assert (after.bos, after.eos) == tuple(plan.new_ids[[before.bos or 0, before.eos or 0]])


def test_merges_whose_result_is_not_a_token_stay_as_they_were() -> None:
    full = byte_level([("a", "b"), ("ab", "c"), ("b", "c"), ("y", "y")], nameless=["abc"])
    plan = check(full, ["bc"], ["abc"], 0, simple_byte_level)  # spelled a b c; without the token "ab", it would be a bc
    assert b"yy" not in tokens_of(replace(full, fields=plan.fields))


def test_of_equal_scores_the_path_of_the_leftmost_is_kept() -> None:
    full = sentencepiece({"bc": 0.0, "ab": 0.0, "abc": -1.0, "yy": -2.0})
    plan = check(full, ["abc"], [], 0, simple_sentencepiece)
    assert [tokens_of(full)[index] for index in plan.kept[259:]] == [b"ab", b"abc"]


def test_the_token_that_scores_unigrams_unknown_is_kept() -> None:
    low = {"a": -1.0, "ab": -2.0, "yy": -3.0, "zz": -40.0}
    full = unigram(low, unused={"d": -60.0})  # an unknown character scores -50, so "ad" would be read as unknown
    plan = check(full, ["a"], ["ad", "dd", "ax"], 0, simple_unigram)
    assert {b"zz", b"d"} <= set(tokens_of(replace(full, fields=plan.fields)))


def test_merges_go_with_their_parts() -> None:
    full = byte_level([("a", "b"), ("ab", "c"), ("b", "c"), ("bc", "a")])
    plan = plan_trim(full, ["abc"], 259)
    assert plan.fields["tokenizer.ggml.merges"].strings == [b"a b", b"ab c"]


def without(full: Header, key: str) -> Header:
    return replace(full, fields={name: field for name, field in full.fields.items() if name != f"tokenizer.ggml.{key}"})


def replaced(full: Header, key: str, field: Field) -> Header:
    return replace(full, fields={**full.fields, key: field})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (replaced(sentencepiece(TOY), "tokenizer.ggml.model", Field.string("rwkv")), r"'rwkv'.*'llama', 'gpt2', 't5'"),
        (replaced(sentencepiece(TOY), "tokenizer.ggml.model", Field.string("bert")), "'bert'"),
        (without(sentencepiece(TOY), "scores"), "tokenizer.ggml.scores"),
        (without(sentencepiece(TOY), "token_type"), "tokenizer.ggml.token_type"),
        (without(sentencepiece(TOY), "tokens"), "tokenizer.ggml.tokens"),
        (without(byte_level([("a", "b")]), "merges"), "tokenizer.ggml.merges"),
        (sentencepiece(TOY | {"<s>": 0.0}), r"b'<s>' twice"),
        (sentencepiece(TOY | {"a" * 5000: 0.0}), "token 268 has 5000 bytes, limit 4096"),
        (sentencepiece(TOY | {"d": float("nan")}), "score of token 268 is nan"),
        (replaced(sentencepiece(TOY), "tokenizer.ggml.token_type", Field.int32_array([1])), "1 entries .* 268 tokens"),
        (header("llama", [b"a"], [1], scores=Field.float32_array([0.0])), "byte 0x00"),
        (replaced(byte_level([("a", "b")]), "tokenizer.ggml.pre", Field.string("no-such")), "llama.cpp cannot read"),
        (replaced(sentencepiece(TOY), KEPT_FIELD, Field.int32_array([0])), "trimmed vocabulary already"),
    ],
)
def test_a_vocabulary_that_cannot_be_cut_is_refused(broken: Header, said: str) -> None:
    with pytest.raises(TrimImpossible, match=said):
        plan_trim(broken, ["ab"], 1)


@pytest.mark.parametrize(
    ("examples", "keep", "said"),
    [
        ([], 265, "hold no text"),
        (["", ""], 265, "hold no text"),
        (["ab"], 12, r"12 tokens .* at least 262"),
        (["ab"], 268, "keeping 268 tokens does not cut a vocabulary of 268"),
        (["ab", "\ud800"], 265, "example 1 cannot be tokenized"),
    ],
)
def test_an_impossible_request_is_refused(examples: list[str], keep: int, said: str) -> None:
    with pytest.raises(RequestInvalid, match=said):
        plan_trim(sentencepiece(TOY), examples, keep)


def test_the_mapping_goes_both_ways() -> None:
    plan = plan_trim(sentencepiece(TOY), ["ab"], 264)
    assert plan.new_ids[plan.kept].tolist() == list(range(len(plan.kept)))
    assert np.count_nonzero(plan.new_ids < 0) == 268 - len(plan.kept)
