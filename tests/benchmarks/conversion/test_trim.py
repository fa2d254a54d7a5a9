"""The comparison of trimmed files with whole ones: which are made, how they are timed, and what the ratios are."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.cli import create_app
from benchmarks.conversion import trim as trim_speed
from benchmarks.conversion.trim import TrimFile, TrimRun, TrimSettings, ratios
from benchmarks.errors import ServerFailed
from benchmarks.load import servers
from benchmarks.load.servers import recipe_file
from benchmarks.peers import servers as peer_servers
from benchmarks.peers.servers import CHOSEN, prepare_files
from benchmarks.record import save_json, this_machine
from models.common.files import sha256_file
from models.manifest import MANIFEST_FILE, Artefact, Manifest, dump_manifest, read_manifest
from models.store.store import Store
from tests.support.convert.tiny import write_model

_CONVERSION = read_manifest(recipe_file()).conversion
assert _CONVERSION is not None
RECIPES = _CONVERSION.quantization


def file(kind: str, *, trimmed: bool, size: int, prefill: float, decode: dict[int, float]) -> TrimFile:
    return TrimFile(
        kind=kind,
        trimmed=trimmed,
        tokens=16 if trimmed else 256,
        size_bytes=size << 20,
        sha256="0" * 64,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
    )


def run_of(*files: TrimFile) -> TrimRun:
    return TrimRun(
        started_at="2026-11-22T21:00:00+00:00",
        machine=this_machine(),
        backend="CPU",
        repetitions=5,
        prompt_tokens=112,
        answer_tokens=3,
        files=files,
    )


@pytest.fixture
def run() -> TrimRun:
    return run_of(
        file("Q8_0", trimmed=True, size=41, prefill=99, decode={1: 20, 8: 1, 16: 34}),
        file("Q4_0", trimmed=True, size=30, prefill=50, decode={1: 18, 8: 1, 16: 90}),
        file("Q4_0", trimmed=False, size=90, prefill=50, decode={1: 10, 8: 1, 16: 50}),
        file("Q8_0", trimmed=False, size=100, prefill=90, decode={1: 10, 8: 1, 16: 20}),
    )


def test_each_quantization_is_compared_with_itself_and_judged(run: TrimRun) -> None:
    found = {trimmed.kind: {one.name: (one.value, one.reached) for one in all_of} for trimmed, _, all_of in ratios(run)}
    assert found["Q8_0"] == {
        "size": (0.41, False), "decode ×1": (2.0, True), "decode ×16": (1.7, False), "prefill": (1.1, None)
    }  # fmt: skip
    assert found["Q4_0"]["size"] == (30 / 90, True)
    assert found["Q4_0"]["decode ×1"] == (1.8, True)


def test_a_run_is_shown_again_from_its_file(run: TrimRun, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_json(path, run.model_dump(mode="json"))
    shown = CliRunner().invoke(create_app(), ["trim", "--report", str(path)]).stdout
    assert "Q8_0: 16 of 256 tokens, 41 MiB of 100 MiB" in shown
    assert "size: 0.410 of the whole vocabulary's, aim MISSED" in shown
    assert "decode ×1: 2.000 of the whole vocabulary's, aim reached" in shown


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every conversion that is asked for; in its place a tiny model is installed."""
    asked: list[list[str]] = []

    def run(command: list[str], environment: dict[str, str]) -> None:
        asked.append(command[1:])
        if command[0] == "deskside":
            convert_with(command, environment)

    monkeypatch.setattr(servers, "deskside_command", lambda *arguments: ["deskside", *arguments])
    for module in (servers, peer_servers):
        monkeypatch.setattr(module, "run_to_end", run)
    return asked


def convert_with(command: list[str], environment: dict[str, str]) -> None:
    kind = command[command.index("--quant") + 1] if "--quant" in command else RECIPES
    name = command[command.index("--name") + 1]
    install(Store(Path(environment["DESKSIDE_HOME"])), name, kind.upper())


def install(store: Store, name: str, kind: str) -> None:
    with store.staging(name) as folder:
        path = write_model(folder / f"{name}-{kind}.gguf")
        artefact = Artefact(file=path.name, quantization=kind, size_bytes=path.stat().st_size, sha256=sha256_file(path))
        manifest = Manifest(name=name, licence="L", artefacts=(artefact,))
        (folder / MANIFEST_FILE).write_text(dump_manifest(manifest))


def test_each_quantization_is_made_as_the_recipe_has_it_and_whole_and_timed_in_one_run(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[dict[str, object]] = []

    def timed(job: dict[str, object]) -> dict[str, object]:
        jobs.append(job)
        assert isinstance(job["files"], dict)
        speeds = {"prefill_tokens_per_s": 3.0, "decode_tokens_per_s": {"1": 1.0, "8": 2.0, "16": 4.0}}
        return {"backend": "CPU", "speeds": dict.fromkeys(job["files"], speeds)}

    monkeypatch.setattr(trim_speed, "_timed", timed)
    settings = TrimSettings(kinds="q8_0,Q4_0", folder=tmp_path)
    run = trim_speed.compare_trimmed(settings, lambda *_: None)
    kinds = [(command[command.index("--quant") + 1], "--whole-vocab" in command) for command in commands]
    assert kinds == [("q8_0", False), ("q8_0", True), ("Q4_0", False), ("Q4_0", True)]
    assert len(jobs) == 1, "both files of a pair are timed in the same run"
    assert [(file.kind, file.trimmed, file.decode_tokens_per_s[16]) for file in run.files] == [
        ("Q8_0", True, 4.0), ("Q8_0", False, 4.0), ("Q4_0", True, 4.0), ("Q4_0", False, 4.0)
    ]  # fmt: skip
    trim_speed.compare_trimmed(settings, lambda *_: None)
    assert len(commands) == 4, "what is there is not made again"
    trim_speed.compare_trimmed(settings.model_copy(update={"keep": 300, "as_stored": True}), lambda *_: None)
    again = [command[command.index("--keep") + 1] for command in commands[4:]]
    assert again == ["300", "300"], "the whole ones serve again"
    assert [job["repack"] for job in jobs] == [True, True, False]


def test_the_recipes_own_quantization_is_the_recipes_own_file(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"prefill_tokens_per_s": 3.0, "decode_tokens_per_s": {"1": 1.0, "8": 2.0, "16": 4.0}}
    monkeypatch.setattr(
        trim_speed, "_timed", lambda job: {"backend": "CPU", "speeds": dict.fromkeys(job["files"], speeds)}
    )
    settings = TrimSettings(kinds=RECIPES.lower(), folder=tmp_path)
    trim_speed.compare_trimmed(settings, lambda *_: None)
    trim_speed.compare_trimmed(settings.model_copy(update={"keep": 300}), lambda *_: None)
    options = [{option for option in command if option in {"--quant", "--trim-vocab"}} for command in commands]
    assert options == [set(), {"--quant"}, {"--quant", "--trim-vocab"}]


def test_what_cannot_be_timed_says_why(tmp_path: Path) -> None:
    job = {"files": {"a": str(tmp_path / "none.gguf")}, "rounds": 1, "prompt_tokens": 4, "answer_tokens": 1}
    with pytest.raises(ServerFailed, match=r"cannot be timed .*none\.gguf"):
        trim_speed._timed(job)


def test_the_peers_q4_k_m_is_the_plain_conversion(commands: list[list[str]], tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    for name in ("email-triage", "gemma-3-270m"):
        install(store, name, "Q8_0")
    files = prepare_files(store, tmp_path / "peers", Path("python"))
    made = {command[command.index("--quant") + 1]: command for command in commands if "--quant" in command}
    assert files.tuned.title == CHOSEN
    assert (files.tuned.quantization, files.tuned_q4.title) == ("Q8_0", "Q4_K_M")
    assert "--whole-vocab" in made["Q4_K_M"]
    assert "--whole-vocab" not in made["F16"], "the same model as the one that is served"
