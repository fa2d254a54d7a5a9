"""A checkpoint with a cut vocabulary, and two measures of the loss: coverage, and agreement of answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convert.checkpoint.source import Checkpoint
from convert.errors import RequestInvalid, TrimImpossible
from models.gguf.header import Header, TensorInfo
from models.quality import Trim
from runtime.llama.decode import greedy_answer
from runtime.llama.interface import LlamaLike

from .plan import TrimPlan, tokenizer_of

MAX_ANSWER_TOKENS = 64
_BY_TOKEN = ("token_embd.weight", "output.weight", "output.bias", "per_layer_token_embd.weight")


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
