"""`deskside bench`, `bench report` and `eval` as a person runs them, against a stand-in server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.cli import create_app, eval_command
from benchmarks.comparison.plan import EvalSettings, evaluation_task
from benchmarks.comparison.run import BenchSettings, make_plan
from benchmarks.errors import BadWorkload
from benchmarks.record import load_run
from models.manifest import Artefact, Manifest, dump_manifest
from models.store.store import Store
from tests.support.benchmarks.stand_in import StandIn, running

RUNNER = CliRunner()
Invoke = Callable[..., Any]


@pytest.fixture
def app() -> StandIn:
    """Right about mails that say so, babbling about long prompts; see StandIn for faults."""
    return StandIn(lambda prompt: "spam" if "buy" in prompt else "ham")


@pytest.fixture
def url(app: StandIn) -> Iterator[str]:
    with running(app) as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Examples, a prompt file and something that looks like a model."""
    lines = []
    for i in range(40):
        user, label = (f"buy {i}", "spam") if i % 2 else (f"hello {i}", "ham")
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": label}]
        lines.append(json.dumps({"id": str(i), "messages": messages}))
    (tmp_path / "mails.jsonl").write_text("\n".join(lines))
    (tmp_path / "few.txt").write_text("Mail: hi\nList: ham\n\nMail: {mail}\nList:")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    return tmp_path


@pytest.fixture
def bench(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setenv("DESKSIDE_HOME", str(folder / "home"))
    model = str(folder / "tiny.gguf")
    common = ["--model", model, "--base", model, "--url", url, "--base-url", url, "--examples",
              str(folder / "mails.jsonl"), "--few-shot", str(folder / "few.txt"), "--out", str(folder / "run.json"),
              "--concurrency", "1,4", "--requests", "12"]  # fmt: skip
    return lambda *more: RUNNER.invoke(create_app(), [*common, *more], catch_exceptions=False)


@pytest.fixture
def evaluate(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setenv("DESKSIDE_HOME", str(folder / "home"))
    command = typer.Typer()
    command.command()(eval_command)
    common = [str(folder / "tiny.gguf"), "--url", url, "--examples", str(folder / "mails.jsonl")]
    return lambda *more: RUNNER.invoke(command, [*common, *more], catch_exceptions=False)


def test_a_run_measures_both_local_arms_and_asks_no_mail_twice(bench: Invoke, app: StandIn, folder: Path) -> None:
    result = bench("--arms", "fine-tune,base-few-shot")
    assert result.exit_code == 0, result.output
    assert "Latency, ms" in result.stdout
    assert "run.json" in result.stderr
    for path in ("/v1/chat/completions", "/v1/completions"):
        bodies = [b for b, p in zip(app.bodies, app.paths, strict=True) if p == path]
        prompts = [b.get("prompt") or b["messages"][0]["content"] for b in bodies]
        assert len(prompts) == len(set(prompts)) == 2 * 12 + 2
    run = load_run(folder / "run.json")
    assert [[len(level.samples) for level in arm.levels] for arm in run.arms] == [[12, 12], [12, 12]]
    assert run.statistics is not None
    assert run.statistics["arms"][0]["accuracy"]["share"] == 1.0
    assert run.cost is not None


def test_quick_changes_only_what_was_not_given(bench: Invoke, folder: Path) -> None:
    assert bench("--arms", "fine-tune", "--quick").exit_code == 0
    work = load_run(folder / "run.json").workload
    assert (work.requests_per_level, work.concurrency) == (12, (1, 4))
    defaults = make_plan(BenchSettings(quick=True, arms="hosted", requests=3), Store(folder)).workload
    assert (defaults.requests_per_level, defaults.concurrency) == (3, (1, 4))


def test_base_prompts_stop_at_the_line_and_everything_is_greedy(bench: Invoke, app: StandIn) -> None:
    bench("--arms", "fine-tune,base-few-shot", "--quick")
    by_path = dict(zip(app.paths, app.bodies, strict=True))
    assert by_path["/v1/completions"]["stop"] == "\n"
    assert by_path["/v1/completions"]["prompt"].startswith("Mail: hi")
    assert {body["temperature"] for body in app.bodies} == {0}


def test_failed_requests_are_counted_and_give_exit_code_3(bench: Invoke, folder: Path) -> None:
    text = (folder / "mails.jsonl").read_text()
    (folder / "mails.jsonl").write_text(text.replace("hello 1", "HTTP500 1"))
    result = bench("--arms", "fine-tune", "--seed", "3")
    assert result.exit_code == 3, result.output
    assert "requests failed" in result.stdout
    assert any(s.error for level in load_run(folder / "run.json").arms[0].levels for s in level.samples)


def test_a_hosted_api_gets_the_prompt_and_the_key_but_the_file_does_not(
    bench: Invoke, app: StandIn, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESKSIDE_HOSTED_KEY", "top-secret")
    body = '{"temperature": null, "reasoning_effort": "none"}'
    hosted = ["--arms", "hosted", "--hosted-url", url, "--hosted-model", "big-1", "--hosted-body", body]
    assert bench(*hosted).exit_code == 0
    assert app.headers[0][b"authorization"] == b"Bearer top-secret"
    assert app.bodies[0]["model"] == "big-1"
    assert app.bodies[0]["reasoning_effort"] == "none"
    assert "temperature" not in app.bodies[0]
    assert app.bodies[0]["messages"][0]["content"].startswith("Mail: hi")
    assert "top-secret" not in (folder / "run.json").read_text()
    assert load_run(folder / "run.json").arms[0].kind == "measured"


def test_report_shows_the_run_again_with_other_assumptions(bench: Invoke, folder: Path) -> None:
    shown = bench("--arms", "fine-tune,base-few-shot", "--hour-price", "10").stdout
    file = str(folder / "run.json")
    assert RUNNER.invoke(create_app(), ["report", file]).stdout == shown
    dearer = RUNNER.invoke(create_app(), ["report", file, "--finetune-price", "12345"]).stdout
    assert "$12345" in dearer
    assert "$10)" in dearer
    assert json.loads(RUNNER.invoke(create_app(), ["report", file, "--json"]).stdout)["statistics"]["arms"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--arms", "poem"], "no arm is called 'poem'"),
        (["--arms", "hosted", "--hosted-url", "http://x"], "--hosted-model"),
        (["--arms", "hosted", "--hosted-url", "http://x", "--hosted-model", "m", "--hosted-body", "{"], "not JSON"),
        (["--concurrency", "one"], "'one'"),
        (["--requests", "30"], "--requests 19"),
        (["--power-watts", "-1"], "power_watts"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    bench: Invoke, app: StandIn, options: list[str], says: str
) -> None:
    with pytest.raises(Exception, match=says):
        bench(*options)
    assert app.bodies == []


def test_values_of_the_wrong_kind_are_usage_errors(bench: Invoke) -> None:
    for options in (["--requests", "many"], ["--requests", "0"], ["--no-such-option"]):
        assert bench(*options).exit_code == 2


def test_eval_scores_every_example_and_goes_on_where_it_stopped(evaluate: Invoke, app: StandIn, folder: Path) -> None:
    out = folder / "predictions.json"
    result = evaluate("--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["correct"], found["total"], len(app.bodies)) == (40, 40, 40)
    kept = json.loads(out.read_text())
    kept["predictions"] = kept["predictions"][:35]
    out.write_text(json.dumps(kept))
    assert json.loads(evaluate("--out", str(out), "--json").stdout)["total"] == 40
    assert len(app.bodies) == 45
    # Another prompt is another experiment: nothing of the old answers is used.
    evaluate("--out", str(out), "--prompt", str(folder / "few.txt"))
    assert len(app.bodies) == 85


def test_eval_does_not_count_a_failure_as_a_wrong_answer(evaluate: Invoke, folder: Path) -> None:
    text = (folder / "mails.jsonl").read_text()
    (folder / "mails.jsonl").write_text(text.replace("hello 38", "HTTP500 38"))
    with pytest.raises(Exception, match=r"could not answer '38'.*HTTP 500"):
        evaluate("--out", str(folder / "p.json"))
    assert len(json.loads((folder / "p.json").read_text())["predictions"]) == 32


def write_letters(folder: Path) -> None:
    """Twelve letters that differ, each asked for with a system message."""
    lines = []
    for i in range(12):
        said = [
            ("system", "Answer in our style."),
            ("user", f"letter {i}"),
            ("assistant", f"Dear {i}! " + "Thanks. " * 20),
        ]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}))
    (folder / "mails.jsonl").write_text("\n".join(lines))


def test_eval_of_a_writing_model_asks_for_whole_texts_and_compares_them(
    evaluate: Invoke, app: StandIn, folder: Path
) -> None:
    write_letters(folder)
    app.answer = lambda prompt: f"Dear {prompt.split()[1]}! " + "Thanks. " * 10
    found = json.loads(evaluate("--json").stdout)
    assert (found["correct"], found["total"]) == (0, 12)
    assert 0.5 < found["chrf"]["estimate"] < 1
    assert "classes" not in found
    assert app.bodies[0]["max_tokens"] > 50
    assert [message["role"] for message in app.bodies[0]["messages"]] == ["system", "user"]
    shown = evaluate()
    assert "chrF" in shown.stdout
    assert "label" not in shown.stdout


def test_answers_that_were_cut_are_told(evaluate: Invoke, app: StandIn) -> None:
    app.answer = lambda prompt: "a long story without an end"
    told = evaluate("--max-tokens", "5")
    assert app.bodies[0]["max_tokens"] == 5
    assert "40 answers were cut at 5 tokens; --max-tokens allows more" in told.stderr


def test_bench_of_a_writing_model_has_no_accuracy(bench: Invoke, app: StandIn, folder: Path) -> None:
    write_letters(folder)
    app.answer = lambda prompt: "Dear you! Thanks."
    result = bench("--arms", "fine-tune", "--requests", "5", "--concurrency", "1,2")
    assert result.exit_code == 0, result.output
    assert "chrF of the written texts, fine-tune" in result.stdout
    assert "accuracy" not in result.stdout
    assert load_run(folder / "run.json").workload.labels == ()


def test_the_prompt_of_another_task_is_not_put_before_ones_own_examples(folder: Path) -> None:
    settings = BenchSettings(arms="hosted", examples=folder / "mails.jsonl", requests=2, concurrency="1")
    with pytest.raises(BadWorkload, match=r"--few-shot FILE is missing.*--arms fine-tune"):
        make_plan(settings, Store(folder))


def test_examples_of_another_task_are_refused(evaluate: Invoke, app: StandIn, folder: Path) -> None:
    stored = folder / "mine"
    stored.mkdir()
    (folder / "tiny.gguf").rename(stored / "mine.gguf")
    artefact = Artefact(file="mine.gguf", quantization="F16", size_bytes=4, sha256="0" * 64)
    manifest = Manifest(name="mine", licence="none", task="classify", labels=("red", "blue"), artefacts=(artefact,))
    (stored / "model.toml").write_text(dump_manifest(manifest))
    with pytest.raises(
        BadWorkload, match="'ham', which is none of the 2 labels of 'mine': give a --task or --examples"
    ):
        evaluation_task(str(stored), EvalSettings(examples=folder / "mails.jsonl"), Store(folder))
