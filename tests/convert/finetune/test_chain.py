"""`deskside finetune`: from a spreadsheet to an installed model in one command; what cannot be is refused before."""

import csv
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint.source import open_checkpoint
from convert.errors import FinetuneFailed, RequestInvalid
from convert.finetune import chain
from convert.finetune.asked import AskedExamples, examples_to_ask
from convert.finetune.chain import Finetuned, finetune_task
from convert.finetune.request import FinetuneRequest
from convert.training.examples import read_data, tokenizer_for
from convert.training.settings import EpochScore, FinetuneResult, FinetuneSettings, TrainingCost
from convert.training.train import check_installed
from models.card.training import CURVE_FILE
from models.common.chat_records import read_chat_records
from models.common.console import LineReporter
from models.errors import ModelError
from models.gguf.fields import TOKENS as TOKENS_FIELD
from models.gguf.header import read_header
from models.manifest import read_manifest
from models.store.store import Store
from models.task.new import NewTask, make_task
from models.task.task import Task, open_task, text_of, write_text_length
from runtime.cli.main import load_verb, main
from tests.support.convert.tiny import TOKENS, write_mails, write_model
from tests.support.models.tasks import csv_file, rows

TURNS = "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
QUICK: dict[str, Any] = {"layers": 2, "epochs": 2, "batch": 4, "learning_rate": 0.02, "rank": 4, "alpha": 8}
N_COPIES = 3
KEPT_TOKENS = len(TOKENS) - 1


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Labelled mails as a spreadsheet saves them: separated by semicolons, each with some words of its own."""
    path = tmp_path / "mails.csv"
    records = read_chat_records(write_mails(tmp_path / "mails.jsonl"))
    with path.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, delimiter=";")
        rows.writerow(["mail", "label"])
        rows.writerows([f"{text_of(one)} {copy} {one.id}", one.answer] for one in records for copy in range(N_COPIES))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf", "llama", template=TURNS)


@pytest.fixture
def with_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if JAX was installed: these requests are refused before it is used."""
    monkeypatch.setattr(chain, "check_installed", lambda: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finetuned, Path]:
    """A table made into a model, and the folder of everything."""
    pytest.importorskip("jax", reason="needs the extra `finetune`")
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DESKSIDE_HOME", str(folder / "home"))
        patch.setattr(chain, "DEFAULT_KEEP", KEPT_TOKENS)
        patch.setattr(chain, "SMALL_VOCABULARY", 1)
        path = folder / "mails.csv"
        records = read_chat_records(write_mails(folder / "mails.jsonl"))
        with path.open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label"])
            rows.writerows([f"{text_of(one)} {copy} {one.id}", one.answer] for one in records for copy in range(2))
        model = write_model(folder / "base.gguf", "llama", template=TURNS)
        request = FinetuneRequest(task=str(path), base=str(model), name="sorted")
        done = finetune_task(request, FinetuneSettings(**QUICK, tokens=16), Store(), LineReporter())
    return done, folder


@pytest.mark.finetune
def test_a_spreadsheet_becomes_an_installed_model(finished: tuple[Finetuned, Path]) -> None:
    done, folder = finished
    assert done.stored is not None
    manifest = done.stored.manifest
    assert manifest is not None
    task = open_task(str(folder / "home" / "tasks" / "sorted"))
    assert (manifest.name, manifest.task, manifest.labels) == ("sorted", "classify", task.spec.labels)
    assert manifest.prompt == task.spec.manifest_prompt()
    assert manifest.prompt.max_text_tokens == 16, "the length given is in the model and in the task"
    log = json.loads((done.result.trained / "training.json").read_text())
    assert log["settings"]["tokens"] == 16
    assert manifest.adapter is not None
    assert done.stored.gguf.is_file()
    assert done.result.best.accuracy is not None
    training = manifest.training
    assert training is not None, "the card tells it"
    assert (training.task, training.depth, training.layers) == ("sorted", 2, QUICK["layers"])
    assert [epoch.loss for epoch in training.epochs] == [score.loss for score in done.result.epochs]
    assert training.losses == tuple(round(step["loss"], 4) for step in log["steps"])
    assert (done.stored.folder / CURVE_FILE).is_file()


@pytest.mark.parametrize(
    ("kind", "n_copies", "measured"), [("classify", 2, False), ("classify", 5, True), ("extract", 5, True)]
)
def test_the_conversion_is_the_task_s(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: Path,
    with_jax: None,
    kind: str,
    n_copies: int,
    measured: bool,
) -> None:
    """Chosen on the validation examples if they are enough, and with the task's own form of answers."""
    records = read_chat_records(write_mails(tmp_path / "mails.jsonl"))
    lines = [
        {"text": f"{text_of(one)} {copy} {one.id}", "out": one.answer if kind == "classify" else {"kind": one.answer}}
        for one in records
        for copy in range(n_copies)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = EpochScore(1, 1.0, 1.0, None, kept=True)
    asked: dict[str, Any] = {}

    def trained(base: Path, train: Any, validation: Any, labels: Any, settings: Any, out: Path, report: Any) -> Any:
        asked.update(labels=labels, answers={record.answer for record in train})
        return FinetuneResult(out, score, (score,), TrainingCost(1, 1, 1.0, 1), 1.0, 1.0)

    monkeypatch.setattr(chain, "finetune", trained)
    request = FinetuneRequest(task=str(path), base=str(base), only_train=True)
    done = finetune_task(request, FinetuneSettings(), Store(), LineReporter())
    conversion = done.conversion
    assert conversion.examples == (done.task.file("validation") if measured else None)
    assert conversion.manifest is not None
    manifest = read_manifest(conversion.manifest)
    if kind == "classify":
        assert (manifest.task, manifest.labels, manifest.compact_json) == ("classify", ("ham", "spam"), False)
    else:
        assert (manifest.task, manifest.labels, manifest.compact_json) == ("write", (), True)
        assert (asked["labels"], asked["answers"]) == ((), {'{"kind":"ham"}', '{"kind":"spam"}'})


def test_convert_is_given_the_base_that_was_trained(
    table: Path, base: Path, with_jax: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def trained(base: Path, train: Any, validation: Any, labels: Any, settings: Any, out: Path, report: Any) -> Any:
        read.append(read_header(base).integer("llama.block_count"))
        score = EpochScore(1, 1.0, 1.0, 0.5, kept=True)
        out.mkdir(exist_ok=True)
        return FinetuneResult(out, score, (score,), TrainingCost(1, 1, 1.0, 1), 1.0, 1.0)

    monkeypatch.setattr(chain, "finetune", trained)
    for depth in ("1", "all"):
        request = FinetuneRequest(task=str(table), base=str(base), depth=depth, only_train=True)
        source = Path(finetune_task(request, FinetuneSettings(), Store(), LineReporter()).conversion.source)
        assert read_header(source).integer("llama.block_count") == read[-1]
        assert (source == base) == (depth == "all")
    assert read == [1, 2]


@pytest.mark.finetune
def test_the_vocabulary_is_cut_before_the_training(finished: tuple[Finetuned, Path]) -> None:
    done, _ = finished
    assert done.stored is not None
    assert done.stored.manifest is not None
    trained_on = Path(done.conversion.source)
    for gguf in (done.stored.gguf, *trained_on.glob("*.gguf")):
        assert read_header(gguf).fields[TOKENS_FIELD].length == KEPT_TOKENS
    assert done.stored.manifest.base is not None
    assert done.stored.manifest.base.name.startswith("base-")


@pytest.mark.finetune
def test_again_the_new_model_is_tested_and_a_changed_table_is_refused(
    finished: tuple[Finetuned, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done, folder = finished
    monkeypatch.setenv("DESKSIDE_HOME", str(folder / "home"))
    request = FinetuneRequest(task=str(folder / "mails.csv"), base=str(folder / "base.gguf"), name="sorted")
    monkeypatch.setattr(chain, "DEFAULT_KEEP", KEPT_TOKENS)
    monkeypatch.setattr(chain, "SMALL_VOCABULARY", 1)
    again = finetune_task(request, FinetuneSettings(**QUICK, tokens=16), Store(), LineReporter())
    assert "'sorted' is not worse and is installed" in " ".join(capsys.readouterr().err.split())
    assert again.stored == done.stored
    changed = folder / "home" / "tasks" / "sorted" / "task.toml"
    os.utime(changed, (1, 1))
    with pytest.raises(RequestInvalid, match=r"has changed since the task 'sorted' was made of it"):
        finetune_task(request, FinetuneSettings(**QUICK), Store(), LineReporter())


def test_the_prompt_stands_around_every_text(table: Path) -> None:
    task = make_task(NewTask(name="asked", file=table, prompt="Sort this mail: {input}!")).task
    every = examples_to_ask(task, FinetuneSettings(), Path("no base is read"), LineReporter())
    for split, asked in (("train", every.train), ("validation", every.validation)):
        bare = task.records(split)
        assert [one.prompt[-1].content for one in asked] == [f"Sort this mail: {text_of(one)}!" for one in bare]
        assert [one.answer for one in asked] == [one.answer for one in bare]


def length_of(settings: FinetuneSettings, base: Path) -> tuple[AskedExamples, Task]:
    task = open_task("long")
    return examples_to_ask(task, settings, base, LineReporter()), task


@pytest.fixture
def long_texts(tmp_path: Path) -> Task:
    """Texts that say what they are in their first words, of which the base makes some thirty tokens."""
    pairs = [(f"{text} {number} " + "and so on " * 60, label) for number, (text, label) in enumerate(rows(90))]
    return make_task(NewTask(name="long", file=csv_file(tmp_path, pairs), prompt="Sort: {input}")).task


def test_a_given_length_cuts_every_example_and_leaves_none_out(long_texts: Task, base: Path) -> None:
    asked, task = length_of(FinetuneSettings(tokens=64), base)
    n = {split: len(task.records(split)) for split in ("train", "validation")}
    assert (len(asked.train), len(asked.validation)) == (n["train"], n["validation"])
    assert asked.n_cut == n["train"] + n["validation"]
    assert asked.prompt == task.spec.manifest_prompt().model_copy(update={"max_text_tokens": 64})
    assert asked.settings.tokens == 64
    checkpoint = open_checkpoint(base)
    tokenizer = tokenizer_for(checkpoint, asked.train)
    data = read_data(checkpoint, asked.train, asked.validation, task.spec.labels, asked.settings.max_tokens)
    checkpoint.close()
    assert data.train.n_too_long == 0
    for record in asked.train:
        text = record.prompt[-1].content.removeprefix("Sort: ")
        assert 50 < len(tokenizer.encode(text, add_special=False, parse_special=False)) <= 64
    assert length_of(FinetuneSettings(tokens=64, max_tokens=100), base)[0].settings.max_tokens == 100


def test_auto_chooses_the_shortest_that_says_as_much(
    long_texts: Task, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, _ = length_of(FinetuneSettings(tokens="auto"), base)  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert asked.settings.tokens == asked.prompt.max_text_tokens
    assert "whole texts: accuracy" in told
    assert "of the texts cut" in told
    assert f"chosen: {asked.settings.tokens} tokens" in told


def test_the_tasks_own_length_is_kept_in_training(long_texts: Task, base: Path) -> None:
    write_text_length(long_texts, 32)
    asked, task = length_of(FinetuneSettings(), base)
    assert (task.spec.max_text_tokens, asked.settings.tokens, asked.prompt) == (32, 32, task.spec.manifest_prompt())
    assert asked.n_cut == len(asked.train) + len(asked.validation)


def test_examples_that_become_the_same_are_not_on_both_sides(tmp_path: Path, base: Path) -> None:
    common = "Dear all, we are pleased to tell you that this is the way in which every mail of ours begins. "
    pairs = [(common + f"{text} {number}", label) for number, (text, label) in enumerate(rows(90))]
    make_task(NewTask(name="long", file=csv_file(tmp_path, [*pairs, *rows(60, seed=1)])))
    asked, task = length_of(FinetuneSettings(tokens=16), base)
    held = {record.prompt for record in asked.validation}
    assert not held & {record.prompt for record in asked.train}
    assert 0 < len(asked.train) < len(task.records("train"))


def test_auto_without_labels_is_refused_with_what_to_give(tmp_path: Path, base: Path, with_jax: None) -> None:
    pairs = [(text, f"{label}: {text[:20]} {number}") for number, (text, label) in enumerate(rows(60))]
    make_task(NewTask(name="written", file=csv_file(tmp_path, pairs), kind="write"))
    settings = FinetuneSettings(tokens="auto")  # type: ignore[arg-type]
    with pytest.raises(RequestInvalid, match=r"'written' is of kind 'write', without labels: give .* --tokens 256"):
        finetune_task(FinetuneRequest(task="written", base=str(base)), settings, Store(), LineReporter())
    request = FinetuneRequest(task="written", base=str(base), depth="auto")
    with pytest.raises(RequestInvalid, match=r"--depth auto compares labels, and 'written' has none: give a number"):
        finetune_task(request, FinetuneSettings(), Store(), LineReporter())


@pytest.mark.parametrize("given", ["0", "7", "4097", "some"])
def test_a_length_that_cannot_be_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["finetune", "mails", "--tokens", given])
    assert leaving.value.code == 2
    assert "--tokens" in capsys.readouterr().err


def test_examples_that_leak_are_refused_with_the_command_that_mends_it(table: Path, base: Path, with_jax: None) -> None:
    task = make_task(NewTask(name="mails", file=table)).task
    train, test = task.file("train"), task.file("test")
    train.write_text(train.read_text() + test.read_text().splitlines()[0] + "\n")
    with pytest.raises(FinetuneFailed, match=r"To mend it: deskside task apply mails --drop"):
        finetune_task(FinetuneRequest(task="mails", base=str(base)), FinetuneSettings(), Store(), LineReporter())


def test_without_jax_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FinetuneFailed, match=r"JAX, which is not installed; .*pip install -e '\.\[finetune\]'"):
        check_installed()


def test_the_options_are_those_of_the_settings() -> None:
    options = {option for one in load_verb("finetune").params for option in one.opts}
    expected = {"--base", "--name", "--replace", "--out", "--minutes", "--method", "--layers", "--epochs", "--seed"}
    assert expected <= options


@pytest.mark.usefixtures("with_jax")
def test_what_is_missing_or_unknown_is_named(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.csv"
    short.write_text("text,label\nhello,ham\nbuy now,spam\n")
    one = tmp_path / "one.csv"
    one.write_text("text,label\n" + "".join(f"mail number {n},ham\n" for n in range(30)))
    refused = {
        ("nothing-there",): (1, "there is no task 'nothing-there'"),
        (str(short),): (1, "has 2 examples; a task needs 20"),
        (str(one),): (1, "every answer is 'ham'"),
        (str(table), "--base", "gemma-3-271m"): (1, "gemma-3-271m"),
        (str(table), "--layers", "0"): (2, "--layers"),
        (str(table), "--depth", "half"): (2, "--depth"),
    }
    for arguments, (code, said) in refused.items():
        with pytest.raises(SystemExit) as leaving:
            main(["finetune", *arguments])
        assert leaving.value.code == code
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.finetune
def test_the_next_command_is_said(finished: tuple[Finetuned, Path]) -> None:
    from convert.cli import trained_summary

    done, _ = finished
    made = trained_summary(done)
    assert made[0].startswith("trained in ")
    assert f"accuracy {done.result.best.accuracy:.3f}" in made[0]
    assert made[-1] == "next: deskside serve sorted"
    only_trained = trained_summary(replace(done, stored=None))
    assert only_trained[1].startswith(
        f"next: deskside convert {done.conversion.source} --adapter {done.result.trained}"
    )


def test_a_score_is_better_by_accuracy_first() -> None:
    def score(accuracy: float | None, loss: float) -> EpochScore:
        return EpochScore(1, 0.0, loss, accuracy, kept=False)

    assert score(0.8, 1.0).is_better_than(None)
    assert score(0.81, 2.0).is_better_than(score(0.8, 1.0))
    assert score(0.8, 0.9).is_better_than(score(0.8, 1.0))
    assert not score(0.8, 1.0).is_better_than(score(0.8, 1.0))
    assert score(None, 0.9).is_better_than(score(None, 1.0))


def test_the_best_of_several_seeds_is_kept(tmp_path: Path) -> None:
    tried: dict[str, FinetuneSettings] = {}
    accuracies = {"seed-7": 0.8, "seed-8": 0.9, "seed-9": 0.85}

    def train(settings: FinetuneSettings, name: str) -> FinetuneResult:
        tried[name] = settings
        best = EpochScore(1, 0.0, 0.5, accuracies.get(name, 0.1), kept=True)
        return FinetuneResult(tmp_path / name, best, (best,), TrainingCost(1, 1, 1.0, 1), 1.0, 1.0)

    settings = FinetuneSettings(seed=7, minutes=30)
    best = chain._best_of_seeds(3, settings, train, LineReporter())
    assert best.trained == tmp_path / "seed-8"
    assert {name: (one.seed, one.minutes) for name, one in tried.items()} == {
        f"seed-{seed}": (seed, 10) for seed in (7, 8, 9)
    }
    assert chain._best_of_seeds(1, settings, train, LineReporter()).trained == tmp_path
    assert tried[""] == settings


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        FinetuneSettings(layers=0)


def test_a_damaged_table_is_the_readers_error(tmp_path: Path, with_jax: None) -> None:
    damaged = tmp_path / "damaged.csv"
    damaged.write_bytes(b"text,label\n" + b"\x00\x01\x02" * 50)
    with pytest.raises(ModelError):
        finetune_task(FinetuneRequest(task=str(damaged)), FinetuneSettings(), Store(), LineReporter())
