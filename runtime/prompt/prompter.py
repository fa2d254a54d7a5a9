"""Messages → text → token ids: the model's chat template, in a sandbox, with the length checked before anything runs.

A user's text stays text. `<end_of_turn>` in a mail must not close the turn, so every piece of message text that the
tokenizer would read as a control token is replaced by a placeholder before the template sees it, and its tokens are put
in as plain text afterwards. Messages without such pieces, nearly all, are tokenised in one go. The text of
`/v1/completions` is different: the client writes the whole prompt, control tokens included.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal, NoReturn

from runtime.errors import ContextTooLong, InvalidRequest, TemplateFailed
from runtime.llama.interface import TokenizerLike

from .template import ChatTemplate

# Tokenising can take time quadratic in the text's length. A text with unusually many
# characters per cell of the context is first counted slice by slice, and refused as soon as it is clearly too long.
USUAL_CHARS_PER_TOKEN = 4
SLICE_CHARS = 4096


class Prompter:
    """Prompts for one model. Immutable: any thread may use it."""

    def __init__(self, tokenizer: TokenizerLike, template: str | None, n_ctx: int) -> None:
        """`template` is the model's Jinja chat template, if it has one. Raises TemplateFailed if it does not parse."""
        self._tokenizer = tokenizer
        self._n_ctx = n_ctx
        self._template = None if template is None else ChatTemplate(template)
        self._control_texts = re.compile(_any_of(tokenizer.special_texts) or "(?!)")

    @property
    def n_ctx(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self._n_ctx

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """The text of a conversation, as the model was trained to see it. `extra` are more template variables.

        Raises TemplateFailed, or InvalidRequest if the template refuses the messages.
        """
        guard = _Guard(self._control_texts)
        text = self._render(messages, guard, add_generation_prompt=add_generation_prompt, extra=extra or {})
        return "".join(piece for piece, _ in guard.split(text))

    @property
    def takes_tools(self) -> bool:
        """True if the chat template reads a list of tools."""
        return self._template is not None and "tools" in self._template.variables

    @property
    def template_text(self) -> str:
        """All text that the chat template may write by itself; empty without one."""
        return "" if self._template is None else self._template.written

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        param: str = "messages",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> tuple[int, ...]:
        """The token ids of a conversation up to the model's turn. Raises as `render`, or ContextTooLong.

        `tools` is OpenAI's list of what the model may call.
        """
        guard = _Guard(self._control_texts)
        extra = {"tools": guard.protect(tools)} if tools else {}
        pieces = guard.split(self._render(messages, guard, add_generation_prompt=True, extra=extra))
        return self._tokens(pieces, param=param)

    def text(self, text: str) -> tuple[int, ...]:
        """The token ids of a bare text; control tokens written in it are control tokens. Raises ContextTooLong."""
        return self._tokens([(text, True)], param="prompt")

    def literal(self, text: str, *, param: str) -> tuple[int, ...]:
        """The token ids of a bare text; control tokens written in it stay text. Raises ContextTooLong."""
        return self._tokens([(text, False)], param=param)

    def limit(self, prompt: Sequence[int], max_tokens: int | None, *, param: str) -> int:
        """The limit of an answer to `prompt` in tokens: `max_tokens`, or all that the context leaves if None.

        Raises ContextTooLong naming the numbers, with `param` for an answer that is too long.
        """
        room = self._n_ctx - len(prompt)
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if room < 1:
            self._too_long(f"the prompt has {len(prompt)} tokens", param="messages" if param != "prompt" else param)
        if max_tokens is not None and max_tokens > room:
            self._too_long(f"the prompt has {len(prompt)} tokens and {param} is {max_tokens}", param=param)
        return room if max_tokens is None else max_tokens

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        guard: "_Guard",
        *,
        add_generation_prompt: bool,
        extra: Mapping[str, object],
    ) -> str:
        if self._template is None:
            raise TemplateFailed("the model has no chat template; send a text to /v1/completions instead")
        variables = {
            **extra,
            "messages": [_plain_message(guard.protect(message), place) for place, message in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._spelled(self._tokenizer.bos),
            "eos_token": self._spelled(self._tokenizer.eos),
        }
        return self._template.render(variables)

    def _tokens(self, pieces: Sequence[tuple[str, bool]], *, param: str) -> tuple[int, ...]:
        if sum(len(text) for text, _ in pieces) > USUAL_CHARS_PER_TOKEN * self._n_ctx:
            self._refuse_far_too_long(pieces, param=param)
        tokens = self._encode(pieces)
        bos = self._tokenizer.bos
        if bos is not None and self._tokenizer.adds_bos and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tuple(tokens)

    def _refuse_far_too_long(self, pieces: Sequence[tuple[str, bool]], *, param: str) -> None:
        n_tokens = 0
        for text, special in pieces:
            for start in range(0, len(text), SLICE_CHARS):
                n_tokens += len(self._encode([(text[start : start + SLICE_CHARS], special)]))
                # Twice the context: cuts between slices add tokens.
                if n_tokens > 2 * self._n_ctx:
                    self._too_long(f"the prompt has more than {n_tokens} tokens", param=param)

    def _encode(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        encode = self._tokenizer.encode
        encoded = (encode(text, add_special=False, parse_special=special) for text, special in pieces)
        return list(chain.from_iterable(encoded))

    def _spelled(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.token_bytes(token, special=True).decode(errors="replace")

    def _too_long(self, what: str, *, param: str) -> NoReturn:
        raise ContextTooLong(too_long(what, self._n_ctx), param=param, code="context_length_exceeded")


def too_long(what: str, n_ctx: int) -> str:
    """The message of a ContextTooLong. Clients know the error by OpenAI's own words, which come first."""
    return (
        f"This model's maximum context length is {n_ctx} tokens. However, {what}. Send less, or ask for fewer tokens."
    )


class _Guard:
    """Hides the control-token texts of one conversation from the template, behind placeholders."""

    def __init__(self, control_texts: re.Pattern[str]) -> None:
        self._control_texts = control_texts
        # Private-use characters and digits pass through a template's filters; the number cannot be guessed.
        self._nonce = f"\ue000{secrets.randbelow(10**18):018d}"
        self._hidden: list[str] = []

    def protect(self, value: object) -> object:
        """`value` with control-token texts replaced in every string of it, names of fields too, however deep."""
        if isinstance(value, str):
            return self._control_texts.sub(self._hide, value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The pieces of a rendered text in order; True for those with control tokens of the template's own."""
        pieces = re.split(f"{self._nonce}:([0-9]+)\ue001", text) if self._hidden else [text]
        return [
            (self._hidden[int(piece)], False) if place % 2 else (piece, True)
            for place, piece in enumerate(pieces)
            if piece
        ]

    def _hide(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"{self._nonce}:{len(self._hidden) - 1}\ue001"


def _plain_message(message: object, place: int) -> object:
    """The message with its text parts joined, since many templates know strings only."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidRequest(
                f"content part {kind!r} is not supported: text only", param=f"messages[{place}].content"
            )
    return {**message, "content": "".join(part["text"] for part in content)}


def _any_of(texts: Iterable[str]) -> str:
    """A pattern that matches the longest of `texts`, by a tree: an alternation of thousands is slow on hostile text."""
    branches: dict[str, list[str]] = {}
    for text in texts:
        branches.setdefault(text[:1], []).append(text[1:])
    ends = branches.pop("", None) is not None
    if not branches:
        return ""
    tree = "|".join(re.escape(head) + _any_of(tails) for head, tails in branches.items())
    return f"(?:{tree})?" if ends else f"(?:{tree})" if len(branches) > 1 else tree


# The end of a base model's prompt.
ANSWER_MARK = "\nAnswer:"

_TASKS = {
    "predicate": "Statement: {instructions}\nIs the statement true of the text above? Answer yes or no.",
    "choice": "Task: {instructions}\nChoices:\n{options}\nAnswer with one of the choices, exactly as it is written.",
    "score": "Task: {instructions}\nLevels, from the lowest to the highest:\n{options}\n"
    "Answer with one of the levels, exactly as it is written.",
}


def input_text(messages: Sequence[tuple[str, str]]) -> str:
    """(role, text) pairs as one text: a single message unchanged, a conversation with the roles."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in messages)


def question_text(
    kind: Literal["predicate", "choice", "score"],
    about: str,
    instructions: str,
    options: Sequence[tuple[str, str | None]],
) -> str:
    """The user's message that asks about the text `about`; `options` are (text, description)."""
    listed = "\n".join(f"- {text}: {description}" if description else f"- {text}" for text, description in options)
    before, marker, after = _TASKS[kind].partition("{options}")
    return f"{about}\n\n{before.replace('{instructions}', instructions)}{listed if marker else ''}{after}"
