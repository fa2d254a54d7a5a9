"""Command-line options made from the fields of a value, so that a flag, its default and its help are written once."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
ReportOption = Annotated[Path | None, typer.Option("--report", help="Show this run's file again instead of measuring.")]


def with_options(**models: type[BaseModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a typer command that takes these models by name: it gets one option for each of their fields.

    Only options that were given are set on the model (`model_fields_set`). A bad value is a usage error (exit 2).
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            made = {name: _make(model, values) for name, model in models.items()}
            return command(**values, **made)

        signature = inspect.signature(command)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name not in models]
        parameters = own + [_parameter(model, name) for model in models.values() for name in model.model_fields]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _make(model: type[BaseModel], values: dict[str, Any]) -> BaseModel:
    given = {name: value for name in model.model_fields if (value := values.pop(name)) is not None}
    try:
        return model(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise typer.BadParameter(f"{name}: {first['msg']}, got {first['input']!r}") from error


def _parameter(model: type[BaseModel], name: str) -> inspect.Parameter:
    field = model.model_fields[name]
    is_switch = field.annotation is bool
    shown: Any = False if is_switch or field.default is None else str(field.default)
    option = typer.Option(f"--{name.replace('_', '-')}", help=field.description, show_default=shown)
    kind = field.annotation if is_switch else Any if field.annotation is None else field.annotation | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, option],
    )
