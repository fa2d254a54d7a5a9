"""The reference files: made once by the oracle's own Python, and again when their inputs change."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.oracle.ours import Kind, to_gguf

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / ".oracle"
PYTHON = ORACLE / "venv" / "bin" / "python"
CONVERTER = ORACLE / "llama.cpp"

ToGguf = Callable[[str, Kind], Path]


@pytest.fixture(scope="session")
def references() -> Path:
    """A folder with `ckpt`, `ref` and `adapters`, as reference.py and adapters.py tell."""
    if not (ORACLE / ".ready").is_file():
        pytest.skip("the oracle is not installed: make oracle")
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in {".py", ".lock", ".txt"})
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    target = ORACLE / "references" / made_of[:16]
    if not target.is_dir():
        shutil.rmtree(target.parent, ignore_errors=True)
        unfinished = target.with_name("unfinished")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        for module in ("reference", "adapters"):
            command = [str(PYTHON), "-m", f"tests.oracle.{module}", str(CONVERTER), str(unfinished)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{module} failed:\n{done.stderr[-4000:]}"
        unfinished.rename(target)
    return target


@pytest.fixture(scope="session")
def ours(references: Path, tmp_path_factory: pytest.TempPathFactory) -> ToGguf:
    """Deskside's conversion of a case, made once."""
    folder = tmp_path_factory.mktemp("ours")

    @cache
    def convert(name: str, kind: Kind) -> Path:
        # llama.cpp's converter takes the model's name from the folder's
        return to_gguf(references / "ckpt" / name, folder / f"{name}-{kind}.gguf", kind)

    return convert
