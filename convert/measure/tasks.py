"""Examples as token ids: prompts, expected answers, and the labels to choose from.

The reference's tokenizer and chat template make the tokens once, for every file with the same vocabulary, so that a
base without a template gets the prompts of its fine-tune. They are the tokens of serving: the runtime renders the
prompt, and labels are tokenised as in `/v1/decisions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convert.tokenizer.chat_template import END_OF_TURN_FIELD, TEMPLATE_FIELD
from models.common.chat_records import ChatRecord
from models.errors import BadExamples
from models.gguf.header import read_meta
from models.manifest import BARE_PROMPT, Prompt
from models.quality import TaskKind
from runtime.errors import ContextTooLong, RequestError
from runtime.llama.interface import TokenizerLike
from runtime.llama.model import load_tokenizer
from runtime.prompt.cut import spoken
from runtime.prompt.prompter import ANSWER_MARK, Prompter, input_text

from .examples import MIN_EXAMPLES, messages_of

# Longer examples are left out: they would need a KV cache of gigabytes beside the weights.
MAX_TOKENS = 4096
# A written answer is decoded up to here: if two models have not diverged by then, they rarely do.
MAX_WRITTEN = 128


@dataclass(frozen=True, slots=True)
class EvalTask:
    """One example. `answer` ends with an end-of-turn token; `expected` is its text."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    expected: str

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer as one sequence."""
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True)
class Tasks:
    """All tasks for models with a vocabulary of `n_vocab` tokens.

    To classify, `choices` are the tokens of `labels`, in their order; to write, both are empty, and an answer is
    decoded for at most `max_written` tokens. Any of `ends` ends an answer. `n_too_long` examples were left out.
    """

    work: TaskKind
    tasks: tuple[EvalTask, ...]
    labels: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    n_vocab: int
    n_too_long: int = 0
    max_written: int = MAX_WRITTEN

    def room(self, task: EvalTask) -> int:
        """The most KV cells that `task` takes: its prompt and the longest possible answer."""
        written = self.max_written if self.work == "write" else 0
        return len(task.prompt) + max([len(task.answer), written, *map(len, self.choices)])


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The form of a prompt: chat template, end-of-turn token, and the manifest's prompt."""

    chat_template: str | None
    end_of_turn: int | None
    prompt: Prompt = BARE_PROMPT


def tasks_of(
    gguf: Path,
    records: Sequence[ChatRecord],
    work: TaskKind,
    labels: Sequence[str] = (),
    prompt: Prompt = BARE_PROMPT,
    end_of_turn: int | None = None,
) -> Tasks:
    """The tasks for the model at `gguf`, with the chat template and end-of-turn token of its metadata.

    `end_of_turn` overrules the latter. Raises BadExamples as `make_tasks`, LoadFailed, BadGguf, TemplateFailed.
    """
    meta = read_meta(gguf)
    tokenizer = load_tokenizer(gguf)
    if end_of_turn is None:
        stated = meta.values.get(END_OF_TURN_FIELD)
        end_of_turn = stated if isinstance(stated, int) else tokenizer.eos
    context = meta.number(f"{meta.architecture}.context_length")
    asking = PromptFormat(meta.text(TEMPLATE_FIELD) or None, end_of_turn, prompt)
    return make_tasks(tokenizer, asking, records, work, labels, min(MAX_TOKENS, context or MAX_TOKENS))


def make_tasks(
    tokenizer: TokenizerLike,
    asking: PromptFormat,
    records: Sequence[ChatRecord],
    work: TaskKind,
    labels: Sequence[str],
    max_tokens: int,
) -> Tasks:
    """Tokenise `records`; leave out and count those that need more than `max_tokens`.

    Raises BadExamples when the template refuses a record, when two labels are the same tokens, or when fewer than half
    of MIN_EXAMPLES remain.
    """
    speller = _TaskTokenizer(tokenizer, asking, max_tokens)
    choices = tuple(map(speller.choice, labels)) if work == "classify" else ()
    if len(set(choices)) < len(choices) or () in choices:
        raise BadExamples(f"two of the labels {list(labels)!r} are the same tokens to this model, or one is none")
    named = tuple(labels) if work == "classify" else ()
    asked = Tasks(work, (), named, choices, speller.ends, tokenizer.n_vocab)
    spelled = (
        EvalTask(record.id, speller.prompt(record), speller.answer(record.answer), record.answer) for record in records
    )
    tasks = tuple(task for task in spelled if task.prompt and asked.room(task) <= max_tokens)
    n_too_long = len(records) - len(tasks)
    if len(tasks) < MIN_EXAMPLES // 2:
        raise BadExamples(
            f"{n_too_long} of {len(records)} held-out examples need more than {max_tokens} tokens; {len(tasks)} are "
            f"left, at least {MIN_EXAMPLES // 2} are needed"
        )
    return replace(asked, tasks=tasks, n_too_long=n_too_long)


class _TaskTokenizer:
    """Tokenises prompts and answers for one model."""

    def __init__(self, tokenizer: TokenizerLike, asking: PromptFormat, max_tokens: int) -> None:
        self._tokenizer, self._encode = tokenizer, tokenizer.encode
        self._asking = asking
        self._prompter = Prompter(tokenizer, asking.chat_template, max_tokens)
        self._chats = asking.chat_template is not None and bool(tokenizer.end_tokens)
        # A text-only model has learnt no end-of-turn token: a new line ends its answer, too.
        new_line = () if self._chats else tuple(self._encode("\n", add_special=False, parse_special=False)[-1:])
        self.ends: tuple[int, ...] = (*tokenizer.end_tokens, *new_line)
        end = asking.end_of_turn if asking.end_of_turn in self.ends else next(iter(self.ends), None)
        self._end: tuple[int, ...] = () if end is None else new_line or (end,)

    def prompt(self, record: ChatRecord) -> tuple[int, ...]:
        """The prompt's tokens; empty if there are too many."""
        try:
            return self._prompt(record)
        except ContextTooLong:
            return ()
        except RequestError as error:
            raise BadExamples(f"line {record.line}: {error}") from error

    def _prompt(self, record: ChatRecord) -> tuple[int, ...]:
        said = messages_of(record, self._asking.prompt, self._tokenizer)
        if self._chats:
            return self._prompter.chat(said)
        text = input_text(spoken(said))
        return self._prompter.literal(text + ANSWER_MARK, param="messages")

    def choice(self, text: str) -> tuple[int, ...]:
        """The tokens of an answer without its end token."""
        return tuple(self._encode(text if self._chats else f" {text}", add_special=False, parse_special=False))

    def answer(self, text: str) -> tuple[int, ...]:
        """The tokens of an answer with its end token."""
        return self.choice(text) + self._end
