"""Prefixes that outlive the engine: found after a restart, and computed where the disk has lost or damaged them."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.prefixes.disk import DiskStore
from runtime.prefixes.identity import Identity
from runtime.requests import Finished, Request
from tests.runtime.engine.test_engine import ends, ids_of, run
from tests.runtime.engine.test_snapshots import GREEDY, ask, requests_of, text
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.prefixes import IDENTITY, files

ADAPTERS = {"mails": "01" * 32}


@contextmanager
def engine_with(
    root: Path, llama: FakeLlama | None = None, *, n_bytes: int = 1 << 20, identity: Identity = IDENTITY
) -> Iterator[Engine]:
    """An engine that keeps prefixes under `root`, closed at the end."""
    disk = DiskStore(root, identity, 1 << 20, ADAPTERS)
    engine = Engine(llama or FakeLlama(adapters=tuple(ADAPTERS)), EngineOptions(snapshot_bytes=n_bytes), disk=disk)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("window", [None, 64, 0])
def test_the_next_engine_goes_on_where_the_last_was(tmp_path: Path, window: int | None) -> None:
    with engine_with(tmp_path, FakeLlama(window=window)) as engine:
        answers = [ask(engine, text(name, 150))[1] for name in range(6)]
    with engine_with(tmp_path, FakeLlama(window=window)) as engine:
        again = [ask(engine, (*text(name, 150), *text(9, 20))) for name in range(6)]
        assert [cached for cached, _ in again] == [150 if window is None else 128] * 6
        assert [ask(engine, text(name, 150))[1] for name in range(6)] == answers
        assert engine.stats().disk_prefixes_loaded_total == 6


def test_what_memory_has_no_room_for_comes_from_the_disk(tmp_path: Path) -> None:
    with engine_with(tmp_path, n_bytes=0) as engine:
        for _ in range(2):
            found = [ask(engine, text(name, 200)) for name in range(8)]
        assert [cached for cached, _ in found] == [198] * 8
        stats = engine.stats()
        assert stats.snapshot_bytes == 0
        assert stats.snapshots_restored_total == stats.disk_prefixes_loaded_total == 8


def test_another_file_computes_for_itself(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        ask(engine, text(0, 150))
    with engine_with(tmp_path, identity=Identity("toy", "cd" * 32, IDENTITY.library, IDENTITY.computing)) as engine:
        assert ask(engine, text(0, 150))[0] == 0


def test_a_prefix_on_disk_belongs_to_its_adapter(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        run(engine, Request("x", text(0, 150), GREEDY, adapter="mails"))
    with engine_with(tmp_path) as engine:
        assert ask(engine, text(0, 150))[0] == 0
        end = ends(run(engine, Request("x", text(0, 150), GREEDY, adapter="mails")))["x"]
        assert isinstance(end, Finished)
        assert end.usage.cached_tokens == 148


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_a_file_that_is_lost_is_computed_and_written_again(tmp_path: Path, harm: str) -> None:
    with engine_with(tmp_path) as engine:
        expected = ask(engine, text(0, 150))[1]
    with engine_with(tmp_path) as engine:
        [path] = files(tmp_path)
        content = bytearray(path.read_bytes())
        content[-30] ^= 1
        path.write_bytes(content)
        if harm == "gone":
            path.unlink()
        assert ask(engine, text(0, 150)) == (0, expected)
        assert engine.stats().disk_prefixes_damaged_total == (harm == "flipped")
    with engine_with(tmp_path) as engine:
        assert ask(engine, text(0, 150)) == (148, expected)


@pytest.mark.parametrize("window", [None, 64, 0])
def test_what_has_ended_is_on_disk_though_the_engine_is_killed(tmp_path: Path, window: int | None) -> None:
    """It is never closed, nor at rest; the same engine goes on in the cells."""
    disk = DiskStore(tmp_path, IDENTITY, 1 << 20, ADAPTERS)
    killed = Engine(FakeLlama(window=window), EngineOptions(snapshot_bytes=1 << 20), disk=disk)
    known = 150 if window is None else 128
    ask(killed, text(0, 150))
    assert disk.drain(10)
    with engine_with(tmp_path, FakeLlama(window=window)) as engine:
        assert ask(engine, (*text(0, 150), *text(9, 20)))[0] == known
    assert ask(killed, (*text(0, 150), *text(8, 80)))[0] == known
    assert killed.stats().snapshots_restored_total == 0
    assert disk.drain(10)
    n_files = len(files(tmp_path))
    killed.close()
    assert len(files(tmp_path)) == n_files == 2, "nothing is written twice"


def test_an_engine_that_rests_has_written(tmp_path: Path) -> None:
    llama = FakeLlama()
    with engine_with(tmp_path, llama) as engine:
        ask(engine, text(0, 150))
        engine.rest()
        assert llama.used_cells == 0
        assert engine.stats().snapshot_bytes > 0
    assert len(files(tmp_path)) == 1


@given(
    window=st.sampled_from([None, 0, 40]),
    n_bytes=st.sampled_from([0, 3000, 1 << 20]),
    rounds=st.lists(
        st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 20)), max_size=4),
        max_size=5,
    ),
    harms=st.lists(st.sampled_from(["none", "flip", "delete", "clear"]), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_any_requests_are_answered_as_if_nothing_were_kept(
    window: int | None,
    n_bytes: int,
    rounds: list[list[tuple[list[int], int]]],
    harms: list[str],
    seed: int,
) -> None:
    """The engine ends after each round, and files are harmed. The fake fails the test where a cell is wrong."""
    root = Path(tempfile.mkdtemp())
    chance = np.random.default_rng(seed)
    try:
        for asked, harm in zip(rounds, harms, strict=False):
            llama = FakeLlama(n_ctx=300, n_seq_max=8, window=window, adapters=tuple(ADAPTERS))
            with engine_with(root, llama, n_bytes=n_bytes) as engine:
                damage(root, harm, chance)
                requests = requests_of(asked)
                events = run(engine, *requests)
                assert Counter(map(type, ends(events).values())) == Counter({Finished: len(requests)} if asked else {})
                for request in requests:
                    expected = run(Engine(FakeLlama(n_ctx=300, adapters=tuple(ADAPTERS))), request)
                    assert ids_of(events, request.id) == ids_of(expected, request.id)
                engine.check({seq_id: len(tokens) for seq_id, tokens in llama.sequences.items()})
    finally:
        shutil.rmtree(root)


def damage(root: Path, harm: str, chance: np.random.Generator) -> None:
    """Flip a byte in each file, delete some, or all."""
    for path in files(root):
        if harm == "flip":
            content = bytearray(path.read_bytes())
            content[chance.integers(len(content))] ^= 1 << int(chance.integers(8))
            path.write_bytes(content)
        elif harm == "clear" or (harm == "delete" and chance.random() < 0.5):
            path.unlink()
