"""A first use on a terminal of 80 columns: no line is wider, the verdict stands first, and nothing needed is cut."""

from pathlib import Path
from typing import Literal

import pytest

from benchmarks.conversion.record import ConverterSample, ConvertRun, InstallSize
from benchmarks.peers.record import save_peer_run
from benchmarks.peers.tasks import DESKSIDE
from benchmarks.record import save_json, save_run
from convert.cli import summary
from models.common.console import page
from models.manifest import MANIFEST_FILE, Accuracy, Adapter, Base, dump_manifest
from models.quality import QUALITY_FILE
from models.store.store import Store
from runtime.cli.main import VERBS, main
from tests.support.benchmarks.examples import arm, run_of, sample
from tests.support.benchmarks.peer_examples import MACHINE, made, offline, peer_run
from tests.support.models.build import artefact, fill, manifest
from tests.support.models.ladder import ladder

WIDTH = 80
PARTS = " ".join(f"dist://tiny-gguf-part{n}/tiny_gguf_part{n}/data/tiny.gguf.part0{n - 1}" for n in range(1, 5))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A fine-tune with a card, a ladder and a base that came in parts; a current folder, so that paths are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DESKSIDE_HOME", "home")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    store = Store()
    served = Accuracy(what="fine-tune as served", split="test", correct=9, total=10, interval_low=0.6, interval_high=1)
    tuned = manifest("mail").model_copy(
        update={
            "description": "Sorts an e-mail into one of seven mailing lists, or spam. Send it as the user's message.",
            "labels": tuple(f"list-{n}" for n in range(20)),
            "base": Base(name="tiny", source=PARTS, sha256=artefact().sha256),
            "adapter": Adapter(path="adapter", rank=16),
            "quality": (served,),
        }
    )
    with store.staging("mail") as folder:
        fill(folder, "mail")
        (folder / MANIFEST_FILE).write_text(dump_manifest(tuned), encoding="utf-8")
        (folder / "README.md").write_text("# mail\n\n![Speed](quality.svg)\n", encoding="utf-8")
        save_json(folder / QUALITY_FILE, ladder().model_dump(mode="json"))
    return store


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command prints on stdout; fails if a line is wider than the terminal."""
    with pytest.raises(SystemExit):
        main(argv)
    out = capsys.readouterr().out
    wide = [line for line in out.splitlines() if len(line) > WIDTH]
    assert out
    assert not wide
    return out


@pytest.mark.parametrize("argv", [("--help",), *((verb, "--help") for verb in VERBS)], ids=" ".join)
def test_help_fits(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "…" not in shown(capsys, *argv).replace("…/v1", ""), "no word of it is cut"


def test_the_doctor_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "doctor")
    assert "fix: deskside pull email-triage" in text
    assert "mail Q8_0" in text


def test_the_list_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "models", "list")
    for name in ("mail", "email-triage", "gemma-3-270m"):
        assert any(line.split()[:1] == [name] for line in text.splitlines())


def test_a_shown_model_is_text_for_reading(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "models", "show", "mail")
    assert not any(mark in text for mark in ("dist://", "![", "](", "**", "| --"))
    assert text.index("0.900 [0.600, 1.000]") < text.index("Q4_0 was chosen for") < text.index("deskside serve mail")
    assert "the packages tiny-gguf-part1 to tiny-gguf-part4" in text
    assert "home/models/mail/README.md" in text
    rows = [line.split() for line in text.splitlines()]
    for one in ladder().candidates:
        row = next(row for row in rows if row[:1] == [one.name] and "MiB" in row)
        assert " ".join(row).endswith(one.verdict), "verdicts stand in their rows, whole"


def test_a_report_begins_with_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    slow = {users: [sample(n, start=n, first=11, finish=12.345) for n in range(64)] for users in (1, 4, 16)}
    hosted = arm("hosted (replayed)", slow, kind="replayed", streams=False, measures_accuracy=False)
    base = arm("base-few-shot", slow, shared_share=0.9)
    save_run(Path("run.json"), run_of(arm("fine-tune", slow), base, hosted))
    text = shown(capsys, "bench", "report", "run.json")
    assert text.startswith("at 10,000 requests a month (assumed) the prompt is cheaper than the fine-tune")
    assert text.index("accuracy, fine-tune: 1.000") < text.index("Latency, ms")
    assert "12345 [12345, 12345]" in text
    assert "gemini-3.5-flash-lite " in text
    assert "claude-haiku-4-5 " in text
    assert "claude-haiku-5-5 " in text


def test_a_comparison_with_peers_begins_with_its_aims(capsys: pytest.CaptureFixture[str]) -> None:
    ours, best = f"{DESKSIDE}, chosen", "llama-server best, plain Q4_K_M"
    run = peer_run(
        made("label", "chat", ours, 1.0), made("label", "chat", best, 2.0), offline=(offline(DESKSIDE, "chat", 9),)
    )
    save_peer_run(Path("peers.json"), run)
    text = shown(capsys, "bench", "peers", "--report", "peers.json")
    assert text.split()[0] == "Aims"
    assert best in text
    assert "2.00 [2.00, 2.00]" in text


def test_a_comparison_of_converters_begins_with_its_aims(capsys: pytest.CaptureFixture[str]) -> None:
    names: tuple[Literal["deskside", "llama.cpp"], ...] = ("deskside", "llama.cpp")
    versions = {f"package-{n}": "1.2.3" for n in range(9)}
    run = ConvertRun(
        started_at="2026-11-22T12:00:00+00:00",
        machine=MACHINE,
        checkpoint="a checkpoint of random numbers in the shape of Gemma 3",
        parameters=270_000_000,
        checkpoint_bytes=1 << 29,
        commands={name: f"python -m {name} /a/long/folder --outfile out.gguf --outtype f16" for name in names},
        needs=tuple(InstallSize(converter=n, versions=versions, loaded_bytes=1, installed_bytes=2) for n in names),
        tensors=236,
        equal_tensors=236,
        conversions=tuple(
            ConverterSample(converter=name, wall_s=1.5, cpu_s=1.0, peak_bytes=3 << 20, load_before=0.5)
            for name in names
        ),
    )
    save_json(Path("convert.json"), run.model_dump(mode="json"))
    text = shown(capsys, "bench", "convert", "--report", "convert.json")
    assert text.index("(aim: at most") < text.index("236 of 236 tensors are equal")
    assert text.startswith("  wall time: ")


def test_the_summary_of_a_conversion_fits(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for line in summary(store.get("mail")):
        page().print(line)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.startswith("installed mail: Q8_0")
    assert text.endswith("next: deskside serve mail\n")
