"""A newcomer's journey by the commands as they are typed: a table, a task, a check, a training, a server, an answer.

`mails.csv` was written for this test, by a rule, and is under the project's licence: a byte-order mark, semicolons,
line breaks inside quotes, names with accents. The base is tiny; the training is the real one, and is killed once.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from models.task.task import open_task
from tests.support.convert.tiny_reader import write_reader

pytestmark = pytest.mark.finetune
ROOT = Path(__file__).parents[2]
MAILS = Path(__file__).with_name("mails.csv")
TOPICS = {
    "account": "login password username locked code",
    "billing": "invoice invoices refund bank payment charged fee discount paid reminder card",
    "delivery": "parcel courier shipment ship box transit arrived damaged delivered",
}
EASY = {
    "account": "Hello, please reset the password. The login says that the username is locked.",
    "billing": "Hello, the invoice shows a fee that we paid. Please refund the payment to our bank.",
    "delivery": "Hello, the courier left the parcel in the rain, and the box was damaged.",
}
TRAINING = ["--batch", "4", "--learning-rate", "0.005", "--rank", "8", "--alpha", "16"]
ADDRESS = re.compile(r"loaded in [\d.]+ s: (http://127\.0\.0\.1:\d+/v1)")


class Shell:
    """Commands in a home of their own."""

    def __init__(self, folder: Path) -> None:
        self.home, self.base = folder / "home", folder / "base.gguf"
        words = sorted(set(re.findall(r"[A-Za-z]{2,}", MAILS.read_text(encoding="utf-8-sig"))))
        write_reader(self.base, words, [[label, *topic.split()] for label, topic in TOPICS.items()])

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command."""
        environment = {**os.environ, "DESKSIDE_HOME": str(self.home), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        return subprocess.Popen(
            [sys.executable, "-m", "runtime.cli.main", *arguments],
            env=environment,
            text=True,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str) -> tuple[str, str]:
        """Run a command that must succeed; returns what it says on stdout and stderr."""
        with self.start(*arguments) as process:
            out, err = process.communicate()
        assert process.returncode == 0, err
        return out, err

    @contextmanager
    def serve(self, name: str) -> Iterator[openai.OpenAI]:
        """A client of `deskside serve NAME`, which is stopped at the end."""
        with self.start("serve", name, "--port", "0") as server:
            assert server.stderr is not None
            try:
                said = ""
                while (found := ADDRESS.search(said)) is None:
                    line = server.stderr.readline()
                    assert line, f"deskside serve ended early and said: {said}"
                    said += line
                with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0) as client:
                    yield client
            finally:
                server.terminate()
                server.communicate()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    pytest.importorskip("jax", reason="needs the extra `finetune`")
    return Shell(tmp_path_factory.mktemp("journey"))


def ask(client: openai.OpenAI, model: str, text: str, **fields: Any) -> str:
    said = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], temperature=0, **fields
    )
    return said.choices[0].message.content or ""


def test_from_a_table_to_an_answer(shell: Shell) -> None:
    out, err = shell.run("task", "new", "mails", str(MAILS))
    for said in ("UTF-8 with BOM", "separator ';'", "'mail'", "'team'", "account, billing, delivery", "72 train"):
        assert said in out
    assert "next: deskside task check mails" in err
    out, _ = shell.run("task", "check", "mails")
    assert "0 must be mended" in out

    command = [
        "finetune",
        "mails",
        "--base",
        str(shell.base),
        "--layers",
        "2",
        "--epochs",
        "8",
        "--patience",
        "8",
        *TRAINING,
    ]
    with shell.start(*command) as killed:
        assert killed.stderr is not None
        assert any(line.strip().startswith("epoch 1:") for line in killed.stderr)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not list((shell.home / "models").glob("mails")), "nothing is installed"
    out, err = shell.run(*command)
    resumed = re.search(r"resumed at step (\d+) of 144", err)
    assert resumed is not None
    assert 18 <= int(resumed[1]) < 144
    assert "epoch 1:" not in err
    assert "next: deskside serve mails" in err
    assert out.startswith("mails\t")

    with shell.serve("mails") as client:
        assert [model.id for model in client.models.list()] == ["mails"]
        for label, text in EASY.items():
            assert ask(client, "mails", text, max_tokens=12).strip() == label


def schema_of(home: Path, name: str) -> Mapping[str, Any]:
    spec = json.loads(json.dumps(open_task(str(home / "tasks" / name)).spec.json_schema))
    assert isinstance(spec, dict)
    return spec


def test_from_json_fields_to_an_answer_of_their_schema(shell: Shell, tmp_path: Path) -> None:
    with MAILS.open(encoding="utf-8-sig", newline="") as stream:
        mails = list(csv.DictReader(stream, delimiter=";"))
    fields = [{"team": one["team"], "tags": [one["team"], "quoted"][: 1 + ('"' in one["mail"])]} for one in mails]
    rows = [{"mail": one["mail"], "fields": given} for one, given in zip(mails, fields, strict=True)]
    file = tmp_path / "fields.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out, _ = shell.run("task", "new", "fields", str(file), "--kind", "extract")
    assert "JSON without white space" in out
    shell.run("finetune", "fields", "--base", str(shell.base), "--epochs", "1", "--layers", "1", *TRAINING)
    schema = schema_of(shell.home, "fields")
    asked = {"type": "json_schema", "json_schema": {"name": "fields", "strict": True, "schema": schema}}
    with shell.serve("fields") as client:
        answer = ask(client, "fields", mails[0]["mail"], response_format=asked, max_tokens=100)
    value = json.loads(answer)
    jsonschema.validate(value, schema)
    assert answer == json.dumps(value, separators=(",", ":")), "as the examples are written"
    assert list(value) == ["team", "tags"]
