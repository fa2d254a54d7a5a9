"""The doctor's report as text for people."""

from rich.console import Console
from rich.table import Table

from .doctor import GPU_HELP, Report, human_bytes


def print_report(report: Report, console: Console | None = None) -> None:
    """Print facts, models and checks to stdout; each failed check is followed by its fix."""
    console = console or Console(soft_wrap=True, highlight=False)
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report).items():
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    for check in report.checks:
        mark = "[green]ok     [/]" if check.ok else "[red]missing[/]"
        console.print(f"{mark}  {check.name}: ", end="")
        console.print(check.detail, markup=False)
        if not check.ok:
            console.print(f"         fix: {check.fix}", markup=False)


def _facts(report: Report) -> dict[str, str]:
    machine = report.machine
    memory = f"{human_bytes(machine.memory_bytes)}, {human_bytes(machine.memory_available_bytes)} available"
    offload = "yes" if report.gpu_offload else f"no ({GPU_HELP})"
    models = [f"{model['name']} {model['quantization']} {human_bytes(model['size_bytes'])}" for model in report.models]
    return {
        "system": machine.system,
        "cpu": f"{machine.cpu}, {machine.physical_cores} physical cores, {machine.logical_cores} logical",
        "memory": memory,
        "python": report.python,
        "deskside": report.deskside,
        "llama-cpp-python": f"{report.llama_cpp_python}, {report.backend}",
        "gpu offload": offload,
        "store": f"{report.store}, {human_bytes(report.disk_free_bytes)} free",
        "models": "; ".join(models) or "none",
    }
