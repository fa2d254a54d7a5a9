"""The set-up says what it does: what is compiled, how far that is, what remains, and why it failed."""

import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runtime.cli.install import (
    PhaseFailed,
    Told,
    collected,
    compile_estimate,
    compiled,
    minutes,
    pinned_version,
    run,
    split_lock,
)

ROOT = Path(__file__).parents[3]
LOCK = """\
jinja2==3.1.6 \\
    --hash=sha256:1
# a remark
llama-cpp-python==0.3.36 \\
    --hash=sha256:2 \\
    --hash=sha256:3
numpy==2.4.1 ; python_version >= "3.11" \\
    --hash=sha256:4
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_engine_is_pinned_by_itself_and_no_line_is_lost() -> None:
    engine, others = split_lock(LOCK)
    assert engine.splitlines() == ["llama-cpp-python==0.3.36 \\", "    --hash=sha256:2 \\", "    --hash=sha256:3"]
    assert sorted((engine + others).splitlines()) == sorted(LOCK.splitlines())
    assert "llama" not in others
    assert pinned_version(engine) == "0.3.36"
    with pytest.raises(PhaseFailed, match="llama-cpp-python"):
        pinned_version("")


def test_the_real_lock_file_pins_the_engine() -> None:
    engine, others = split_lock((ROOT / "requirements.lock").read_text())
    assert pinned_version(engine)
    assert "--hash=sha256:" in engine
    assert "\nllama-cpp-python" not in others


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("  [50/200] Building CXX object x.cpp.o", 0.25),
        ("  [ 25%] Building CXX object x.cpp.o", 0.25),
        ("[100%] Built target llama", 1.0),
        ("  Running command Building wheel for llama-cpp-python", None),
        ("  -- Check size of int [4/8]", None),
    ],
)
def test_ninja_and_make_tell_how_far_the_compile_is(line: str, share: float | None) -> None:
    assert compiled(line) == share


def test_collected_packages_are_counted_once() -> None:
    lines = ("Collecting a==1", "  Downloading a.whl", "Collecting a==1", "Collecting b")
    assert list(map(collected(4), lines)) == [0.25, None, 0.25, 0.5]
    parts = ("Processing /w/big_part-1.0-py3-none-any.whl", "Processing ./x-y-2.tar.gz", "Ignoring z: markers 's'")
    assert list(map(collected(4), parts)) == [0.25, 0.5, 0.75], "files of a folder, and what is for other machines"


def test_the_time_left_goes_by_the_last_minute() -> None:
    clock, out = Clock(), io.StringIO()
    told = Told(out, clock)
    told.phase("Compiling")
    for now_s, share in ((60, 0.25), (120, 0.36), (240, 0.36)):  # other work slows it, then stops it
        clock.now_s = now_s
        told.progress(share)
    clock.now_s = 300
    told.progress(0.46)
    assert [line.rpartition("about ")[2] for line in out.getvalue().splitlines()[1:]] == [
        "3 min left",
        "6 min left",
        "5 min left",
    ]


def test_unpacking_is_a_phase_of_its_own(tmp_path: Path) -> None:
    out = io.StringIO()
    script = "print('Collecting a'); print('Installing collected packages: a'); print('Collecting b')"
    run([sys.executable, "-c", script], tmp_path / "log", Told(out), collected(2), unpacks=True)
    assert [line[9:] for line in out.getvalue().splitlines()] == ["     50% of it, about 1 s left", "Unpacking them"]


@pytest.mark.parametrize("n_cores", [1, 2, 128])
def test_its_lines_fit_80_columns(n_cores: int) -> None:
    assert len(f"==> 10:06 llama.cpp is to be compiled, once: {compile_estimate(n_cores)}") <= 80


@pytest.mark.parametrize(
    ("n_cores", "said"),
    [
        (1, "6 to 21 minutes on 1 idle core"),
        (2, "3 to 10 minutes on 2 idle cores"),
        (32, "about a minute on 32 idle cores"),
    ],
)
def test_the_first_estimate_spans_fast_and_slow_processors(n_cores: int, said: str) -> None:
    assert compile_estimate(n_cores) == said


def test_a_time_is_said_as_one_would() -> None:
    assert [minutes(seconds) for seconds in (0, 7.4, 59.4, 59.9, 400)] == ["1 s", "7 s", "59 s", "1 min", "7 min"]


def test_phases_and_progress_have_a_clock() -> None:
    clock, out = Clock(), io.StringIO()
    told = Told(out, clock)
    told.phase("Compiling")
    for now_s, share in ((1, 0.01), (60, 0.1), (61, 0.11), (300, 0.5), (600, 1.0)):
        clock.now_s = now_s
        told.progress(share)
    told.phase("Ready")
    assert out.getvalue().splitlines() == [
        "==> 0:00 Compiling",
        "==> 1:00      10% of it, about 9 min left",
        "==> 5:00      50% of it, about 5 min left",
        "==> 10:00     100% of it, about 1 s left",
        "==> 10:00 Ready",
    ]


def test_a_terminal_shows_progress_in_place() -> None:
    out = Terminal()
    told = Told(out, Clock())
    told.phase("Compiling")
    told.progress(0.5)
    told.progress(0.6)
    told.phase("Ready")
    assert out.getvalue().count("\n") == 2
    assert out.getvalue().endswith("\r\x1b[K==> 0:00 Ready\n")


def test_a_command_that_fails_shows_its_end_and_keeps_all(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import sys\nfor n in range(90): print('line', n)\nsys.exit(3)"
    with pytest.raises(PhaseFailed, match=rf"ended with 3; all it said is in {log}") as caught:
        run([sys.executable, "-c", script], log)
    assert "line 89" in str(caught.value)
    assert "line 3\n" not in str(caught.value)
    assert log.read_text().startswith("line 0\n")


def test_a_commands_output_becomes_progress(tmp_path: Path) -> None:
    out = io.StringIO()
    run([sys.executable, "-c", "print('[1/2] a'); print('[2/2] b')"], tmp_path / "log", Told(out), compiled)
    assert out.getvalue().count("of it") == 2


def test_the_help_of_make_fits_80_columns_without_breaking_words() -> None:

    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    told = " ".join(shown.split())
    for verb, words in re.findall(r"^([a-z-]+):.*## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert f"make {verb} {words.replace('$$', '$')}" in told


def test_extras_are_installed_from_the_folder_since_deskside_is_on_no_index() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [path for house in ("models", "runtime", "convert", "benchmarks") for path in (ROOT / house).rglob("*")]
    named: set[str] = set()
    for path in [*files, ROOT / "README.md", ROOT / "Makefile"]:
        if path.suffix in (".py", ".md", ".toml", ""):
            text = path.read_text() if path.is_file() else ""
            assert not re.search(r"install [^\n]*deskside\[", text), path
            named |= set(re.findall(r"install -e '\.\[([\w-]+)\]'", text))
    assert named == {"bench", "default-model", "finetune", "recipe", "tables"}
    assert named <= set(extras)
