"""Make the oracle: a venv with torch, transformers and PEFT, and llama.cpp's converter as llama-cpp-python ships it.

    python tests/oracle/install.py FOLDER

makes FOLDER/venv and FOLDER/llama.cpp, and FOLDER/.ready when both are whole. Deskside's own venv is not touched.
The converter is part of the source distribution that requirements.lock pins, so it is the one of the llama.cpp that is
measured; nothing is compiled.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
PRODUCT_LOCK = HERE.parent.parent / "requirements.lock"
SHIPS_CONVERTER = "llama-cpp-python"
WANTED = ("conversion/", "gguf-py/", "convert_hf_to_gguf.py")
MAX_UNPACKED_BYTES = 64 << 20


def install(folder: Path) -> None:
    """Make everything anew in `folder`. Raises CalledProcessError when pip fails; its words are on stderr."""
    ready = folder / ".ready"
    ready.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"installing the oracle into {str(folder)!r}: torch, transformers, llama.cpp's converter", file=sys.stderr)
    _make_venv(folder / "venv")
    _fetch_converter(folder)
    ready.touch()


def _make_venv(target: Path) -> None:
    venv.create(target, clear=True, with_pip=True, symlinks=True)
    python = target / "bin" / "python"
    _pip(python, "install", "--no-compile", "--require-hashes", "--no-deps", "-r", str(HERE / "requirements.lock"))
    _pip(python, "install", "--no-compile", "-r", str(HERE / "torch.txt"))


def _fetch_converter(folder: Path) -> None:
    pinned = folder / "converter.lock"
    pinned.write_text(entry(PRODUCT_LOCK.read_text(encoding="utf-8"), SHIPS_CONVERTER), encoding="utf-8")
    downloads = folder / "download"
    shutil.rmtree(downloads, ignore_errors=True)
    sources = ("--no-deps", "--no-binary", SHIPS_CONVERTER, "-d", str(downloads))
    _pip(Path(sys.executable), "download", "--require-hashes", *sources, "-r", str(pinned))
    shutil.rmtree(folder / "llama.cpp", ignore_errors=True)
    unpack(next(downloads.glob("*.tar.gz")), folder / "llama.cpp")
    shutil.rmtree(downloads)


def entry(lock: str, name: str) -> str:
    """The lines of one distribution in a pip lock file. ValueError when it has none."""
    found = re.search(rf"^{re.escape(name)}==[^\n]*(?:\n +--hash=[^\n]*)*\n", lock, re.MULTILINE)
    if found is None:
        raise ValueError(f"no entry of {name!r} in the lock file")
    return found.group()


def unpack(archive: Path, target: Path) -> None:
    """Unpack the converter's part of the source distribution. Links and paths that lead elsewhere are refused."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            _, _, path = member.name.partition("/vendor/llama.cpp/")
            if path.startswith(WANTED) and (member.isfile() or member.isdir()):
                member.name = path
                members.append(member)
        n_bytes = sum(member.size for member in members)
        if n_bytes > MAX_UNPACKED_BYTES:
            raise ValueError(f"{archive.name} holds {n_bytes} bytes of converter, the limit is {MAX_UNPACKED_BYTES}")
        tar.extractall(target, members, filter="data")


def _pip(python: Path, *arguments: str) -> None:
    verb, *rest = arguments
    quiet = ("--disable-pip-version-check", "-q")
    subprocess.run([str(python), "-m", "pip", verb, *quiet, *rest], check=True)


if __name__ == "__main__":
    install(Path(sys.argv[1]))
