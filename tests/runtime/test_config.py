"""The configuration: text forms, limits, and the flags and variables generated from it."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from models.common.options import flag, variable, with_options
from runtime.config import RuntimeConfig


def invoke(*arguments: str, env: dict[str, str] | None = None, seen: list[RuntimeConfig] | None = None) -> Result:
    app = typer.Typer()

    @app.command()
    @with_options(config=RuntimeConfig)
    def serve(name: Annotated[str, typer.Argument()], config: RuntimeConfig, loud: bool = False) -> None:
        assert (name, loud) == ("toy", True)
        assert seen is not None
        seen.append(config)

    return CliRunner().invoke(app, ["toy", "--loud", *arguments], env={"COLUMNS": "200", "TERM": "dumb", **(env or {})})


def configured(*arguments: str, **env: str) -> RuntimeConfig:
    seen: list[RuntimeConfig] = []
    result = invoke(*arguments, env=env, seen=seen)
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize("name", RuntimeConfig.model_fields)
def test_every_field_has_a_flag_with_help_and_a_variable(name: str) -> None:
    output = invoke("--help").output
    assert flag(RuntimeConfig, name) in output
    assert str(variable(RuntimeConfig, name)) in output
    assert str(RuntimeConfig.model_fields[name].description).split(";")[0] in output


def test_a_flag_wins_over_its_variable_and_both_over_the_default() -> None:
    variables = {"DESKSIDE_SLOTS": "5", "DESKSIDE_PORT": "99", "DESKSIDE_GPU_LAYERS": "7"}
    config = configured("--slots", "4", "--cors-origins", "http://a, http://b", **variables)
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
        (["--memory-budget", "all"], "--memory-budget takes auto|GIB, got 'all'"),
        (["--prefix-disk-size", "0"], "--prefix-disk-size must lie between 0.001 and 1048576, got 0"),
        (["--log-level", "loud"], "--log-level must be one of debug, info, warning, error, got 'loud'"),
    ],
)
def test_a_bad_value_is_a_usage_error_that_names_flag_limit_and_value(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_bad_variable_is_named() -> None:
    result = invoke(env={"DESKSIDE_HOST": "::", "DESKSIDE_PORT": "70000"})
    assert result.exit_code == 2
    assert "DESKSIDE_PORT must lie between 0 and 65535, got 70000" in result.output


def test_the_environment_alone_makes_a_configuration() -> None:
    assert configured() == RuntimeConfig()
    config = configured(
        DESKSIDE_THREADS="auto", DESKSIDE_DRAIN_SECONDS="1.5", DESKSIDE_HOST="", DESKSIDE_LOG_LEVEL="INFO"
    )
    assert (config.threads, config.drain_seconds, config.bind, config.log_level) == (None, 1.5, "127.0.0.1", "info")


def test_the_folder_of_prefixes_is_a_path_in_the_home_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert configured().prefix_disk is None
    config = configured("--prefix-disk-size", "0.5", DESKSIDE_PREFIX_DISK="~/prefixes")
    assert (config.prefix_disk, config.prefix_disk_size) == (Path("/home/someone/prefixes"), 0.5)


def test_the_address_is_given_as_host() -> None:
    assert configured("--host", "0.0.0.0").bind == "0.0.0.0"
    assert configured(DESKSIDE_HOST="0.0.0.0").bind == "0.0.0.0"


@pytest.mark.parametrize(("text", "most"), [("auto", None), ("off", 0), ("0", 0), ("Off ", 0), ("7", 7)])
def test_speculation_is_auto_off_or_a_number(text: str, most: int | None) -> None:
    assert configured(DESKSIDE_SPECULATE=text).speculate == most


def test_a_configuration_is_frozen_and_knows_its_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RuntimeConfig().slots = 3
    with pytest.raises(ValidationError, match="host"):
        RuntimeConfig.model_validate({"host": "::"})
