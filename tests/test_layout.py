"""The house stands as drawn: who imports whom, which library has which door, and nothing grows past reading size.

A room is a folder. A file directly in one of the four houses is a unit of its own (`runtime.errors`, `convert.cli`).
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSES = ("models", "runtime", "convert", "benchmarks")
FILES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))
ROOMS = sorted({path.parent for path in FILES})

# The units of each house, lowest first. A unit imports units of lower levels only.
LEVELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "models": (
        ("errors",),
        ("common", "gguf"),
        ("training", "calibration"),
        ("manifest", "quality"),
        ("card",),
        ("store",),
        ("task",),
        ("email_triage", "debian_synopsis", "cli"),
    ),
    "runtime": (
        ("errors", "config", "requests"),
        ("prefill", "prefixes"),
        ("llama", "openai", "monitoring"),
        ("kv_cache",),
        ("scheduling", "decoding", "prompt", "worker"),
        ("engine",),
        ("serving",),
        ("batch", "pool"),
        ("server",),
        ("cli",),
    ),
    "convert": (
        ("errors", "child"),
        ("families", "gguf_writer", "tokenizer"),
        ("checkpoint", "quantize", "measure"),
        ("lora", "trim", "proof"),
        ("planning",),
        ("selection", "training"),
        ("pipeline", "replacement"),
        ("finetune",),
        ("cli",),
    ),
    "benchmarks": (
        ("errors",),
        ("record",),
        ("cost",),
        ("load",),
        ("comparison", "conversion", "peers", "prefill", "calibration"),
        ("ways",),
        ("report", "soak"),
        ("cli",),
    ),
}
# house -> the other houses and rooms it may import
BETWEEN = {
    "models": set[str](),
    "runtime": {"models"},
    # The prompt and the weighing of labels: conversion measures what serving does.
    "convert": {
        *("models", "runtime.llama", "runtime.errors", "runtime.config", "runtime.requests"),
        *("runtime.prompt", "runtime.decoding.choice_tree"),
    },
    "benchmarks": {"models"},
}
# module -> what it may import beyond that
EXCEPTIONS = {
    "runtime.cli.main": {f"{house}.{part}" for house in HOUSES for part in ("cli", "errors")},
    # Measures the engine without HTTP, in a process of its own.
    "benchmarks.peers.scripts.bare_loop": {"runtime"},
    # Times the products of prompts, in a process of its own.
    "benchmarks.prefill.race_child": {"runtime.llama"},
}
# room -> all of ours that it may import, beyond itself
NOTHING_ELSE = {"runtime.prefixes": {"runtime.errors", "models.common"}}
# These decide or translate only: of ours they import each other and the nouns, of Python nothing that acts.
PURE = (
    *("runtime.openai", "runtime.scheduling", "runtime.decoding.choice_tree", "runtime.decoding.prompt_lookup"),
    *("runtime.kv_cache.prefix_cache", "runtime.kv_cache.radix_tree", "runtime.kv_cache.snapshots"),
)
NOUNS = {"runtime.errors", "runtime.requests"}
ACTING = {"asyncio", "ctypes", "logging", "os", "pathlib", "socket", "subprocess", "threading"}
# foreign library -> the rooms or modules that may import it
DOORS = {
    # The peers' scripts run in the peers' own venv.
    "llama_cpp": {"runtime.llama", "*_child", "benchmarks.peers.scripts"},
    "xllamacpp": {"benchmarks.peers.scripts"},
    "ctranslate2": {"benchmarks.peers.scripts"},
    "ik_llama_cpp": {"benchmarks.peers.scripts"},
    "llguidance": {"runtime.decoding.grammar"},
    # The judges of a vocabulary: our own code reads what is converted.
    "tokenizers": {"convert.proof.reference"},
    # A checkpoint to convert needs its vocabulary as sentencepiece's own protobuf.
    "sentencepiece": {"convert.proof.reference", "benchmarks.conversion.checkpoint"},
    "fastapi": {"runtime.server"},
    "starlette": {"runtime.server", "benchmarks.load.replay"},
    "huggingface_hub": {"models.store.hub"},
    "genai_prices": {"benchmarks.cost"},
    "duckdb": {"models.task.readers.sheets"},
    "python_calamine": {"models.task.readers.sheets"},
    "jsonschema": {"models.task.schema"},
    "xxhash": {"runtime.prefixes.snapshot_file"},
    "yaml": {"convert.checkpoint.config"},
    "jax": {"convert.training"},
    "torch": {"models.email_triage"},
    "transformers": {"models.email_triage"},
    "peft": {"models.email_triage"},
}
MAX_FILES = 9
MORE_FILES = {"runtime/openai": 11, "convert/families": 11}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


@cache
def parsed(path: Path) -> ast.Module:
    """The file's syntax tree, parsed once for all checks."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that the file imports, at its top or inside a function, with relative ones made absolute."""
    package = list(path.relative_to(ROOT).parent.parts)
    found: list[str] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join(base + (node.module.split(".") if node.module else []))
            for alias in node.names:
                found.append(f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name)
    return tuple(found)


def within(module: str, allowed: set[str]) -> bool:
    """True if `module` is one of `allowed` or inside one of them; `*_child` allows every child process's module."""
    ends = tuple(name[1:] for name in allowed if name.startswith("*"))
    return module.endswith(ends or ("\0",)) or any(module == name or module.startswith(name + ".") for name in allowed)


def house(module: str) -> str:
    return module.split(".")[0]


def level(module: str) -> int:
    """The level of the unit that `module` is or lies in."""
    unit = module.split(".")[1]
    for number, units in enumerate(LEVELS[house(module)]):
        if unit in units:
            return number
    raise AssertionError(f"{module} belongs to no unit of LEVELS")


def test_every_folder_is_a_room_of_the_drawing() -> None:
    for room in ROOMS:
        parts = room.relative_to(ROOT).parts
        if len(parts) > 1:
            assert any(parts[1] in units for units in LEVELS[parts[0]]), f"{'/'.join(parts)} is not in LEVELS"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_house_imports_only_what_the_design_allows(path: Path) -> None:
    module = module_name(path)
    for imported in imports(path):
        if house(imported) in set(HOUSES) - {house(module)}:
            allowed = BETWEEN[house(module)] | EXCEPTIONS.get(module, set())
            assert within(imported, allowed), f"{module} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_rooms_import_strictly_downward(path: Path) -> None:
    module = module_name(path)
    for imported in imports(path):
        if house(imported) != house(module) or imported not in MODULES:
            continue
        assert module not in HOUSES, f"{module}/__init__.py imports {imported}"
        same_unit = imported.split(".")[1] == module.split(".")[1]
        assert same_unit or level(imported) < level(module), f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("room", NOTHING_ELSE)
def test_a_room_that_stands_alone_imports_nothing_else(room: str) -> None:
    paths = [path for path in FILES if within(module_name(path), {room})]
    ours = {imported for path in paths for imported in imports(path) if house(imported) in HOUSES}
    assert ours, room
    assert {name for name in ours if not within(name, NOTHING_ELSE[room] | {room})} == set()


@pytest.mark.parametrize("path", [p for p in FILES if within(module_name(p), set(PURE))], ids=module_name)
def test_what_decides_or_translates_does_nothing_else(path: Path) -> None:
    module = module_name(path)
    own = {".".join(module.split(".")[:2])}
    for imported in imports(path):
        assert imported.split(".")[0] not in ACTING, f"{module} imports {imported}"
        if house(imported) in HOUSES:
            assert within(imported, NOUNS | own | set(PURE)), f"{module} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_foreign_library_has_one_door(path: Path) -> None:
    for imported in imports(path):
        library = imported.split(".")[0]
        if library in DOORS:
            assert within(module_name(path), DOORS[library]), f"{module_name(path)} imports {library}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_holds_few_files(room: Path) -> None:
    name = room.relative_to(ROOT).as_posix()
    files = [path.name for path in room.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MORE_FILES.get(name, MAX_FILES), f"{name} holds {len(files)} files: {sorted(files)}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    n_lines = path.read_text(encoding="utf-8").count("\n")
    assert n_lines <= MAX_FILE_LINES, f"{path.name} has {n_lines} lines, limit {MAX_FILE_LINES}"
    tree = parsed(path)
    assert ast.get_docstring(tree), f"{path.name} does not say what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {lines} lines"
            parameters = len(node.args.args) + len(node.args.kwonlyargs)
            # typer makes options of a command's parameters; no code calls it
            assert parameters <= MAX_PARAMETERS or node.name.endswith("_command"), (
                f"{path.name}:{node.lineno} {node.name} takes {parameters} parameters"
            )


def named(path: Path) -> Iterator[str]:
    """The classes and capitalised type aliases that the file defines at its top level."""
    for node in parsed(path).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (target.id for target in targets if isinstance(target, ast.Name))
            yield from (name for name in names if name.lstrip("_")[:1].isupper() and not name.isupper())


def test_a_name_means_one_thing() -> None:
    files: dict[str, set[str]] = {}
    for path in FILES:
        for name in named(path):
            files.setdefault(name, set()).add(module_name(path))
    shared = {name: sorted(modules) for name, modules in files.items() if len(modules) > 1}
    assert not shared, shared


def test_the_tests_mirror_the_rooms() -> None:
    drawn = {room.relative_to(ROOT) for room in ROOMS}
    for name in HOUSES:
        folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests" / name).rglob("test_*.py")}
        assert folders <= drawn, f"tests of no room: {sorted(str(folder) for folder in folders - drawn)}"


def test_the_checks_see_what_they_should() -> None:
    """A checker that finds no imports passes everything: show that it reads each form."""
    assert "runtime.errors" in imports(ROOT / "runtime" / "engine" / "engine.py")
    assert within("runtime.llama.model", {"runtime.llama"})
    assert within("convert.quantize.imatrix_child", {"*_child"})
    assert not within("runtime.engine", {"runtime.llama", "runtime.errors"})
    assert level("runtime.cli.main") > level("runtime.server.app") > level("runtime.engine.engine")
    assert level("runtime.engine.engine") > level("runtime.llama.model") > level("runtime.errors")
    assert {"TaskKind", "LossBudget"} <= set(named(ROOT / "models" / "quality.py"))
