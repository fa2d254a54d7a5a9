"""The scripts of the peers' own Python, with stand-ins for the libraries that are installed there alone."""

import io
import json
import subprocess
import sys
from importlib import import_module, reload
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.errors import ServerFailed
from benchmarks.load.servers import ModelFile
from benchmarks.peers import servers
from benchmarks.peers.offline import PROMPT_STEPS, run_prompts
from benchmarks.peers.run import PeerRunFile, PeerSession, PeerWorkload
from benchmarks.peers.tasks import IK_LLAMA
from tests.support.benchmarks.peer_examples import peer_run


def script(name: str) -> ModuleType:
    """The script as a module, with the libraries that are stood in for at the moment."""
    return reload(import_module(f"benchmarks.peers.scripts.{name}"))


def params() -> SimpleNamespace:
    """The wheel's own defaults, of those parameters that a profile may change."""
    cpu = [SimpleNamespace(n_threads=-1) for _ in range(2)]
    return SimpleNamespace(
        model=SimpleNamespace(path=""), cpuparams=cpu[0], cpuparams_batch=cpu[1],
        n_parallel=1, n_ctx=0, kv_unified=False, swa_full=False, cache_ram_mib=8192,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("profile", "slots", "context", "unified", "ram"),
    [
        ("unified", 16, 32768, True, 0),
        ("unified-ram", 16, 32768, True, 8192),
        ("split", 16, 32768, False, 0),
        ("split-ram", 16, 32768, False, 8192),
        ("shipped", 4, 0, True, 8192),
    ],
)
def test_each_profile_of_llama_server(
    monkeypatch: pytest.MonkeyPatch, profile: str, slots: int, context: int, unified: bool, ram: int
) -> None:
    library = ModuleType("xllamacpp")
    library.CommonParams = params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    serve = script("serve_xllamacpp")
    made = serve.settings("m.gguf", 8000, 2, profile, 2048)
    assert (made.n_parallel, made.n_ctx, made.kv_unified, made.cache_ram_mib) == (slots, context, unified, ram)
    assert made.swa_full == (profile != "shipped")
    assert (made.model.path, made.port, made.cpuparams.n_threads, made.cpuparams_batch.n_threads) == (
        *("m.gguf", 8000),
        *(2, 2),
    )
    with pytest.raises(ValueError, match="unknown profile 'best'"):
        serve.settings("m.gguf", 8000, 2, "best", 2048)


def test_every_profile_of_the_comparison_is_one_of_the_script() -> None:
    text = Path(servers.script("serve_xllamacpp.py")).read_text(encoding="utf-8")
    for profile in (*servers.CANDIDATES, servers.SHIPPED):
        file = ModelFile(Path(__file__), Path(), "Q8_0", "0" * 64, servers.CHOSEN)
        plan = servers.llama_server_plan(file, 2, profile, Path("python"), 4096)
        assert f'"{servers.LLAMA_SERVER_ARGUMENTS[profile]}"' in text
        assert plan.name == f"llama-server {profile}, chosen"
        assert plan.slow == plan.once == (profile == servers.SHIPPED)
        assert ("4,096 cells" in plan.facts.settings) == (profile != servers.SHIPPED)


class IkLibrary(ModuleType):
    """The calls that the timing makes; keeps each decoded batch as (token, position, sequence, wants logits)."""

    def __init__(self, code: int = 0) -> None:
        super().__init__("ik_llama_cpp._ctypes_api")
        self.code = code
        self.cleared = 0
        self.batches: list[list[tuple[int, int, int, bool]]] = []
        self.shape = SimpleNamespace()
        self.model = SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1

    def llama_model_default_params(self) -> SimpleNamespace:
        return self.model

    def llama_context_default_params(self) -> SimpleNamespace:
        return self.shape

    def llama_vocab_n_tokens(self, vocab: int) -> int:
        return 50

    def llama_batch_init(self, size: int, embd: int, n_seq: int) -> SimpleNamespace:
        columns = {name: [0] * size for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(size)], **columns)

    def llama_kv_cache_clear(self, context: int) -> None:
        self.cleared += 1

    def llama_decode(self, context: int, batch: Any) -> int:
        rows = range(batch.n_tokens)
        self.batches.append([(batch.token[n], batch.pos[n], batch.seq_id[n][0], batch.logits[n]) for n in rows])
        return self.code


def time_ik(monkeypatch: pytest.MonkeyPatch, library: IkLibrary) -> dict[str, Any]:
    """The script's answer to a job of two repetitions."""
    package = ModuleType("ik_llama_cpp")
    package._ctypes_api = library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ik_llama_cpp", package)
    monkeypatch.setitem(sys.modules, "ik_llama_cpp._ctypes_api", library)
    job = {"gguf": "m.gguf", "threads": 2, "steps": {"two": [[0, 3], [1, 2]], "one": [[0, 4]]}, "repetitions": 2}
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(job)))
    monkeypatch.setattr(sys, "stdout", out)
    script("time_ik_llama").main()
    answer: dict[str, Any] = json.loads(out.getvalue())["seconds"]
    return answer


def test_ik_llama_computes_every_step_in_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    library = IkLibrary()
    seconds = time_ik(monkeypatch, library)
    assert {step: (list(took), len(took[IK_LLAMA])) for step, took in seconds.items()} == {
        "two": ([IK_LLAMA], 2),
        "one": ([IK_LLAMA], 2),
    }
    assert library.cleared == len(library.batches) == 2 * (2 + 1)
    shapes = [[row[1:] for row in batch] for batch in library.batches]
    assert shapes[0] == [(0, 0, False), (1, 0, False), (2, 0, True), (0, 1, False), (1, 1, True)]
    assert [row[1:] for row in library.batches[-1]] == [(n, 0, n == 3) for n in range(4)]
    assert {token < 50 for batch in library.batches for token, *_ in batch} == {True}
    assert (library.model.repack_tensors, library.model.flash_attn, library.shape.flash_attn) == (True, False, False)
    assert (library.shape.n_threads, library.shape.n_threads_batch, library.shape.n_ubatch) == (2, 2, 5)


def test_ik_llama_that_cannot_decode_gives_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="llama_decode failed with code -3"):
        time_ik(monkeypatch, IkLibrary(code=-3))


def test_prompts_are_timed_in_turns_and_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[str] = []

    def answer(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[-1])
        job = json.loads(given["input"])
        engines = [IK_LLAMA] if command[0] == "peers-python" else job["kinds"]
        seconds = {step: dict.fromkeys(engines, [0.5] * job["repetitions"]) for step in job["steps"]}
        failed = job["gguf"].endswith("bad.gguf")
        return subprocess.CompletedProcess(command, int(failed), json.dumps({"seconds": seconds}), "no such file")

    monkeypatch.setattr("benchmarks.peers.offline.subprocess.run", answer)
    file = ModelFile(Path("m.gguf"), Path(), "Q8_0", "0" * 64, "chosen")
    session = PeerSession(PeerWorkload({}, (), 2), PeerRunFile(peer_run(), tmp_path / "run.json"), lambda *_: None)
    run_prompts([file], 2, Path("peers-python"), session)
    ours, theirs = "benchmarks.prefill.race_child", servers.script("time_ik_llama.py")
    assert commands == [ours, theirs, theirs, ours]
    passes = session.file.run.prompts
    assert len(passes) == 2 * len(PROMPT_STEPS) * 3
    assert {(one.engine, one.tokens) for one in passes} == {
        (engine, tokens)
        for engine in ("deskside, --prefill stock", "deskside, --prefill auto", IK_LLAMA)
        for tokens in (110, 500)
    }
    with pytest.raises(ServerFailed, match=r"race_child failed .exit 1.: no such file"):
        run_prompts([ModelFile(Path("bad.gguf"), Path(), "Q8_0", "0")], 2, Path("peers-python"), session)
