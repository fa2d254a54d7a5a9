"""`deskside compare` as a person runs it, against a stand-in server that is made so that the right ranking is known."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.cli import compare_command
from benchmarks.errors import BadWorkload, ServerFailed
from benchmarks.ways.asking import MAX_TRIES, AskingRules, ask
from benchmarks.ways.counted import Voters
from benchmarks.ways.plan import MIXED, OF_BASE, WAYS, CompareSettings, compare_plan
from benchmarks.ways.questions import base_way, retrieved_way
from benchmarks.ways.record import WayAnswer, load_comparison
from models.errors import ModelNotFound
from models.manifest import Artefact, Manifest, dump_manifest
from models.store.store import Store
from models.task.new import NewTask, make_task
from models.task.task import Task, WorkKind, text_of
from tests.support.benchmarks.stand_in import StandIn, running
from tests.support.models.gguf_heads import GEMMA, head
from tests.support.models.tasks import CLASSES, csv_file, rows

Invoke = Callable[..., Any]
LABELS = tuple(CLASSES)
TEMPLATE = {"tokenizer.chat_template": "{{ messages }}"}
COMPARE = typer.Typer()
COMPARE.command()(compare_command)


def label_of(prompt: str) -> str:
    """The right label of the last text of a prompt."""
    last = prompt.rpartition("Sort: ")[2]
    return next(label for label, word in CLASSES.items() if word in last)


@pytest.fixture
def app() -> StandIn:
    """A base that always says the first label, and a fine-tune that is always right."""
    made = StandIn(lambda prompt: f" {LABELS[0]}\n")
    made.chances = lambda prompt: {label: 0.8 if label == label_of(prompt) else 0.1 for label in LABELS}
    return made


@pytest.fixture
def url(app: StandIn) -> Iterator[str]:
    with running(app) as address:
        yield address


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("DESKSIDE_HOSTED_KEY", raising=False)
    (tmp_path / "base.gguf").write_bytes(head(GEMMA))
    folder = tmp_path / "home" / "models" / "parcels"
    folder.mkdir(parents=True)
    (folder / "parcels.gguf").write_bytes(head({**GEMMA, **TEMPLATE}))
    size = (folder / "parcels.gguf").stat().st_size
    artefact = Artefact(file="parcels.gguf", quantization="F16", size_bytes=size, sha256="0" * 64)
    made = Manifest(name="parcels", licence="none", task="classify", labels=LABELS, artefacts=(artefact,))
    (folder / "model.toml").write_text(dump_manifest(made))
    return tmp_path / "home"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_task(NewTask("parcels", csv_file(tmp_path, rows(90)), prompt="Sort: {input}")).task


@pytest.fixture
def compare(url: str, tmp_path: Path) -> Invoke:
    common = ["--base", str(tmp_path / "base.gguf"), "--local-url", url, "--out", str(tmp_path / "run.json")]

    def invoke(*more: str, name: str = "parcels") -> Any:
        return CliRunner().invoke(COMPARE, [name, *common, *more], catch_exceptions=False)

    return invoke


def test_every_way_is_asked_judged_and_shown(compare: Invoke, app: StandIn, task: Task, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    result = compare("--markdown", str(page), "--curve")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    made = load_comparison(tmp_path / "run.json")
    assert made.judgement is not None
    scores = {way["name"]: way["measures"][0]["value"]["estimate"] for way in made.judgement["ways"]}
    share = sum(one.answer == LABELS[0] for one in task.records("test")) / len(task.records("test"))
    assert scores == {
        "words": 1, "vote": scores["vote"], "fine-tune": 1, MIXED: 1,
        "majority": scores["majority"], **dict.fromkeys(OF_BASE, share),
    }  # fmt: skip
    assert scores["majority"] < 0.6 < scores["vote"]
    assert {way.name for way in made.ways if way.skipped} == {"nearest", "hosted"}
    assert made.judgement["twice"]["n_changed"] == 0
    for way in made.ways:
        if way.name in {"fine-tune", *OF_BASE}:
            assert [one.id for one in way.answers["test"]] == [one.id for one in task.records("test")]
            assert all(one.took_s and one.prompt_tokens for one in way.answers["test"])
    for said in ("is best, accuracy 1.000", "A/A: fine-tune asked twice, 0 of", "not measured: hosted: no hosted API"):
        assert said in " ".join(result.stdout.split())
    assert "| fine-tune | 1.000 [" in page.read_text()
    assert "With fewer examples" in page.read_text()
    assert made.command[0] == "deskside"


def test_the_questions_are_what_each_way_says(compare: Invoke, app: StandIn, task: Task) -> None:
    compare("--shots", "3")
    asked: dict[str, list[dict[str, Any]]] = {}
    for path, body in zip(app.paths, app.bodies, strict=True):
        asked.setdefault(path, []).append(body)
    n, n_held = len(task.records("test")), len(task.records("validation"))
    decisions, texts = asked["/v1/decisions"], asked["/v1/completions"]
    assert (len(decisions), len(texts)) == (2 * n + n_held, 3 * n)
    assert {one["value"] for one in decisions[0]["questions"][0]["choices"]} == set(LABELS)
    assert texts[0]["structured_outputs"] == {"choice": [f" {label}\n" for label in task.spec.labels]}
    assert {(body["stop"], body["temperature"]) for body in texts} == {("\n", 0)}
    zero, few, retrieved = texts[:n], texts[n : 2 * n], texts[2 * n :]
    assert {body["prompt"].count("Sort: ") for body in zero} == {1}
    assert (
        {body["prompt"].count("Sort: ") for body in few}
        == {body["prompt"].count("Sort: ") for body in retrieved}
        == {4}
    )
    shared = few[0]["prompt"].rpartition("Sort: ")[0]
    assert shared.count("\nAnswer: ") == 3
    assert all(body["prompt"].startswith(shared) for body in few), "the same examples, in front of every text"
    again = decisions[n + n_held :]
    assert [body["input"] for body in again][::-1] != [body["input"] for body in again]
    assert sorted(body["input"] for body in again) == sorted(body["input"] for body in decisions[:n])


def test_retrieved_examples_end_with_the_most_similar(task: Task, tmp_path: Path, home: Path) -> None:
    voters, test = Voters(task.records("train"), LABELS), task.records("test")
    for name in ("base.gguf", "chat.gguf"):
        (tmp_path / "chat.gguf").write_bytes(head({**GEMMA, **TEMPLATE}))
        stored = Store(home).resolve(str(tmp_path / name))
        way = retrieved_way(task, stored, {"test": test}, 3, voters, None)
        for record, question in zip(test, way.questions["test"], strict=True):
            nearest = [text_of(one) for one in voters.nearest(text_of(record), 3)]
            said = question.prompt + json.dumps(question.fields)
            places = [said.index(text) for text in nearest]
            assert places == sorted(places, reverse=True)
            assert (
                question.prompt.startswith("Every text is answered")
                or question.fields["messages"][0]["role"] == "system"
            )


def test_a_second_run_asks_what_is_missing(compare: Invoke, app: StandIn, task: Task, tmp_path: Path) -> None:
    compare("--ways", "few-shot,fine-tune")
    first, n = len(app.bodies), len(task.records("test"))
    assert first == 3 * n
    compare("--ways", "few-shot,fine-tune")
    assert len(app.bodies) == first
    # Another way alone: the answers of the others are not dropped.
    compare("--ways", "zero-shot")
    assert len(app.bodies) == first + 2 * n
    compare("--ways", "few-shot,fine-tune")
    assert len(app.bodies) == first + 2 * n
    # Another prompt is another question, and a model of other bytes another model.
    compare("--ways", "few-shot", "--shots", "2")
    assert len(app.bodies) == first + 4 * n
    (tmp_path / "base.gguf").write_bytes(head({**GEMMA, "general.name": "other"}))
    result = compare("--ways", "few-shot", "--shots", "2")
    assert len(app.bodies) == first + 6 * n
    assert "of another model or prompt" in result.stderr


def test_a_kill_loses_no_answer_that_arrived(app: StandIn, url: str, task: Task, tmp_path: Path) -> None:
    release, arrived = threading.Event(), threading.Event()
    n_free = 5

    def slow(prompt: str) -> str:
        if len(app.bodies) > n_free:
            arrived.set()
            release.wait(30)
        return f" {LABELS[0]}\n"

    app.answer = slow
    out = tmp_path / "run.json"
    arguments = ["compare", "parcels", "--ways", "few-shot", "--base", str(tmp_path / "base.gguf")]
    arguments += ["--local-url", url, "--out", str(out), "--concurrency", "1"]
    program = f"from runtime.cli.main import main; main({arguments!r})"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert arrived.wait(60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    release.set()
    app.bodies.clear()
    app.answer = lambda prompt: f" {LABELS[0]}\n"
    result = CliRunner().invoke(COMPARE, arguments[1:], catch_exceptions=False)
    assert result.exit_code == 0
    n = len(task.records("test"))
    assert len(app.bodies) == 2 * n - n_free, "the rest, and all of the second asking"
    assert len(load_comparison(out).ways[0].answers["test"]) == n


HOSTED = ("--ways", "hosted", "--hosted-model", "big-1")


def test_a_hosted_api_is_asked_within_the_cap_recorded_and_replayed(
    compare: Invoke, app: StandIn, url: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESKSIDE_HOSTED_KEY", "top-secret")
    app.answer = lambda prompt: label_of(prompt)
    calls, n = tmp_path / "calls.json", len(task.records("test"))
    asked = ("--url", url, "--record", str(calls), "--price", "1,1", "--shots", "2")
    # A call costs at most its bytes and the answer: enough for some calls.
    part = compare(*HOSTED, *asked, "--max-cost", "0.0015", "--concurrency", "1")
    made = load_comparison(tmp_path / "run.json")
    answered = made.ways[0].answers["test"]
    assert part.exit_code == 3
    assert 0 < len(answered) < n
    assert made.ways[0].cost_usd is not None
    assert made.ways[0].cost_usd <= 0.0015
    assert "--max-cost $0.0015 was reached after" in " ".join(part.stdout.split())
    whole = compare(*HOSTED, *asked, "--max-cost", "1")
    assert (whole.exit_code, len(app.bodies)) == (0, n)
    official = {"model", "messages", "temperature", "max_completion_tokens", "stream", "stream_options"}
    assert {name for body in app.bodies for name in body} == official
    for path in (calls, tmp_path / "run.json"):
        assert "top-secret" not in path.read_text()
    assert len(json.loads(calls.read_text())["calls"]) == n
    (tmp_path / "run.json").unlink()
    replayed = compare("--ways", "hosted", "--replay", str(calls), "--shots", "2")
    assert len(app.bodies) == n
    assert load_comparison(tmp_path / "run.json").ways[0].kind == "replayed"
    assert "hosted (replayed) is best, accuracy 1.000" in " ".join(replayed.stdout.split())
    with pytest.raises(BadWorkload, match="the prompt, the examples shown"):
        compare("--ways", "hosted", "--replay", str(calls), "--shots", "3")


def test_a_server_that_is_full_is_asked_again_after_its_time(
    app: StandIn, task: Task, url: str, home: Path, tmp_path: Path
) -> None:
    waited: list[float] = []
    kept: list[WayAnswer] = []

    async def wait(seconds: float) -> None:
        waited.append(seconds)

    base = Store(home).resolve(str(tmp_path / "base.gguf"))
    way = base_way("zero-shot", task, base, {"test": task.records("test")[:2]}, 0, url)
    app.n_refused = 2
    ask(way, url, way.questions["test"], AskingRules(1, wait=wait), kept.append)
    assert waited == [7, 7]
    assert [one.tries for one in kept] == [3, 1]
    app.n_refused = MAX_TRIES
    with pytest.raises(ServerFailed, match="HTTP 429: slow down"):
        ask(way, url, way.questions["test"], AskingRules(1, wait=wait), kept.append)


def test_a_server_that_fails_ends_the_run_and_keeps_the_answers(
    compare: Invoke, app: StandIn, task: Task, tmp_path: Path
) -> None:
    def broken(prompt: str) -> str:
        if len(app.bodies) > 4:
            raise ConnectionAbortedError
        return f" {LABELS[0]}\n"

    app.answer = broken
    with pytest.raises(ServerFailed, match=r"few-shot: .* could not answer .* the same command continues"):
        compare("--ways", "few-shot", "--concurrency", "1")
    app.answer = lambda prompt: f" {LABELS[0]}\n"
    app.bodies.clear()
    compare("--ways", "few-shot", "--concurrency", "1")
    assert len(app.bodies) == 2 * len(task.records("test")) - 4


@pytest.mark.parametrize("kind", ["write", "extract"])
def test_other_kinds_have_their_own_ways(kind: WorkKind, compare: Invoke, app: StandIn, tmp_path: Path) -> None:
    answers = ['{"kind": "box"}', '{"kind": "bag"}'] if kind == "extract" else ["a red box", "a bag of tools"]
    pairs = [(text, answers["parcel" in text]) for text, _ in rows(60)]
    task = make_task(NewTask("mine", csv_file(tmp_path, pairs, "mine.csv"), kind=kind)).task
    app.answer = lambda prompt: f"\n{answers[0]}\nmore"
    result = compare("--ways", "majority,words,vote,nearest,zero-shot,few-shot,fine-tune+vote", name="mine")
    assert result.exit_code == 0, result.output
    made = load_comparison(tmp_path / "run.json")
    skipped = {way.name for way in made.ways if way.skipped}
    assert skipped == {"words", "vote", "fine-tune", "fine-tune+vote"}
    assert made.judgement is not None
    assert made.judgement["measure"] == ("field F1" if kind == "extract" else "ROUGE-L")
    scores = {way["name"]: way["measures"][0]["value"]["estimate"] for way in made.judgement["ways"]}
    assert scores["nearest"] > scores["majority"]
    zero = next(way for way in made.ways if way.name == "zero-shot")
    if kind == "write":
        assert {one.answer for one in zero.answers["test"]} == {answers[0]}, "the first line with text"
        assert "stop" not in app.bodies[0]
    else:
        assert app.bodies[0]["structured_outputs"]["json"] == task.spec.json_schema


def test_quick_asks_few_of_the_same_examples(
    compare: Invoke, app: StandIn, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.ways.plan.QUICK", 4)
    shown = compare("--ways", "fine-tune+vote", "--quick").stdout
    assert len(app.bodies) == 4 * 3
    assert "(--quick)" in shown
    assert load_comparison(tmp_path / "run.json").quick
    compare("--ways", "fine-tune+vote")
    n, n_held = len(task.records("test")), len(task.records("validation"))
    assert len(app.bodies) == 2 * n + n_held, "the few are not asked again"


def test_json_is_for_scripts(compare: Invoke, task: Task) -> None:
    found = json.loads(compare("--ways", "majority,words", "--json").stdout)
    assert found["judgement"]["ways"][0]["name"] == "words"
    assert "answers" not in found["ways"][0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ways": ("word",)}, "no way 'word'; did you mean 'words'"),
        ({"url": "http://x/v1"}, "--url needs --hosted-model"),
        ({"url": "http://x/v1", "hosted_model": "m"}, "give --max-cost USD"),
        ({"url": "http://x/v1", "hosted_model": "m", "max_cost": 1}, "the price of 'm' at http://x/v1 is not known"),
        ({"url": "http://x/v1", "hosted_model": "m", "max_cost": 1, "price": "dear"}, "--price takes IN,OUT"),
        ({"record": Path("x")}, "--record keeps the calls of a hosted API"),
        ({"replay": Path("x"), "url": "http://x/v1"}, "leave out --url and --record, or --replay"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(
    task: Task, home: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadWorkload, match=says):
        compare_plan(task, CompareSettings(**options), Store(home))


def test_models_that_are_absent_are_a_reason_unless_they_were_named(task: Task, home: Path, tmp_path: Path) -> None:
    plan = compare_plan(task, CompareSettings(), Store(tmp_path / "empty"))
    assert plan.ways == WAYS
    assert "`deskside finetune parcels --name parcels`" in plan.skipped["fine-tune"]
    assert all("deskside pull gemma-3-270m" in plan.skipped[name] for name in OF_BASE)
    with pytest.raises(ModelNotFound):
        compare_plan(task, CompareSettings(model="parcel"), Store(tmp_path / "empty"))
