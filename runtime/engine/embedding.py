"""Embedding requests inside the engine: texts go through the model's second context, a small batch at a time.

They share nothing with answers but the engine's steps, of which they get every other one while there are answers to
write. Within a batch requests take turns text by text, so that one of thousands of texts holds up nobody; a text that
was begun is finished first. A batch that fails is taken apart: its requests then run alone until one of them fails
alone, or none does.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from runtime.errors import ContextTooLong, EngineError, InvalidRequest
from runtime.llama.interface import Batch, LlamaLike, ModelInfo, Pooling
from runtime.requests import Embedded, Embedding, Event, Failed, Usage


@dataclass(eq=False, slots=True)
class _Job:
    """A live request: `todo` are the places of texts not begun, `vectors` what is pooled so far."""

    embedding: Embedding
    vectors: np.ndarray
    todo: deque[int]
    n_done: int = 0


@dataclass(eq=False, slots=True)
class _TextProgress:
    """A text that was begun, under its sequence id."""

    job: _Job
    place: int
    seq_id: int
    n_computed: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.job.embedding.prompts[self.place]


@dataclass(eq=False, slots=True)
class _Piece:
    """`count` more tokens of a text."""

    text: _TextProgress
    count: int


class Embedder:
    """The engine's embedding requests."""

    def __init__(self, llama: LlamaLike) -> None:
        self._llama = llama
        self._jobs: dict[str, _Job] = {}
        self._turns: deque[_Job] = deque()
        self._suspects: deque[_Job] = deque()
        self._begun: _TextProgress | None = None
        self._stepped_last = False
        self.n_prompt = 0

    @property
    def live(self) -> tuple[str, ...]:
        """The ids of the requests whose terminal event is still to come."""
        return tuple(self._jobs)

    def add(self, embedding: Embedding) -> None:
        """Begin with a request that was checked."""
        shape = (len(embedding.prompts), self._llama.info.n_embd)
        job = _Job(embedding, np.zeros(shape, np.float32), deque(range(len(embedding.prompts))))
        self._jobs[embedding.id] = job
        self._turns.append(job)

    def drop(self, request_id: str) -> None:
        """Forget a live request; its cells are free with the next batch."""
        job = self._jobs.pop(request_id)
        self._turns.remove(job)
        if job in self._suspects:
            self._suspects.remove(job)
        if self._begun is not None and self._begun.job is job:
            self._begun = None

    def clear(self) -> None:
        """Forget all requests."""
        for request_id in self.live:
            self.drop(request_id)

    def takes_step(self, *, text_waits: bool) -> bool:
        """Whether the next step is the embedder's: if it has work, and was not the last to step while text waits."""
        self._stepped_last = bool(self._jobs) and not (text_waits and self._stepped_last)
        return self._stepped_last

    def step(self) -> list[Event]:
        """One decode, and what came of it."""
        pieces = self._plan()
        suspect = self._suspects[0] if self._suspects else None
        try:
            rows = self._llama.embed(_batch(pieces), pieces[0].text.job.embedding.adapter)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the fault of one of these at most
            return self._take_apart(pieces, error)
        events: list[Event] = []
        self._begun = None
        for piece, part in zip(pieces, np.split(rows, np.cumsum([piece.count for piece in pieces])[:-1]), strict=True):
            events += self._advance(piece, part)
        if suspect in self._suspects and self._begun is None:
            self._suspects.popleft()
        return events

    def _plan(self) -> list[_Piece]:
        """The begun text, then one text of each request in turn, as long as there is room; all under one adapter."""
        room = self._llama.info.embed_n_batch
        pieces: list[_Piece] = []
        for text in self._texts():
            count = min(len(text.tokens) - text.n_computed, room)
            pieces.append(_Piece(text, count))
            room -= count
            if room == 0 or len(pieces) == self._llama.info.embed_n_seq_max:
                break
        return pieces

    def _texts(self) -> Iterator[_TextProgress]:
        begun = self._begun
        jobs = deque([self._suspects[0]]) if self._suspects else self._turns
        first = begun.job if begun is not None else next(job for job in jobs if job.todo)
        if begun is not None:
            yield begun
        ids = range(self._llama.info.embed_n_seq_max)
        free = (seq_id for seq_id in ids if begun is None or seq_id != begun.seq_id)
        alike = [job for job in jobs if job.embedding.adapter == first.embedding.adapter]
        while waiting := next((job for job in jobs if job in alike and job.todo), None):
            jobs.remove(waiting)
            jobs.append(waiting)
            yield _TextProgress(waiting, waiting.todo.popleft(), next(free))

    def _advance(self, piece: _Piece, rows: np.ndarray) -> list[Event]:
        text, job = piece.text, piece.text.job
        is_last = text.n_computed + piece.count == len(text.tokens)
        _pool(job.vectors[text.place], rows, self._llama.info.pooling, is_first=text.n_computed == 0)
        text.n_computed += piece.count
        if not is_last:
            self._begun = text
            return []
        job.n_done += 1
        return [self._end(job)] if job.n_done == len(job.vectors) else []

    def _end(self, job: _Job) -> Event:
        self.drop(job.embedding.id)
        lengths = np.linalg.norm(job.vectors.astype(np.float64), axis=1, keepdims=True)
        if not np.all(np.isfinite(lengths) & (lengths > 0)):
            return Failed(job.embedding.id, EngineError("the model gave a vector without a length"))
        n_tokens = sum(map(len, job.embedding.prompts))
        self.n_prompt += n_tokens
        return Embedded(job.embedding.id, (job.vectors / lengths).astype(np.float32), Usage(n_tokens, 0, 0))

    def _take_apart(self, pieces: list[_Piece], error: Exception) -> list[Event]:
        """The batch failed: fail its request if there is but one, else let each begin its texts again, alone."""
        self._begun = None
        jobs = list(dict.fromkeys(piece.text.job for piece in pieces))
        if len(jobs) == 1:
            self.drop(jobs[0].embedding.id)
            return [Failed(jobs[0].embedding.id, error)]
        for piece in reversed(pieces):
            piece.text.job.todo.appendleft(piece.text.place)
            piece.text.job.vectors[piece.text.place] = 0
        self._suspects = deque(jobs)
        return []


def _pool(vector: np.ndarray, rows: np.ndarray, pooling: Pooling, *, is_first: bool) -> None:
    """Add a text's next rows to its vector. A mean is left a sum: its length is made 1 in the end."""
    if pooling == "mean":
        vector += rows.sum(axis=0)
    elif pooling == "last":
        vector[:] = rows[-1]
    elif is_first:
        vector[:] = rows[0]


def _batch(pieces: Iterable[_Piece]) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    seq_ids: list[int] = []
    for piece in pieces:
        start = piece.text.n_computed
        tokens += piece.text.tokens[start : start + piece.count]
        positions += range(start, start + piece.count)
        seq_ids += [piece.text.seq_id] * piece.count
    return Batch(
        np.asarray(tokens, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(seq_ids, np.int32),
        np.ones(len(tokens), np.int8),
    )


def check_embedding(embedding: Embedding, info: ModelInfo) -> None:
    """Raise InvalidRequest or ContextTooLong for what the edge should have refused."""
    if not embedding.prompts:
        raise InvalidRequest("there is nothing to embed: no texts", param="input")
    for prompt in embedding.prompts:
        if not prompt:
            raise InvalidRequest("a text has no tokens", param="input")
        if len(prompt) > info.embed_n_ctx:
            message = f"a text has {len(prompt)} tokens, limit {info.embed_n_ctx} for an embedding"
            raise ContextTooLong(message, param="input")
        for token in prompt:
            if not 0 <= token < info.n_vocab:
                raise InvalidRequest(f"token id {token} is not in the vocabulary of {info.n_vocab}", param="input")
