"""The library is compiled where it can run, once for everything that it depends on; a broken compiler is a reason."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.prefill.build import PROVED, Host, Unavailable, find_compiler, key, library, require_host

HOST = Host("linux x86_64", "a processor", frozenset({"avx2", "fma", "f16c"}), PROVED[0])


def compiler(folder: Path, body: str) -> str:
    """A program in place of a compiler: it prints its version, or runs `body`."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit\necho >> {folder}/calls\n{body}\n')
    path.chmod(0o755)
    return str(path)


WRITES = 'for last; do :; done; echo code > "$last"'


def test_it_is_compiled_once(tmp_path: Path) -> None:
    fake = compiler(tmp_path, WRITES)
    first = library(tmp_path / "cache", HOST, fake)
    assert first.read_text() == "code\n"
    assert library(tmp_path / "cache", HOST, fake) == first
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_whatever_it_depends_on_is_in_its_name() -> None:
    other = (
        replace(HOST, cpu="another"),
        replace(HOST, features=HOST.features | {"avx512f"}),
        replace(HOST, llama_version="0.3.37"),
    )
    names = {key(HOST, "gcc 12"), key(HOST, "gcc 13"), *(key(host, "gcc 12") for host in other)}
    assert len(names) == 5


def test_a_broken_compiler_is_a_reason_and_leaves_nothing(tmp_path: Path) -> None:
    fake = compiler(tmp_path, "echo 'prefill.cpp:1: error: no such register' >&2; exit 1")
    with pytest.raises(Unavailable, match="no such register"):
        library(tmp_path / "cache", HOST, fake)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_does_not_start_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not run"):
        library(tmp_path, HOST, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (replace(HOST, system="darwin arm64"), "this is darwin arm64"),
        (replace(HOST, features=frozenset({"avx2", "fma"})), "lacks F16C"),
        (replace(HOST, llama_version="0.4.0"), "not with 0.4.0"),
    ],
)
def test_other_machines_and_releases_are_refused(host: Host, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        require_host(host)


def test_no_compiler_is_a_reason() -> None:
    with pytest.raises(Unavailable, match="no C\\+\\+ compiler"):
        find_compiler(lambda _: None)


def test_the_compiler_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "mine")
    assert find_compiler(lambda name: f"{os.sep}{name}") == f"{os.sep}mine"


def test_the_host_is_read_from_the_first_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Zen\nflags\t\t: avx2 fma\n\nmodel name\t: other\nflags\t\t: sse\n")
    host = Host.here("1.0", tmp_path / "cpuinfo")
    assert (host.cpu, host.features, host.llama_version) == ("Zen", frozenset({"avx2", "fma"}), "1.0")
