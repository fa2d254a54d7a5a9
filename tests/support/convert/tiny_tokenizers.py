"""Small tokenizers of every kind, trained on the spot and saved as transformers saves them."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from convert.gguf_writer import Layout, write_gguf
from convert.proof.parity import TEXTS
from convert.tokenizer.read import VocabularyFields, read_vocabulary
from models.gguf.fields import Field

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
_UP, _LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UP}*{_LOW}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UP}+{_LOW}*%s"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = _CASED % ("", "") + r"|\p{N}" + _CASED_TAIL
GPT4O = _CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_TAIL
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_level(pattern: str | None, *, digits: bool = False, looks_up: bool = False, size: int = 700) -> Tokenizer:
    """Byte-level BPE that splits by `pattern`, or by GPT-2's. `looks_up`: words that are tokens are not merged."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=looks_up))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        before.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def sentence_model(kind: str = "bpe", size: int = 900, **options: Any) -> bytes:
    """A tokenizer.model as SentencePiece trains it."""
    written = io.BytesIO()
    usual: dict[str, Any] = {
        "byte_fallback": kind == "bpe",
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=written,
        vocab_size=size,
        model_type=kind,
        minloglevel=2,
        hard_vocab_limit=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        **(usual | options),
    )
    return written.getvalue()


def sentence_bpe(model: bytes | None = None) -> Tokenizer:
    """A SentencePiece BPE in `tokenizers`: every pair of pieces that makes a piece is a merge, best scores first."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model or sentence_model())
    ids = range(processor.GetPieceSize())
    vocabulary = {processor.IdToPiece(index): index for index in ids}
    merges = [
        (processor.GetScore(index), vocabulary[text[:at]], vocabulary[text[at:]], text[:at], text[at:])
        for text, index in vocabulary.items()
        if not (processor.IsByte(index) or processor.IsControl(index) or processor.IsUnknown(index))
        for at in range(1, len(text))
        if text[:at] in vocabulary and text[at:] in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [merge[3:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [text for text, index in vocabulary.items() if processor.IsControl(index) or processor.IsUnknown(index)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken("<tag>", special=False, normalized=False)])
    return tokenizer


def unigram(model: bytes, **metaspace: Any) -> Tokenizer:
    """A Unigram model in `tokenizers`, with T5's way of treating spaces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(processor.IdToPiece(index), processor.GetScore(index)) for index in range(processor.GetPieceSize())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
    special = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """`folder` with tokenizer.json and a tokenizer_config.json that names the usual tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return folder


def edit(folder: Path, change: Mapping[str, Any]) -> None:
    """Replace top-level entries of tokenizer.json."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")


def vocabulary_gguf(path: Path, vocabulary: VocabularyFields) -> Path:
    """A GGUF that holds a vocabulary and no weights."""
    fields = {"general.architecture": Field.string("llama"), "general.name": Field.string(vocabulary.name_part)}
    write_gguf(path, Layout({**fields, **vocabulary.fields}, [], 32), lambda _: iter(()), lambda _: None)
    return path


def convert(folder: Path, n_rows: int | None = None, config: Mapping[str, Any] | None = None) -> Path:
    """The GGUF of `folder`'s tokenizer, beside it."""
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() if n_rows is None else n_rows
    return vocabulary_gguf(folder / "vocabulary.gguf", read_vocabulary(folder, config or {}, size))
