"""Measurements without HTTP: a file of mails labelled offline, the engine beside a bare decode loop, prompts alone.

`deskside batch` and CTranslate2 int8 each label the file as one process. Start and model load are measured with a file
of one mail and subtracted, for both alike. CTranslate2 gets token ids, so its time lacks the tokenizing that Deskside's
includes. Prompts are timed beside ik_llama.cpp, which brings no server.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.errors import ServerFailed
from benchmarks.load.servers import ModelFile, deskside_command, free_port, serve_command, serving
from benchmarks.load.workload import LabelledExample

from .record import BarePass, OfflinePass, PromptPass
from .run import PeerSession, Slices
from .servers import PeerFiles, end_tokens, script
from .tasks import CHAT, CONSTRAINED, DECISIONS, DESKSIDE, LABEL, LABEL_TOKENS, REPLY, REPLY_TOKENS, asking

CTRANSLATE2 = "ctranslate2 int8"
BATCH = 16
PROMPT_STEPS = {"one prompt of 110 tokens": [[0, 110]], "5 prompts of 100 tokens": [[seq, 100] for seq in range(5)]}
PROMPT_TIMINGS = 5
# What Deskside's own timings are called in its answer, and in the report.
PRODUCTS = {"stock": f"{DESKSIDE}, --prefill stock", "auto": f"{DESKSIDE}, --prefill auto"}
ARRIVAL, SORTED = "in order of arrival", "sorted by length"
Labeller = Callable[[Sequence[LabelledExample]], list[str]]


@dataclass(frozen=True, slots=True)
class OfflineWork:
    """A file of mails to label: the mails, the models, the CPU threads and the Python of the peers."""

    examples: Sequence[LabelledExample]
    files: PeerFiles
    threads: int
    peers_python: Path


@dataclass(frozen=True, slots=True)
class TokenizedMails:
    """The token ids of each mail's prompt, by mail, and the text of each label, by its token ids."""

    prompts: dict[str, list[int]]
    labels: dict[tuple[int, ...], str]


def run_offline(work: OfflineWork, session: PeerSession) -> None:
    """Measure every way of labelling in turn, in reversed order with each repetition."""
    labels = session.workload.labels
    tokens = _tokens(work, labels)
    ways: list[tuple[str, str, Labeller]] = [
        (DESKSIDE, way, _deskside_batch(work, way, labels)) for way in (CONSTRAINED, DECISIONS, CHAT)
    ]
    ways += [(CTRANSLATE2, way, _ctranslate2(work, way, tokens)) for way in (ARRIVAL, SORTED)]
    for repetition in range(session.workload.repetitions):
        for server, way, label in ways if repetition % 2 == 0 else ways[::-1]:
            what = f"offline, {way}: {server}, repetition {repetition + 1}"
            session.progress(what, 0, len(work.examples))
            session.file.add(offline=(_timed(server, way, repetition, work.examples, label),))
            session.progress(what, len(work.examples), len(work.examples))


def run_bare(file: ModelFile, threads: int, session: PeerSession) -> None:
    """Measure the engine beside a bare loop on labels and replies of 16 clients.

    Raises ServerFailed with the end of the child's stderr.
    """
    session.progress("engine beside a bare loop", 0, 1)
    arguments = [str(file.folder), str(threads), str(session.workload.repetitions)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.peers.scripts.bare_loop", *arguments],
        input=json.dumps(_bare_work(session.workload.slices)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServerFailed(f"the bare loop failed (exit {done.returncode}): {done.stderr[-1000:]}")
    session.file.add(bare=tuple(BarePass.model_validate_json(line) for line in done.stdout.splitlines()))
    session.progress("engine beside a bare loop", 1, 1)


def run_prompts(files: Sequence[ModelFile], threads: int, peers_python: Path, session: PeerSession) -> None:
    """Time steps of prompts in our engine and in ik_llama.cpp, in turns: one process each for every repetition.

    Raises ServerFailed with the end of the child's stderr.
    """
    engines = [
        [sys.executable, "-P", "-m", "benchmarks.prefill.race_child"],
        [str(peers_python), "-P", script("time_ik_llama.py")],
    ]
    for repetition in range(session.workload.repetitions):
        for file in files:
            what = f"prompts: {file.title or file.quantization}, repetition {repetition + 1}"
            session.progress(what, 0, 1)
            job = {"gguf": str(file.path), "steps": PROMPT_STEPS, "threads": threads, "kinds": list(PRODUCTS)}
            for command in engines if repetition % 2 == 0 else engines[::-1]:
                done = _run_timings(command, job | {"repetitions": PROMPT_TIMINGS})
                session.file.add(prompts=prompt_passes(done, file.title or file.quantization, repetition))
            session.progress(what, 1, 1)


def prompt_passes(answer: str, file: str, repetition: int) -> tuple[PromptPass, ...]:
    """The passes in a child's answer: `{"seconds": {step: {engine: [seconds, …]}}, …}`."""
    return tuple(
        PromptPass(
            file=file,
            step=step,
            engine=PRODUCTS.get(engine, engine),
            tokens=sum(n for _, n in PROMPT_STEPS[step]),
            repetition=repetition,
            seconds=tuple(seconds),
        )
        for step, engines in json.loads(answer)["seconds"].items()
        for engine, seconds in engines.items()
    )


def batch_lines(examples: Sequence[LabelledExample], way: str, labels: Sequence[str]) -> str:
    """The input of `deskside batch`: one line per mail, with the same body as over HTTP."""
    asked = asking(LABEL, way, DESKSIDE, labels)
    assert asked is not None
    endpoint, fields = asked
    url = "/v1/decisions" if endpoint == "decisions" else "/v1/chat/completions"
    lines = []
    for example in examples:
        text = {"input": example.text} if endpoint == "decisions" else {"messages": [_user(example.text)]}
        lines.append({"custom_id": example.id, "method": "POST", "url": url, "body": text | fields})
    return "".join(json.dumps(line) + "\n" for line in lines)


def batch_answers(lines: str, examples: Sequence[LabelledExample]) -> list[str]:
    """The labels in `deskside batch`'s output, in the order of `examples`. KeyError when one is missing."""
    bodies = {}
    for line in map(json.loads, lines.splitlines()):
        body = line["response"]["body"]
        chat = "choices" in body
        bodies[line["custom_id"]] = body["choices"][0]["message"]["content"] if chat else body["answers"][0]["choice"]
    return [str(bodies[example.id]).strip() for example in examples]


def _timed(server: str, way: str, repetition: int, examples: Sequence[LabelledExample], label: Labeller) -> OfflinePass:
    answers: list[str] = []
    error: str | None = None
    walls = []
    try:
        for part in (examples[:1], examples):
            began = time.perf_counter()
            answers = label(part)
            walls.append(time.perf_counter() - began)
    except (subprocess.CalledProcessError, OSError, KeyError, ValueError) as failure:
        stderr = getattr(failure, "stderr", "") or ""
        error = f"{type(failure).__name__}: {failure} {stderr[-300:]}"
        walls = [*walls, 0.0, 0.0][:2]
    right = sum(answer == example.label for answer, example in zip(answers, examples, strict=False))
    return OfflinePass(server=server, way=way, repetition=repetition, mails=len(examples), wall_one_s=walls[0],
                       wall_s=walls[1], right=right, error=error)  # fmt: skip


def _deskside_batch(work: OfflineWork, way: str, labels: Sequence[str]) -> Labeller:
    def label(examples: Sequence[LabelledExample]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "mails.jsonl", Path(folder) / "labels.jsonl"
            source.write_text(batch_lines(examples, way, labels), encoding="utf-8")
            flags = ["--model", str(work.files.tuned.folder), "--threads", str(work.threads)]
            _run(deskside_command("batch", str(source), str(target), *flags))
            return batch_answers(target.read_text(encoding="utf-8"), examples)

    return label


def _ctranslate2(work: OfflineWork, way: str, tokens: TokenizedMails) -> Labeller:
    ends = [str(token) for token in end_tokens(work.files.tuned.path)]

    def label(examples: Sequence[LabelledExample]) -> list[str]:
        order = list(examples)
        if way == SORTED:
            order.sort(key=lambda example: len(tokens.prompts[example.id]))
        prompts = json.dumps([tokens.prompts[example.id] for example in order])
        arguments = ["label", str(work.files.ctranslate2), str(work.threads), str(BATCH), *ends]
        answers = json.loads(_run([str(work.peers_python), "-P", script("run_ctranslate2.py"), *arguments], prompts))
        texts = {e.id: tokens.labels.get(tuple(ids), "") for e, ids in zip(order, answers, strict=True)}
        return [texts[example.id] for example in examples]

    return label


def _run_timings(command: Sequence[str], job: dict[str, object]) -> str:
    # As the server sets it: threads that spin for ever take the time of those that they wait for.
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ServerFailed(f"{Path(command[-1]).name} failed (exit {done.returncode}): {done.stderr[-1000:]}")
    return done.stdout


def _run(command: Sequence[str], text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _tokens(work: OfflineWork, labels: Sequence[str]) -> TokenizedMails:
    """Render and tokenize through our own server, with the model's own template and tokenizer."""
    port = free_port()
    with (
        serving(serve_command(str(work.files.tuned.folder), port), port) as server,
        httpx.Client(base_url=server.base_url.removesuffix("/v1"), trust_env=False, timeout=60) as http,
    ):

        def tokenize(text: str) -> list[int]:
            return list(http.post("/tokenize", json={"content": text}).raise_for_status().json()["tokens"])

        prompts = {}
        for example in work.examples:
            body = {"messages": [_user(example.text)]}
            rendered = http.post("/apply-template", json=body).raise_for_status().json()["prompt"]
            prompts[example.id] = tokenize(rendered)
        return TokenizedMails(prompts, {tuple(tokenize(label)): label for label in labels})


def _bare_work(slices: Slices) -> dict[str, dict[str, object]]:
    return {
        task: {"texts": [example.text for example in slices[task, CHAT][0]], "tokens": tokens, "stops": stops}
        for task, tokens, stops in ((LABEL, LABEL_TOKENS, True), (REPLY, REPLY_TOKENS, False))
    }


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
