"""A large tokenizer.json is read in columns: scores, kinds and joins equal those of a token-by-token reading."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.errors import TokenizerInvalid
from convert.tokenizer.pieces import TokenType
from convert.tokenizer.read import VocabularyFields, read_vocabulary
from tests.support.convert import tiny_tokenizers as tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tiny.save(tiny.sentence_bpe(), tmp_path_factory.mktemp("saved"))
    raw: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return raw


def read(folder: Path, raw: Mapping[str, Any], **config: Any) -> VocabularyFields:
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}), encoding="utf-8")
    return read_vocabulary(folder, {}, 1000)


def with_model(raw: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**raw, "model": {**raw["model"], **changes}}


def test_each_token_scores_by_the_first_merge_that_makes_it(saved: Mapping[str, Any], tmp_path: Path) -> None:
    merges = [["q", "zq"], ["zq", "q"], *saved["model"]["merges"]]  # the first make what are no tokens, but count
    vocabulary = read(tmp_path, with_model(saved, merges=merges))
    order = list(dict.fromkeys(left + right for left, right in merges))
    ranks = {text: rank for rank, text in enumerate(order)}
    tokens, scores, kinds = (vocabulary.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    columns = zip(tokens.strings or [], scores.numbers or (), kinds.numbers or (), strict=True)
    normal = [(text.decode(), score) for text, score, kind in columns if kind == TokenType.NORMAL]
    assert len(normal) > 300
    assert normal == [(text, -ranks.get(text, len(order))) for text, _ in normal]


def test_the_first_score_is_minus_zero_as_sentencepiece_writes_it(saved: Mapping[str, Any], tmp_path: Path) -> None:
    left, right = saved["model"]["merges"][0]
    fields = read(tmp_path, saved).fields
    index = (fields["tokenizer.ggml.tokens"].strings or []).index((left + right).encode())
    scores = np.array(fields["tokenizer.ggml.scores"].numbers, np.float32)
    assert scores[index].tobytes() == np.float32(-0.0).tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_joins_that_no_merge_makes_are_counted_as_pair_by_pair(
    saved: Mapping[str, Any], seed: int, tmp_path: Path
) -> None:
    chance, model = random.Random(seed), saved["model"]
    merges = [merge for merge in model["merges"] if chance.random() < 0.8]
    merges += [chance.choice(merges), ["no", "thing"]]  # one twice, and one whose halves are no tokens
    pairs, known = {tuple(merge) for merge in merges}, model["vocab"]
    texts = [text for text in known if not (text.startswith("<0x") and len(text) == 6)]
    splits = [(text[:at], text[at:]) for text in texts for at in range(1, len(text))]
    extra = [pair for pair in splits if pair[0] in known and pair[1] in known and pair not in pairs]
    assert len(extra) > 10
    warnings = read(tmp_path, with_model(saved, merges=merges)).warnings
    assert any(f"has {len(extra)} pairs of pieces that no merge joins" in warning for warning in warnings)


def test_no_role_falls_to_a_token_without_a_text(saved: Mapping[str, Any], tmp_path: Path) -> None:
    fields = read(tmp_path, with_model(saved, vocab={**saved["model"]["vocab"], "": 990})).fields
    assert (fields["tokenizer.ggml.tokens"].strings or [])[990] == b""
    named = [field.value for key, field in fields.items() if key.endswith("_token_id")]
    assert named
    assert 990 not in named


@pytest.mark.parametrize("score", [1e39, -1e39, 10**400, float("nan"), float("inf"), "1", True, None], ids=repr)
def test_a_score_beyond_float32_is_refused(score: Any, tmp_path: Path) -> None:
    folder = tiny.save(tiny.unigram(tiny.sentence_model("unigram")), tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["vocab"][7][1] = score
    with pytest.raises(TokenizerInvalid, match=r"token 7 is .*, a text and a score are needed"):
        read(folder, raw)


@pytest.mark.parametrize(
    "content",
    [b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}", b'{"a": 1} 2', b"{'a': 1}", b""],
    ids=repr,
)
def test_nearly_valid_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        TokenizerInvalid, match=r"tokenizer.json' (is not valid JSON: .* at line 1|begins with a byte order mark)"
    ):
        read_vocabulary(tmp_path, {}, 1000)
