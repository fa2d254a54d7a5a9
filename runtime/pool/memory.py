"""How much memory a model will need, and how much this machine has for models. Sizes in bytes.

Both are estimates: they decide which models may be loaded side by side, before anything is loaded.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.gguf.header import GgufMeta

# Left to the rest of the machine when the budget is found out.
USABLE_SHARE = 0.9
# llama.cpp's compute buffers, the engine's own tables and those of the grammars, as measured on models below 1 GiB.
OVERHEAD_BYTES = 256 << 20
CACHE_BYTES_PER_VALUE = 2
LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Need:
    """What a loaded model takes: its files, the KV cache of `n_ctx` tokens, `n_rows` rows of logits, and the rest."""

    files: int
    n_ctx: int
    cache: int
    n_rows: int
    logits: int
    overhead: int = OVERHEAD_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.files + self.cache + self.logits + self.overhead

    def __str__(self) -> str:
        return (
            f"about {mebibytes(self.total)}: {mebibytes(self.files)} of files, {mebibytes(self.cache)} of KV cache for "
            f"{self.n_ctx} tokens, {mebibytes(self.logits)} for {self.n_rows} rows of logits, "
            f"{mebibytes(self.overhead)} for the engine"
        )


def model_need(meta: GgufMeta, files_bytes: int, *, n_ctx: int, n_rows: int) -> Need:
    """What the model described by `meta` needs. A file that does not give its own shape counts by its size alone."""
    # llama.cpp holds the logits twice: as the graph computes them, and as they are handed out.
    logits = 2 * n_rows * meta.n_vocab * LOGIT_BYTES
    return Need(files_bytes, n_ctx, n_ctx * _cache_bytes_per_token(meta), n_rows, logits)


def _cache_bytes_per_token(meta: GgufMeta) -> int:
    """Keys and values of one token in all layers; sliding-window layers keep every token here, like the others."""
    family = meta.architecture
    n_layers = meta.number(f"{family}.block_count")
    n_heads = meta.number(f"{family}.attention.head_count")
    width = meta.number(f"{family}.embedding_length") // max(n_heads, 1)
    key = meta.number(f"{family}.attention.key_length") or width
    value = meta.number(f"{family}.attention.value_length") or width
    kv_heads = meta.numbers(f"{family}.attention.head_count_kv", n_layers)
    n_kv_heads = sum(kv_heads) or n_heads * n_layers
    return n_kv_heads * (key + value) * CACHE_BYTES_PER_VALUE


def machine_budget(root: Path = Path("/")) -> int | None:
    """What models may take: nine tenths of what is available now; None where the system does not say.

    On Linux the least of MemAvailable and what each cgroup of this process (v2 or v1) has left; on a Mac the free share
    of its memory. `root` stands in for `/` in tests.
    """
    if sys.platform == "darwin":
        found = _mac_available()
    else:
        found = min((left for left in (_mem_available(root), *_cgroups_left(root)) if left is not None), default=None)
    return None if found is None else int(USABLE_SHARE * max(found, 0))


def mebibytes(count: int) -> str:
    """`count` bytes for people."""
    return f"{count / 2**20:.0f} MiB"


def _mem_available(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    return None


def _cgroups_left(root: Path) -> Iterator[int | None]:
    """What is left in each memory cgroup this process is in, innermost first; page cache counts as left."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = mount / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder == mount.parent:
                break
            yield _left(folder, *files)


def _left(folder: Path, limit_file: str, used_file: str) -> int | None:
    limit, used = _number(folder / limit_file), _number(folder / used_file)
    if limit is None or used is None:
        return None
    counts = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    cached = counts.get("total_inactive_file", counts.get("inactive_file", "0"))
    return limit - used + int(cached)


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _mac_available() -> int | None:
    """A Mac's memory times the share that its kernel calls free; half of it where the kernel does not say."""
    total, level = _sysctl("hw.memsize"), _sysctl("kern.memorystatus_level")
    return None if total is None else total * (50 if level is None else level) // 100


def _sysctl(name: str) -> int | None:
    try:
        answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return int(answer.stdout) if answer.stdout.strip().isdigit() else None
