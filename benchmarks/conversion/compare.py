"""`deskside bench convert`: one checkpoint converted to F16 by llama.cpp's converter and by Deskside, in turn.

Each conversion is a process of its own. llama.cpp's converter runs as its users run it: in a Python with torch and
transformers, which it imports. Deskside runs as `deskside convert FOLDER --quant F16` with everything it does besides
writing: hashes, the proofs of tokenizer and template, a first decode, and the installation into a store. Both find the
checkpoint in the page cache.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.errors import ServerFailed
from benchmarks.load.servers import PeakWatch
from benchmarks.record import now_text, results_file, save_json, this_machine
from models.common.console import NamedProgress, page, show_progress
from models.common.machine import load_average, mebibytes
from models.common.options import JsonOption, ReportOption, with_options
from models.gguf.header import read_header
from models.store.store import Store

from .checkpoint import make_checkpoint
from .record import ConversionAim, ConverterSample, ConvertRun, ConvertSettings, InstallSize, judge, load_convert_run

_NAME = "bench-convert"
_NEEDS = Path(__file__).with_name("needs.py")
_VERSIONS = (
    "import json, sys; from importlib.metadata import version as v; print(json.dumps({n: v(n) for n in sys.argv[1:]}))"
)


@with_options(settings=ConvertSettings)
def convert_speed_command(settings: ConvertSettings, as_json: JsonOption = False, report: ReportOption = None) -> None:
    """Measure `deskside convert` beside llama.cpp's converter: wall time, peak memory and install size."""
    if report is not None:
        run = load_convert_run(report)
    else:
        out = settings.out or results_file("convert")
        with show_progress() as progress:
            run = compare_converters(settings, progress)
        save_json(out, run.model_dump(mode="json"))
        remove_converted(settings)
        print(f"raw samples: {out}", file=sys.stderr)
    aims = judge(run)
    if as_json:
        shown = [aim.model_dump(mode="json") | {"ratio": aim.ratio, "reached": aim.reached} for aim in aims]
        print(json.dumps(run.model_dump(mode="json") | {"aims": shown}, ensure_ascii=False, indent=2))
    else:
        _print(run, aims)


def compare_converters(settings: ConvertSettings, progress: NamedProgress) -> ConvertRun:
    """Make the checkpoint, run both converters in turn, and measure their install sizes. Raises BenchError."""
    gguf = Store().resolve(settings.model).gguf
    checkpoint = settings.folder / f"{settings.model}-hf"
    progress("make the checkpoint", 0, 1)
    parameters = make_checkpoint(gguf, checkpoint)
    progress("make the checkpoint", 1, 1)
    converters = [_llama_cpp(settings, checkpoint), _deskside(settings, checkpoint)]
    total = (settings.repetitions + 1) * len(converters)
    needs, conversions = [], list[ConverterSample]()
    for number, converter in enumerate(converters):
        progress("convert", number, total)
        needs.append(_install_size(converter))
    equal, tensors = _compare(*(converter.output for converter in converters))
    for repetition in range(settings.repetitions):
        for number, converter in enumerate(converters):
            progress("convert", (repetition + 1) * len(converters) + number, total)
            conversions.append(_time(converter))
    progress("convert", total, total)
    return ConvertRun(
        started_at=now_text(),
        machine=this_machine(),
        checkpoint=settings.model,
        parameters=parameters,
        checkpoint_bytes=sum(file.stat().st_size for file in checkpoint.iterdir()),
        commands={one.name: " ".join(Path(word).name for word in one.command) for one in converters},
        needs=tuple(needs),
        tensors=tensors,
        equal_tensors=equal,
        conversions=tuple(conversions),
    )


def remove_converted(settings: ConvertSettings) -> None:
    """Remove the converted files; the checkpoint stays for the next run."""
    (settings.folder / "llama.cpp-F16.gguf").unlink(missing_ok=True)
    shutil.rmtree(settings.folder / "home", ignore_errors=True)


@dataclass(frozen=True)
class _Converter:
    """A converter as a command.

    `roots` are the distributions it requires, `shown` those reported with their versions, `code` its own folders
    outside any distribution, `children` the modules that it runs in processes of their own.
    """

    name: Literal["deskside", "llama.cpp"]
    python: Path
    command: Sequence[str]
    environment: Mapping[str, str]
    output: Path
    roots: Sequence[str]
    shown: Sequence[str]
    code: Sequence[Path] = ()
    children: Sequence[str] = ()


def _llama_cpp(settings: ConvertSettings, checkpoint: Path) -> _Converter:
    script = settings.oracle / "llama.cpp" / "convert_hf_to_gguf.py"
    if not (settings.oracle / ".ready").is_file():
        raise ServerFailed(
            f"llama.cpp's converter is not in {str(settings.oracle)!r}: `make bench-convert` installs it"
        )
    output = settings.folder / "llama.cpp-F16.gguf"
    roots = ("torch", "transformers", "numpy", "sentencepiece", "protobuf")
    return _Converter(
        name="llama.cpp",
        python=settings.oracle / "venv" / "bin" / "python",
        command=(str(script), str(checkpoint), "--outtype", "f16", "--outfile", str(output)),
        environment={**os.environ, "HF_HUB_OFFLINE": "1"},
        output=output,
        roots=roots,
        shown=roots,
        code=(script.parent,),
    )


def _deskside(settings: ConvertSettings, checkpoint: Path) -> _Converter:
    home = settings.folder / "home"
    return _Converter(
        name="deskside",
        python=Path(sys.executable),
        command=(
            *("-c", "from runtime.cli.main import main; main()", "convert"),
            *(str(checkpoint), "--name", _NAME, "--quant", "F16", "--replace"),
        ),
        environment={**os.environ, "DESKSIDE_HOME": str(home)},
        output=home / "models" / _NAME / f"{_NAME}-F16.gguf",
        roots=("deskside",),
        shown=("deskside", "llama-cpp-python", "numpy"),
        code=tuple(Path(__file__).parents[2] / folder for folder in ("models", "convert", "runtime")),
        children=("convert.proof.proof_child", "convert.proof.runs"),
    )


def _time(converter: _Converter) -> ConverterSample:
    load_before, started = load_average(), time.perf_counter()
    command = [str(converter.python), *converter.command]
    process = subprocess.Popen(
        command, env=dict(converter.environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with PeakWatch(process.pid) as watch:
        stderr = process.stderr.read()  # until the process exits and closes it
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    _check(converter, process.returncode, stderr.decode(errors="replace"))
    unit = 1 if sys.platform == "darwin" else 1024
    return ConverterSample(
        converter=converter.name,
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=max(watch.peak_bytes, usage.ru_maxrss * unit),
        load_before=load_before,
    )


def _install_size(converter: _Converter) -> InstallSize:
    """Run the converter once, untimed, for the modules it imports; then measure the distributions that provide them."""
    modules = _imported(converter, converter.command)
    if converter.children:
        modules |= _imported(converter, ("-c", f"import {', '.join(converter.children)}"))
    sizes = _ask(converter, str(_NEEDS), *converter.roots, stdin="\n".join(sorted(modules)))
    own = sum(_tree_bytes(folder) for folder in converter.code)
    return InstallSize(
        converter=converter.name,
        versions=_ask(converter, "-c", _VERSIONS, *converter.shown),
        loaded_bytes=sizes["loaded"] + own,
        installed_bytes=sizes["installed"] + own,
    )


def _imported(converter: _Converter, command: Sequence[str]) -> set[str]:
    words = [str(converter.python), "-X", "importtime", *command]
    done = subprocess.run(words, env=dict(converter.environment), capture_output=True, text=True, check=False)
    _check(converter, done.returncode, done.stderr)
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip() for line in lines}


def _ask(converter: _Converter, *arguments: str, stdin: str = "") -> dict[str, Any]:
    command = [str(converter.python), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    _check(converter, done.returncode, done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _tree_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")


def _check(converter: _Converter, code: int, stderr: str) -> None:
    if code != 0:
        raise ServerFailed(f"{converter.name}'s converter failed (exit {code}): {stderr.strip()[-800:]}")


def _compare(theirs: Path, ours: Path) -> tuple[int, int]:
    first, second = _hashes(theirs), _hashes(ours)
    return sum(second.get(name) == found for name, found in first.items()), len(first.keys() | second.keys())


def _hashes(path: Path) -> dict[str, tuple[str, str]]:
    found = {}
    with path.open("rb") as file:
        for name, tensor in read_header(path).tensors.items():
            file.seek(tensor.offset)
            found[name] = (tensor.kind.name, hashlib.sha256(file.read(tensor.n_bytes)).hexdigest())
    return found


def _print(run: ConvertRun, aims: Sequence[ConversionAim]) -> None:
    out = page()
    for aim in aims:
        said = f"{aim.deskside:.2f} {aim.unit} against {aim.llama_cpp:.2f} {aim.unit}"
        verdict = "reached" if aim.reached else "MISSED"
        out.print(f"  {aim.name}: {said}, {aim.ratio:.2f}x (aim: at most {aim.limit:g}x, {verdict})")
    machine = run.machine
    out.print(f"{run.checkpoint}, {run.parameters / 1e6:.0f} M parameters, {mebibytes(run.checkpoint_bytes)}, to F16")
    out.print(f"{machine.cpu}, {machine.logical_cores} cores, {machine.system}, Python {machine.python}")
    for need in run.needs:
        versions = ", ".join(f"{name} {version}" for name, version in need.versions.items())
        out.print(f"  {need.converter}: {run.commands[need.converter]} ({versions})")
    out.print(f"{run.equal_tensors} of {run.tensors} tensors are equal byte for byte")
    repetitions = sum(one.converter == "deskside" for one in run.conversions)
    out.print(f"Times and memory are medians of {repetitions} runs each, in turn, the checkpoint in the page cache.")
