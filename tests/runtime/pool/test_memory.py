"""What a model needs, by its own numbers; what the machine has, from files that stand in for the system's."""

import sys
from pathlib import Path

import pytest

from models.gguf.header import GgufMeta, Value
from runtime.pool import memory
from runtime.pool.memory import OVERHEAD_BYTES, USABLE_SHARE, machine_budget, model_need
from tests.support.models.gguf_heads import GEMMA

GIB = 1 << 30


def meta(**changes: object) -> GgufMeta:
    values = {**GEMMA, **{name.replace("__", "."): value for name, value in changes.items()}}
    values["tokenizer.ggml.tokens"] = None
    return GgufMeta(values, {"tokenizer.ggml.tokens": 262_144})  # type: ignore[arg-type]


def test_cache_and_logits_follow_from_the_shape() -> None:
    need = model_need(meta(), 1000, n_ctx=8192, n_rows=32)
    assert need.cache == 8192 * 18 * 1 * (256 + 256) * 2
    assert need.logits == 2 * 32 * 262_144 * 4
    assert need.total == 1000 + need.cache + need.logits + OVERHEAD_BYTES
    assert "144 MiB of KV cache for 8192 tokens" in str(need)


def test_heads_may_differ_from_layer_to_layer_and_default_to_the_width() -> None:
    per_layer = meta(gemma3__block_count=3, gemma3__attention__head_count_kv=(4, 0, 2))
    assert model_need(per_layer, 0, n_ctx=10, n_rows=0).cache == 10 * (4 + 0 + 2) * 512 * 2
    plain: dict[str, Value] = {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64}
    old = GgufMeta({**plain, "llama.attention.head_count": 8}, {})
    assert model_need(old, 0, n_ctx=10, n_rows=0).cache == 10 * 2 * 8 * (8 + 8) * 2


def test_a_file_that_says_nothing_counts_by_its_size() -> None:
    need = model_need(GgufMeta({}, {}), 5000, n_ctx=8192, n_rows=32)
    assert need.total == 5000 + OVERHEAD_BYTES


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable:   {8 << 20} kB\n"}
V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        (MEMINFO, 8),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n", V2 + "memory.max": "max\n"}, 8),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/\n",
                V2 + "memory.max": f"{4 * GIB}\n",
                V2 + "memory.current": f"{3 * GIB}\n",
                V2 + "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
            },
            3,
        ),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/team/job\n",
                V2 + "team/job/memory.max": "max\n",
                V2 + "team/job/memory.current": "0\n",
                V2 + "team/memory.max": f"{2 * GIB}\n",
                V2 + "team/memory.current": "0\n",
            },
            2,
        ),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box\n0::/\n",
                V1 + "memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "memory.usage_in_bytes": "0\n",
                V1 + "box/memory.limit_in_bytes": f"{GIB}\n",
                V1 + "box/memory.usage_in_bytes": f"{GIB // 2}\n",
            },
            0.5,
        ),
        (
            {**MEMINFO, "proc/self/cgroup": "0::/\n", V2 + "memory.max": "0\n", V2 + "memory.current": "7\n"},
            0,
        ),
        ({"proc/self/cgroup": "0::/\n"}, None),
    ],
    ids=["machine", "no limit", "v2 and its cache", "v2 parent", "v1", "over the limit", "nothing known"],
)
def test_the_budget_is_nine_tenths_of_the_least_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], gib: float | None
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    found = machine_budget(write(tmp_path, files))
    assert found == (None if gib is None else int(USABLE_SHARE * gib * GIB))


@pytest.mark.parametrize(("level", "gib"), [(25, 4), (None, 8)])
def test_a_mac_gives_its_free_share(monkeypatch: pytest.MonkeyPatch, level: int | None, gib: int) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_sysctl", {"hw.memsize": 16 * GIB, "kern.memorystatus_level": level}.get)
    assert machine_budget() == int(USABLE_SHARE * gib * GIB)


def test_this_machine_has_some() -> None:
    budget = machine_budget()
    assert budget is None or budget > 0
