"""The configuration: text forms, bounds, the flags made from it, and the machine's physical cores."""

import os
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from runtime.cli.config_flags import with_config
from runtime.config import RuntimeConfig, env_name, flag, physical_cores, settings


def make_app(seen: list[RuntimeConfig]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @with_config("engine", "server")
    def serve(name: Annotated[str, typer.Argument()], config: RuntimeConfig, loud: bool = False) -> None:
        assert (name, loud) == ("toy", True)
        seen.append(config)

    return app


@pytest.mark.parametrize("name", settings())
def test_every_field_has_a_flag_with_help_and_a_variable(name: str) -> None:
    result = CliRunner().invoke(make_app([]), ["--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert flag(name) in result.output
    assert env_name(name) in result.output
    assert settings()[name].help.split(";")[0] in result.output


def test_a_flag_wins_over_its_variable_and_both_over_the_default() -> None:
    seen: list[RuntimeConfig] = []
    arguments = ["toy", "--loud", "--slots", "4", "--cors-origins", "http://a, http://b"]
    result = CliRunner().invoke(
        make_app(seen), arguments, env={"DESKSIDE_SLOTS": "5", "DESKSIDE_PORT": "99", "DESKSIDE_GPU_LAYERS": "7"}
    )
    assert result.exit_code == 0, result.output
    config = seen[0]
    assert (config.slots, config.port, config.gpu_layers, config.context) == (4, 99, 7, 8192)
    assert config.cors_origins == ("http://a", "http://b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "0"], "--slots must lie between 1 and 128, got 0"),
        (["--port", "http"], "--port takes INTEGER, got 'http'"),
        (["--threads", "many"], "--threads takes auto|N, got 'many'"),
        (["--speculate", "on"], "--speculate takes auto|off|N, got 'on'"),
        (["--speculate", "65"], "--speculate must lie between 0 and 64, got 65"),
        (["--drain-seconds", "nan"], "--drain-seconds must lie between 0 and 86400, got nan"),
        (["--log-level", "loud"], "--log-level must be one of debug, info, warning, error, got 'loud'"),
    ],
)
def test_a_bad_value_is_a_usage_error_that_names_flag_limit_and_value(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(make_app([]), ["toy", "--loud", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert message in result.output


def test_the_environment_alone_makes_a_configuration() -> None:
    assert RuntimeConfig.from_env({}) == RuntimeConfig()
    config = RuntimeConfig.from_env({"DESKSIDE_THREADS": "auto", "DESKSIDE_DRAIN_SECONDS": "1.5", "DESKSIDE_HOST": ""})
    assert (config.threads, config.drain_seconds, config.host) == (None, 1.5, "127.0.0.1")


@pytest.mark.parametrize(("text", "most"), [("auto", None), ("off", 0), ("0", 0), ("Off ", 0), ("7", 7)])
def test_speculation_is_auto_off_or_a_number(text: str, most: int | None) -> None:
    assert RuntimeConfig.from_env({"DESKSIDE_SPECULATE": text}).speculate == most


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def siblings(*lists: str) -> dict[str, str]:
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {name.format(cpu): text + "\n" for cpu, text in enumerate(lists)}


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        (siblings("0-1", "0-1", "2-3", "2-3"), 2),
        (siblings("0,2", "1,3", "0,2", "1,3") | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_physical_cores_counts_hyperthreads_once_and_keeps_to_the_quota(
    tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    assert physical_cores(write(tmp_path, files)) == cores
