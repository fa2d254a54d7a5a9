"""`deskside eval --task` as a person runs it, against a stand-in server: what is asked, scored, kept and refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.cli import eval_command
from benchmarks.comparison.plan import EvalSettings, evaluation_task
from benchmarks.errors import BadWorkload
from benchmarks.load.servers import recipe_file
from models.errors import BadTask, ModelNotFound
from models.manifest import Artefact, Manifest, dump_manifest
from models.store.store import Store
from models.task.new import NewTask, make_task
from models.task.task import Task, open_task, text_of
from tests.support.benchmarks.stand_in import StandIn, running
from tests.support.models.gguf_heads import GEMMA, head
from tests.support.models.tasks import CLASSES, csv_file, rows

Invoke = Callable[..., Any]
TEMPLATE = {"tokenizer.chat_template": "{{ messages }}"}
EVAL = typer.Typer()
EVAL.command()(eval_command)


def label_of(prompt: str) -> str:
    """The right label of a text of `rows`."""
    return next(label for label, word in CLASSES.items() if word in prompt.rpartition("Text:\n")[2])


@pytest.fixture
def app() -> StandIn:
    return StandIn(label_of)


@pytest.fixture
def url(app: StandIn) -> Iterator[str]:
    with running(app) as address:
        yield address


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("DESKSIDE_HOSTED_KEY", raising=False)
    (tmp_path / "chat.gguf").write_bytes(head({**GEMMA, **TEMPLATE}))
    (tmp_path / "base.gguf").write_bytes(head(GEMMA))
    return tmp_path / "home"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_task(NewTask("parcels", csv_file(tmp_path, rows()), prompt="Sort: {input}")).task


@pytest.fixture
def records_task(tmp_path: Path) -> Callable[[list[str], dict[str, Any]], Task]:
    """Make a task of thirty texts with these answers in turn."""

    def made(answers: list[str], wanted: dict[str, Any]) -> Task:
        pairs = [(text, answers[i % len(answers)]) for i, (text, _) in enumerate(rows(30))]
        return make_task(NewTask("mine", csv_file(tmp_path, pairs, "mine.csv"), **wanted)).task

    return made


@pytest.fixture
def evaluate(url: str, tmp_path: Path) -> Invoke:
    def invoke(model: str, *more: str) -> Any:
        given = str(tmp_path / model) if model.endswith(".gguf") else model
        return CliRunner().invoke(EVAL, [given, "--url", url, *more], catch_exceptions=False)

    return invoke


def test_a_split_is_asked_with_its_prompt_and_scored_by_its_labels(evaluate: Invoke, app: StandIn, task: Task) -> None:
    for split in ("test", "validation"):
        app.bodies.clear()
        found = json.loads(evaluate("chat.gguf", "--task", "parcels", "--split", split, "--json").stdout)
        records = task.records(split)
        asked = sorted(body["messages"][-1]["content"] for body in app.bodies)
        assert asked == sorted(f"Sort: {text_of(one)}" for one in records)
        assert (found["correct"], found["accuracy"]["estimate"], found["macro_f1"]["estimate"]) == (len(records), 1, 1)
        assert found["macro_f1"].keys() == {"estimate", "low", "high"}
        assert [one["id"] for one in found["predictions"]] == [one.id for one in records]
        assert (found["source"]["task"], found["source"].get("split")) == ("parcels", split)
    shown = evaluate("chat.gguf", "--task", str(task.folder)).stdout
    assert "(parcels, test split): accuracy 1.000" in shown
    assert "macro-F1 1.000" in shown


def test_the_default_is_the_default_models_task(home: Path, tmp_path: Path) -> None:
    plan = evaluation_task(str(tmp_path / "chat.gguf"), EvalSettings(), Store(home))
    assert plan.asked is not None
    assert [one.text for one in plan.asked.examples] == [
        text_of(one) for one in open_task(str(recipe_file())).records("test")
    ]
    assert plan.examples == recipe_file("data", "test.jsonl.gz")
    assert plan.arm.chat


def test_shots_are_turns_for_a_chat_model_and_text_for_a_base(evaluate: Invoke, app: StandIn, task: Task) -> None:
    evaluate("chat.gguf", "--task", "parcels", "--shots", "3")
    roles = [message["role"] for message in app.bodies[-1]["messages"]]
    assert (app.paths[-1], roles) == ("/v1/chat/completions", ["system", *["user", "assistant"] * 3, "user"])
    app.answer = lambda prompt: f" {label_of(prompt.rpartition('Sort: ')[2])}"
    found = json.loads(evaluate("base.gguf", "--task", "parcels", "--shots", "3", "--json").stdout)
    assert (app.paths[-1], app.bodies[-1]["stop"]) == ("/v1/completions", "\n")
    assert app.bodies[-1]["prompt"].count("\nAnswer:") == 4
    assert found["accuracy"]["estimate"] == 1


def test_it_resumes_only_what_was_asked_alike(evaluate: Invoke, app: StandIn, task: Task, tmp_path: Path) -> None:
    out, n = tmp_path / "answers.json", len(task.records("test"))
    options = ("chat.gguf", "--task", "parcels", "--out", str(out))
    evaluate(*options)
    kept = json.loads(out.read_text())
    out.write_text(json.dumps(kept | {"predictions": kept["predictions"][:-2]}))
    evaluate(*options)
    assert len(app.bodies) == n + 2
    evaluate(*options, "--shots", "1")
    assert len(app.bodies) == 2 * n + 2


ANSWERS = [json.dumps({"kind": kind, "parts": parts}) for kind, parts in (("box", ["a", "b"]), ("bag", ["b"]))]


def test_an_extraction_is_requested_by_its_schema(
    evaluate: Invoke, app: StandIn, records_task: Callable[..., Task]
) -> None:
    task = records_task(ANSWERS, {"kind": "extract"})
    right = {text_of(one): one.answer for one in task.records("test")}
    app.answer = lambda prompt: right[prompt]
    found = json.loads(evaluate("chat.gguf", "--task", "mine", "--json").stdout)
    sent = {json.dumps(body["response_format"]) for body in app.bodies}
    assert [json.loads(one)["json_schema"]["schema"] for one in sent] == [task.spec.json_schema]
    assert {body["temperature"] for body in app.bodies} == {0}
    assert app.bodies[0]["max_tokens"] > max(map(len, ANSWERS))
    n = len(right)
    assert (found["n_valid"], found["correct"], found["field_f1"]["estimate"]) == (n, n, 1)
    app.answer = lambda prompt: "{" if prompt == next(iter(right)) else right[prompt]
    assert json.loads(evaluate("chat.gguf", "--task", "mine", "--json").stdout)["n_valid"] == n - 1
    shown = evaluate("chat.gguf", "--task", "mine").stdout
    assert f"valid {(n - 1) / n:.3f} [" in shown
    assert "field F1 " in shown


def test_texts_are_scored_by_rouge_l(evaluate: Invoke, app: StandIn, records_task: Callable[..., Task]) -> None:
    # Two answers that repeat: a task to write is never scored by labels.
    task = records_task(["mail client", "image editor"], {"kind": "write"})
    app.answer = lambda prompt: "mail client"
    found = json.loads(evaluate("chat.gguf", "--task", "mine", "--json").stdout)
    answers = [one.answer for one in task.records("test")]
    assert found["rouge_l"]["estimate"] == found["exact"]["estimate"] == answers.count("mail client") / len(answers)
    assert "ROUGE-L" in evaluate("chat.gguf", "--task", "mine").stdout


def test_a_model_that_only_the_server_knows_is_asked_by_its_name(
    evaluate: Invoke, app: StandIn, task: Task, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("DESKSIDE_HOSTED_KEY", "top-secret")
    found = json.loads(evaluate("big-1", "--task", "parcels", "--shots", "2", "--json").stdout)
    official = {"model", "messages", "temperature", "max_completion_tokens", "stream", "stream_options"}
    assert {name for body in app.bodies for name in body} == official
    assert app.bodies[0]["model"] == found["source"]["model"] == "big-1"
    assert app.headers[0][b"authorization"] == b"Bearer top-secret"
    with pytest.raises(ModelNotFound, match="big-1"):
        evaluation_task("big-1", EvalSettings(task="parcels"), Store(home))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"task": "parcel"}, BadTask, "there is no task 'parcel'; did you mean 'parcels'"),
        ({"task": "parcels", "examples": Path("x.jsonl")}, BadWorkload, "--task is of a task.*leave one of them out"),
        ({"split": "train", "examples": Path("x.jsonl")}, BadWorkload, "--split is of a task"),
        ({"shots": 2, "examples": Path("x.jsonl")}, BadWorkload, "--shots is of a task"),
        ({"task": "parcels", "shots": 2, "prompt": Path("x.txt")}, BadWorkload, "leave out --shots, or --prompt"),
        ({"task": "parcels", "shots": 60}, BadWorkload, "the train split of 'parcels' has"),
        ({"task": "parcels", "score_labels": True}, BadWorkload, "has a chat template: leave the option out"),
    ],
)
def test_what_cannot_work_is_refused_before_a_server_starts(
    task: Task, home: Path, tmp_path: Path, options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        evaluation_task(str(tmp_path / "chat.gguf"), EvalSettings(**options), Store(home))


def test_labels_are_scored_for_a_base_alone(task: Task, home: Path, tmp_path: Path) -> None:
    plan = evaluation_task(str(tmp_path / "base.gguf"), EvalSettings(task="parcels", score_labels=True), Store(home))
    assert plan.scoring == "labels scored"
    assert plan.read()[1] == task.spec.labels


def test_a_models_labels_are_those_of_the_task_unless_shots_show_others(task: Task, home: Path, tmp_path: Path) -> None:
    stored = tmp_path / "other"
    stored.mkdir()
    (tmp_path / "chat.gguf").rename(stored / "other.gguf")
    size = (stored / "other.gguf").stat().st_size
    artefact = Artefact(file="other.gguf", quantization="F16", size_bytes=size, sha256="0" * 64)
    manifest = Manifest(name="other", licence="none", task="classify", labels=("red", "blue"), artefacts=(artefact,))
    (stored / "model.toml").write_text(dump_manifest(manifest))
    with pytest.raises(BadWorkload, match="none of the 2 labels of 'other': give a --task or --examples"):
        evaluation_task(str(stored), EvalSettings(task="parcels"), Store(home))
    assert evaluation_task(str(stored), EvalSettings(task="parcels", shots=1), Store(home)).arm.chat
