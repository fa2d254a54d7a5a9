"""An installed model is replaced by one that is not worse on the same examples; what cannot be told is refused."""

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from convert import replacement
from convert.errors import NotReplaced
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.replacement import MIN_TESTED, Incumbent, compare_scores, incumbent_of
from models.common.chat_records import ChatMessage, ChatRecord
from models.common.console import LineReporter
from models.common.text_scores import rouge_l
from models.manifest import MANIFEST_FILE, Manifest, dump_manifest
from models.store.store import Store
from models.task.task import Task, TaskSpec, write_task
from tests.support.convert.tiny import write_model

TURNS = "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
LABELS = ("ham", "spam")
N = 40


def records(answers: tuple[str, ...] = LABELS, n: int = N) -> list[ChatRecord]:
    return [ChatRecord(f"{i}", i, (ChatMessage("user", f"mail {i}"),), answers[i % len(answers)]) for i in range(n)]


def task_of(tmp_path: Path, spec: TaskSpec, examples: list[ChatRecord]) -> Task:
    return write_task(tmp_path / "sorted", spec, {"train": examples, "validation": examples, "test": examples})


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return task_of(tmp_path, TaskSpec(kind="classify", labels=LABELS, scorer="accuracy"), records())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    return Store()


def conversion(tmp_path: Path, architecture: str = "llama", labels: tuple[str, ...] = LABELS) -> ConvertRequest:
    """The request for a tiny model with these labels."""
    source = write_model(tmp_path / f"{architecture}.gguf", architecture, template=TURNS)
    manifest = tmp_path / MANIFEST_FILE
    made = Manifest(name="mails", licence="MIT", task="classify" if labels else "write", labels=labels)
    manifest.write_text(dump_manifest(made))
    return ConvertRequest(source=str(source), name="mails", manifest=manifest, quantization="F16")


def incumbent(name: str, task: Task, store: Store, *, overruled: bool = False) -> Incumbent | None:
    return incumbent_of(name, task, store, LineReporter(), overruled=overruled)


def fake_scores(monkeypatch: pytest.MonkeyPatch, scores: Mapping[str, float]) -> None:
    monkeypatch.setattr(replacement, "_scores", lambda *_: dict(scores))


def test_a_worse_model_is_not_installed_and_a_better_one_is(
    tmp_path: Path, task: Task, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(conversion(tmp_path), store, LineReporter())
    old = store.get("mails").gguf.read_bytes()
    right, wrong = ({str(i): score for i in range(N)} for score in (1.0, 0.0))
    request = conversion(tmp_path, "gemma3")
    fake_scores(monkeypatch, right)
    tested = incumbent("mails", task, store)
    assert tested is not None
    fake_scores(monkeypatch, wrong)
    with pytest.raises(NotReplaced) as refused:
        convert(request, store, LineReporter(), partial(tested.admit, request))
    said = str(refused.value)
    for part in ("is worse", "0.000", "1.000", f"p = {2 / 2**N:.3g}", request.source, "--name mails --replace"):
        assert part in said
    assert store.get("mails").gguf.read_bytes() == old
    assert store.previous("mails") is None
    fake_scores(monkeypatch, right)
    convert(request, store, LineReporter(), partial(tested.admit, request))
    assert "is not worse and is installed" in " ".join(capsys.readouterr().err.split())
    assert store.get("mails").gguf.read_bytes() != old
    kept = store.previous("mails")
    assert kept is not None
    assert kept.gguf.read_bytes() == old


def test_models_answer_as_they_are_served(tmp_path: Path, task: Task, store: Store) -> None:
    """Of two labels a tiny model is right in some cases; the same model asked twice gives the same scores."""
    request = conversion(tmp_path)
    convert(request, store, LineReporter())
    tested = incumbent("mails", task, store)
    assert tested is not None
    assert list(tested.scores) == [one.id for one in task.records("validation")]
    assert set(tested.scores.values()) <= {0.0, 1.0}
    assert 0 < sum(tested.scores.values()) < N
    tested.admit(request, store.get("mails"))


def test_texts_are_scored_by_the_words_that_they_share(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert.measure.compare import MeasureJob, MeasureResult
    from convert.measure.forward import ModelAnswer

    examples = records(("one two three", "a longer answer of " + "many " * 60))
    written = task_of(tmp_path, TaskSpec(kind="write", scorer="rouge-l"), examples)
    convert(conversion(tmp_path, labels=()), store, LineReporter())

    def answered(job: MeasureJob, *_: object) -> MeasureResult:
        assert job.tasks.max_written >= max(len(one.answer) for one in job.tasks.tasks)
        return MeasureResult(tuple(ModelAnswer("two three") for _ in job.tasks.tasks), ())

    monkeypatch.setattr(replacement, "run_job", answered)
    tested = incumbent("mails", written, store)
    assert tested is not None
    assert tested.scores == {one.id: rouge_l(one.answer, "two three") for one in written.records("validation")}


def test_what_cannot_be_compared_is_refused_with_the_option_that_overrules(
    tmp_path: Path, task: Task, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert incumbent("mails", task, store) is None, "none is installed"
    convert(conversion(tmp_path, labels=("ham", "eggs")), store, LineReporter())
    with pytest.raises(NotReplaced, match=r"its labels are 'eggs', 'ham'; .* are 'ham', 'spam'.*--replace"):
        incumbent("mails", task, store)
    assert incumbent("mails", task, store, overruled=True) is None
    assert "is replaced without a test" in capsys.readouterr().err
    small = Task(tmp_path / "small", task.spec)
    write_task(small.folder, task.spec, dict.fromkeys(("train", "validation", "test"), records(n=MIN_TESTED - 1)))
    with pytest.raises(NotReplaced, match=rf"has {MIN_TESTED - 1} validation examples, the test needs {MIN_TESTED}"):
        incumbent("mails", small, store)
    file = store.get("mails").gguf
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(NotReplaced, match=r"cannot be compared with it: .*has sha256.*--replace"):
        incumbent("mails", task, store)


def test_a_loss_counts_only_beyond_chance() -> None:
    def right(n: int) -> list[float]:
        return [1.0] * n + [0.0] * (N - n)

    assert not compare_scores(right(N), right(N)).is_worse
    assert not compare_scores(right(N - 5), right(N)).is_worse, "5 of 5 lost: p = 0.0625"
    assert compare_scores(right(N - 6), right(N)).is_worse, "6 of 6 lost: p = 0.031"
    assert not compare_scores(right(N), right(N - 6)).is_worse, "that is better"


def test_a_loss_of_graded_scores_counts_only_beyond_chance() -> None:
    chance = random.Random(0)
    old = [chance.uniform(0.3, 0.9) for _ in range(N)]
    noise = [chance.uniform(-0.1, 0.1) for _ in range(N)]
    alike = [score + change for score, change in zip(old, noise, strict=True)]
    worse = [score - 0.08 for score in alike]
    assert not compare_scores(alike, old).is_worse
    assert compare_scores(worse, old).is_worse
    assert not compare_scores(old, worse).is_worse
    found = compare_scores(worse, old)
    assert found.difference.low < found.difference.estimate < found.difference.high < 0
