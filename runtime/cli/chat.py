"""A chat in the terminal: one conversation, by the same calls that answer `/v1/chat/completions`.

On a terminal it prompts, streams, and lets Ctrl-C stop an answer; from a pipe it reads one message per line and writes
one answer per line, for use in shell scripts.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from models.manifest import Manifest, Prompt
from runtime.config import RuntimeConfig
from runtime.errors import ContextTooLong, RequestError
from runtime.openai.chat import MAX_MESSAGES
from runtime.requests import Failed, TextDelta
from runtime.serving.call import Call
from runtime.serving.chat import prepare_chat
from runtime.serving.model import ServedModel, open_model

from .commands import ChatOptions

LABEL_TOKENS = 32
HELP = (
    '/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, """ opens and closes many lines'
)


@dataclass
class Conversation:
    """The exchanges so far, in the model's format. A classifier labels each text independently, so it keeps none."""

    manifest: Manifest | None
    options: ChatOptions
    turns: list[dict[str, str]] = field(default_factory=list)
    asked: int = 0

    @property
    def classifies(self) -> bool:
        """True if the model answers with one of its labels."""
        return self.manifest is not None and self.manifest.task == "classify"

    def messages(self, text: str) -> list[dict[str, str]]:
        """The messages of the next request."""
        system = [("system", self.options.system)] if self.options.system else []
        turns = [(turn["role"], turn["content"]) for turn in self.turns]
        prompt = self.manifest.prompt if self.manifest else Prompt()
        return prompt.messages([*system, *turns, ("user", text)])

    def remember(self, text: str, answer: str) -> None:
        """Append an exchange, unless the model is a classifier."""
        if not self.classifies:
            asked = self.messages(text)[-1]
            self.turns += [asked, {"role": "assistant", "content": answer}]
            if len(self.turns) > MAX_MESSAGES - 2:
                self.forget_oldest()

    def forget_oldest(self) -> bool:
        """Drop the oldest exchange; False if there is none."""
        dropped = bool(self.turns)
        del self.turns[:2]
        return dropped

    def body(self, text: str) -> dict[str, Any]:
        """The next request, as a body of `/v1/chat/completions`: greedy and short for a label.

        A given seed counts up from answer to answer, so that a conversation can be repeated.
        """
        given, seed = self.options.temperature, self.options.seed
        return {
            "messages": self.messages(text),
            "max_tokens": self.options.max_tokens or (LABEL_TOKENS if self.classifies else None),
            "temperature": given if given is not None else 0.0 if self.classifies else 0.8,
            "top_p": self.options.top_p,
            "seed": None if seed is None else (seed + self.asked) % (1 << 63),
            "stream": True,
        }


class Chat:
    """One conversation with one model."""

    def __init__(self, model: ServedModel, conversation: Conversation) -> None:
        self.model = model
        self.conversation = conversation

    async def answer(self, text: str) -> AsyncGenerator[str, None]:
        """Stream the answer to `text`; remember it once it is complete. Closing the generator cancels it.

        Raises RequestError or EngineError. Drops the oldest exchanges while the context is too small.
        """
        stream = self.model.supervisor.submit(*self._call(text).work)
        pieces: list[str] = []
        try:
            async for event in stream:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, TextDelta) and event.text:
                    pieces.append(event.text)
                    yield event.text
        finally:
            stream.cancel()
        self.conversation.remember(text, "".join(pieces))

    def _call(self, text: str) -> Call:
        turns = list(self.conversation.turns)
        while True:
            try:
                call = prepare_chat(self.conversation.body(text), self.model)
            except ContextTooLong as error:
                if self.conversation.forget_oldest():
                    continue
                self.conversation.turns = turns  # the text alone is too long: keep the conversation
                raise ContextTooLong(str(error).replace("max_tokens", "--max-tokens"), code=error.code) from None
            self.conversation.asked += 1
            return call


def chat_with(model: str, config: RuntimeConfig, options: ChatOptions) -> None:
    """Load a model and talk to it until the input ends. Raises ModelNotFound, LoadFailed, RequestError, EngineError."""
    served = open_model(model, config)
    try:
        conversation = Conversation(served.manifest, options)
        served.prompter.chat(conversation.messages("?"))  # a model without a template fails before the first prompt
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  (gives `input` line editing)
            print(greeting(served.name, conversation), file=sys.stderr)
        with asyncio.Runner() as runner:
            talk(Chat(served, conversation), runner)
    finally:
        served.supervisor.stop()


def greeting(name: str, conversation: Conversation) -> str:
    """The model's purpose and the chat's commands."""
    manifest = conversation.manifest
    about = f"{name}: {manifest.description}" if manifest and manifest.description else name
    if manifest and conversation.classifies:
        about += f"\nIt answers each text independently with one of: {', '.join(manifest.labels)}."
    return f"{about}\n{HELP}"


def talk(chat: Chat, runner: asyncio.Runner) -> None:
    """Read messages and write answers until the input ends. Ctrl-C stops an answer on a terminal, all from a pipe."""
    interactive = sys.stdin.isatty()
    while (text := _next_message(interactive)) is not None:
        if text == "/exit":
            return
        if text == "/reset":
            chat.conversation.turns.clear()
        elif text.startswith("/") and interactive and "\n" not in text:
            print(HELP, file=sys.stderr)
        elif text:
            _say(chat, text, runner, interactive)


def _say(chat: Chat, text: str, runner: asyncio.Runner, interactive: bool) -> None:
    try:
        runner.run(_write_answer(chat, text))
    except KeyboardInterrupt:
        if not interactive:
            raise
        print("\n(stopped)", file=sys.stderr)
    except RequestError as error:
        if not interactive:
            raise
        print(f"error: {error}", file=sys.stderr)


async def _write_answer(chat: Chat, text: str) -> None:
    async with aclosing(chat.answer(text)) as pieces:
        async for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)


def _next_message(interactive: bool) -> str | None:
    """Read the next message, stripped; None at the end of the input."""
    try:
        line = _read_line("> " if interactive else "")
        if not line.startswith('"""'):
            return line.strip()
        lines = [line.removeprefix('"""')]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(_read_line(". " if interactive else ""))
        return "\n".join(lines).rstrip().removesuffix('"""').strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        print("\n(Ctrl-D leaves)", file=sys.stderr)
        return ""


def _read_line(prompt: str) -> str:
    if prompt and not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt).removeprefix("\ufeff")  # a piped file may begin with a byte order mark
