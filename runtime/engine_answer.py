"""An answer as the engine writes it: its tokens, its sampler, its text and its grammar, moved on together."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from .detokenize import TextStream
from .engine_guide import Guide
from .llama_protocol import TokenizerLike
from .sampling import Sampler
from .sequence import FinishReason, Sequence


@dataclass(frozen=True, slots=True)
class Written:
    """What a drawn token brought: text that can be sent, the tokens of the text, and why the answer ends, if so."""

    text: str
    tokens: tuple[int, ...]
    reason: FinishReason | None


def speller(tokenizer: TokenizerLike, spelled: tuple[int, ...]) -> Callable[[int], bytes]:
    """The bytes of each token in an answer's text; of control tokens, those in `spelled` only."""
    if not spelled:
        return tokenizer.token_bytes
    return lambda token: tokenizer.token_bytes(token, special=token in spelled)


@dataclass(eq=False, slots=True)
class Answer:
    """A live answer.

    `allowed` is what the guide lets be drawn next, bool of shape (n_vocab,), while it is worked out. `unsent` tokens
    stand in the sequence already, but their text was not given out yet.
    """

    sequence: Sequence
    sampler: Sampler
    text: TextStream
    guide: Guide | None = None
    allowed: Future[np.ndarray] | None = None
    unsent: list[int] = field(default_factory=list)
    n_counted: int = 0

    def write(self, token: int, *, ends: bool) -> Written:
        """`token` was drawn; `ends` if it is an end token. What the grammar makes follow is written too.

        Raises GrammarFailed.
        """
        self.sequence.tokens.append(token)
        tokens, self.unsent = self.unsent if ends else [*self.unsent, token], []
        text = "".join(map(self.text.push, tokens))
        whole = ends or self.text.stopped
        if self.guide is not None and not whole:
            for forced in self.guide.take(token, self._room):
                self.sequence.tokens.append(forced)
                self.sampler.note(forced)
                tokens.append(forced)
                text += self.text.push(forced)
                if self.text.stopped:
                    break
            whole = self.text.stopped or self.guide.complete
        reason: FinishReason | None = "stop" if whole else "length" if self._room < 1 else None
        return Written(text if reason is None else text + self.text.finish(), tuple(tokens), reason)

    @property
    def _room(self) -> int:
        return self.sequence.request.params.max_tokens - self.sequence.n_generated
