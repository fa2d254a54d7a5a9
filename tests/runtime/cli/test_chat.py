"""The terminal chat, on the toy model: what is said, what is remembered, and how it ends."""

import asyncio
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import replace

import pytest

from models.manifest import Manifest
from runtime.cli import chat as chat_module
from runtime.cli.chat import Chat, Conversation, chat_with, greeting, talk
from runtime.cli.commands import ChatOptions
from runtime.config import RuntimeConfig
from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import ContextTooLong, TemplateFailed
from runtime.prompt.prompter import Prompter
from runtime.serving.model import ServedModel
from tests.support.runtime.engine_thread import supervise, supervising
from tests.support.runtime.fakes import FAKE_TEMPLATE, FakeLlama

SORTER = Manifest(name="sorter", description="Sorts mail.", task="classify", labels=("ham", "spam"), licence="none")


@contextmanager
def chatting(llama: FakeLlama, options: ChatOptions | None = None, manifest: Manifest | None = None) -> Iterator[Chat]:
    prompter = Prompter(llama.tokenizer, FAKE_TEMPLATE, llama.info.n_ctx)
    with supervising(Engine(llama, EngineOptions())) as supervisor:
        grammars = Grammars(llama.tokenizer)
        model = ServedModel("toy", manifest, supervisor, prompter, llama.tokenizer, llama.info, grammars)
        yield Chat(model, Conversation(manifest, options or ChatOptions()))


async def say(chat: Chat, text: str) -> str:
    return "".join([piece async for piece in chat.answer(text)])


def piped(monkeypatch: pytest.MonkeyPatch, chat: Chat, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with asyncio.Runner() as runner:
        talk(chat, runner)


def test_an_answer_comes_in_pieces_and_is_remembered() -> None:
    async def pieces(chat: Chat) -> list[str]:
        return [piece async for piece in chat.answer("hello")]

    with chatting(FakeLlama(script="Good day!"), ChatOptions(temperature=0)) as chat:
        answered = asyncio.run(pieces(chat))
        assert "".join(answered) == "Good day!"
        assert len(answered) > 1
        assert chat.conversation.messages("again") == [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "Good day!"},
            {"role": "user", "content": "again"},
        ]


def test_a_system_text_stands_first() -> None:
    conversation = Conversation(None, ChatOptions(system="Be brief."))
    assert conversation.messages("hi")[0] == {"role": "system", "content": "Be brief."}


def test_a_classifier_is_asked_its_way_greedily_and_without_history() -> None:
    manifest = SORTER.model_copy(update={"prompt": SORTER.prompt.model_copy(update={"template": "Mail: {text}"})})
    conversation = Conversation(manifest, ChatOptions())
    conversation.remember("a", "spam")
    assert conversation.messages("win {text} money") == [{"role": "user", "content": "Mail: win {text} money"}]
    assert conversation.body("a")["temperature"] == 0
    told = greeting("sorter", conversation)
    assert "Sorts mail." in told
    assert "ham, spam" in told


def test_a_seed_repeats_a_conversation() -> None:
    async def two(chat: Chat) -> list[str]:
        return [await say(chat, "one"), await say(chat, "two")]

    answers = []
    for _ in range(2):
        with chatting(FakeLlama(), ChatOptions(seed=7, max_tokens=8, temperature=1.5)) as chat:
            answers.append(asyncio.run(two(chat)))
    assert answers[0] == answers[1]


def test_old_exchanges_make_room_for_new_ones() -> None:
    async def many(chat: Chat) -> None:
        for number in range(9):
            assert await say(chat, f"message {number} " + "x" * 20) == "yes"

    with chatting(FakeLlama(n_ctx=160, script="yes"), ChatOptions(temperature=0, max_tokens=4)) as chat:
        asyncio.run(many(chat))
        assert 2 <= len(chat.conversation.turns) < 18
        with pytest.raises(ContextTooLong):
            asyncio.run(say(chat, "x" * 200))


def test_an_answer_that_is_left_is_cancelled_and_forgotten() -> None:
    async def leave(chat: Chat) -> None:
        async with aclosing(chat.answer("hello")) as pieces:
            async for _ in pieces:
                break
        await chat.model.supervisor.drain(30)

    with chatting(FakeLlama(script=lambda history: ord("a")), ChatOptions(temperature=0)) as chat:
        asyncio.run(leave(chat))
        assert chat.conversation.turns == []
        assert chat.model.supervisor.live == 0


def test_from_a_pipe_lines_become_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(FakeLlama(script="ham"), manifest=SORTER) as chat:
        piped(monkeypatch, chat, '\ufeff/reset\nfirst\n\n"""two\nlines"""\n/reset\nlast\n/exit\nnot reached\n')
    assert capsys.readouterr() == ("ham\nham\nham\n", "")


def test_from_a_pipe_a_wrong_message_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with chatting(FakeLlama(n_ctx=64), manifest=SORTER) as chat, pytest.raises(ContextTooLong):
        piped(monkeypatch, chat, "x" * 200)


class Terminal(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


def typing(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """`input` for someone who types these lines; an exception is a key: Ctrl-C or Ctrl-D."""
    typed = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    return read


def at_terminal(monkeypatch: pytest.MonkeyPatch, chat: Chat, lines: Sequence[str | type[BaseException]]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(chat_module, "input", typing(*lines), raising=False)
    with asyncio.Runner() as runner:
        talk(chat, runner)


def test_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(FakeLlama(n_ctx=200, script="yes"), ChatOptions(temperature=0)) as chat:
        at_terminal(monkeypatch, chat, ["one", KeyboardInterrupt, "/help", "x" * 400, "two", EOFError])
        assert [turn["content"] for turn in chat.conversation.turns] == ["one", "yes", "two", "yes"]
    out, err = capsys.readouterr()
    assert out == "yes\nyes\n"
    assert "Ctrl-D leaves" in err
    assert "/reset" in err
    assert "error: " in err


@pytest.mark.parametrize("template", [FAKE_TEMPLATE, None])
def test_the_command_opens_and_closes_the_model(
    template: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = FakeLlama(script="ham")
    supervisor = supervise(Engine(llama, EngineOptions()))
    supervisor.start()
    prompter = Prompter(llama.tokenizer, template, llama.info.n_ctx)
    grammars = Grammars(llama.tokenizer)
    served = ServedModel("sorter", SORTER, supervisor, prompter, llama.tokenizer, llama.info, grammars)
    monkeypatch.setattr(chat_module, "open_model", lambda name, config: served)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a mail\n"))
    with nullcontext() if template else pytest.raises(TemplateFailed):
        chat_with("sorter", RuntimeConfig(), ChatOptions())
    assert capsys.readouterr().out == ("ham\n" if template else "")
    assert supervisor.state == "stopped"
    assert llama.closed


def test_reset_forgets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(FakeLlama(script="yes"), ChatOptions(temperature=0)) as chat:
        at_terminal(monkeypatch, chat, ["one", "/reset", "/exit"])
        assert chat.conversation.turns == []


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal is a real one, sent while the model babbles."""
    spoken = itertools.count()

    def babble(history: tuple[int, ...]) -> int:
        if next(spoken) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return ord("a")

    with chatting(FakeLlama(n_ctx=4096, script=babble), ChatOptions(temperature=0)) as chat:
        at_terminal(monkeypatch, chat, ["one", EOFError])
        assert chat.conversation.turns == []
    out, err = capsys.readouterr()
    assert set(out) <= {"a", "\n"}
    assert "(stopped)" in err


def test_an_adapters_chat_asks_for_the_adapter() -> None:
    llama = FakeLlama(script="yes", adapters=("mail",))
    with chatting(llama) as chat:
        with_adapter = Chat(replace(chat.model, adapter="mail"), chat.conversation)
        assert asyncio.run(say(with_adapter, "hello")) == "yes"
    assert set(llama.applied) == {"mail"}
