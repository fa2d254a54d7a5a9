"""`deskside serve` as a user runs it: the installed model in a process of its own, real clients, real signals."""

import gzip
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from models.store.store import StoredModel
from tests.support.runtime.serving import wait_until

pytestmark = pytest.mark.model

CHAT = "/v1/chat/completions"
TEST_SPLIT = Path(__file__).parents[2] / "models" / "email_triage" / "data" / "test.jsonl.gz"
GREETING = re.compile(
    r"deskside: (?P<name>\S+) \((?P<quantization>\S+), \d+ MiB\) on (?P<backend>.+), \d+ threads, "
    r"(?P<slots>\d+) slots, context (?P<context>\d+), loaded in [\d.]+ s: (?P<url>http://127\.0\.0\.1:\d+)/v1"
)


@dataclass
class Server:
    """A `deskside serve` that was started here."""

    process: subprocess.Popen[str]
    greeting: dict[str, str]
    http: httpx.Client

    def accepted(self) -> int:
        """Answers that have not ended."""
        count: int = self.http.get("/health").json()["accepted"]
        return count


@contextmanager
def serve(model: StoredModel, *flags: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "runtime.cli.main", "serve", str(model.folder), "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = ""
            while (match := GREETING.search(said)) is None:
                line = process.stderr.readline()
                assert line, f"deskside serve ended early and said: {said}"
                said += line
            with httpx.Client(base_url=match["url"], timeout=60) as http:
                yield Server(process, match.groupdict(), http)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(email_triage: StoredModel) -> Iterator[Server]:
    with serve(email_triage, "--slots", "4") as running:
        yield running


def mails(count: int) -> list[list[dict[str, str]]]:
    with gzip.open(TEST_SPLIT, "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["messages"] for _ in range(count)]


def endless(tokens: int, **fields: Any) -> dict[str, Any]:
    """A request whose answer takes a while."""
    return {"messages": mails(1)[0][:1], "max_tokens": tokens, "ignore_eos": True, "stream": True, **fields}


def test_the_start_up_line_says_what_runs_and_where(server: Server, email_triage: StoredModel) -> None:
    assert email_triage.manifest is not None
    greeting = server.greeting
    assert greeting["name"] == "email-triage"
    assert greeting["quantization"] == email_triage.manifest.artefacts[0].quantization
    assert (greeting["slots"], greeting["context"]) == ("4", "8192")


def test_the_official_client_gets_a_label_for_each_mail(server: Server, email_triage: StoredModel) -> None:
    assert email_triage.manifest is not None
    with openai.OpenAI(base_url=f"{server.greeting['url']}/v1", api_key="none", max_retries=0) as client:

        def label(mail: list[dict[str, str]]) -> str | None:
            question: Any = mail[:1]
            answer = client.chat.completions.create(
                model="email-triage", messages=question, temperature=0, max_tokens=16
            )
            assert answer.choices[0].finish_reason == "stop"
            return answer.choices[0].message.content

        asked = mails(8)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(label, asked))
    assert set(answers) <= set(email_triage.manifest.labels)
    right = sum(answer == mail[1]["content"] for answer, mail in zip(answers, asked, strict=True))
    assert right >= 4, f"{right} of {len(asked)} right: the model does not do what it was trained for"


def test_what_the_cut_vocabulary_has_no_token_for_is_read_and_written_in_bytes(server: Server) -> None:
    text = "na\u00efve \u65e5\u672c\u8a9e, \U0001f9d1\u200d\U0001f680 \u20ac 12"
    tokens = server.http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert len(tokens) > len(text), "some of it is in no train mail"
    assert server.http.post("/detokenize", json={"tokens": tokens}).json()["content"] == text
    pattern = "\u65e5\u672c (\U0001f680|\u00f1and\u00fa) \u20ac[0-9]{2}"
    body = {"messages": mails(1)[0][:1], "temperature": 0, "max_tokens": 64, "regex": pattern}
    written = server.http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert re.fullmatch(pattern, written)


def test_a_second_look_at_the_same_mail_is_cached(server: Server) -> None:
    body = endless(2, stream=False, temperature=0)
    first, second = (server.http.post(CHAT, json=body).json() for _ in range(2))
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 2
    assert first["choices"] == second["choices"]


def test_a_client_killed_in_mid_stream_frees_its_slots(server: Server) -> None:
    read_one = "import json, sys, httpx\nbody = json.loads(sys.argv[2])\n"
    read_one += "with httpx.stream('POST', sys.argv[1], json=body, timeout=60) as r:\n"
    read_one += "    for line in r.iter_lines(): print(line, flush=True)\n"
    body = json.dumps(endless(1500, n=4))
    with subprocess.Popen(
        [sys.executable, "-c", read_one, server.greeting["url"] + CHAT, body], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith("data: ")
        assert server.accepted() == 4
        client.kill()
    wait_until(lambda: server.accepted() == 0)
    written = re.search(r"^deskside_generated_tokens_total\S* (\S+)", server.http.get("/metrics").text, re.MULTILINE)
    assert written is not None
    assert float(written[1]) < 4 * 1500


def test_sigterm_finishes_what_was_accepted_and_then_leaves(email_triage: StoredModel) -> None:
    with serve(email_triage, "--slots", "2", "--drain-seconds", "300") as server:
        with server.http.stream("POST", CHAT, json=endless(80)) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=server.greeting["url"], timeout=60) as other:
                wait_until(lambda: other.get("/health").status_code == 503)
                refused = other.post(CHAT, json=endless(5))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_it_at_once(email_triage: StoredModel) -> None:
    with serve(email_triage, "--slots", "2") as server, server.http.stream("POST", CHAT, json=endless(2000)) as stream:
        lines = stream.iter_lines()  # held: without it the connection is closed, and there is nothing to drain
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGINT)
        with httpx.Client(base_url=server.greeting["url"], timeout=60) as other:
            wait_until(lambda: other.get("/health").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 130
