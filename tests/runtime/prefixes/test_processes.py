"""Several processes at one folder of prefixes, and some of them killed: every file is whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.runtime.prefixes import files, payload, store

ROOT = Path(__file__).parents[3]
N_BYTES = 300_000

# Writes snapshots without end, and a line for each.
WRITER = f"""
import sys
from itertools import count
from pathlib import Path
from tests.support.runtime.prefixes import payload, store, tokens
disk = store(Path(sys.argv[1]), 1 << 30)
for name in count():
    disk.save(tokens(name % 40), None, payload(tokens(name % 40), {N_BYTES}))
    print(name, flush=True)
"""
# Stops in the middle of a snapshot's file, before it is renamed.
STOPPER = f"""
import os, sys, time
from pathlib import Path
from tests.support.runtime.prefixes import payload, store, tokens
def stop(descriptor):
    if os.fstat(descriptor).st_size > {N_BYTES}:
        print("writing", flush=True)
        time.sleep(600)
os.fsync = stop
disk = store(Path(sys.argv[1]), 1 << 30)
disk.save(tokens(1), None, payload(tokens(1), {N_BYTES}))
disk.drain(600)
"""
# Writes, reads and evicts in a small folder, and says what it saw.
SHARER = f"""
import logging, sys
import numpy as np
from pathlib import Path
from tests.support.runtime.prefixes import payload, store, tokens
logging.basicConfig(level="WARNING")
disk = store(Path(sys.argv[1]), 5 * {N_BYTES})
n_found = n_wrong = 0
for name in range(150):
    name = name * int(sys.argv[2]) % 8
    of = tokens(name)
    key = disk.save(of, None, payload(of, {N_BYTES}))
    for entry in disk.index() if name == 3 else ():
        found = disk.load(entry.key)
        n_found += found is not None
        n_wrong += found is not None and not np.array_equal(found, payload(entry.tokens, {N_BYTES}))
disk.close(60)
print(n_found > 0, n_wrong, disk.counts.damaged)
"""


def start(program: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_whole(root: Path) -> int:
    """The number of snapshots, each of which was found whole."""
    disk = store(root, 1 << 30)
    found = disk.index()
    for entry in found:
        loaded = disk.load(entry.key)
        assert loaded is not None
        assert np.array_equal(loaded, payload(entry.tokens, N_BYTES))
    disk.close()
    assert disk.counts.damaged == 0
    assert len(found) == len(files(root))
    assert list(root.glob("*/.*.part")) == []
    return len(found)


@pytest.mark.parametrize("n_lines", [1, 7, 30])
def test_a_writer_that_is_killed_leaves_whole_files_only(tmp_path: Path, n_lines: int) -> None:
    with start(WRITER, str(tmp_path)) as child:
        assert child.stdout is not None
        for _ in range(n_lines):
            assert child.stdout.readline()
        child.kill()
    check_whole(tmp_path)
    with start(WRITER, str(tmp_path)) as child:
        assert child.stdout is not None
        while len(files(tmp_path)) < 40:
            assert child.stdout.readline()
        child.kill()
    assert check_whole(tmp_path) == 40


def test_a_file_that_is_half_written_at_the_kill_is_none(tmp_path: Path) -> None:
    with start(STOPPER, str(tmp_path)) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob("*/.*.part"))) == 1
        store(tmp_path).close()
        assert len(list(tmp_path.glob("*/.*.part"))) == 1, "its writer lives"
        child.kill()
    assert check_whole(tmp_path) == 0
    assert tmp_path.exists()


def test_two_servers_share_a_folder(tmp_path: Path) -> None:
    with start(SHARER, str(tmp_path), "1") as one, start(SHARER, str(tmp_path), "3") as two:
        for child in (one, two):
            out, err = child.communicate(timeout=300)
            assert (out, err, child.returncode) == ("True 0 0\n", "", 0)
    assert 1 <= check_whole(tmp_path) <= 6
