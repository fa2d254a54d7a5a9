"""Tiny tokenizers in each family's own form: the files a published checkpoint has, trained on a page of text.

Run by the oracle's Python. SentencePiece makes `tokenizer.model`; the `tokenizer.json` beside it is spelled as
transformers' converter spells it, so that either file alone says the same.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = """
Deskside runs a team's own fine-tuned small model on the machines it already has: a laptop CPU or a consumer GPU.
The quick brown fox jumps over the lazy dog. I've told you he'll be there; she said they're not, and we'd better wait.
def tokenize(text: str, *, special: bool = True) -> list[int]:\n    return [vocabulary[piece] for piece in split(text)]
Prices: 3.50 EUR, 1,299.00 USD, 2026-11-22, 007, 42 % of 1000000. E-mail: someone@example.org, see (page 12) [3] {x}.
Größe, Straße, Übermut, naïve façade, déjà vu, señor, smörgåsbord, ångström, žluťoučký kůň, pchnąć w tę łódź.
Быстрая коричневая лиса прыгает через ленивую собаку. Нещо на български език, и още малко.
我想在苹果公司工作，因为那里的天气很好。日本語の文章も少しだけ書いておきます。한국어 문장도 조금 있습니다.
The ticket was routed to the billing team, the billing team routed the ticket to the support team.
"""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Bpe:
    """A byte-level BPE vocabulary. `pre` is the name llama.cpp knows its pre-tokenizer by."""

    pre: str
    split: Callable[[], Any]
    special: tuple[str, ...]
    bos: str | None
    eos: str
    tokenizer_class: str = "PreTrainedTokenizerFast"
    plain: tuple[str, ...] = ()  # added tokens that are not special
    special_first: bool = False
    ignore_merges: bool = False
    starts_with_bos: bool = False
    nfc: bool = False
    template_file: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def _isolated(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )


def _removed(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )


def _digits() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BPE = {
    "llama-3": Bpe(
        "llama-bpe",
        lambda: _isolated(LLAMA3),
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            *(f"<|reserved_special_token_{index}|>" for index in range(4)),
        ),
        "<|begin_of_text|>",
        "<|eot_id|>",
        ignore_merges=True,
        starts_with_bos=True,
        config={"clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"]},
    ),
    "smollm": Bpe(
        "smollm",
        _digits,
        (*_IM, "<repo_name>", "<file_sep>"),
        "<|im_start|>",
        "<|im_end|>",
        special_first=True,
        tokenizer_class="GPT2Tokenizer",
        config={"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "add_prefix_space": False},
    ),
    "qwen2": Bpe(
        "qwen2",
        lambda: _isolated(QWEN2),
        _IM,
        None,
        "<|im_end|>",
        tokenizer_class="Qwen2Tokenizer",
        nfc=True,
        config={"pad_token": "<|endoftext|>", "add_bos_token": False, "add_prefix_space": False, "bos_token": None},
    ),
    "qwen3": Bpe(
        "qwen2",
        lambda: _isolated(QWEN2),
        _IM,
        None,
        "<|im_end|>",
        tokenizer_class="Qwen2Tokenizer",
        plain=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        nfc=True,
        template_file=True,
        config={"pad_token": "<|endoftext|>", "add_bos_token": False},
    ),
    "phi-4-mini": Bpe(
        "gpt-4o",
        lambda: _removed(GPT4O),
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        tokenizer_class="GPT2Tokenizer",
        plain=("<|tool|>", "<|/tool|>"),
        config={"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "add_bos_token": False},
    ),
    "granite": Bpe(
        "refact",
        _digits,
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        "<|end_of_text|>",
        "<|end_of_text|>",
        tokenizer_class="GPT2Tokenizer",
        special_first=True,
        config={"pad_token": "<|end_of_text|>", "unk_token": "<|end_of_text|>", "add_bos_token": False},
    ),
    "olmo-2": Bpe(
        "dbrx",
        lambda: _removed(LLAMA3),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "<|pad|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        tokenizer_class="GPT2Tokenizer",
        config={"pad_token": "<|pad|>", "unk_token": "<|endoftext|>"},
    ),
    "stablelm-2": Bpe(
        "stablelm2",
        lambda: _removed(QWEN2),
        _IM,
        "<|endoftext|>",
        "<|endoftext|>",
        tokenizer_class="GPT2Tokenizer",
        plain=("<|reg0|>",),
        config={"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    ),
}


@dataclass(frozen=True)
class Spm:
    """A SentencePiece BPE vocabulary with byte fallback."""

    unk: int
    bos: int
    eos: int
    pad: int = -1
    n_tokens: int = 512
    control: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    appended: tuple[str, ...] = ()  # tokens that only the JSON files know
    dummy_prefix: bool = True
    with_model: bool = True
    with_json: bool = True
    tokenizer_class: str = "LlamaTokenizer"
    eos_token: str = "</s>"
    config: dict[str, Any] = field(default_factory=dict)


_PHI = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
SPM = {
    "llama-spm": Spm(0, 1, 2, config={"legacy": False, "add_bos_token": True, "add_eos_token": False}),
    "llama-spm-json": Spm(0, 1, 2, with_model=False, config={"legacy": False, "add_bos_token": True}),
    "llama-spm-model": Spm(0, 1, 2, with_json=False, config={"legacy": False, "add_bos_token": True}),
    "mistral-spm": Spm(
        0, 1, 2, control=("[INST]", "[/INST]", "[TOOL_CALLS]"), config={"add_bos_token": True, "add_eos_token": False}
    ),
    "phi-3": Spm(
        0,
        1,
        2,
        n_tokens=544,
        appended=_PHI,
        eos_token="<|endoftext|>",
        config={"add_bos_token": False, "legacy": False},
    ),
    "gemma": Spm(
        3,
        2,
        1,
        pad=0,
        symbols=("<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<unused0>"),
        dummy_prefix=False,
        tokenizer_class="GemmaTokenizer",
        eos_token="<eos>",
        config={"add_bos_token": True, "add_eos_token": False, "spaces_between_special_tokens": False},
    ),
}


def write_vocabulary(folder: Path, name: str) -> dict[str, Any]:
    """Write the tokenizer's files into `folder`; what config.json says of them."""
    return _write_bpe(folder, BPE[name]) if name in BPE else _write_spm(folder, SPM[name])


def pre_tokenizer(name: str) -> str:
    """The name llama.cpp gives the pre-tokenizer of vocabulary `name`."""
    return BPE[name].pre if name in BPE else "default"


def _write_bpe(folder: Path, style: Bpe) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=style.ignore_merges))
    if style.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = style.split()
    tokenizer.decoder = decoders.ByteLevel()
    first = [AddedToken(token, special=True, normalized=False) for token in style.special if style.special_first]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=460 - (0 if first else len(style.special)),
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in style.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in style.plain])
    byte_level = processors.ByteLevel(trim_offsets=True)
    if style.starts_with_bos:
        bos = style.bos or ""
        pair = (bos, tokenizer.token_to_id(bos))
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[pair]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    elif not style.special_first:
        tokenizer.post_processor = byte_level
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": style.bos, "eos_token": style.eos, "tokenizer_class": style.tokenizer_class, **style.config}
    config["added_tokens_decoder"] = _decoder_table(tokenizer)
    if style.template_file:
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    else:
        config["chat_template"] = CHATML
    _write_json(folder / "tokenizer_config.json", config)
    special = {"bos_token_id": style.bos, "eos_token_id": style.eos, "pad_token_id": style.config.get("pad_token")}
    ids = {key: tokenizer.token_to_id(token) for key, token in special.items() if token is not None}
    return {"vocab_size": tokenizer.get_vocab_size(with_added_tokens=True), **ids}


def _decoder_table(tokenizer: Tokenizer) -> dict[str, Any]:
    table = {}
    for index, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        table[str(index)] = {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
    return table


def _write_spm(folder: Path, style: Spm) -> dict[str, Any]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=style.n_tokens,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=style.dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=style.unk,
        bos_id=style.bos,
        eos_id=style.eos,
        pad_id=style.pad,
        bos_piece="<bos>" if style.pad == 0 else "<s>",
        eos_piece="<eos>" if style.pad == 0 else "</s>",
        control_symbols=list(style.control),
        user_defined_symbols=list(style.symbols),
        hard_vocab_limit=True,
        minloglevel=2,
    )
    if style.with_model:
        (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = _as_tokenizer(processor, style)
    if style.with_json:
        tokenizer.save(str(folder / "tokenizer.json"))
    if style.appended:
        ids = {token: processor.vocab_size() + index for index, token in enumerate(style.appended)}
        _write_json(folder / "added_tokens.json", ids)
    config = {
        "bos_token": processor.id_to_piece(style.bos),
        "eos_token": style.eos_token,
        "unk_token": processor.id_to_piece(style.unk),
        "tokenizer_class": style.tokenizer_class,
        "added_tokens_decoder": _decoder_table(tokenizer),
        "chat_template": CHATML,
        **style.config,
    }
    if style.pad == 0:
        config["pad_token"] = "<pad>"
    _write_json(folder / "tokenizer_config.json", config)
    return {"vocab_size": processor.vocab_size() + len(style.appended)}


def _as_tokenizer(processor: Any, style: Spm) -> Tokenizer:
    vocabulary = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    scores = {piece: processor.get_score(index) for piece, index in vocabulary.items()}
    unknown = processor.id_to_piece(style.unk)
    merges = list(_merges(vocabulary, scores, processor))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    last: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style.dummy_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        last.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(last)
    control = [index for index in vocabulary.values() if processor.is_control(index) or processor.is_unknown(index)]
    marked = [AddedToken(processor.id_to_piece(index), special=True, normalized=False) for index in control]
    tokenizer.add_special_tokens(marked)
    tokenizer.add_tokens([AddedToken(symbol, special=False, normalized=False) for symbol in style.symbols])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in style.appended])
    bos = processor.id_to_piece(style.bos)
    if style.config.get("add_bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, style.bos)]
        )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: dict[str, float], processor: Any) -> Iterator[tuple[str, str]]:
    found = []
    for piece, index in vocabulary.items():
        if processor.is_byte(index) or processor.is_control(index) or processor.is_unknown(index):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[piece], vocabulary[left], vocabulary[right], left, right))
    for *_, left, right in sorted(found):
        yield left, right


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
