"""The engine: one model, many answers at once. `step()` plans, decodes, samples and emits.

One thread owns an engine. Every request that `add` accepts ends in exactly one terminal event, from `step` or `cancel`.
A decode that fails is never a reason to fail a neighbour: no room in the cache means doing less, a malformed batch is
taken apart to find the guilty sequence. Only a fatal code ends them all, and the engine with them.

What a grammar allows depends on the tokens before, not on the logits, so it is worked out while llama.cpp decodes.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import TracebackType

import numpy as np

from runtime.decoding.detokenize import TextStream
from runtime.decoding.grammar import Grammars
from runtime.decoding.sampling import SampledToken, Sampler
from runtime.errors import BatchInvalid, Cancelled, DecodeAborted, DecodeFailed, InvalidRequest, ModelUnknown, NoKvSlot
from runtime.llama.interface import Batch, LlamaLike
from runtime.requests import (
    Embedding,
    EngineStats,
    Event,
    Failed,
    Finished,
    Request,
    Scoring,
    TextDelta,
    TokenLogprob,
    Usage,
    Work,
)
from runtime.scheduling.plan import Chunk, Copy, Edit, ScheduledSequence, StepPlan
from runtime.scheduling.prefix_cache import PrefixCache
from runtime.scheduling.scheduler import Scheduler

from .answer import Generation, begin, check_request, speller
from .drafts import Drafts
from .embedding import Embedder, check_embedding
from .options import EngineOptions
from .scoring import ARRIVALS, Scorer, check_scoring


class Stopwatch:
    """`with watch:` adds the block's seconds, `last_s`, to `total_s`, also when it raises. Not reentrant."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back."""
        self._clock = clock
        self._began_s = 0.0
        self.last_s = 0.0
        self.total_s = 0.0

    def __enter__(self) -> None:
        self._began_s = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.last_s = self._clock() - self._began_s
        self.total_s += self.last_s


class Engine:
    """Continuous batching over one `LlamaLike`; without a `grammars` it takes no request with a grammar.

    `clock`, in seconds, times steps and decodes: whether drafts pay depends on it, what an answer says does not.
    """

    def __init__(
        self,
        llama: LlamaLike,
        options: EngineOptions | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        options = options or EngineOptions()
        info = llama.info
        self._llama = llama
        self._tokenizer = llama.tokenizer
        self._cache = PrefixCache(info.n_ctx, info.n_seq_max, options.idle_bound(info.n_ctx))
        self._scheduler = Scheduler(
            self._cache,
            step_tokens=min(options.step_tokens, info.n_batch),
            max_running=min(options.max_running, info.n_seq_max),
            max_rows=info.n_seq_max,  # a model gives no fewer in one decode
            mix_cells=options.mix_bound(info.gpu_layers),
        )
        self._grammars = grammars
        self._guides = ThreadPoolExecutor(1, "deskside-guides")  # one: a grammar has one reader at a time
        self._scorer = Scorer(self._scheduler, self._next_arrival, max(1, options.max_running // 2))
        self._drafts = Drafts(options.max_drafts)
        self._embedder = Embedder(llama)
        self._answers: dict[str, Generation] = {}
        self._failure: DecodeFailed | None = None
        self._n_arrivals = 0
        self._n_steps = 0
        self._n_prompt = 0
        self._n_cached = 0
        self._n_generated = 0
        self._stepping, self._decoding = Stopwatch(clock), Stopwatch(clock)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._writes or self._embedder.live)

    @property
    def _writes(self) -> bool:
        return bool(self._answers or self._scorer.live)

    @property
    def failure(self) -> DecodeFailed | None:
        """The fatal error that ended this engine, if one did. Its requests were failed by the step that met it."""
        return self._failure

    def add(self, request: Work) -> None:
        """Accept a request. Raises ContextTooLong, InvalidRequest or ModelUnknown: what the edge should have refused.

        Raises the fatal DecodeFailed if there was one.
        """
        self._raise_if_dead()
        if self._is_live(request.id):
            raise InvalidRequest(f"request id {request.id!r} is already live", param="id")
        adapters = self._llama.info.adapters
        if request.adapter is not None and request.adapter not in adapters:
            raise ModelUnknown(f"adapter {request.adapter!r} is not loaded; loaded are {list(adapters)}", param="model")
        if isinstance(request, Scoring):
            check_scoring(request, self._llama.info.n_vocab, self._llama.info.n_ctx)
            self._scorer.add(request)
            return
        if isinstance(request, Embedding):
            check_embedding(request, self._llama.info)
            self._embedder.add(request)
            return
        check_request(request, self._llama.info)
        answer = self._open(request)
        self._answers[request.id] = answer
        self._scheduler.add(answer.sequence)

    def prepare(self, request: Work) -> None:
        """Compile the request's grammar, from any thread, so that no step waits for it. Raises InvalidRequest."""
        if isinstance(request, Request) and request.params.grammar is not None and self._grammars is not None:
            self._grammars.compile(request.params.grammar)

    def cancel(self, request_id: str, error: Exception | None = None) -> list[Event]:
        """End a request with `error` (None: Cancelled) and free its cells at once. No event if it is not live."""
        if not self._is_live(request_id):
            return []
        events = self._fail(request_id, error or Cancelled(f"request {request_id!r} was cancelled"))
        self._edit(self._cache.take_edits())
        return events

    def step(self) -> list[Event]:
        """At most one decode, and what came of it. A fatal error fails every request; only the next step raises it.

        While there are both, embeddings and text take turns.
        """
        self._raise_if_dead()
        with self._stepping:
            return self._step()

    def _step(self) -> list[Event]:
        try:
            if self._embedder.takes_step(text_waits=self._writes):
                return self._embedder.step()
            plan = self._scheduler.plan()
            if plan is None:
                return []
            self._edit(plan.edits)
            events = self._compute(self._drafts.extend(plan, self._scheduler, self._answers))
            self._edit(self._cache.take_edits())
        except Exception as error:  # noqa: BLE001 - whatever it is, no client may be left waiting
            return self._die(error)
        return events

    def stats(self) -> EngineStats:
        """What the engine holds right now, and has done since it began."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_cells_used=self._cache.used_cells,
            kv_cells_total=self._cache.n_cells,
            prompt_tokens_total=self._n_prompt + self._scorer.n_prompt + self._embedder.n_prompt,
            cached_tokens_total=self._n_cached + self._scorer.n_cached,
            generated_tokens_total=self._n_generated,
            steps_total=self._n_steps,
            preemptions_total=self._scheduler.n_preemptions,
            draft_tokens_total=self._drafts.n_drafted,
            draft_tokens_accepted_total=self._drafts.n_accepted,
            decode_seconds_total=self._decoding.total_s,
            step_seconds_total=self._stepping.total_s,
        )

    def close(self) -> None:
        """Free the model. Cancel what is live first: closing emits nothing."""
        self._guides.shutdown()
        self._llama.close()

    def _open(self, request: Request) -> Generation:
        params = request.params
        token_bytes = speller(self._tokenizer, params.spelled)
        answer = Generation(
            ScheduledSequence(request, self._next_arrival(), list(request.prompt)),
            Sampler(params, self._tokenizer.end_tokens),
            TextStream(token_bytes, params.stop),
        )
        if params.grammar is not None:
            if self._grammars is None:
                raise InvalidRequest("this engine takes no grammars", param=params.grammar.param)
            answer.guide, forced = begin(self._grammars, params.grammar, params, token_bytes)
            answer.sequence.tokens += forced
            answer.sequence.n_ahead = len(forced)
            answer.unsent = forced
            for token in forced:
                answer.sampler.note(token)
        return answer

    def _compute(self, plan: StepPlan) -> list[Event]:
        self._ask_guides(plan)
        try:
            batch = batch_of(plan)
            self._llama.use_adapter(plan.adapter)
            with self._decoding:
                logits = self._llama.decode(batch)
        except (NoKvSlot, BatchInvalid, DecodeAborted) as error:
            return self._retry(plan, error)
        self._drafts.timed(plan, self._decoding.last_s)
        self._n_steps += 1
        self._scheduler.commit(plan)
        events: list[Event] = []
        n_read = 0
        for chunk in plan.chunks:
            if chunk.samples:
                events += self._advance(chunk, logits[n_read : n_read + chunk.n_rows])
                n_read += chunk.n_rows
        return events

    def _retry(self, plan: StepPlan, error: NoKvSlot | BatchInvalid | DecodeAborted) -> list[Event]:
        """The plan failed and harmed nobody: have the next one do less, or fail the one that cannot do with less."""
        if not isinstance(error, NoKvSlot):
            for chunk in plan.chunks:
                self._llama.remove(seq_id_of(chunk), chunk.start)
        if self._drafts.withdraw(plan):
            return []
        again = self._scheduler.shrink if isinstance(error, NoKvSlot) else self._scheduler.isolate
        return [] if again(plan) else self._fail(plan.chunks[0].sequence.request.id, error)

    def _ask_guides(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            answer = self._answers.get(chunk.sequence.request.id)
            if chunk.samples and answer is not None and answer.guide is not None:
                answer.allowed = self._guides.submit(answer.guide.allowed)

    def _advance(self, chunk: Chunk, rows: np.ndarray) -> list[Event]:
        sequence = chunk.sequence
        answer = self._answers.get(sequence.request.id)
        events: list[Event] = []
        try:
            if answer is None:
                return self._scorer.advance(sequence, rows)
            allowed = None if answer.allowed is None else answer.allowed.result()
            n_known = len(sequence.tokens)
            for row, draft in zip(rows[-1 - len(chunk.drafts) :], (*chunk.drafts, None), strict=True):
                draw = answer.sampler.draw(row, allowed)
                if draw.token != draft:
                    self._scheduler.trim(sequence, len(sequence.tokens))
                events += self._emit(answer, draw)
                if draw.token != draft or sequence.seq_id is None:
                    break
            self._drafts.judge(answer, chunk, sequence.tokens[n_known:])
        except Exception as error:  # noqa: BLE001 - one answer's fault must not be its neighbours'
            return events + self._fail(sequence.request.id, error)
        return events

    def _emit(self, answer: Generation, draw: SampledToken) -> list[Event]:
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

    def _logprobs(self, draw: SampledToken) -> tuple[TokenLogprob, ...]:
        if draw.logprob is None:
            return ()
        name = self._tokenizer.token_bytes
        top = tuple((token, name(token, special=True), logprob) for token, logprob in draw.top)
        return (TokenLogprob(draw.token, name(draw.token, special=True), draw.logprob, top),)

    def _count(self, answer: Generation) -> None:
        sequence = answer.sequence
        if answer.n_counted == 0:
            self._n_prompt += len(sequence.request.prompt)
            self._n_cached += sequence.n_cached
        self._n_generated += sequence.n_generated - answer.n_counted
        answer.n_counted = sequence.n_generated

    def _edit(self, edits: Iterable[Edit]) -> None:
        for edit in edits:
            if isinstance(edit, Copy):
                self._llama.copy_prefix(edit.source, edit.target, edit.length)
            else:
                self._llama.remove(edit.seq_id, edit.start)

    def _fail(self, request_id: str, error: Exception) -> list[Event]:
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self._scheduler.drop(answer.sequence)
        elif request_id in self._embedder.live:
            self._embedder.drop(request_id)
        else:
            self._scorer.drop(request_id)
        return [Failed(request_id, error)]

    def _is_live(self, request_id: str) -> bool:
        return any(request_id in live for live in (self._answers, self._scorer.live, self._embedder.live))

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
        failed, self._answers = [*self._answers, *self._scorer.live, *self._embedder.live], {}
        self._scheduler.clear()
        self._scorer.clear()
        self._embedder.clear()
        return [Failed(request_id, fatal) for request_id in failed]

    def _raise_if_dead(self) -> None:
        if self._failure is not None:
            raise self._failure


def batch_of(plan: StepPlan) -> Batch:
    """The arrays of the plan's decode."""
    counts = [chunk.count for chunk in plan.chunks]
    tokens = [[*chunk.sequence.tokens[chunk.start : chunk.start + chunk.count], *chunk.drafts] for chunk in plan.chunks]
    ends = np.cumsum(counts)
    wants_logits = np.zeros(ends[-1], np.int8)
    for end, chunk in zip(ends, plan.chunks, strict=True):
        wants_logits[end - chunk.n_rows : end] = 1
    starts = np.repeat([chunk.start for chunk in plan.chunks] - (ends - counts), counts)
    return Batch(
        tokens=np.fromiter(chain.from_iterable(tokens), np.int32, ends[-1]),
        positions=(starts + np.arange(ends[-1])).astype(np.int32),
        seq_ids=np.repeat([seq_id_of(chunk) for chunk in plan.chunks], counts).astype(np.int32),
        wants_logits=wants_logits,
    )


def seq_id_of(chunk: Chunk) -> int:
    """The sequence id under which the chunk is computed."""
    assert chunk.sequence.seq_id is not None
    return chunk.sequence.seq_id
