"""The whole of `deskside bench peers`: install, convert, deal out the mails, measure stage by stage."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.load.servers import deskside_command, recipe_file
from benchmarks.load.workload import (
    LabelledExample,
    PromptTemplate,
    conversation_cells,
    conversation_turns,
    labels_of,
    long_prompts,
    read_examples,
    read_prompt,
)
from benchmarks.record import now_text, results_file, this_machine
from models.common.console import NamedProgress
from models.common.machine import logical_cores
from models.store.store import Store

from .offline import OfflineWork, run_bare, run_offline, run_prompts
from .record import PeerRun, PeerSettings
from .run import PeerRunFile, PeerSession, PeerWorkload, Slices, Stage, run_stage
from .servers import (
    BEST,
    CANDIDATES,
    SHIPPED,
    SPLIT,
    UNIFIED,
    PeerFiles,
    ServerPlan,
    deskside_plan,
    install_peers,
    llama_cpp_plan,
    llama_server_plan,
    peer_versions,
    prepare_files,
    script,
)
from .tasks import (
    BURST,
    CHAT,
    CONVERSATIONS,
    FEW_SHOT,
    HOP,
    LABEL,
    LABEL_ALONE,
    REPLY,
    REPLY_ALONE,
    REPLY_CHARS,
    PeerTask,
    deal,
    tasks,
)

HOP_REQUESTS = 30


def compare_peers(settings: PeerSettings, progress: NamedProgress) -> tuple[PeerRun, Path]:
    """Install, convert and measure; returns the run and its file. Raises BenchError and ModelError."""
    settings = settings.effective()
    folder = settings.folder.absolute()
    threads = settings.threads or logical_cores()
    labels, slices, warmup, offline = deal_examples(settings)
    python = install_peers(folder / "venv")
    files = prepare_files(Store(), folder, python)
    material = _Material(settings, files, python, threads, slices, warmup)
    out = settings.out or results_file("peers")
    run = PeerRun(
        started_at=now_text(),
        machine=this_machine(),
        peers=peer_versions(python),
        builds=_builds(python),
        threads=material.threads,
        repetitions=settings.repetitions,
        quick=settings.quick,
        seed=settings.seed,
        examples="test and validation split of email-triage; long prompts and warm-up from its train split",
    )
    session = PeerSession(PeerWorkload(slices, labels, settings.repetitions), PeerRunFile(run, out), progress)
    wanted = settings.stages.split(",")
    for name, stage in _stages(material):
        if name in wanted:
            run_stage(stage, session)
    if "offline" in wanted:
        run_offline(OfflineWork(offline, files, threads, python), session)
    if "bare" in wanted:
        run_bare(files.tuned, threads, session)
    if "prompts" in wanted:
        run_prompts([files.tuned, files.tuned_q4], threads, python, session)
    session.file.add(finished_at=now_text())
    return session.file.run, out


def deal_examples(
    settings: PeerSettings,
) -> tuple[tuple[str, ...], Slices, Sequence[LabelledExample], Sequence[LabelledExample]]:
    """Deal the mails out: labels, the slices of each task and way, the warm-up, and the offline file."""
    test, validation, train = (_split(name) for name in ("test", "validation", "train"))
    everything = tasks(settings.burst)
    n = settings.repetitions
    sizes = {LABEL: settings.requests, LABEL_ALONE: settings.alone, HOP: HOP_REQUESTS}
    sizes |= {REPLY: settings.reply_requests, REPLY_ALONE: settings.alone}
    sizes |= {FEW_SHOT: settings.requests, BURST: settings.burst}
    tuned, base = (LABEL, LABEL_ALONE), (FEW_SHOT,)
    replies = long_prompts(train[: -HOP_REQUESTS * n - settings.warmup], REPLY_CHARS)
    spare = [replace(example, label="") for example in train[-HOP_REQUESTS * n - settings.warmup : -settings.warmup]]
    slices = {
        **_deal(test + validation, [everything[name] for name in tuned], sizes, n, settings.seed),
        **_deal(test + validation, [everything[name] for name in base], sizes, n, settings.seed + 1),
        **_deal(replies, [everything[name] for name in (REPLY, REPLY_ALONE)], sizes, n, settings.seed),
        **_deal(spare, [everything[HOP]], sizes, n, settings.seed),
    }
    # Every burst goes to a new process, so all bursts may have the same mails.
    burst = deal(test + validation, {BURST: (1, settings.burst)}, settings.seed + 2)[BURST]
    slices |= {(BURST, way): burst * n for way in everything[BURST].ways}
    # Those who converse meet a new process too.
    slices |= {(CONVERSATIONS, CHAT): [conversation_turns(train, settings.people, settings.turns)] * n}
    offline = deal(test + validation, {"offline": (1, settings.offline)}, settings.seed + 3)["offline"][0]
    return labels_of(test), slices, train[-settings.warmup :], offline


@dataclass(frozen=True, slots=True)
class _Material:
    """The inputs of the stages."""

    settings: PeerSettings
    files: PeerFiles
    python: Path
    threads: int
    slices: Slices
    warmup: Sequence[LabelledExample]


def _split(name: str) -> tuple[LabelledExample, ...]:
    examples = read_examples(recipe_file("data", f"{name}.jsonl.gz"))
    return tuple(replace(example, id=f"{name}/{example.id}") for example in examples)


def _deal(
    pool: Sequence[LabelledExample], chosen: Sequence[PeerTask], sizes: dict[str, int], repetitions: int, seed: int
) -> dict[tuple[str, str], list[list[LabelledExample]]]:
    counts = {task.name: (repetitions * len(task.ways), sizes[task.name]) for task in chosen}
    dealt = deal(pool, counts, seed)
    return {
        (task.name, way): dealt[task.name][number * repetitions : (number + 1) * repetitions]
        for task in chosen
        for number, way in enumerate(task.ways)
    }


def _stages(m: _Material) -> list[tuple[str, Stage]]:
    files, threads = m.files, m.threads
    ours, f16, ours_q4 = (deskside_plan(file, threads) for file in (files.tuned, files.tuned_f16, files.tuned_q4))
    peers = [llama_server_plan(files.tuned, threads, profile, m.python) for profile in CANDIDATES]
    peers_q4 = [llama_server_plan(files.tuned_q4, threads, profile, m.python) for profile in (UNIFIED, SPLIT)]
    shipped = llama_server_plan(files.tuned, threads, SHIPPED, m.python)
    python, python_shipped = (llama_cpp_plan(files.tuned, threads, profile, m.python) for profile in (BEST, SHIPPED))
    everything = tasks(m.settings.burst)

    def work(*rows: tuple[str, Sequence[ServerPlan]]) -> list[tuple[PeerTask, frozenset[str]]]:
        return [(everything[name], frozenset(plan.name for plan in plans)) for name, plans in rows]

    tuned = work(
        (LABEL, (ours, f16, ours_q4, *peers, *peers_q4, shipped, python, python_shipped)),
        (REPLY, (ours, ours_q4, *peers, shipped, python)),
        (LABEL_ALONE, (ours, *peers, python)),
        (REPLY_ALONE, (ours, *peers, python)),
        (HOP, (ours,)),
    )
    base = [deskside_plan(files.base, threads)]
    base += [llama_server_plan(files.base, threads, profile, m.python) for profile in (*CANDIDATES, SHIPPED)]
    talkers = [ours]
    cells = conversation_cells(m.settings.turns)
    talkers += [llama_server_plan(files.tuned, threads, profile, m.python, cells) for profile in CANDIDATES]
    prompt = read_prompt(recipe_file("prompts", "few_shot.txt"), "few-shot prompt")
    bare = PromptTemplate("bare mail")
    servers = (ours, *peers, f16, ours_q4, *peers_q4, shipped, python, python_shipped)
    fine_tune = Stage(servers, tuned, bare, m.warmup)
    return [
        ("fine-tune", fine_tune),
        ("base", Stage(base, work((FEW_SHOT, base)), prompt, m.warmup)),
        ("cold", Stage(base, work((BURST, base)), prompt, (), cold=True)),
        ("conversations", Stage(talkers, work((CONVERSATIONS, talkers)), bare, (), cold=True)),
    ]


def _builds(python: Path) -> dict[str, str]:
    """The compile options that each llama.cpp reports: part of any difference is the build."""
    theirs = subprocess.run(
        [str(python), "-P", script("serve_xllamacpp.py"), "--system-info"], capture_output=True, text=True, check=True
    )
    ours = subprocess.run(deskside_command("doctor", "--json"), capture_output=True, text=True, check=False)
    try:
        described = str(json.loads(ours.stdout)["backend"])
    except (ValueError, KeyError, TypeError):
        described = f"`deskside doctor` did not report it (exit {ours.returncode})"
    return {"deskside and llama_cpp.server": described, "llama-server (xllamacpp)": theirs.stdout.strip()}
