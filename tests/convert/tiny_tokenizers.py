"""Small tokenizers of every kind, trained on the spot and saved as transformers saves them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from convert.gguf_file import Layout, write_gguf
from convert.tokenizer import Vocabulary, read_vocabulary
from convert.torture import TEXTS
from models.gguf_fields import Field

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


def byte_level(pattern: str | None, *, digits: bool = False, size: int = 700) -> Tokenizer:
    """Byte-level BPE that splits by `pattern`, or by GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
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


def vocabulary_gguf(path: Path, vocabulary: Vocabulary) -> Path:
    """A GGUF that holds a vocabulary and no weights."""
    fields = {"general.architecture": Field.string("llama"), "general.name": Field.string(vocabulary.name_part)}
    write_gguf(path, Layout({**fields, **vocabulary.fields}, [], 32), lambda _: iter(()), lambda _: None)
    return path


def convert(folder: Path, n_rows: int | None = None, config: Mapping[str, Any] | None = None) -> Path:
    """The GGUF of `folder`'s tokenizer, beside it."""
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() if n_rows is None else n_rows
    return vocabulary_gguf(folder / "vocabulary.gguf", read_vocabulary(folder, config or {}, size))
