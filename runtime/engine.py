"""The engine: one model, many answers at once. `step()` plans, decodes, samples and emits.

One thread owns an engine. Every request that `add` accepts ends in exactly one terminal event, from `step` or `cancel`.
A decode that fails is never a reason to fail a neighbour: no room in the cache means doing less, a malformed batch is
taken apart to find the guilty sequence. Only a fatal code ends them all, and the engine with them.

What a grammar allows depends on the tokens before, not on the logits, so it is worked out while llama.cpp decodes.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from .constrain_protocol import Constrainer
from .detokenize import TextStream
from .engine_answer import Answer
from .engine_guide import begin
from .engine_scoring import ARRIVALS, Scorer, check_scoring
from .errors import (
    BatchInvalid,
    Cancelled,
    ContextTooLong,
    DecodeAborted,
    DecodeFailed,
    InvalidRequest,
    NoKvSlot,
)
from .llama_protocol import LlamaLike
from .prefix import PrefixCache
from .sampling import Draw, Sampler
from .scheduler import Scheduler
from .sequence import (
    Batch,
    Chunk,
    Copy,
    Edit,
    EngineStats,
    Event,
    Failed,
    Finished,
    Plan,
    Request,
    Scoring,
    Sequence,
    TextDelta,
    TokenLogprob,
    Usage,
    Work,
)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds of one engine.

    A step computes at most `step_tokens` tokens (and never more than the model's `n_batch`) for at most `max_running`
    sequences. Finished prompts may keep `idle_cells` of the KV cache for others to share (None: a quarter); each of
    them needs a sequence id too, so load the model with `n_seq_max` ids.
    """

    step_tokens: int = 512
    max_running: int = 16
    idle_cells: int | None = None

    @property
    def n_seq_max(self) -> int:
        """Sequence ids the model should be loaded with: the running ones and as many idle prefixes."""
        return min(2 * self.max_running, 256)


class Engine:
    """Continuous batching over one `LlamaLike`; without a `constrainer` it takes no request with a grammar."""

    def __init__(
        self, llama: LlamaLike, options: EngineOptions | None = None, constrainer: Constrainer | None = None
    ) -> None:
        options = options or EngineOptions()
        info = llama.info
        idle_cells = info.n_ctx // 4 if options.idle_cells is None else options.idle_cells
        self._llama = llama
        self._tokenizer = llama.tokenizer
        self._ledger = PrefixCache(info.n_ctx, info.n_seq_max, idle_cells)
        self._scheduler = Scheduler(
            self._ledger,
            step_tokens=min(options.step_tokens, info.n_batch),
            max_running=min(options.max_running, info.n_seq_max),
            max_rows=info.n_seq_max,  # a model gives no fewer in one decode
        )
        self._constrainer = constrainer
        self._guides = ThreadPoolExecutor(1, "deskside-guides")  # one: a grammar has one reader at a time
        self._scorer = Scorer(self._scheduler, self._next_arrival, max(1, options.max_running // 2))
        self._answers: dict[str, Answer] = {}
        self._failure: DecodeFailed | None = None
        self._n_arrivals = 0
        self._n_steps = 0
        self._n_prompt = 0
        self._n_cached = 0
        self._n_generated = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._answers or self._scorer.live)

    @property
    def failure(self) -> DecodeFailed | None:
        """The fatal error that ended this engine, if one did. Its requests were failed by the step that met it."""
        return self._failure

    def add(self, request: Work) -> None:
        """Accept a request. Raises ContextTooLong or InvalidRequest for what the edge should have refused.

        Raises the fatal DecodeFailed if there was one.
        """
        self._raise_if_dead()
        if self._is_live(request.id):
            raise InvalidRequest(f"request id {request.id!r} is already live", param="id")
        if isinstance(request, Scoring):
            check_scoring(request, self._llama.info.n_vocab, self._llama.info.n_ctx)
            self._scorer.add(request)
            return
        self._check(request)
        answer = self._open(request)
        self._answers[request.id] = answer
        self._scheduler.add(answer.sequence)

    def prepare(self, request: Work) -> None:
        """Compile the request's grammar, from any thread, so that no step waits for it. Raises InvalidRequest."""
        if isinstance(request, Request) and request.params.grammar is not None and self._constrainer is not None:
            self._constrainer.check(request.params.grammar)

    def cancel(self, request_id: str, error: Exception | None = None) -> list[Event]:
        """End a request with `error` (None: Cancelled) and free its cells at once. No event if it is not live."""
        if not self._is_live(request_id):
            return []
        events = self._fail(request_id, error or Cancelled(f"request {request_id!r} was cancelled"))
        self._edit(self._ledger.take_edits())
        return events

    def step(self) -> list[Event]:
        """At most one decode, and what came of it. A fatal error fails every request; only the next step raises it."""
        self._raise_if_dead()
        try:
            plan = self._scheduler.plan()
            if plan is None:
                return []
            self._edit(plan.edits)
            events = self._compute(plan)
            self._edit(self._ledger.take_edits())
        except Exception as error:  # noqa: BLE001 - whatever it is, no client may be left waiting
            return self._die(error)
        return events

    def stats(self) -> EngineStats:
        """What the engine holds right now, and has done since it began."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_cells_used=self._ledger.used_cells,
            kv_cells_total=self._ledger.n_cells,
            prompt_tokens_total=self._n_prompt + self._scorer.n_prompt,
            cached_tokens_total=self._n_cached + self._scorer.n_cached,
            generated_tokens_total=self._n_generated,
            steps_total=self._n_steps,
            preemptions_total=self._scheduler.n_preemptions,
        )

    def close(self) -> None:
        """Free the model. Cancel what is live first: closing emits nothing."""
        self._guides.shutdown()
        self._llama.close()

    def _open(self, request: Request) -> Answer:
        params = request.params
        answer = Answer(
            Sequence(request, self._next_arrival(), list(request.prompt)),
            Sampler(params, self._tokenizer.end_tokens),
            TextStream(self._tokenizer.token_bytes, params.stop),
        )
        if params.grammar is not None:
            if self._constrainer is None:
                raise InvalidRequest("this engine takes no grammars", param=params.grammar.param)
            answer.guide, forced = begin(self._constrainer, params.grammar, params, self._tokenizer.token_bytes)
            answer.sequence.tokens += forced
            answer.sequence.n_ahead = len(forced)
            answer.unsent = forced
            for token in forced:
                answer.sampler.note(token)
        return answer

    def _compute(self, plan: Plan) -> list[Event]:
        self._ask_guides(plan)
        try:
            logits = self._llama.decode(_batch(plan))
        except NoKvSlot as error:
            return [] if self._scheduler.shrink(plan) else self._fail(plan.chunks[0].sequence.request.id, error)
        except (BatchInvalid, DecodeAborted) as error:
            for chunk in plan.chunks:
                self._llama.remove(_seq_id(chunk), chunk.start)
            return [] if self._scheduler.isolate(plan) else self._fail(plan.chunks[0].sequence.request.id, error)
        self._n_steps += 1
        self._scheduler.commit(plan)
        events: list[Event] = []
        n_read = 0
        for chunk in plan.chunks:
            if chunk.samples:
                events += self._advance(chunk.sequence, logits[n_read : n_read + chunk.n_rows])
                n_read += chunk.n_rows
        return events

    def _ask_guides(self, plan: Plan) -> None:
        for chunk in plan.chunks:
            answer = self._answers.get(chunk.sequence.request.id)
            if chunk.samples and answer is not None and answer.guide is not None:
                answer.allowed = self._guides.submit(answer.guide.allowed)

    def _advance(self, sequence: Sequence, rows: np.ndarray) -> list[Event]:
        answer = self._answers.get(sequence.request.id)
        try:
            if answer is None:
                return self._scorer.advance(sequence, rows)
            allowed = None if answer.allowed is None else answer.allowed.result()
            return self._emit(answer, answer.sampler.draw(rows[-1], allowed))
        except Exception as error:  # noqa: BLE001 - one answer's fault must not be its neighbours'
            return self._fail(sequence.request.id, error)

    def _emit(self, answer: Answer, draw: Draw) -> list[Event]:
        sequence, request = answer.sequence, answer.sequence.request
        ends = self._tokenizer.is_end(draw.token)
        written = answer.write(draw.token, ends=ends)
        events: list[Event] = []
        if written.text or written.tokens:
            logprobs = () if ends else self._logprobs(draw)
            events.append(TextDelta(request.id, written.text, written.tokens, logprobs))
        self._count(answer)
        if written.reason is not None:
            usage = Usage(len(request.prompt), sequence.n_cached, sequence.n_generated)
            events.append(Finished(request.id, written.reason, usage))
            self._scheduler.finish(sequence)
            del self._answers[request.id]
        return events

    def _logprobs(self, draw: Draw) -> tuple[TokenLogprob, ...]:
        if draw.logprob is None:
            return ()
        name = self._tokenizer.token_bytes
        top = tuple((token, name(token, special=True), logprob) for token, logprob in draw.top)
        return (TokenLogprob(draw.token, name(draw.token, special=True), draw.logprob, top),)

    def _count(self, answer: Answer) -> None:
        sequence = answer.sequence
        if answer.n_counted == 0:
            self._n_prompt += len(sequence.request.prompt)
            self._n_cached += sequence.n_cached
        self._n_generated += sequence.n_generated - answer.n_counted
        answer.n_counted = sequence.n_generated

    def _check(self, request: Request) -> None:
        params, info = request.params, self._llama.info
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

    def _edit(self, edits: Iterable[Edit]) -> None:
        for edit in edits:
            if isinstance(edit, Copy):
                self._llama.copy_prefix(edit.source, edit.target, edit.length)
            else:
                self._llama.remove(edit.seq_id, edit.start)

    def _fail(self, request_id: str, error: Exception) -> list[Event]:
        answer = self._answers.pop(request_id, None)
        if answer is None:
            self._scorer.drop(request_id)
        else:
            self._scheduler.drop(answer.sequence)
        return [Failed(request_id, error)]

    def _is_live(self, request_id: str) -> bool:
        return request_id in self._answers or request_id in self._scorer.live

    def _next_arrival(self) -> int:
        arrival, self._n_arrivals = self._n_arrivals, self._n_arrivals + ARRIVALS
        return arrival

    def _die(self, error: Exception) -> list[Event]:
        if not isinstance(error, DecodeFailed):
            fatal = DecodeFailed(f"the engine broke: {type(error).__name__}: {error}")
            fatal.__cause__ = error
        else:
            fatal = error
        self._failure = fatal
        failed, self._answers = [*self._answers, *self._scorer.live], {}
        self._scorer.clear()
        return [Failed(request_id, fatal) for request_id in failed]

    def _raise_if_dead(self) -> None:
        if self._failure is not None:
            raise self._failure


def _batch(plan: Plan) -> Batch:
    """The arrays of the plan's decode."""
    counts = [chunk.count for chunk in plan.chunks]
    tokens = [chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] for chunk in plan.chunks]
    ends = np.cumsum(counts)
    wants_logits = np.zeros(ends[-1], np.int8)
    for end, chunk in zip(ends, plan.chunks, strict=True):
        wants_logits[end - chunk.n_rows : end] = 1
    starts = np.repeat([chunk.start for chunk in plan.chunks] - (ends - counts), counts)
    return Batch(
        tokens=np.fromiter(chain.from_iterable(tokens), np.int32, ends[-1]),
        positions=(starts + np.arange(ends[-1])).astype(np.int32),
        seq_ids=np.repeat([_seq_id(chunk) for chunk in plan.chunks], counts).astype(np.int32),
        wants_logits=wants_logits,
    )


def _seq_id(chunk: Chunk) -> int:
    assert chunk.sequence.seq_id is not None
    return chunk.sequence.seq_id
