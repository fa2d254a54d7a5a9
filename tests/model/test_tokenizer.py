"""A real vocabulary of 262,144 tokens goes through a tokenizer.json and back, and stays what it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.proof.parity import check_tokenizer, open_pair
from convert.tokenizer.pieces import TokenType
from convert.tokenizer.read import read_vocabulary
from models.gguf.fields import read_fields
from tests.support.convert.tiny_tokenizers import vocabulary_gguf

pytestmark = pytest.mark.model
_ADDED = {TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED}


def as_tokenizer_json(gguf: Path) -> dict[str, Any]:
    """What transformers makes of SentencePiece's file: each pair of pieces that makes a piece is a merge."""
    fields = read_fields(gguf)
    spelled = [text.decode() for text in fields["tokenizer.ggml.tokens"].strings or []]
    kinds = fields["tokenizer.ggml.token_type"].numbers or ()
    scores = fields["tokenizer.ggml.scores"].numbers or ()
    texts = [text.replace(" ", "▁") for text in spelled]
    ids = {text: index for index, text in enumerate(texts)}
    merges = [
        (0 if kinds[index] == TokenType.USER_DEFINED else -scores[index], ids[text[:at]], ids[text[at:]])
        for text, index in ids.items()
        if kinds[index] in {TokenType.NORMAL, TokenType.USER_DEFINED}
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]
    added = [
        {"id": index, "content": texts[index], "special": kind != TokenType.USER_DEFINED, "normalized": False}
        | {"lstrip": False, "rstrip": False, "single_word": False}
        for index, kind in enumerate(kinds)
        if kind in _ADDED
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [[texts[left], texts[right]] for _, left, right in sorted(merges)],
        },
    }


def test_gemmas_vocabulary_comes_back_as_it_was(base_gguf: Path, tmp_path: Path) -> None:
    raw = json.dumps(as_tokenizer_json(base_gguf), ensure_ascii=False)
    (tmp_path / "tokenizer.json").write_text(raw, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    before = read_fields(base_gguf)
    texts = before["tokenizer.ggml.tokens"].strings or []
    vocabulary = read_vocabulary(tmp_path, {"model_type": "gemma3_text"}, len(texts))
    assert vocabulary.fields["tokenizer.ggml.tokens"].strings == texts
    for key in ("model", "pre", "bos_token_id", "eos_token_id", "add_space_prefix"):
        assert vocabulary.fields[f"tokenizer.ggml.{key}"].value == before[f"tokenizer.ggml.{key}"].value
    mails = ["Subject: [ilug] Re: kernel  panic\n\n> On Tue, 3 Sep 2002\n\n\n\tI'd try `dmesg | tail`.\n-- \nJoe"]
    for gguf in (base_gguf, vocabulary_gguf(tmp_path / "vocabulary.gguf", vocabulary)):
        parity = check_tokenizer(open_pair(gguf, tmp_path), mails)
        assert parity.mismatches == ()
        assert parity.n_tokens > 1500
