"""A toy model behind the seam of `runtime/llama/interface.py`: deterministic, instant, and strict where llama.cpp is.

Its logits are a pure function of one sequence's token history, so batching cannot change an answer except through a
bug of the engine. It keeps real cells, and raises what llama.cpp would return or what a test orders.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.errors import BatchInvalid, DecodeAborted, DecodeFailed, EngineError, InvalidRequest, NoKvSlot
from runtime.llama.interface import Batch, ModelInfo

BOS, EOS, START_OF_TURN, END_OF_TURN = 256, 257, 258, 259
FAKE_VOCAB = 260
FAKE_WIDTH = 16
SPECIALS = {"<bos>": BOS, "<eos>": EOS, "<start_of_turn>": START_OF_TURN, "<end_of_turn>": END_OF_TURN}
FAKE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

Script = str | Callable[[tuple[int, ...]], int]


class FakeTokenizer:
    """A token is a byte; four control tokens follow the bytes."""

    specials: Mapping[str, int] = SPECIALS
    special_texts = tuple(SPECIALS)
    n_vocab = FAKE_VOCAB
    bos: int | None = BOS
    eos: int | None = EOS
    adds_bos = True
    end_tokens = (EOS, END_OF_TURN)

    def __init__(self, more_specials: Sequence[str] = ()) -> None:
        """`more_specials` are control tokens of a test's own, numbered from FAKE_VOCAB on."""
        if more_specials:
            self.specials = SPECIALS | {text: FAKE_VOCAB + place for place, text in enumerate(more_specials)}
            self.special_texts = tuple(self.specials)
            self.n_vocab = FAKE_VOCAB + len(more_specials)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidRequest("half a surrogate pair")
        tokens = [BOS] if add_special else []
        pattern = "|".join(map(re.escape, self.specials)) if parse_special else "(?!)"
        for part in re.split(f"({pattern})", text):
            special = self.specials.get(part) if parse_special else None
            tokens.extend(part.encode() if special is None else [special])
        return tokens

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        if token < 256:
            return bytes([token])
        names = {number: name for name, number in self.specials.items()}
        return names[token].encode() if special else b""

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def is_end(self, token: int) -> bool:
        return token in self.end_tokens


def fake_info(
    n_ctx: int = 512,
    n_seq_max: int = 32,
    n_batch: int = 512,
    n_vocab: int = FAKE_VOCAB,
    adapters: tuple[str, ...] = (),
    cut_limit: int | None = None,
) -> ModelInfo:
    """What the fake says of itself."""
    return ModelInfo(
        n_vocab=n_vocab,
        n_ctx=n_ctx,
        n_ctx_train=n_ctx,
        n_seq_max=n_seq_max,
        n_batch=n_batch,
        n_params=0,
        size_bytes=0,
        description="fake",
        architecture="fake",
        backend="fake",
        n_threads=1,
        gpu_layers=0,
        chat_template=FAKE_TEMPLATE,
        n_embd=FAKE_WIDTH,
        embed_n_ctx=n_ctx // 2,
        embed_n_seq_max=8,
        embed_n_batch=32,
        adapters=adapters,
        cut_limit=n_ctx if cut_limit is None else cut_limit,
    )


def adapted(history: tuple[int, ...], adapter: str | None) -> tuple[int, ...]:
    """What the fake's logits are a function of: an adapter acts like a prefix that nobody sees."""
    return history if adapter is None else (*adapter.encode(), -1, *history)


@dataclass(eq=False)
class _Cell:
    token: int
    adapter: str | None
    hollow: bool = False


class FakeLlama:
    """LlamaLike without llama.cpp.

    `script` says what it answers: a text, which follows any prompt (as long as the prompt does not end with the text's
    own beginning) and then ends the turn; a function from the whole history to the next token; or None for logits
    drawn from a hash of the history. `fail_at` raises an error at the k-th decode (counted from 0); `on_decode` is
    called with k before every decode and may block, to hold the engine at a known place. `on_embed` is called with
    every batch to embed, and may raise. `cells_hidden` takes cells away behind the engine's back, so that NoKvSlot
    comes unforeseen. Logits depend on the adapter too, and a cell that was computed under another one than is applied
    must not be read. `applied` tells each decode's adapter. `template` is its chat template, `more_specials`
    are control tokens of its own. Where `script` is a text, control tokens are written out in it.

    Snapshots are good at every length up to `window` tokens (None: always), longer ones at their own length only: the
    cells before the window come back hollow, and a token that looks at one fails the test. `snapshots_refused` makes
    `restore` fail. `saved` and `restored` count.
    """

    def __init__(
        self,
        n_ctx: int = 512,
        n_seq_max: int = 32,
        n_batch: int = 512,
        script: Script | None = None,
        fail_at: Mapping[int, Exception] | None = None,
        on_decode: Callable[[int, Batch], None] | None = None,
        on_embed: Callable[[Batch], None] | None = None,
        adapters: tuple[str, ...] = (),
        template: str = FAKE_TEMPLATE,
        more_specials: Sequence[str] = (),
        window: int | None = None,
        row_group: int = 1,
        rows_alike: int = 1,
        unified: bool = False,
    ) -> None:
        self.window = n_ctx if window is None else window
        self.unified = unified
        self.snapshots_refused = False
        self.saved = self.restored = 0
        self.tokenizer = FakeTokenizer(more_specials)
        info = fake_info(n_ctx, n_seq_max, n_batch, self.tokenizer.n_vocab, adapters, window)
        self.info = replace(info, chat_template=template, row_group=row_group, rows_alike=rows_alike)
        self.script = script
        self.fail_at = dict(fail_at or {})
        self.on_decode = on_decode
        self.on_embed = on_embed
        self._embedded: dict[int, tuple[int, ...]] = {}
        self.cells_hidden = 0
        self.decodes = 0
        self.batches: list[Batch] = []
        self.adapter: str | None = None
        self.applied: list[str | None] = []
        self.closed = False
        self._sequences: dict[int, list[_Cell]] = {}

    @property
    def used_cells(self) -> int:
        """Cells that sequences hold; a copy shares those of its source only if the cache is `unified`."""
        return len({id(cell) for cells in self._sequences.values() for cell in cells})

    @property
    def sequences(self) -> dict[int, tuple[int, ...]]:
        """The tokens that each sequence id holds; empty ones are left out."""
        return {seq_id: tuple(cell.token for cell in cells) for seq_id, cells in self._sequences.items() if cells}

    def decode(self, batch: Batch) -> np.ndarray:
        number, self.decodes = self.decodes, self.decodes + 1
        self.batches.append(batch)
        self.applied.append(self.adapter)
        if self.on_decode is not None:
            self.on_decode(number, batch)
        self._check(batch)
        ordered = self.fail_at.get(number)
        if isinstance(ordered, DecodeAborted | DecodeFailed):
            self._store(batch, len(batch.tokens) // 2)
        if ordered is not None:
            raise ordered
        if self.used_cells + len(batch.tokens) > self.info.n_ctx - self.cells_hidden:
            raise NoKvSlot(f"{len(batch.tokens)} tokens do not fit")
        return self._store(batch, len(batch.tokens))

    def _check(self, batch: Batch) -> None:
        if self.closed:
            raise EngineError("closed")
        if not 0 < len(batch.tokens) <= self.info.n_batch:
            raise BatchInvalid(f"{len(batch.tokens)} tokens in a batch, limit {self.info.n_batch}")
        ends = {seq_id: len(cells) for seq_id, cells in self._sequences.items()}
        for token, position, seq_id in zip(batch.tokens, batch.positions, batch.seq_ids, strict=True):
            expected = ends.get(int(seq_id), 0)
            if not 0 <= seq_id < self.info.n_seq_max or not 0 <= token < self.info.n_vocab or position != expected:
                raise BatchInvalid(f"token {token} at {position} of sequence {seq_id}, expected position {expected}")
            ends[int(seq_id)] = expected + 1
        for seq_id in set(batch.seq_ids.tolist()):
            foreign = {cell.adapter for cell in self._sequences.get(seq_id, [])} - {self.adapter}
            assert not foreign, f"sequence {seq_id} was computed under {foreign} and is read under {self.adapter!r}"

    def _store(self, batch: Batch, count: int) -> np.ndarray:
        rows = []
        for token, seq_id, wanted in list(zip(batch.tokens, batch.seq_ids, batch.wants_logits, strict=True))[:count]:
            cells = self._sequences.setdefault(int(seq_id), [])
            assert self.is_whole(int(seq_id), len(cells)), f"sequence {seq_id} looks at cells that are gone"
            cells.append(_Cell(int(token), self.adapter))
            if wanted:
                rows.append(self.logits(adapted(tuple(cell.token for cell in cells), self.adapter)))
        return np.stack(rows) if rows else np.empty((0, self.info.n_vocab), np.float32)

    def logits(self, history: tuple[int, ...]) -> np.ndarray:
        """The logits after `history`, float32 of shape (n_vocab,): a pure function."""
        digest = hashlib.blake2b(np.asarray(history, np.int32).tobytes(), digest_size=8).digest()
        logits = np.random.default_rng(int.from_bytes(digest)).normal(0, 2, self.info.n_vocab).astype(np.float32)
        if self.script is not None:
            logits[self._scripted(history)] += 40
        return logits

    def _scripted(self, history: tuple[int, ...]) -> int:
        if callable(self.script):
            return self.script(history)
        answer: list[int] = [*self.tokenizer.encode(self.script or "", add_special=False, parse_special=True), EOS]
        said = next(k for k in range(len(answer) - 1, -1, -1) if k == 0 or list(history[-k:]) == answer[:k])
        return answer[said]

    def embed(self, batch: Batch, adapter: str | None = None) -> np.ndarray:
        assert adapter is None or adapter in self.info.adapters
        held, self._embedded = self._embedded, {}
        assert 0 < len(batch.tokens) <= self.info.embed_n_batch
        if self.on_embed is not None:
            self.on_embed(batch)
        rows = []
        for token, position, seq_id in zip(
            *(a.tolist() for a in (batch.tokens, batch.positions, batch.seq_ids)), strict=True
        ):
            assert 0 <= seq_id < self.info.embed_n_seq_max
            assert position or seq_id not in self._embedded, f"sequence {seq_id} stands for two"
            before = self._embedded.get(seq_id, held.get(seq_id, ())) if position else ()
            assert len(before) == position, f"token at {position} of sequence {seq_id}, expected {len(before)}"
            self._embedded[seq_id] = (*before, token)
            rows.append(self.row(self._embedded[seq_id], adapter))
        return np.stack(rows)

    def row(self, history: tuple[int, ...], adapter: str | None = None) -> np.ndarray:
        """The last layer's row after `history`, float32 of shape (n_embd,): pure, and mostly of the last token."""
        seeds = (history[-1:], [token + 1 for token in adapted(history, adapter)])
        named, whole = (np.random.default_rng(list(seed)).normal(size=self.info.n_embd) for seed in seeds)
        row: np.ndarray = (named + whole / 4).astype(np.float32)
        return row

    def use_adapter(self, name: str | None) -> None:
        assert name is None or name in self.info.adapters, f"no adapter {name!r}"
        self.adapter = name

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        held = self._sequences.get(source, [])
        assert source != target
        assert length <= len(held), f"copy {length} of {len(held)} cells"
        assert not self._sequences.get(target), f"target {target} is not empty"
        if self.unified:
            self._sequences[target] = held[:length]
            return
        n_hollow = max(0, len(held) - self.window)
        self._sequences[target] = [replace(cell, hollow=i < n_hollow) for i, cell in enumerate(held[:length])]

    def remove(self, seq_id: int, start: int = 0, end: int = -1) -> None:
        held = self._sequences.get(seq_id, [])
        assert end in (-1, len(held)), "the fake removes tails only"
        self._sequences[seq_id] = held[:start]

    def is_whole(self, seq_id: int, length: int) -> bool:
        cells = self._sequences.get(seq_id, [])
        return len(cells) == length and not any(cell.hollow for cell in cells[max(0, length - self.window) :])

    def save(self, seq_id: int) -> np.ndarray:
        cells = self._sequences[seq_id]
        assert self.is_whole(seq_id, len(cells))
        self.saved += 1
        numbers = {None: -1} | {name: place for place, name in enumerate(self.info.adapters)}
        return np.array([(cell.token, numbers[cell.adapter]) for cell in cells], np.int32).view(np.uint8).ravel()

    def restore(self, seq_id: int, data: np.ndarray, length: int) -> bool:
        assert not self._sequences.get(seq_id), f"{seq_id} is not empty"
        pairs = data.view(np.int32).reshape(-1, 2).tolist()
        if self.snapshots_refused or self.used_cells + len(pairs) > self.info.n_ctx - self.cells_hidden:
            return False
        names = (*self.info.adapters, None)
        n_hollow = max(0, len(pairs) - self.window)
        cells = [_Cell(token, names[a], i < n_hollow) for i, (token, a) in enumerate(pairs)]
        self._sequences[seq_id] = cells
        self.remove(seq_id, length)
        if not self.is_whole(seq_id, length):
            self.remove(seq_id)
            return False
        self.restored += 1
        return True

    def clear(self) -> None:
        self._sequences.clear()

    def close(self) -> None:
        self.closed = True
