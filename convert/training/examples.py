"""Examples as token ids, the very ones that will be served, in batches of few shapes.

The prompt is the runtime's, in the chat format that conversion will write into the model; loss counts on the answer's
tokens and its end-of-turn token only. Every compiled shape costs seconds, every padded token a part of a step: the
widths of batches are chosen so that the sum of both is smallest.

Labels are scored exactly, by the rule of `/v1/decisions`: all labels follow one copy of the prompt, as columns behind
it, each of which sees the prompt and its own label's beginning. Labels that begin alike share those columns.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from convert.checkpoint.source import Checkpoint
from convert.measure.tasks import PromptFormat, Tasks, make_tasks
from convert.planning.speech import Speech, speech_of
from convert.trim.plan import tokenizer_of
from models.common.chat_records import ChatMessage, ChatRecord, answers_repeat
from models.errors import BadExamples
from models.manifest import BARE_PROMPT, Prompt
from models.quality import TaskKind
from runtime.decoding.choice_tree import ChoiceTree
from runtime.llama.interface import TokenizerLike
from runtime.prompt.cut import CutMessages, cut_messages, spoken
from runtime.requests import ScoringPrompt

STEP = 8
"""Widths of batches are multiples of this."""
# A shape takes about 5 s to compile, in which some thousand tokens could be trained; most runs have several epochs.
SHAPE_COST_TOKENS = 1500
PADDING = 0
NO_TARGETS = np.zeros(0, np.int32)
# Longer rows come in smaller batches: memory grows with the tokens of a batch.
MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class TrainingData:
    """The examples as tokens. `labels`: the answers to choose from, none for work to write."""

    train: Tasks
    validation: Tasks | None
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One example as the decoder reads it: its tokens, and the targets of its last columns (none when it is scored)."""

    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch: rows, columns, and the last columns that have targets or are scored."""

    rows: int
    width: int
    n_last: int


@dataclass(frozen=True)
class TokenBatch:
    """Indices of rows that are computed together; fewer than `shape.rows` in a last batch."""

    shape: BatchShape
    members: tuple[int, ...]


def read_data(
    checkpoint: Checkpoint,
    train: Sequence[ChatRecord],
    validation: Sequence[ChatRecord],
    labels: Sequence[str] | None,
    max_tokens: int,
) -> TrainingData:
    """Tokenise both splits for the model that conversion will make of `checkpoint`.

    `labels` None: the answers are labels if they repeat. Raises BadExamples for examples of which too few fit into
    `max_tokens`, for an answer that is no label, and for prompts that are in both splits.
    """
    _check_apart(train, validation)
    if labels is None:
        answers = [record.answer for record in (*train, *validation)]
        labels = sorted(set(answers)) if answers_repeat(answers) else ()
    known = {record.answer for record in train}
    for record in (*train, *validation):
        if labels and record.answer not in labels:
            raise BadExamples(f"line {record.line}: the answer {record.answer!r} is none of {len(labels)} labels")
    if labels and (never := [label for label in labels if label not in known]):
        raise BadExamples(f"no example to train on has the label {never[0]!r}: add some, or leave the label out")
    speech = _speech(checkpoint, train)
    tokenizer = tokenizer_of(speech.header)
    asking = PromptFormat(speech.chat.template, speech.chat.end_of_turn, BARE_PROMPT)
    work: TaskKind = "classify" if labels else "write"
    trained, validated = (
        make_tasks(tokenizer, asking, records, work, tuple(labels), max_tokens) if records else None
        for records in (train, validation)
    )
    if trained is None:
        raise BadExamples("there is no example to train on")
    return TrainingData(trained, validated, tuple(labels))


def tokenizer_for(checkpoint: Checkpoint, train: Sequence[ChatRecord]) -> TokenizerLike:
    """The tokenizer of the model that conversion will make of `checkpoint`."""
    return tokenizer_of(_speech(checkpoint, train).header)


def cut_examples(
    records: Sequence[ChatRecord], prompt: Prompt, tokenizer: TokenizerLike | None = None
) -> tuple[list[ChatRecord], int]:
    """The examples as they will be asked, with `prompt` around their texts, and the number of those that it cuts.

    Without the `tokenizer` of the model, none is cut.
    """
    made, n_cut = [], 0
    for record in records:
        said = CutMessages(prompt.messages((message.role, message.content) for message in record.prompt))
        if tokenizer is not None:
            said = cut_messages(said.messages, prompt, tokenizer)
        made.append(replace(record, prompt=tuple(ChatMessage(role, text) for role, text in spoken(said.messages))))
        n_cut += said.n_cut > 0
    return made, n_cut


def _speech(checkpoint: Checkpoint, train: Sequence[ChatRecord]) -> Speech:
    return speech_of(checkpoint.header, checkpoint, None).showing(
        text for record in train for text in (record.answer, *(message.content for message in record.prompt))
    )


def training_rows(tasks: Tasks) -> list[TokenRow]:
    """Rows with the answer, its end included, as the targets of their last columns."""
    return [TokenRow(np.array(task.tokens[:-1], np.int32), np.array(task.answer, np.int32)) for task in tasks.tasks]


def choose_widths(lengths: Sequence[int], shape_cost_tokens: int = SHAPE_COST_TOKENS) -> list[int]:
    """The widths, ascending, that cost least: padded columns and a fixed number of tokens for each width."""
    rounded = sorted(-(-length // STEP) * STEP for length in lengths)
    candidates = sorted(set(rounded))
    up_to = [sum(length <= width for length in rounded) for width in candidates]
    best: list[tuple[int, list[int]]] = []
    for index, width in enumerate(candidates):
        options = [(shape_cost_tokens + width * up_to[index], [width])]
        for before in range(index):
            cost, widths = best[before]
            options.append((cost + shape_cost_tokens + width * (up_to[index] - up_to[before]), [*widths, width]))
        best.append(min(options))
    return best[-1][1]


def batches_of(rows: Sequence[TokenRow], size: int, chance: random.Random | None, n_last: int = 0) -> list[TokenBatch]:
    """Batches of at most `size` rows of like length, shuffled by `chance`; without it, in order of length.

    What is left of a width's rows after whole batches joins the next width. `n_last` 0: as many as the longest answer
    has tokens.
    """
    widths = choose_widths([len(row.tokens) for row in rows])
    waiting = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    if n_last == 0:
        n_last = max(len(row.targets) for row in rows)
    batches: list[TokenBatch] = []
    pool: list[int] = []
    for width in widths:
        while waiting and len(rows[waiting[0]].tokens) <= width:
            pool.append(waiting.pop(0))
        if chance is not None:
            chance.shuffle(pool)
        n_rows = max(1, min(size, MAX_BATCH_TOKENS // width))
        whole = len(pool) if width == widths[-1] else len(pool) // n_rows * n_rows
        shape = BatchShape(n_rows, width, min(n_last, width))
        batches += [TokenBatch(shape, tuple(pool[start : start + n_rows])) for start in range(0, whole, n_rows)]
        pool = pool[whole:]
    if chance is not None:
        chance.shuffle(batches)
    return batches


def padded_targets(rows: Sequence[TokenRow], batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
    """Targets (rows, n_last) of a batch, at the ends of its rows, and their weights: 1, and 0 where there is none."""
    shape = batch.shape
    targets = np.full((shape.rows, shape.n_last), PADDING, np.int32)
    weights = np.zeros((shape.rows, shape.n_last), np.float32)
    for place, member in enumerate(batch.members):
        answer = rows[member].targets
        targets[place, -len(answer) :] = answer
        weights[place, -len(answer) :] = 1
    return targets, weights


def lengths_of(rows: Sequence[TokenRow], batch: TokenBatch) -> np.ndarray:
    """The length of each row of a batch; 0 for rows that are not used."""
    lengths = np.zeros(batch.shape.rows, np.int64)
    lengths[: len(batch.members)] = [len(rows[member].tokens) for member in batch.members]
    return lengths


def _check_apart(train: Sequence[ChatRecord], validation: Sequence[ChatRecord]) -> None:
    """Raise BadExamples for a validation example that is trained on: its score would say nothing."""
    trained = {record.prompt: record.line for record in train}
    for record in validation:
        if (line := trained.get(record.prompt)) is not None:
            raise BadExamples(
                f"line {record.line} of the validation examples has the prompt of line {line} of those to train on: "
                "remove one of them"
            )


@dataclass(frozen=True)
class LabelBranches:
    """The columns behind a prompt: `paths[i]` is the beginning of a label that ends with column i's token."""

    choices: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tasks: Tasks) -> "LabelBranches":
        """The branches of all labels of `tasks`."""
        begun = {choice[:depth] for choice in tasks.choices for depth in range(len(choice))}
        paths = tuple(sorted(begun - {()}, key=lambda path: (len(path), path)))
        return cls(tasks.choices, tasks.ends, paths)

    @property
    def n_last(self) -> int:
        """The columns that need logits: the prompt's last one, and all behind it."""
        return len(self.paths) + 1

    def row(self, prompt: tuple[int, ...]) -> TokenRow:
        """A prompt and its branches as one row."""
        return TokenRow(np.array([*prompt, *(path[-1] for path in self.paths)], np.int32), NO_TARGETS)

    def positions(self, width: int) -> np.ndarray:
        """The position of each column: a token's place in the text that it belongs to."""
        trunk = width - len(self.paths)
        return np.array([*range(trunk), *(trunk - 1 + len(path) for path in self.paths)])

    def structure(self, width: int) -> np.ndarray:
        """The columns (of the matrix) that each column (its row) sees."""
        trunk = width - len(self.paths)
        seen = np.zeros((width, width), bool)
        seen[:trunk, :trunk] = np.tri(trunk, dtype=bool)
        seen[trunk:, :trunk] = True
        for at, path in enumerate(self.paths):
            for other, begun in enumerate(self.paths):
                seen[trunk + at, trunk + other] = path[: len(begun)] == begun
        return seen

    def logprobs(self, prompt: tuple[int, ...], logits: np.ndarray) -> tuple[float, ...]:
        """The log-probability of each label; `logits` (n_last, n_vocab) are those of the row's last columns."""
        tree = ChoiceTree(ScoringPrompt(prompt, self.choices, self.ends))
        for path, row in zip(((), *self.paths), logits, strict=True):
            tree.read(path, row)
        return tree.logprobs()


def causal(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and structure of rows of plain text."""
    return np.arange(width), np.tri(width, dtype=bool)
