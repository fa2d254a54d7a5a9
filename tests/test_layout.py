"""The house stands as drawn: who imports whom, which library has which door, and nothing grows past reading size."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "runtime", "convert", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# folder -> the modules of other folders it may import
BETWEEN = {
    "models": set[str](),
    "runtime": {"models"},
    # The prompt, the labels' weighing and the batch's nouns: what is measured is what serving does.
    "convert": {
        *("models", "runtime.llama.model", "runtime.errors", "runtime.config"),
        *("runtime.prompt.prompter", "runtime.decoding.choice_tree", "runtime.requests"),
    },
    "benchmarks": {"models"},
}
# This one measures the engine without HTTP, in a process of its own.
ENGINE_BENCHMARK = "benchmarks.bare_loop"
# runtime, bottom to top. A file counts with the family its name begins with (server_routes: server).
LEVELS = (
    ("errors", "sequence", "config", "memory"),
    (
        "llama",
        "prompt",
        "sampling",
        "constrain",
        "detokenize",
        "prefix",
        "lookup",
        "scheduler",
        "scoring",
        "openai",
        "metrics",
    ),
    ("engine",),
    ("worker",),
    ("intake", "served"),
    ("fleet",),
    ("server", "serve", "batch", "chat", "doctor"),
    ("cli",),
)
SAME_LEVEL = {
    ("scheduler", "prefix"),
    ("prompt", "llama"),
    ("constrain", "llama"),
    ("serve", "server"),
    ("served", "intake"),
}
ONLY_NOUNS = {"openai": {"sequence", "errors"}, "scheduler": {"sequence", "prefix"}, "prefix": {"sequence"}}
# foreign library -> the only modules that may import it
DOORS = {
    # The peer script runs in the peers' own venv, never in Deskside's process.
    "llama_cpp": {
        "runtime.llama.model",
        "convert.quantize.quantize",
        "convert.quantize.imatrix_child",
        "benchmarks.peer_llama_cpp",
    },
    "xllamacpp": {"benchmarks.peer_xllamacpp"},
    "ctranslate2": {"benchmarks.peer_ctranslate2"},
    "llguidance": {"runtime.decoding.grammar"},
    # The judges of a vocabulary: what is converted is read by our own code.
    "tokenizers": {"convert.proof.reference"},
    "sentencepiece": {"convert.proof.reference"},
    "fastapi": {"runtime.server.app"},
    "starlette": {"runtime.server.app"},
    "huggingface_hub": {"models.store.hub"},
    "genai_prices": {"benchmarks.cost"},
    "yaml": {"convert.checkpoint.card"},
    "torch": {"models.email_triage"},
    "transformers": {"models.email_triage"},
    "peft": {"models.email_triage"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at its top or inside a function, with relative ones made absolute."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            if node.module is None or base in ([folder] for folder in FOLDERS):
                yield from (".".join([*base, alias.name]) for alias in node.names)
            else:
                yield ".".join(base)


def within(module: str, allowed: set[str]) -> bool:
    """True if `module` is one of `allowed`, inside one of them, or a split-off file of one (`a.b_c` of `a.b`)."""
    return any(module == name or module.startswith((name + ".", name + "_")) for name in allowed)


def family(module: str) -> str:
    known = [name for level in LEVELS for name in level if module == name or module.startswith(name + "_")]
    assert known, f"runtime/{module}.py belongs to no level of LEVELS"
    return max(known, key=len)


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_folders_import_only_what_the_design_allows(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    composed = {f"{other}.{part}" for other in FOLDERS for part in ("cli", "errors")}
    own = {"runtime.cli.main": composed, ENGINE_BENCHMARK: {"runtime"}}.get(module_name(path), set())
    for imported in imports(path):
        if imported.split(".")[0] in set(FOLDERS) - {folder}:
            assert within(imported, BETWEEN[folder] | own), f"{module_name(path)} imports {imported}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent == ROOT / "runtime"], ids=module_name)
def test_runtime_imports_strictly_downward(path: Path) -> None:
    if path.stem == "__init__":
        assert not [name for name in imports(path) if name.startswith("runtime")]
        return
    me = family(path.stem)
    for imported in imports(path):
        if not imported.startswith("runtime."):
            continue
        other = family(imported.split(".")[1])
        if me in ONLY_NOUNS and other != me:
            assert other in ONLY_NOUNS[me], f"{me} may see only {ONLY_NOUNS[me]}, imports {imported}"
        downward = level(other) < level(me) or other == me or (me, other) in SAME_LEVEL
        assert downward, f"runtime/{path.name} imports {imported}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_foreign_library_has_one_door(path: Path) -> None:
    for imported in imports(path):
        library = imported.split(".")[0]
        if library in DOORS:
            assert within(module_name(path), DOORS[library]), f"{module_name(path)} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES, (
        f"{path.name} has {source.count(chr(10))} lines, limit {MAX_FILE_LINES}"
    )
    tree = ast.parse(source)
    assert ast.get_docstring(tree), f"{path.name} does not say what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {lines} lines"
            parameters = len(node.args.args) + len(node.args.kwonlyargs)
            # what typer makes options of is called by nobody else
            assert parameters <= MAX_PARAMETERS or node.name.endswith("_command"), (
                f"{path.name}:{node.lineno} {node.name} takes {parameters} parameters"
            )


def test_the_checks_see_what_they_should(tmp_path: Path) -> None:
    """A checker that finds no imports passes everything: show that it reads each form."""
    assert "runtime.errors" in set(imports(ROOT / "runtime" / "engine.py"))
    assert within("runtime.llama_load", {"runtime.llama.model"})
    assert not within("runtime.engine.engine", {"runtime.llama.model", "runtime.errors"})
    assert level("cli") > level("server") > level("engine") > level("llama") > level("errors")
