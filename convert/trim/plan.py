"""Plan a vocabulary cut down to the needs of a task: choose the tokens that stay; cut a checkpoint; measure the loss.

Two thirds of a small model can be its vocabulary, and each generated token costs a product with all of it. The plan
keeps the tokens of the examples and of the chat template, special and byte tokens, all that these are merged from, and
then the most common of the rest. `merges` proves that texts of kept tokens get the same tokens as before. The loss is
measured twice: by the coverage of held-out texts, and by the agreement of answers.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.checkpoint.source import Checkpoint
from convert.errors import RequestInvalid, TrimImpossible
from convert.gguf_writer import write_head
from convert.tokenizer.chat_template import TEMPLATE_FIELD
from convert.tokenizer.pieces import TokenizerKind, TokenType
from models.gguf.fields import Field
from models.gguf.header import Header, TensorInfo
from models.quality import Trim
from runtime.errors import EngineError, RequestError
from runtime.llama.decode import greedy_answer
from runtime.llama.interface import LlamaLike
from runtime.llama.model import load_tokenizer
from runtime.llama.tokenizer import Tokenizer
from runtime.prompt.template import ChatTemplate

from .fields import GgufVocabulary, read_gguf_vocabulary, trimmed_fields
from .merges import Rules, may_overlap, rules_for

DEFAULT_KEEP = 32_768
ROWS = 32
"""llama.cpp repacks a matrix for its fast kernels only if its rows come in groups; Q4_0 decodes 1.2× faster so."""

_SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE)
# Reserved and never used: <unused17>, <|reserved_special_token_3|>, <|placeholder1|>, [unused5] …
_PLACEHOLDER = re.compile(rb"[<\[]\|?(unused|reserved|placeholder|dummy|extra)(_special)?(_token)?_?\d+\|?[>\]]")
# GPT-2's spelling of the bytes: printable ones as they are, the others from U+0100 on
_PLAIN_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
MAX_ANSWER_TOKENS = 64
_BY_TOKEN = ("token_embd.weight", "output.weight", "output.bias", "per_layer_token_embd.weight")


@dataclass(frozen=True)
class TrimPlan:
    """A trimmed vocabulary. `kept`: int32, new id -> old id, ascending. `fields`: the whole metadata.

    `n_needed` of the tokens are needed; the others are the most common of the rest.
    """

    kept: np.ndarray
    n_before: int
    n_needed: int
    fields: Mapping[str, Field]

    @property
    def new_ids(self) -> np.ndarray:
        """Old id -> new id, int32 of shape (n_before,); -1 for a token that is cut."""
        ids = np.full(self.n_before, -1, np.int32)
        ids[self.kept] = np.arange(len(self.kept), dtype=np.int32)
        return ids


def plan_trim(
    header: Header, texts: Iterable[str], keep: int = DEFAULT_KEEP, *, template: str | None = None
) -> TrimPlan:
    """Choose the tokens that stay: at most `keep`, rounded down to a multiple of `ROWS` if that is enough.

    `texts`: the examples as the model reads them, with turns, control tokens and answers. `template`: the chat template
    if it is not the header's. The most common tokens are the first by score (SentencePiece's are in the order of
    merging, Unigram's are log-probabilities), then by id.

    Raises TrimImpossible for a vocabulary that cannot be cut; RequestInvalid if there are no texts, if `keep` is not
    below the present size, or if it is below the least possible, which the message names.
    """
    vocabulary = read_gguf_vocabulary(header)
    n_before = len(vocabulary.tokens)
    if keep >= n_before:
        raise RequestInvalid(f"keeping {keep} tokens does not cut a vocabulary of {n_before}; keep fewer")
    tokenizer = tokenizer_of(header)
    used = _used(tokenizer, texts)
    if not used:
        raise RequestInvalid("the examples to trim the vocabulary by hold no text")
    chat = template if template is not None else _template(header)
    used |= _used(tokenizer, [ChatTemplate(chat).written] if chat else [])
    choice = _Choice(vocabulary, rules_for(vocabulary))
    choice.add(_special(vocabulary, tokenizer, used) | used | set(vocabulary.special_ids.values()))
    n_needed = len(choice.kept)
    if n_needed > keep:
        raise RequestInvalid(
            f"{keep} tokens are to be kept, but {n_needed} are needed: special and byte tokens, those of the "
            f"examples and all that these are merged from; keep at least {n_needed}"
        )
    whole_rows = keep // ROWS * ROWS
    choice.fill(whole_rows if whole_rows >= n_needed else keep)
    kept = np.array(sorted(choice.kept), np.int32)
    return TrimPlan(kept, n_before, n_needed, trimmed_fields(header, vocabulary, kept))


def tokenizer_of(header: Header, fields: Mapping[str, Field] | None = None) -> Tokenizer:
    """llama.cpp's tokenizer for a header without its weights, or for `fields` in place of the header's.

    Raises TrimImpossible with llama.cpp's reason.
    """
    with tempfile.TemporaryDirectory(prefix="deskside-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_head(path, header.fields if fields is None else fields, header.alignment)
        try:
            return load_tokenizer(path)
        except EngineError as error:
            raise TrimImpossible(f"llama.cpp cannot read the vocabulary of {str(header.path)!r}: {error}") from error


class _Choice:
    """A growing, closed set of tokens: with each token it holds the tokens that it is merged from."""

    def __init__(self, vocabulary: GgufVocabulary, rules: Rules) -> None:
        self.kept: set[int] = set()
        self._vocabulary = vocabulary
        self._rules = rules
        self.add(set(rules.anchors.tolist()))

    def add(self, tokens: set[int]) -> None:
        """Add `tokens` and their paths; the path of a token on a path is part of that path."""
        for token in tokens - self.kept:
            self.kept |= {token} | self._path(token)

    def fill(self, size: int) -> None:
        """Add the most common tokens until there are `size`; skip tokens that merging never makes."""
        vocabulary = self._vocabulary
        scores = vocabulary.scores if vocabulary.model != TokenizerKind.BPE else np.zeros(len(vocabulary.tokens))
        for token in np.argsort(-scores, kind="stable").tolist():
            if len(self.kept) >= size:
                break
            if token in self.kept or vocabulary.types[token] != TokenType.NORMAL:
                continue
            path = self._path(token)
            if path and len(path - self.kept) <= size - len(self.kept):
                self.kept |= path

    def _path(self, token: int) -> set[int]:
        ids = self._vocabulary.ids
        return {ids[text] for text in self._rules.path(self._vocabulary.tokens[token]) if text in ids}


def _used(tokenizer: Tokenizer, texts: Iterable[str]) -> set[int]:
    used: set[int] = set()
    for index, text in enumerate(texts):
        try:
            used.update(tokenizer.encode(text, add_special=False, parse_special=True))
        except (RequestError, EngineError) as error:
            raise RequestInvalid(f"example {index} cannot be tokenized: {error}") from error
    return used


def _special(vocabulary: GgufVocabulary, tokenizer: Tokenizer, used: set[int]) -> set[int]:
    """Special and byte tokens, those that llama.cpp knows by their text included; placeholders only if in use."""
    found = set(np.flatnonzero(np.isin(vocabulary.types, _SPECIAL)).tolist())
    texts = [text.encode() for text in tokenizer.special_texts]
    found |= {vocabulary.ids[text] for text in texts if text in vocabulary.ids}
    found |= set(tokenizer.end_tokens)
    if vocabulary.model == TokenizerKind.BPE:
        found |= {vocabulary.ids[char] for char in _byte_characters() if char in vocabulary.ids}
    placeholders = {token for token in found - used if _PLACEHOLDER.fullmatch(vocabulary.tokens[token])}
    # Unigram's normalizer looks for user-defined tokens in places where none ends up in the text
    if vocabulary.model == TokenizerKind.UNIGRAM or may_overlap([vocabulary.tokens[token] for token in found]):
        return found
    return found - placeholders


def _byte_characters() -> list[bytes]:
    others = range(0x100, 0x100 + 256 - len(_PLAIN_BYTES))
    return [chr(code).encode() for code in (*_PLAIN_BYTES, *others)]


def _template(header: Header) -> str:
    return header.text(TEMPLATE_FIELD) if TEMPLATE_FIELD in header.fields else ""


class TrimmedCheckpoint:
    """`source` without the rows of cut tokens; the others stay bit for bit and in order. Closing it closes `source`."""

    def __init__(self, source: Checkpoint, plan: TrimPlan) -> None:
        """Raise TrimImpossible for a known tensor without a row per token, and for an unknown tensor with one."""
        self._source = source
        self._kept = plan.kept
        tensors = {name: _trimmed(source.header, tensor, plan) for name, tensor in source.header.tensors.items()}
        self._header = replace(source.header, fields=plan.fields, tensors=tensors)

    @property
    def header(self) -> Header:
        """The header with the trimmed vocabulary and the trimmed shapes."""
        return self._header

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """As `Checkpoint.slabs`: (first row, float32 array of shape (rows, n_in)), with cut rows left out."""
        whole = self._source.header.tensors[tensor.name]
        if tensor.name not in _BY_TOKEN:
            yield from self._source.slabs(whole)
        elif len(whole.shape) == 1:
            yield from ((start, slab[:, self._kept]) for start, slab in self._source.slabs(whole))
        else:
            yield from self._kept_rows(whole)

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def _kept_rows(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        for start, slab in self._source.slabs(tensor):
            first, last = np.searchsorted(self._kept, (start, start + len(slab)))
            if last > first:
                yield int(first), slab[self._kept[first:last] - start]


@dataclass(frozen=True)
class Coverage:
    """Of held-out texts, tokenized by the full vocabulary: the share of kept tokens, and of texts with all kept."""

    tokens: float
    examples: float

    def report(self, plan: TrimPlan, greedy_agreement: float | None = None) -> Trim:
        """The figures as a record of `quality.json`."""
        return Trim(
            tokens_before=plan.n_before,
            tokens_after=len(plan.kept),
            covered_tokens=self.tokens,
            covered_examples=self.examples,
            greedy_agreement=greedy_agreement,
        )


def coverage(header: Header, plan: TrimPlan, texts: Iterable[str]) -> Coverage:
    """Measure the plan's coverage of `texts`; `header` has the full vocabulary. Raises RequestInvalid for no text."""
    tokenizer, new_ids = tokenizer_of(header), plan.new_ids
    found = [new_ids[tokenizer.encode(text, add_special=False, parse_special=True)] >= 0 for text in texts]
    if not sum(map(len, found)):
        raise RequestInvalid("the held-out examples hold no text")
    tokens = float(np.concatenate(found).mean())
    return Coverage(tokens, sum(bool(kept.all()) for kept in found) / len(found))


def greedy_agreement(
    whole: LlamaLike, trimmed: LlamaLike, prompts: Sequence[str], progress: Callable[[int, int], None]
) -> float:
    """The share of prompts that both models answer greedily with the same text, of at most MAX_ANSWER_TOKENS tokens.

    `prompts`: conversations as the model reads them, up to its answer, control tokens written out. Texts are compared,
    not tokens: a cut vocabulary may spell a text differently. Raises RequestInvalid for no prompts, or one too long
    for either context.
    """
    if not prompts:
        raise RequestInvalid("there are no held-out prompts to answer")
    same = 0
    for done, prompt in enumerate(prompts, 1):
        same += _answer(whole, prompt) == _answer(trimmed, prompt)
        progress(done, len(prompts))
    return same / len(prompts)


def _trimmed(header: Header, tensor: TensorInfo, plan: TrimPlan) -> TensorInfo:
    n_rows = tensor.shape[0]
    if tensor.name in _BY_TOKEN:
        if n_rows != plan.n_before:
            raise TrimImpossible(
                f"{str(header.path)!r}: tensor {tensor.name!r} has {n_rows} rows for {plan.n_before} tokens"
            )
        shape = (len(plan.kept), *tensor.shape[1:])
        return replace(tensor, shape=shape, n_bytes=tensor.n_bytes // n_rows * len(plan.kept))
    if n_rows == plan.n_before and not tensor.name.startswith("blk."):
        raise TrimImpossible(
            f"{str(header.path)!r}: tensor {tensor.name!r} seems to have a row for each token, but is not "
            f"among those known to: {', '.join(_BY_TOKEN)}"
        )
    return tensor


def _answer(llama: LlamaLike, prompt: str) -> str:
    tokens = llama.tokenizer.encode(prompt, add_special=False, parse_special=True)
    if llama.tokenizer.adds_bos and llama.tokenizer.bos is not None and tokens[:1] != [llama.tokenizer.bos]:
        tokens.insert(0, llama.tokenizer.bos)
    room = llama.info.n_ctx - len(tokens)
    if room < MAX_ANSWER_TOKENS:
        message = f"a prompt of {len(tokens)} tokens leaves no room for an answer of {MAX_ANSWER_TOKENS} tokens"
        raise RequestInvalid(f"{message} in a context of {llama.info.n_ctx}")
    return llama.tokenizer.decode(greedy_answer(llama, tokens, MAX_ANSWER_TOKENS))
