"""Options generated from a model: each kind of field has its form on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import BaseModel, Field, model_validator
from typer.testing import CliRunner, Result

from models.common.options import Flag, flag, variable, with_options


class Order(BaseModel):
    source: Annotated[str, Flag(metavar="SOURCE", positional=True)] = Field(description="Taken from here.")
    more: Annotated[tuple[str, ...], Flag(metavar="[MORE]…", positional=True)] = Field(
        default=(), description="And these."
    )
    target: Path | None = Field(default=None, description="Written there.")
    kind: Annotated[Literal["small", "large"] | None, Flag("for", shown="by its size")] = Field(
        default=None, description="Size."
    )
    sizes: tuple[int, ...] = Field(default=(1, 2), description="Sizes.")
    share: float = Field(default=0.5, gt=0, description="A share.")
    whole: bool = Field(default=False, description="All of it.")
    name: Annotated[str, Flag(metavar="NAME")] = Field(description="Its name.")

    @model_validator(mode="after")
    def _whole_has_no_share(self) -> "Order":
        if self.whole and "share" in self.model_fields_set:
            raise ValueError("--whole takes no --share")
        return self


def invoke(*arguments: str, seen: list[Order] | None = None) -> Result:
    app = typer.Typer()

    @app.command()
    @with_options(order=Order)
    def place(order: Order, loud: bool = False) -> None:
        """Place an order."""
        if seen is not None:
            seen.append(order)

    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


def ordered(*arguments: str) -> Order:
    seen: list[Order] = []
    result = invoke(*arguments, seen=seen)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_what_is_not_given_keeps_its_default_and_is_not_set() -> None:
    order = ordered("here", "--name", "toy")
    assert order == Order(source="here", name="toy")
    assert order.model_fields_set == {"source", "name"}


def test_each_kind_of_field_is_read_from_text() -> None:
    order = ordered(
        *("here", "a", "b", "--target", "out/x", "--for", "large", "--sizes", "3, 4", "--share", "1.5", "--name", "toy")
    )
    assert (order.source, order.more, order.target) == ("here", ("a", "b"), Path("out/x"))
    assert (order.kind, order.sizes, order.share, order.whole) == ("large", (3, 4), 1.5, False)
    assert ordered("here", "--name", "toy", "--whole").whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "0"], "--share must be more than 0, got 0"),
        (["--share", "half"], "--share takes FLOAT, got 'half'"),
        (["--for", "tiny"], "--for must be one of small, large, got 'tiny'"),
        (["--sizes", "1,two"], "--sizes takes INTEGER,…, got '1,two'"),
        (["--whole", "--share", "1"], "--whole takes no --share"),
    ],
)
def test_a_bad_value_is_a_usage_error(arguments: list[str], message: str) -> None:
    result = invoke("here", "--name", "toy", *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("arguments", [["--name", "toy"], ["here"]])
def test_a_field_without_default_is_required(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Missing" in result.output


def test_the_help_shows_forms_and_defaults() -> None:
    output = invoke("--help").output
    for part in ("SOURCE", "[MORE]…", "PATH", "small|large", "(by its size)", "(1,2)", "NAME", "Taken from here."):
        assert part in output


def test_the_help_lists_a_commands_own_options_last() -> None:
    output = invoke("--help").output
    assert output.index("--target") < output.index("--name") < output.index("--loud") < output.index("--help")


def test_names_follow_from_fields_and_their_marks() -> None:
    assert [flag(Order, name) for name in ("source", "kind", "whole")] == ["SOURCE", "--for", "--whole"]
    assert variable(Order, "kind") is None
