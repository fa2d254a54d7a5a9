"""One model's pass over all tasks: the planned rows of logits, and an answer to every example.

A few examples at a time: their prompts are prefilled together; the expected answers are branches of the prompts and
give the rows; then the model's own answers are computed. To classify, every label is scored in full, as a branch of the
shared prompt, by the rule of `/v1/decisions` (`runtime/decoding/choice_tree.py`); tokens shared with the expected
label's branch are computed once. To write, the prompts' sequences are decoded together with the likeliest token each,
up to an end token or the limit of the tasks. Each prompt is computed once.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from convert.child import StepProgress
from convert.errors import MeasureFailed
from runtime.decoding.choice_tree import ChoiceTree
from runtime.llama.interface import Batch, LlamaLike
from runtime.requests import ScoringPrompt

from .loss import LogitsRow
from .tasks import EvalTask, Tasks

# Half of the sequences may hold prompts: the other half is for their branches.
MAX_TOGETHER = 16
N_SEQ_MAX = 2 * MAX_TOGETHER
# JSON, in which answers are kept, has no infinity.
LEAST_LOGPROB = -9999.0
OnRow = Callable[[LogitsRow, np.ndarray], None]


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """A model's answer: a label, or its text. `cut_off`: the limit came before the end of the text.

    Of a label, `logprobs` are those of all labels, in the order of the tasks.
    """

    text: str
    cut_off: bool = False
    logprobs: tuple[float, ...] = ()


def run_pass(
    llama: LlamaLike,
    tasks: Tasks,
    rows: Iterable[LogitsRow],
    on_row: OnRow,
    together: int = MAX_TOGETHER,
    progress: StepProgress = lambda done, total: None,
) -> tuple[ModelAnswer, ...]:
    """Call `on_row` with each of `rows` and its logits, float32 of shape (n_vocab,), valid until it returns.

    Returns the answers in the order of the tasks. At most `together` examples are in progress at once
    (1 … MAX_TOGETHER). `progress` is called with (examples done, examples in all). Raises EngineError, and
    MeasureFailed when the model has another vocabulary than the tasks or its logits are not numbers.
    """
    if llama.info.n_vocab != tasks.n_vocab:
        raise MeasureFailed(f"the model has {llama.info.n_vocab} tokens, the tasks were made for {tasks.n_vocab}")
    by_place: dict[int, dict[int, LogitsRow]] = {}
    for row in rows:
        by_place.setdefault(row.place, {})[row.position] = row
    answers: list[ModelAnswer] = []
    total = len(tasks.tasks)
    progress(0, total)
    for group in _groups(tasks, together, llama.info.n_ctx):
        llama.clear()
        asked = [
            _ActiveTask(place, tasks.tasks[place], seq_id, by_place.get(place, {}))
            for seq_id, place in enumerate(group)
        ]
        answers += _PromptGroup(llama, tasks, asked, on_row).answers()
        progress(len(answers), total)
    return tuple(answers)


def cells_needed(tasks: Tasks, together: int = MAX_TOGETHER) -> int:
    """Size of a KV cache for `together` examples of usual length, and at least for the longest example."""
    rooms = sorted((tasks.room(task) for task in tasks.tasks), reverse=True)
    return max(sum(rooms[:1]), min(sum(rooms[:together]), 8192))


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """`tokens` of the sequence `seq_id`, from position `start`. `wanted`: indices of the tokens that need logits."""

    seq_id: int
    start: int
    tokens: Sequence[int]
    wanted: Collection[int]


@dataclass(frozen=True, slots=True)
class TokenBranch:
    """`tokens` after the sequence `trunk`, which has `length` tokens.

    `read` is called with each wanted row: its index in `tokens`, and its logits, valid until it returns.
    """

    trunk: int
    length: int
    tokens: Sequence[int]
    wanted: Collection[int]
    read: Callable[[int, np.ndarray], None]


def decode_spans(llama: LlamaLike, runs: Sequence[TokenSpan]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Decode all spans. Yields (span, index in its tokens, logits of shape (n_vocab,)) for each wanted row, in order.

    The logits are valid until the next step of the iterator. Raises EngineError.
    """
    flat = [
        (index, place, token, run.seq_id, run.start + place, place in run.wanted)
        for index, run in enumerate(runs)
        for place, token in enumerate(run.tokens)
    ]
    for start, end in _steps([wanted for *_, wanted in flat], llama.info.n_batch, llama.info.n_seq_max):
        part = flat[start:end]
        _, _, tokens, seq_ids, positions, wants = zip(*part, strict=True)
        logits = llama.decode(
            Batch(
                tokens=np.array(tokens, np.int32),
                positions=np.array(positions, np.int32),
                seq_ids=np.array(seq_ids, np.int32),
                wants_logits=np.array(wants, bool),
            )
        )
        asked = ((index, place) for index, place, *_, wanted in part if wanted)
        for (index, place), row in zip(asked, logits, strict=True):
            yield index, place, row


def decode_branches(llama: LlamaLike, branches: Sequence[TokenBranch], seq_ids: Sequence[int], room: int) -> None:
    """Decode `branches` as the empty sequences `seq_ids`, in at most `room` cells at a time, and empty these again.

    Each branch must fit into `room`. Raises EngineError.
    """
    waiting = list(branches)
    while waiting:
        chosen: list[TokenBranch] = []
        free = room
        while waiting and len(chosen) < len(seq_ids) and (not chosen or len(waiting[0].tokens) <= free):
            chosen.append(waiting.pop(0))
            free -= len(chosen[-1].tokens)
        for seq_id, branch in zip(seq_ids, chosen, strict=False):
            llama.copy_prefix(branch.trunk, seq_id, branch.length)
        runs = [
            TokenSpan(seq_id, branch.length, branch.tokens, branch.wanted)
            for seq_id, branch in zip(seq_ids, chosen, strict=False)
        ]
        for index, place, row in decode_spans(llama, runs):
            chosen[index].read(place, row)
        for seq_id in seq_ids[: len(chosen)]:
            llama.remove(seq_id)


@dataclass(slots=True)
class _ActiveTask:
    """A task in progress: its index, its sequence, and the wanted rows by position."""

    place: int
    task: EvalTask
    seq_id: int
    rows: Mapping[int, LogitsRow]
    tree: ChoiceTree | None = None
    written: list[int] = field(default_factory=list)


def _groups(tasks: Tasks, together: int, n_ctx: int) -> Iterable[list[int]]:
    """Yield groups of neighbouring tasks that fit into the KV cache together, each with its longest possible answer."""
    group: list[int] = []
    used = 0
    for place, task in enumerate(tasks.tasks):
        room = tasks.room(task)
        if group and (len(group) == together or used + room > n_ctx):
            yield group
            group, used = [], 0
        group.append(place)
        used += room
    if group:
        yield group


class _PromptGroup:
    """A few examples with their prompts in the cache together."""

    def __init__(self, llama: LlamaLike, tasks: Tasks, asked: Sequence[_ActiveTask], on_row: OnRow) -> None:
        self._llama = llama
        self._tasks = tasks
        self._asked = asked
        self._on_row = on_row
        self._room = llama.info.n_ctx - sum(len(one.task.prompt) for one in asked)
        self._free_ids = range(len(asked), llama.info.n_seq_max)

    def answers(self) -> list[ModelAnswer]:
        """Compute the rows and answers of these examples."""
        self._prefill()
        if self._tasks.work == "classify":
            return self._choose()
        self._compute([branch for one in self._asked if (branch := self._expected(one)) is not None])
        return self._write()

    def _prefill(self) -> None:
        runs = [TokenSpan(one.seq_id, 0, one.task.prompt, {len(one.task.prompt) - 1}) for one in self._asked]
        for index, place, logits in decode_spans(self._llama, runs):
            one = self._asked[index]
            self._see(one, place, logits)
            if self._tasks.work == "classify":
                one.tree = ChoiceTree(ScoringPrompt(one.task.prompt, self._tasks.choices, self._tasks.ends))
                one.tree.read((), logits)
            else:
                one.written.append(_likeliest(logits))

    def _see(self, one: _ActiveTask, position: int, logits: np.ndarray) -> None:
        if row := one.rows.get(position):
            self._on_row(row, logits)

    def _expected(self, one: _ActiveTask) -> TokenBranch | None:
        """The branch that gives the rows after the expected answer's tokens; None without such rows."""
        n_prompt = len(one.task.prompt)
        wanted = {position - n_prompt for position in one.rows if position >= n_prompt}
        if not wanted:
            return None

        def read(place: int, logits: np.ndarray) -> None:
            self._see(one, n_prompt + place, logits)

        return self._branch(one, one.task.answer[: max(wanted) + 1], wanted, read)

    def _choose(self) -> list[ModelAnswer]:
        trees = [(one, one.tree) for one in self._asked if one.tree is not None]
        branches = [branch for one, tree in trees for branch in self._first_wave(one, tree)]
        while branches:
            self._compute(branches)
            branches = [branch for one, tree in trees for branch in self._wave(one, tree)]
        return [self._chosen(tree.logprobs()) for _, tree in trees]

    def _chosen(self, logprobs: Sequence[float]) -> ModelAnswer:
        label = self._tasks.labels[_first_highest(logprobs)]
        return ModelAnswer(label, logprobs=tuple(max(logprob, LEAST_LOGPROB) for logprob in logprobs))

    def _first_wave(self, one: _ActiveTask, tree: ChoiceTree) -> list[TokenBranch]:
        """The choice tree's branches and the expected answer's; the latter serves the tokens that they share."""
        wave, expected = self._wave(one, tree), self._expected(one)
        if expected is None:
            return wave
        shared: set[int] = set()
        rest: list[TokenBranch] = []
        for branch in wave:
            common = {place for place in branch.wanted if branch.tokens[: place + 1] == expected.tokens[: place + 1]}
            shared |= common
            if alone := frozenset(branch.wanted) - common:
                rest.append(replace(branch, wanted=alone))

        def read(place: int, logits: np.ndarray) -> None:
            if place in expected.wanted:
                expected.read(place, logits)
            if place in shared:
                tree.read(tuple(expected.tokens[: place + 1]), logits)

        return [replace(expected, wanted=frozenset(expected.wanted) | shared, read=read), *rest]

    def _wave(self, one: _ActiveTask, tree: ChoiceTree) -> list[TokenBranch]:
        def reader(path: tuple[int, ...]) -> Callable[[int, np.ndarray], None]:
            return lambda place, logits: tree.read(path[: place + 1], logits)

        return [
            self._branch(one, branch.path, range(branch.first - 1, len(branch.path)), reader(branch.path))
            for branch in tree.next_wave()
        ]

    def _branch(
        self, one: _ActiveTask, tokens: Sequence[int], wanted: Iterable[int], read: Callable[[int, np.ndarray], None]
    ) -> TokenBranch:
        return TokenBranch(one.seq_id, len(one.task.prompt), tokens, frozenset(wanted), read)

    def _compute(self, branches: Sequence[TokenBranch]) -> None:
        decode_branches(self._llama, branches, self._free_ids, self._room)

    def _write(self) -> list[ModelAnswer]:
        while going := [one for one in self._asked if self._goes_on(one)]:
            runs = [
                TokenSpan(one.seq_id, len(one.task.prompt) + len(one.written) - 1, one.written[-1:], {0})
                for one in going
            ]
            for index, _, logits in decode_spans(self._llama, runs):
                going[index].written.append(_likeliest(logits))
        return [self._written(one) for one in self._asked]

    def _goes_on(self, one: _ActiveTask) -> bool:
        return len(one.written) < self._tasks.max_written and one.written[-1] not in self._tasks.ends

    def _written(self, one: _ActiveTask) -> ModelAnswer:
        ended = one.written[-1] in self._tasks.ends
        return ModelAnswer(self._llama.tokenizer.decode(one.written[:-1] if ended else one.written), cut_off=not ended)


def _likeliest(logits: np.ndarray) -> int:
    place = int(logits.argmax())  # the index of a NaN, if there is one
    if not np.isfinite(logits[place]):
        raise MeasureFailed(f"the logits are not numbers (the highest is {logits[place]})")
    return place


def _first_highest(logprobs: Sequence[float]) -> int:
    highest = max(logprobs)
    if highest == -np.inf:
        raise MeasureFailed("the model gives none of the labels any probability")
    return list(logprobs).index(highest)


def _steps(wants: Sequence[bool], n_batch: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of steps with at most `n_batch` tokens and `n_rows` rows."""
    start = rows = 0
    for place, wanted in enumerate(wants):
        if place - start == n_batch or rows + wanted > n_rows:
            yield start, place
            start, rows = place, 0
        rows += wanted
    if start < len(wants):
        yield start, len(wants)
