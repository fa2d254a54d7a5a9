"""The job that embeds texts: they go through the model's second context, a small batch at a time.

Embeddings share nothing with text but the engine's steps. Within a batch requests take turns text by text, so that a
request of thousands of texts delays no other for long; a text that was begun is finished first. A batch that fails is
taken apart: its requests then run alone until one of them fails alone, or all have run.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from runtime.errors import ContextTooLong, EngineError, InvalidRequest
from runtime.llama.interface import Batch, LlamaLike, Pooling
from runtime.requests import Embedded, Embedding, Event, Failed, Usage

from .options import TokenCounts


@dataclass(eq=False, slots=True)
class _LiveEmbedding:
    """A live request: `todo` are the places of texts not begun, `vectors` the rows pooled so far."""

    embedding: Embedding
    vectors: np.ndarray
    todo: deque[int]
    n_done: int = 0


@dataclass(eq=False, slots=True)
class _ActiveText:
    """A text that was begun, under its sequence id."""

    live: _LiveEmbedding
    place: int
    seq_id: int
    n_computed: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.live.embedding.prompts[self.place]


@dataclass(eq=False, slots=True)
class _Piece:
    """`count` more tokens of a text."""

    text: _ActiveText
    count: int


class Embedder:
    """The job of all `Embedding`s, at most `at_once` texts of which share a batch.

    It makes steps of its own: the scheduler knows nothing of them.
    """

    def __init__(self, llama: LlamaLike, counts: TokenCounts, at_once: int) -> None:
        self._llama = llama
        self._counts = counts
        self._at_once = at_once
        self._turns: deque[_LiveEmbedding] = deque()
        self._suspects: deque[_LiveEmbedding] = deque()
        self._blamed: _LiveEmbedding | None = None  # failed alone just now
        self._begun: _ActiveText | None = None
        self.live: dict[str, _LiveEmbedding] = {}

    def check(self, embedding: Embedding) -> None:
        """Raise InvalidRequest or ContextTooLong for a request that the edge should have refused."""
        info = self._llama.info
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

    def add(self, embedding: Embedding) -> None:
        """Begin a request that was checked."""
        shape = (len(embedding.prompts), self._llama.info.n_embd)
        live = _LiveEmbedding(embedding, np.zeros(shape, np.float32), deque(range(len(embedding.prompts))))
        self.live[embedding.id] = live
        self._turns.append(live)

    def drop(self, request_id: str) -> None:
        """Forget a live request; its cells are free with the next batch."""
        live = self.live.pop(request_id)
        self._turns.remove(live)
        if live in self._suspects:
            self._suspects.remove(live)
        if self._begun is not None and self._begun.live is live:
            self._begun = None

    def clear(self) -> None:
        """Forget all requests of an engine that is dead."""
        for request_id in tuple(self.live):
            self.drop(request_id)

    def step(self) -> list[Event]:
        """Compute one batch; the events of the requests that it completes or fails."""
        pieces = self._plan()
        suspect = self._suspects[0] if self._suspects else None
        try:
            rows = self._llama.embed(_batch(pieces), pieces[0].text.live.embedding.adapter)
        except Exception as error:  # noqa: BLE001 - at most one of these requests is to blame
            return self._take_apart(pieces, error)
        events: list[Event] = []
        self._begun = self._blamed = None
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
            if room == 0 or len(pieces) == self._at_once:
                break
        return pieces

    def _texts(self) -> Iterator[_ActiveText]:
        begun = self._begun
        requests = deque([self._suspects[0]]) if self._suspects else self._turns
        first = begun.live if begun is not None else next(live for live in requests if live.todo)
        if begun is not None:
            yield begun
        ids = range(self._llama.info.embed_n_seq_max)
        free = (seq_id for seq_id in ids if begun is None or seq_id != begun.seq_id)
        alike = [live for live in requests if live.embedding.adapter == first.embedding.adapter]
        while waiting := next((live for live in requests if live in alike and live.todo), None):
            requests.remove(waiting)
            requests.append(waiting)
            yield _ActiveText(waiting, waiting.todo.popleft(), next(free))

    def _advance(self, piece: _Piece, rows: np.ndarray) -> list[Event]:
        text, live = piece.text, piece.text.live
        is_last = text.n_computed + piece.count == len(text.tokens)
        _pool(live.vectors[text.place], rows, self._llama.info.pooling, is_first=text.n_computed == 0)
        text.n_computed += piece.count
        if not is_last:
            self._begun = text
            return []
        live.n_done += 1
        return [self._end(live)] if live.n_done == len(live.vectors) else []

    def _end(self, live: _LiveEmbedding) -> Event:
        self.drop(live.embedding.id)
        lengths = np.linalg.norm(live.vectors.astype(np.float64), axis=1, keepdims=True)
        if not np.all(np.isfinite(lengths) & (lengths > 0)):
            return Failed(live.embedding.id, EngineError("the model gave a vector without a length"))
        n_tokens = sum(map(len, live.embedding.prompts))
        self._counts.prompt += n_tokens
        return Embedded(live.embedding.id, (live.vectors / lengths).astype(np.float32), Usage(n_tokens, 0, 0))

    def _take_apart(self, pieces: list[_Piece], error: Exception) -> list[Event]:
        """Let each request of a failed batch begin its texts again, alone; one that fails twice alone has failed."""
        self._begun = None
        requests = list(dict.fromkeys(piece.text.live for piece in pieces))
        if len(requests) == 1 and requests[0] is self._blamed:
            self.drop(requests[0].embedding.id)
            return [Failed(requests[0].embedding.id, error)]
        self._blamed = requests[0] if len(requests) == 1 else None
        for piece in reversed(pieces):
            piece.text.live.todo.appendleft(piece.text.place)
            piece.text.live.vectors[piece.text.place] = 0
        self._suspects = deque(requests)
        return []


def _pool(vector: np.ndarray, rows: np.ndarray, pooling: Pooling, *, is_first: bool) -> None:
    """Add a text's next rows to its vector. A mean stays a sum, since the vector's length becomes 1 in the end."""
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
