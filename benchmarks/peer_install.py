"""The peers' own venv: made once, every file checked by its hash, nothing of it in Deskside's own environment.

llama.cpp is not compiled a second time: the peers get the `llama_cpp` package that Deskside itself runs on, so that
llama-cpp-python's own server is measured with the very same machine code.
"""

import re
import subprocess
import sys
import venv
from importlib import metadata, resources
from pathlib import Path

from models.common.files import sha256_file

from .errors import ServerFailed

SHARED = "llama-cpp-python"
SHARED_FOLDERS = ("llama_cpp", "llama_cpp_python-")
READY = ".ready"


def install_peers(folder: Path) -> Path:
    """Make the venv in `folder` unless it is there already; its Python. Raises ServerFailed when pip fails."""
    lock = Path(str(resources.files("benchmarks"))) / "peers.lock"
    python, ready = folder / "bin" / "python", folder / READY
    wanted = f"{sha256_file(lock)} {sys.version_info.major}.{sys.version_info.minor} {metadata.version(SHARED)}"
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing the peers into {str(folder)!r} (about 100 MB to load, once)", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    wheels = folder / "peers.txt"
    wheels.write_text(without(lock.read_text(encoding="utf-8"), SHARED), encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps"]
    done = subprocess.run([*command, "--require-hashes", "-r", str(wheels)], check=False)
    if done.returncode:
        raise ServerFailed(f"pip could not install the peers (exit {done.returncode}); its words are above")
    _link_shared(folder)
    ready.write_text(wanted, encoding="utf-8")
    return python


def without(lock: str, name: str) -> str:
    """A pip lock file without the entry (and its hashes) of one distribution. ValueError when it has none."""
    entry = re.compile(rf"^{re.escape(name)}==[^\n]*(?:\n +--hash=[^\n]*)*\n", re.MULTILINE)
    rest, found = entry.subn("", lock)
    if found != 1:
        raise ValueError(f"expected one entry of {name!r} in the lock file, found {found}")
    return rest


def _link_shared(folder: Path) -> None:
    site = next((folder / "lib").glob("python*/site-packages"))
    distribution = metadata.distribution(SHARED)
    names = {file.parts[0] for file in distribution.files or () if file.parts[0].startswith(SHARED_FOLDERS)}
    for name in names:
        (site / name).symlink_to(Path(str(distribution.locate_file(name))), target_is_directory=True)


def peer_versions(python: Path) -> dict[str, str]:
    """Distribution -> version of what the report names, asked of the peers' own Python."""
    names = ("xllamacpp", SHARED, "ctranslate2")
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))
