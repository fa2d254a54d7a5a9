"""tokenizer.model is read as SentencePiece wrote it, and a hostile one is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from convert.errors import TokenizerInvalid
from convert.tokenizer.pieces import TokenType, token_table
from convert.tokenizer.read import read_vocabulary
from convert.tokenizer.spacing import checked_charsmap
from convert.tokenizer.tokenizer_model import read_protobuf
from tests.support.convert import tiny_tokenizers as tiny


@pytest.fixture(scope="module")
def model() -> bytes:
    return tiny.sentence_model(user_defined_symbols=["<tag>", "▁▁"])


def write(folder: Path, data: bytes) -> Path:
    (folder / "tokenizer.model").write_bytes(data)
    return folder / "tokenizer.model"


def test_pieces_scores_and_types_are_sentencepieces(model: bytes, tmp_path: Path) -> None:
    parsed = read_protobuf(write(tmp_path, model))
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(parsed.texts) == judge.GetPieceSize()
    tokens = token_table(parsed, judge.GetPieceSize(), "x")
    for index, (text, kind, score) in enumerate(zip(tokens.texts, tokens.kinds, tokens.scores, strict=True)):
        assert text.replace(" ", "▁") == judge.IdToPiece(index)
        assert score == judge.GetScore(index)
        assert (kind == TokenType.CONTROL) == judge.IsControl(index)
        assert (kind == TokenType.BYTE) == judge.IsByte(index)
        assert (kind == TokenType.UNKNOWN) == judge.IsUnknown(index)
    own = tokens.kinds == TokenType.USER_DEFINED
    assert {text for text, is_own in zip(tokens.texts, own, strict=True) if is_own} == {"<tag>", "  "}
    assert (parsed.model, parsed.add_space_prefix) == ("llama", True)


def test_added_tokens_beside_the_model_are_read(model: bytes, tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=model).GetPieceSize()
    write(tmp_path, model)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size, "<|newer|>": size + 1}))
    decoder = {str(size + 1): {"content": "<|newer|>", "special": True}, "2": {"content": "</s>", "special": True}}
    config = {"added_tokens_decoder": decoder, "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}))
    vocabulary = read_vocabulary(tmp_path, {}, size + 3)
    kinds = (vocabulary.fields["tokenizer.ggml.token_type"].numbers or ())[-3:]
    assert kinds == (TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNUSED)
    assert vocabulary.fields["tokenizer.ggml.add_bos_token"].value is True


def field(number: int, payload: bytes) -> bytes:
    """A field of bytes as it is on the wire, for what the library refuses to write."""
    return bytes([number << 3 | 2, len(payload)]) + payload


def trained(**settings: Any) -> bytes:
    data: bytes = proto.ModelProto(trainer_spec=proto.TrainerSpec(**settings)).SerializeToString()
    return data


def normalised(**settings: Any) -> bytes:
    data: bytes = proto.ModelProto(normalizer_spec=proto.NormalizerSpec(**settings)).SerializeToString()
    return data


BPE, UNIGRAM, WORDS = proto.TrainerSpec.BPE, proto.TrainerSpec.UNIGRAM, proto.TrainerSpec.WORD
NORMALISED = normalised(name="identity")
KEEPS_SPACES = {"remove_extra_whitespaces": False}
ONE_PIECE = proto.ModelProto(pieces=[{"piece": "a", "score": -1.0}]).SerializeToString()
HOSTILE = {
    "no field": (b"\x07", "wire type 7"),
    "length past the end": (b"\x0a\xff\xff\xff\xff\x7f", "is truncated: field 1 has 34359738367 bytes, 0 are left"),
    "number that does not end": (b"\x08" + b"\xff" * 20, "the number at byte 1 does not end"),
    "number for a message": (b"\x08\x01", "a number where a message is needed"),
    "text that is a number": (field(1, b"\x08\x01"), "fields of the wrong type"),
    "unknown type": (field(1, field(1, b"a") + b"\x18\x09"), "has the type 9"),
    "text that is not UTF-8": (field(1, field(1, b"\xff")), "is not UTF-8"),
    "empty": (b"", "holds no tokens"),
    "no settings": (ONE_PIECE, "does not say how it was trained"),
    "words": (ONE_PIECE + NORMALISED + trained(model_type=WORDS), "model type 3"),
    "no bytes": (ONE_PIECE + trained(model_type=BPE) + normalised(**KEEPS_SPACES), "has 0 byte tokens"),
    "spaces removed": (ONE_PIECE + trained(model_type=BPE) + NORMALISED, "removes extra white space"),
    "characters replaced": (
        ONE_PIECE + trained(model_type=BPE) + normalised(precompiled_charsmap=b"x", **KEEPS_SPACES),
        "replaces characters",
    ),
    "marks behind words": (ONE_PIECE + NORMALISED + trained(treat_whitespace_as_suffix=True), "marks before words"),
    "charsmap": (
        ONE_PIECE + trained(model_type=UNIGRAM) + normalised(precompiled_charsmap=b"\xff\xff\xff\xff\x00"),
        "whose index claims 4294967295",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    write(tmp_path, data)
    with pytest.raises(TokenizerInvalid, match=message):
        read_vocabulary(tmp_path, {"eos_token_id": 0}, 10)


def test_a_truncated_model_is_refused_or_whole(model: bytes, tmp_path: Path) -> None:
    for cut in range(1, len(model), 101):
        write(tmp_path, model[:cut])
        with pytest.raises(TokenizerInvalid):
            read_vocabulary(tmp_path, {"eos_token_id": 2}, 1000)


def test_a_table_of_replacements_with_an_index_out_of_bounds_is_refused(tmp_path: Path) -> None:
    table = read_protobuf(write(tmp_path, tiny.sentence_model("unigram", normalization_rule_name="nfkc"))).charsmap
    assert checked_charsmap(table, "x") == table
    size = int.from_bytes(table[:4], "little")
    for unit in (1 << 30, 0x0000_0100):  # a base far away; a text where there is none
        with pytest.raises(TokenizerInvalid, match="with an index out of bounds"):
            checked_charsmap(table[:4] + struct.pack("<I", unit) + table[8 : 4 + size] + b"\0\0", "x")
