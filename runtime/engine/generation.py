"""One answer while it is written: its sequence, sampler, text and grammar, advanced together by each sampled token.

Tokens that a grammar forces need no logits: they are written with the sampled token before them, and prefilled together
in the next step. With `logprobs` they are taken one at a time, since each needs its row.

Text is sent in whole characters only, and never a part of a stop string: the pieces joined are what decoding the whole
answer at once would give, up to the stop string that is complete first (of two that end at the same character, the
longer). A call to a tool is not text: once it began, nothing stops it.
"""

import codecs
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from runtime.decoding.choice_tree import ChoiceTree
from runtime.decoding.grammar import Grammars, GrammarState
from runtime.decoding.prompt_lookup import Drafter
from runtime.decoding.sampling import Sampler
from runtime.requests import FinishReason, Grammar, Request, SamplingParams, TokenLogprob
from runtime.scheduling.plan import ScheduledSequence


class TextStream:
    """The text of one answer, released as soon as no later token can change it."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: tuple[str, ...] = (),
        call_mark: str = "",
        *,
        calls_first: bool = False,
    ) -> None:
        """`call_mark` begins a call: anywhere, or as the first text of an answer only (`calls_first`)."""
        self._token_bytes = token_bytes
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._mark = call_mark
        self._calls_first = calls_first
        self._recent, self._n_released = "", 0
        self._calls = False
        self.stopped = False

    def push(self, token: int) -> str:
        """Add `token` and return the text that it releases, maybe none. Sets `stopped` at a complete stop string."""
        return self._release(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The text still held back, once no more tokens come; half a character becomes U+FFFD."""
        released = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return released + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop or self._calls:
            return text
        text, self._held = self._held + text, ""
        stop, call = self._first_stop(text), self._call(text)
        if call is not None and (stop is None or call < stop[0]):
            self._calls = True
            return text
        if stop is not None:
            self.stopped = True
            return text[: stop[1]]
        keep = self._held_back(text)
        self._held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        self._recent = (self._recent + text)[-len(self._mark) :] if self._mark else ""
        self._n_released += len(text)
        return text

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        """The end and the beginning in the text of the stop string that is complete first; None without one."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found) if found else None

    def _call(self, text: str) -> int | None:
        """The place in the text, or before it, at which the mark of a call is complete, or None."""
        if not self._mark:
            return None
        whole = self._recent + text
        start = whole.find(self._mark)
        if start < 0 or (self._calls_first and (start > 0 or self._n_released > len(self._recent))):
            return None
        return start + len(self._mark) - len(self._recent)

    def _held_back(self, text: str) -> int:
        """The number of last characters of `text` that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)


@dataclass(frozen=True, slots=True)
class NewText:
    """The outcome of one sampled token: text to send, the tokens of that text, and why the answer ends, if it does."""

    text: str
    tokens: tuple[int, ...]
    reason: FinishReason | None


@dataclass(eq=False, slots=True)
class Generation:
    """One answer while it is written: its sequence, sampler, text and grammar, advanced together.

    `mask` is the grammar's for the next token, bool of shape (n_vocab,), while a thread works it out. `unsent` tokens
    are part of the sequence, but their text was not sent yet. `drafter` exists once prompt lookup began. The prompt's
    log-probabilities gather in `prompt_logprobs`, from its second token on, until the first token is sampled.
    `labels` is the tree of the request's labels, if it has some.
    """

    request: Request
    sequence: ScheduledSequence
    sampler: Sampler
    text: TextStream
    grammar: GrammarState | None = None
    mask: Future[np.ndarray] | None = None
    unsent: list[int] = field(default_factory=list)
    n_counted: int = 0
    drafter: Drafter | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    labels: ChoiceTree | None = None

    def read_labels(self, logits: np.ndarray) -> None:
        """Take in the row after all tokens so far, if a label's probability depends on it."""
        if self.labels is not None and self.labels.wants(path := self._answer):
            self.labels.read(path, logits)

    @property
    def label_tree(self) -> ChoiceTree | None:
        """The tree of the labels, if the answer written is one of them."""
        if self.labels is None:
            return None
        answer = (
            self._answer[:-1] if self._answer[-1:] and self._answer[-1] in self.labels.prompt.ends else self._answer
        )
        return self.labels if answer in self.labels.prompt.choices else None

    @property
    def _answer(self) -> tuple[int, ...]:
        return tuple(self.sequence.tokens[self.sequence.n_prompt :])

    def write(self, token: int, *, ends: bool) -> NewText:
        """Append the sampled `token` and the tokens that the grammar forces after it. `ends`: it is an end token.

        Raises GrammarFailed.
        """
        self.sequence.tokens.append(token)
        tokens, self.unsent = self.unsent if ends else [*self.unsent, token], []
        text = "".join(map(self.text.push, tokens))
        complete = ends or self.text.stopped
        if self.grammar is not None and not complete:
            for forced in self._accept(self.grammar, token):
                self.sequence.tokens.append(forced)
                self.sampler.note(forced)
                tokens.append(forced)
                text += self.text.push(forced)
                if self.text.stopped:
                    break
            complete = self.text.stopped or self.grammar.complete
        reason: FinishReason | None = "stop" if complete else "length" if self._room < 1 else None
        return NewText(text if reason is None else text + self.text.finish(), tuple(tokens), reason)

    def next_mask(self) -> np.ndarray:
        """The tokens that may be sampled next, bool of shape (n_vocab,). Raises GrammarFailed."""
        assert self.grammar is not None
        allowed = self.grammar.allowed()
        if self._forces_one_by_one and (forced := self.grammar.forced()):
            allowed[:] = False
            allowed[forced[0]] = True
        return allowed

    def narrowed(self, mask: np.ndarray | None, logits: np.ndarray) -> np.ndarray | None:
        """The grammar's mask; only what closes JSON if the model wants to end the answer before it is complete."""
        if mask is None or self.grammar is None or self.grammar.closers is None or self.request.params.ignore_eos:
            return mask
        return self.grammar.closers.narrow(mask, logits)

    def _accept(self, grammar: GrammarState, token: int) -> list[int]:
        """The grammar accepts the sampled `token`; the tokens that it forces next, accepted too."""
        grammar.accept([token])
        return [] if self._forces_one_by_one or grammar.complete else _accept_forced(grammar, self._room)

    @property
    def _forces_one_by_one(self) -> bool:
        return self.request.params.logprobs is not None

    @property
    def _room(self) -> int:
        return self.request.params.max_tokens - self.sequence.n_generated


def begin_grammar(
    grammars: Grammars, grammar: Grammar, params: SamplingParams, token_bytes: Callable[[int], bytes]
) -> tuple[GrammarState, list[int]]:
    """A new answer's state, and the tokens that are forced before any is sampled.

    They never end the answer: at least one token is left to sample. Raises InvalidRequest or GrammarFailed.
    """
    state = grammars.compile(grammar)
    if params.logprobs is not None:
        return state, []
    return state, _accept_forced(state, _room_before_end(grammars.compile(grammar), params, token_bytes))


def _room_before_end(state: GrammarState, params: SamplingParams, token_bytes: Callable[[int], bytes]) -> int:
    """The number of forced tokens before one that would end the answer: by length, stop string or grammar."""
    text = TextStream(token_bytes, params.stop, params.call_mark, calls_first=params.calls_first)
    forced = state.forced()[: params.max_tokens - 1]
    for place, token in enumerate(forced):
        text.push(token)
        state.accept([token])
        if text.stopped or state.complete:
            return place
    return len(forced)


def _accept_forced(state: GrammarState, room: int) -> list[int]:
    """The tokens, at most `room`, that the grammar forces next; the state accepts them."""
    forced = state.forced()[:room]
    if forced:
        state.accept(forced)
    return forced
