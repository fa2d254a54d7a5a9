"""An answer as the engine writes it: its tokens, its sampler, its text and its grammar, moved on together."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from runtime.decoding.detokenize import TextStream
from runtime.decoding.grammar import Grammars, GrammarState
from runtime.decoding.prompt_lookup import Drafter
from runtime.decoding.sampling import Sampler
from runtime.errors import ContextTooLong, InvalidRequest
from runtime.llama.interface import ModelInfo, TokenizerLike
from runtime.requests import FinishReason, Grammar, Request, SamplingParams
from runtime.scheduling.plan import ScheduledSequence


class Guide:
    """A constraint, and whether its forced tokens are taken `one_by_one`."""

    def __init__(self, constraint: GrammarState, *, one_by_one: bool) -> None:
        self._constraint = constraint
        self._one_by_one = one_by_one

    @property
    def complete(self) -> bool:
        """Whether the answer is whole."""
        return self._constraint.complete

    def allowed(self) -> np.ndarray:
        """Which tokens may be drawn next, bool of shape (n_vocab,). Raises GrammarFailed."""
        allowed = self._constraint.allowed()
        if self._one_by_one and (forced := self._constraint.forced()):
            allowed[:] = False
            allowed[forced[0]] = True
        return allowed

    def take(self, token: int, room: int) -> list[int]:
        """`token` was drawn; the tokens, at most `room`, that the grammar makes follow. Raises GrammarFailed."""
        self._constraint.accept([token])
        return [] if self._one_by_one or self.complete else self.force(room)

    def force(self, room: int) -> list[int]:
        """The tokens, at most `room`, that come next whatever the model says; they count as taken."""
        forced = self._constraint.forced()[:room]
        if forced:
            self._constraint.accept(forced)
        return forced


def begin(
    grammars: Grammars, grammar: Grammar, params: SamplingParams, token_bytes: Callable[[int], bytes]
) -> tuple[Guide, list[int]]:
    """A new answer's guide, and the tokens that are forced before anything is drawn.

    They never end the answer: at least one token is left to draw. Raises InvalidRequest or GrammarFailed.
    """
    if params.logprobs is not None:
        return Guide(grammars.compile(grammar), one_by_one=True), []
    room = _room_before_end(grammars.compile(grammar), params, token_bytes)
    guide = Guide(grammars.compile(grammar), one_by_one=False)
    return guide, guide.force(room)


def _room_before_end(constraint: GrammarState, params: SamplingParams, token_bytes: Callable[[int], bytes]) -> int:
    """How many forced tokens come before one that would end the answer: by length, stop string or grammar."""
    text = TextStream(token_bytes, params.stop)
    forced = constraint.forced()[: params.max_tokens - 1]
    for place, token in enumerate(forced):
        text.push(token)
        constraint.accept([token])
        if text.stopped or constraint.complete:
            return place
    return len(forced)


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
class Generation:
    """A live answer.

    `allowed` is what the guide lets be drawn next, bool of shape (n_vocab,), while it is worked out. `unsent` tokens
    stand in the sequence already, but their text was not given out yet. `drafter` is there once it was looked up.
    """

    sequence: ScheduledSequence
    sampler: Sampler
    text: TextStream
    guide: Guide | None = None
    allowed: Future[np.ndarray] | None = None
    unsent: list[int] = field(default_factory=list)
    n_counted: int = 0
    drafter: Drafter | None = None

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


def check_request(request: Request, info: ModelInfo) -> None:
    """Raise InvalidRequest or ContextTooLong for what the edge should have refused."""
    params = request.params
    if not request.prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {params.max_tokens}", param="max_tokens")
    for token in (*request.prompt, *params.logit_bias):
        if not 0 <= token < info.n_vocab:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {info.n_vocab}")
    if len(request.prompt) + params.max_tokens > info.n_ctx:
        raise ContextTooLong(
            f"{len(request.prompt)} prompt tokens and max_tokens {params.max_tokens} exceed "
            f"the context of {info.n_ctx} tokens"
        )
