"""What a cut vocabulary still covers of held-out text, and how often the answers stay the same."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from models.gguf.header import Header
from models.quality import Trim
from runtime.llama.decode import greedy_answer
from runtime.llama.interface import LlamaLike

from .errors import RequestInvalid
from .vocabulary import TrimPlan, tokenizer_of

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Coverage:
    """Of held-out texts, in the whole vocabulary's tokens: the share of tokens kept, and of texts with all kept."""

    tokens: float
    examples: float

    def report(self, plan: TrimPlan, greedy_agreement: float | None = None) -> Trim:
        """The figures as `quality.json` has them."""
        return Trim(
            tokens_before=plan.n_before,
            tokens_after=len(plan.kept),
            covered_tokens=self.tokens,
            covered_examples=self.examples,
            greedy_agreement=greedy_agreement,
        )


def coverage(header: Header, plan: TrimPlan, texts: Iterable[str]) -> Coverage:
    """How much of `texts` the plan covers; `header` is the whole vocabulary's. Raises RequestInvalid for no text."""
    tokenizer, new_ids = tokenizer_of(header), plan.new_ids
    found = [new_ids[tokenizer.encode(text, add_special=False, parse_special=True)] >= 0 for text in texts]
    if not sum(map(len, found)):
        raise RequestInvalid("the held-out examples hold no text")
    tokens = float(np.concatenate(found).mean())
    return Coverage(tokens, sum(bool(kept.all()) for kept in found) / len(found))


def greedy_agreement(
    whole: LlamaLike, trimmed: LlamaLike, prompts: Sequence[str], progress: Callable[[int, int], None]
) -> float:
    """The share of prompts that both models answer with the same text, up to its end or MAX_ANSWER_TOKENS.

    `prompts`: conversations as the model reads them, up to where it answers, control tokens written out. The texts are
    compared, for a cut vocabulary may spell one otherwise. Raises RequestInvalid for no prompts, or one too long for
    either context.
    """
    if not prompts:
        raise RequestInvalid("there are no held-out prompts to answer")
    same = 0
    for done, prompt in enumerate(prompts, 1):
        same += _answer(whole, prompt) == _answer(trimmed, prompt)
        progress(done, len(prompts))
    return same / len(prompts)


def _answer(llama: LlamaLike, prompt: str) -> str:
    tokens = llama.tokenizer.encode(prompt, add_special=False, parse_special=True)
    if llama.tokenizer.adds_bos and llama.tokenizer.bos is not None and tokens[:1] != [llama.tokenizer.bos]:
        tokens.insert(0, llama.tokenizer.bos)
    room = llama.info.n_ctx - len(tokens)
    if room < MAX_ANSWER_TOKENS:
        message = f"a prompt of {len(tokens)} tokens leaves no room for an answer of {MAX_ANSWER_TOKENS} tokens"
        raise RequestInvalid(f"{message} in a context of {llama.info.n_ctx}")
    return llama.tokenizer.decode(greedy_answer(llama, tokens, MAX_ANSWER_TOKENS))
