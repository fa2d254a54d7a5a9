"""The job that writes text: each request is one sequence that grows by the tokens sampled from its logits.

    llama_decode ─► logits ─► Sampler ─► token ─► Generation.write ─► TextDelta … Finished
         ║                       ▲                     │
     meanwhile ─► next_mask ─► mask               GrammarState.accept

A grammar's mask depends on the tokens before, not on the logits, so a thread works it out while llama.cpp decodes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from msgspec import structs

from runtime.decoding.choice_tree import ChoiceTree
from runtime.decoding.grammar import Grammars
from runtime.decoding.sampling import SampledToken, Sampler, with_logprobs
from runtime.errors import ContextTooLong, InvalidRequest
from runtime.llama.interface import LlamaLike, TokenizerLike
from runtime.requests import Event, Finished, Request, ScoringPrompt, TextDelta, TokenLogprob, Usage
from runtime.scheduling.plan import Chunk, ScheduledSequence, StepPlan
from runtime.scheduling.scheduler import Scheduler

from .drafts import Drafts
from .generation import Generation, TextStream, begin_grammar
from .options import TokenCounts
from .scoring import Scorer


class Writer:
    """The job of all `Request`s, and the owner of their sequences."""

    def __init__(
        self,
        llama: LlamaLike,
        scheduler: Scheduler,
        arrivals: Iterator[int],
        counts: TokenCounts,
        grammars: Grammars | None,
        drafts: Drafts | None,
        scorer: Scorer,
    ) -> None:
        """`scorer` completes the probabilities of labels."""
        self._info = llama.info
        self._tokenizer = llama.tokenizer
        self._scheduler = scheduler
        self._arrivals = arrivals
        self._counts = counts
        self._grammars = grammars
        self._drafts = drafts
        self._scorer = scorer
        self._mask_thread = ThreadPoolExecutor(1, "deskside-grammar-masks")  # one: a GrammarState has one reader
        self.live: dict[str, Generation] = {}

    def check(self, request: Request) -> None:
        """Raise InvalidRequest or ContextTooLong for a request that the edge should have refused."""
        params, info = request.params, self._info
        if not request.prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if params.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {params.max_tokens}", param="max_tokens")
        for token in (*request.prompt, *params.logit_bias):
            if not 0 <= token < info.n_vocab:
                raise InvalidRequest(f"token id {token} is not in the vocabulary of {info.n_vocab}")
        if request.labels:
            self._scorer.check_prompt(self._labels(request))
        if len(request.prompt) + params.max_tokens > info.n_ctx:
            raise ContextTooLong(
                f"{len(request.prompt)} prompt tokens and max_tokens {params.max_tokens} exceed "
                f"the context of {info.n_ctx} tokens"
            )

    def prepare(self, request: Request) -> None:
        """Compile the request's grammar, from any thread. Raises InvalidRequest."""
        if request.params.grammar is not None and self._grammars is not None:
            self._grammars.compile(request.params.grammar)

    def add(self, request: Request) -> None:
        """Begin a request that was checked. Raises InvalidRequest if its grammar cannot be used."""
        generation = self._begin(request)
        self.live[request.id] = generation
        self._scheduler.add(generation.sequence)

    def drop(self, request_id: str) -> None:
        """Forget a live request; its cells are free with the next edits."""
        self._scheduler.drop(self.live.pop(request_id).sequence)

    def clear(self) -> None:
        """Forget all requests of an engine that is dead."""
        self.live.clear()

    def close(self) -> None:
        """Stop the thread that computes masks."""
        self._mask_thread.shutdown()

    def start_masks(self, plan: StepPlan) -> None:
        """Work out the masks of the plan's answers with grammars, while the plan is decoded."""
        for chunk in plan.chunks:
            if chunk.samples and chunk.sequence.owner is self:
                generation = self.live[chunk.sequence.request_id]
                if generation.grammar is not None:
                    generation.mask = self._mask_thread.submit(generation.next_mask)

    def advance(self, chunk: Chunk, logits: np.ndarray) -> Iterator[Event]:
        """Sample the next token, and one more after each draft that was right.

        Each token is sampled from the row, and with the random number, that it would have without drafts. At the first
        token that differs from its draft the drafts behind it are taken back. Raises GrammarFailed or EngineError.
        """
        sequence = chunk.sequence
        generation = self.live[sequence.request_id]
        mask = None if generation.mask is None else generation.mask.result()
        self._score_prompt(generation, chunk, logits)
        if sequence.n_computed < len(sequence.tokens):
            return
        n_known = len(sequence.tokens)
        for row, draft in zip(logits[-1 - len(chunk.drafts) :], (*chunk.drafts, None), strict=True):
            generation.read_labels(row)
            sampled = generation.sampler.draw(row, generation.narrowed(mask, row))
            if sampled.token != draft:
                self._scheduler.trim(sequence, len(sequence.tokens))
            yield from self._emit(generation, sampled)
            if sampled.token != draft or sequence.seq_id is None:
                break
        if self._drafts is not None:
            self._drafts.judge(generation, chunk, sequence.tokens[n_known:])

    def _begin(self, request: Request) -> Generation:
        params = request.params
        token_bytes = _speller(self._tokenizer, params.spelled)
        state, forced = None, list[int]()
        if params.grammar is not None:
            if self._grammars is None:
                raise InvalidRequest("this engine takes no grammars", param=params.grammar.param)
            state, forced = begin_grammar(self._grammars, params.grammar, params, token_bytes)
        sequence = ScheduledSequence(
            owner=self,
            request_id=request.id,
            arrival=next(self._arrivals),
            tokens=[*request.prompt, *forced],
            n_prompt=len(request.prompt),
            max_tokens=params.max_tokens,
            adapter=request.adapter,
            n_ahead=len(forced),
            first_row=0 if params.prompt_logprobs else None,
        )
        sampler = Sampler(params, self._tokenizer.end_tokens)
        for token in forced:
            sampler.note(token)
        text = TextStream(token_bytes, params.stop, params.call_mark, calls_first=params.calls_first)
        labels = ChoiceTree(self._labels(request)) if request.labels else None
        return Generation(request, sequence, sampler, text, grammar=state, unsent=forced, labels=labels)

    def _labels(self, request: Request) -> ScoringPrompt:
        return ScoringPrompt(request.prompt, request.labels, tuple(self._tokenizer.end_tokens))

    def _emit(self, generation: Generation, sampled: SampledToken) -> Iterator[Event]:
        sequence, request = generation.sequence, generation.request
        ends = self._tokenizer.is_end(sampled.token)
        new = generation.write(sampled.token, ends=ends)
        logprobs = (*generation.prompt_logprobs, *(() if ends else self._logprobs(sampled)))
        generation.prompt_logprobs = []
        self._count(generation)
        if new.reason is not None:
            self._scheduler.finish(sequence)
            del self.live[request.id]
        if new.text or new.tokens or logprobs:
            yield TextDelta(request.id, new.text, new.tokens, logprobs)
        if new.reason is not None:
            usage = Usage(sequence.n_prompt, sequence.n_cached, sequence.n_generated)
            yield from self._finished(generation, Finished(request.id, new.reason, usage))

    def _finished(self, generation: Generation, event: Finished) -> Iterator[Event]:
        """The terminal event; while probabilities of labels are not known, the scorer holds it.

        The rows that the answer was sampled from are those of its own label, and show that most others are negligible.
        """
        tree = generation.label_tree
        if tree is None:
            yield event
        elif tree.is_complete:
            yield structs.replace(event, label_logprobs=tree.logprobs())
        else:
            self._scorer.complete(event, tree, generation.sequence)

    def _score_prompt(self, generation: Generation, chunk: Chunk, logits: np.ndarray) -> None:
        """Read the prompt's log-probabilities out of the rows after its tokens, where they are asked for.

        A prompt is computed in pieces, and again from its beginning after a pre-emption.
        """
        sequence, n_top = generation.sequence, generation.request.params.logprobs
        if sequence.first_row is None:
            return
        told = generation.prompt_logprobs
        for place, row in enumerate(logits, chunk.start + chunk.count - len(logits) + 1):
            if place == len(told) + 1 and place < sequence.n_prompt:
                told += self._logprobs(with_logprobs(row, sequence.tokens[place], n_top or 0))
        if len(told) + 1 >= sequence.n_prompt:
            sequence.first_row = None

    def _logprobs(self, sampled: SampledToken) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        name = self._tokenizer.token_bytes
        top = tuple((token, name(token, special=True), logprob) for token, logprob in sampled.top)
        return (TokenLogprob(sampled.token, name(sampled.token, special=True), sampled.logprob, top),)

    def _count(self, generation: Generation) -> None:
        sequence = generation.sequence
        if generation.n_counted == 0:
            self._counts.prompt += sequence.n_prompt
            self._counts.cached += sequence.n_cached
        self._counts.generated += sequence.n_generated - generation.n_counted
        generation.n_counted = sequence.n_generated


def _speller(tokenizer: TokenizerLike, spelled: tuple[int, ...]) -> Callable[[int], bytes]:
    """The bytes of each token in an answer's text; of control tokens, those in `spelled` only."""
    if not spelled:
        return tokenizer.token_bytes
    return lambda token: tokenizer.token_bytes(token, special=token in spelled)
