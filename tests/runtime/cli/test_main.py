"""`deskside`: every verb has help, every error an exit code, and a verb is imported only when it is called."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.common.options import flag
from runtime.cli import main as cli
from runtime.cli.main import EXIT_CODES, VERBS, Verb, exit_code, load_verb, main
from runtime.config import BatchConfig, EngineConfig, RuntimeConfig

ROOT = Path(__file__).parents[3]
ERROR_TREES = ("models.errors", "runtime.errors", "convert.errors", "benchmarks.errors")
ERRORS = [
    error
    for tree in ERROR_TREES
    for _, error in inspect.getmembers(importlib.import_module(tree), inspect.isclass)
    if issubclass(error, Exception) and error.__module__ == tree
]


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    out, err = capsys.readouterr()
    code = leaving.value.code
    assert isinstance(code, int)
    return code, out, err


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `deskside doctor` raise `error`."""

    def verb() -> None:
        raise error

    monkeypatch.setattr(cli, "VERBS", {"doctor": Verb("tests.stub", "verb", "Raises.")})
    monkeypatch.setitem(sys.modules, "tests.stub", type(sys)("tests.stub"))
    monkeypatch.setattr(sys.modules["tests.stub"], "verb", verb, raising=False)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(verb, "--help", capsys=capsys)
    assert (code, err) == (0, "")
    assert f"Usage: deskside {verb}" in out
    assert not re.search(r"<(bool|str|int|float|path|list)\b", out)
    assert VERBS[verb].help.endswith(".")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("serv", "did you mean 'serve'?"),
        ("Convert", "did you mean 'convert'?"),
        ("train", "deskside finetune mails.csv"),
        ("fine-tune", "deskside convert BASE --adapter"),
        ("ls", "deskside models list"),
        ("nonsense", "No such command"),
    ],
)
def test_a_verb_that_is_none_is_answered_with_the_one_that_was_meant(
    typed: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = run(typed, capsys=capsys)
    assert code == 2
    assert said in err


@pytest.mark.parametrize("words", sorted(set(cli.MEANT.values())))
def test_the_commands_that_are_suggested_exist(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in words.split("deskside ")[1:]:
        verb, *rest = command.split()
        group = [rest[0]] if verb == "models" else []
        code, out, _ = run(*([verb] if verb.startswith("--") else [verb, *group, "--help"]), capsys=capsys)
        assert code == 0
        assert all(word.strip(",") in out for word in rest if word.startswith("--"))


def test_help_lists_every_verb_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0
    for name, verb in VERBS.items():
        assert f"{name} " in out
        assert verb.help.split()[0] in out


@pytest.mark.parametrize(("verb", "config"), [("serve", RuntimeConfig), ("batch", BatchConfig), ("chat", EngineConfig)])
def test_the_flags_are_generated_from_the_config(verb: str, config: type[EngineConfig]) -> None:
    options = {option for parameter in load_verb(verb).params for option in parameter.opts}
    expected = {flag(RuntimeConfig, name) for name in config.model_fields}
    assert options & {flag(RuntimeConfig, name) for name in RuntimeConfig.model_fields} == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--nope"],
        ["nope"],
        ["batch"],
        ["batch", "a", "b"],
        ["doctor", "--nope"],
        ["doctor", "extra"],
        ["chat", "--temperature", "3"],
        ["chat", "--slots", "0"],
        ["serve", "--port", "http"],
        ["models", "nope"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(*argv, capsys=capsys)
    assert (code, out) == (2, "")
    assert "Usage: deskside" in err


@pytest.mark.parametrize("verb", [("serve",), ("batch", "in", "out", "--model", "m"), ("chat",)], ids=" ".join)
def test_a_folder_of_prefixes_that_cannot_be_made_is_refused_before_anything_is_loaded(
    verb: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = run(*verb, "--prefix-disk", str(tmp_path / "file" / "x"), capsys=capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: prefixes cannot be kept in {str(tmp_path / 'file' / 'x')!r}: Not a directory")


def test_a_misspelled_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'batch'" in run("bacth", capsys=capsys)[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--version", capsys=capsys)
    assert code == 0
    assert out.startswith("deskside 0.")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{error.__module__}.{error.__name__}")
def test_every_error_of_ours_has_an_exit_code(error: type[Exception]) -> None:
    code = exit_code(error.__new__(error))
    assert code in (1, 2)
    assert code == next(row for kind, row in EXIT_CODES.items() if issubclass(error, kind))


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_an_error_is_one_line(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, kind("what and why"))
    code, out, err = run("doctor", capsys=capsys)
    assert (code, out) == (EXIT_CODES[kind], "")
    assert err == ("" if kind is KeyboardInterrupt else "error: what and why\n")


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_debug_shows_the_traceback(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, OSError("no disk"))
    if way == "variable":
        monkeypatch.setenv("DESKSIDE_DEBUG", "1")
    _, _, err = run(*(["--debug"] if way == "flag" else []), "doctor", capsys=capsys)
    assert "Traceback" in err
    assert err.endswith("error: no disk\n")


def test_an_unexpected_error_is_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, KeyError("x"))
    code, _, err = run("doctor", capsys=capsys)
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith("error: KeyError: 'x' (a bug in Deskside")


def test_a_reader_that_closes_the_pipe_is_not_reported() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from runtime.cli.main import main; main(['--help'])"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 1


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["batch", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    program = f"""
import sys
from runtime.cli.main import main
try:
    main({argv!r})
except SystemExit:
    print(sorted({{name.split('.')[0] for name in sys.modules}}), file=sys.stderr)
"""
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "fastapi", "llama_cpp", "httpx", "huggingface_hub", "jinja2", "gguf"}
    assert heavy.isdisjoint(eval(child.stderr))


@pytest.mark.parametrize(("given", "expected"), [(None, "1000"), ("7", "7")])
def test_threads_spin_briefly_by_default(monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == expected
