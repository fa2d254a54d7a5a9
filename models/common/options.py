"""Command-line options generated from a pydantic model, so that a flag, its default and its help are written once.

A field's type gives the option its form: `bool` a switch, `Literal` a choice, `tuple` a comma-separated list (as an
argument: several words), `X | None` an option without a default. `Flag` in an `Annotated` type changes one option.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

METAVARS = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT"}
OUT_OF_RANGE = {"greater_than_equal", "less_than_equal", "greater_than", "less_than"}
WORDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True, slots=True)
class Flag:
    """Marker of a field with an option unlike the one that its name and type give.

    `name` is the option's, without dashes. `shown` is the default that the help text shows. A `positional` field
    becomes an argument.
    """

    name: str = ""
    metavar: str = ""
    shown: str = ""
    positional: bool = False


def _auto(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "auto" else value


def _auto_or_off(value: object) -> object:
    return 0 if isinstance(value, str) and value.strip().lower() == "off" else _auto(value)


# None is "auto": determined from the machine, or at run time.
AutoInt = Annotated[int | None, BeforeValidator(_auto), Flag(metavar="auto|N", shown="auto")]
AutoFloat = Annotated[float | None, BeforeValidator(_auto), Flag(metavar="auto|N", shown="auto")]
AutoOffInt = Annotated[int | None, BeforeValidator(_auto_or_off), Flag(metavar="auto|off|N", shown="auto")]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="PATH", help="Show this run's file again instead of measuring.")
]


def with_options(**models: type[BaseModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a typer command that takes these models by name: it gets one option for each of their fields.

    Only options that were given are set on the model (`model_fields_set`). A model with a class variable `env_prefix`
    is also read from the environment: a flag wins over its variable, which wins over the default. A bad value is a
    usage error (exit 2) that names the flag or variable, its limits and the value. In the help the options of the
    models come after the command's own required parameters and before its other options, such as `--json`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            made = {name: _make(model, values) for name, model in models.items()}
            return command(**values, **made)

        signature = inspect.signature(command)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name not in models]
        first = [p for p in own if p.default is inspect.Parameter.empty]
        generated = [_parameter(model, name) for model in models.values() for name in model.model_fields]
        parameters = [*first, *generated, *(p for p in own if p not in first)]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def flag(model: type[BaseModel], name: str) -> str:
    """The command-line flag of the field `name`; for a positional one, its name in the usage line."""
    marks = _marks(model.model_fields[name])
    return marks.metavar or name.upper() if marks.positional else "--" + (marks.name or name.replace("_", "-"))


def variable(model: type[BaseModel], name: str) -> str | None:
    """The environment variable of the field `name`; None if the model is not read from the environment."""
    prefix: str = getattr(model, "env_prefix", "")
    marks = _marks(model.model_fields[name])
    return prefix + (marks.name or name).replace("-", "_").upper() if prefix and not marks.positional else None


def _marks(field: FieldInfo) -> Flag:
    return next((mark for mark in reversed(field.metadata) if isinstance(mark, Flag)), Flag())


def _kind(field: FieldInfo) -> Any:
    """The field's type without `None`."""
    if get_origin(field.annotation) in (Union, UnionType):
        return next(kind for kind in get_args(field.annotation) if kind is not NoneType)
    return field.annotation


def _metavar(field: FieldInfo) -> str:
    kind = _kind(field)
    if get_origin(kind) is Literal:
        plain = "|".join(str(choice) for choice in get_args(kind))
    elif get_origin(kind) is tuple:
        plain = f"{METAVARS[get_args(kind)[0]]},…"
    else:
        plain = METAVARS[kind]
    return _marks(field).metavar or plain


def _parameter(model: type[BaseModel], name: str) -> inspect.Parameter:
    """The typer parameter of a field: a switch, or text that the model reads; None where it was not given."""
    field = model.model_fields[name]
    marks, kind = _marks(field), _kind(field)
    required = field.is_required()
    if marks.positional:
        taken: Any = list[str] if get_origin(kind) is tuple else str
        info = typer.Argument(metavar=flag(model, name), help=field.description, show_default=_shown(field))
    elif kind is bool:
        taken, required = bool, False
        info = typer.Option(flag(model, name), envvar=variable(model, name), help=field.description, show_default=False)
    else:
        taken = str
        info = typer.Option(
            flag(model, name),
            envvar=variable(model, name),
            metavar=_metavar(field),
            help=field.description,
            show_default=_shown(field),
        )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[taken if required or taken is bool else taken | None, info],
    )


def _shown(field: FieldInfo) -> str | bool:
    """The default in the help text; False hides it."""
    default = None if field.is_required() else field.default
    if isinstance(default, tuple):
        default = ",".join(str(part) for part in default)
    return _marks(field).shown or (False if default in (None, "") else str(default))


def _make(model: type[BaseModel], values: dict[str, Any]) -> BaseModel:
    given = {name: value for name in model.model_fields if (value := values.pop(name)) not in (None, [])}
    try:
        return model(**{name: _parts(model.model_fields[name], value) for name, value in given.items()})
    except ValidationError as error:
        raise typer.BadParameter(_refusal(model, given, error)) from error


def _parts(field: FieldInfo, value: Any) -> Any:
    if get_origin(_kind(field)) is tuple and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _refusal(model: type[BaseModel], given: Mapping[str, Any], error: ValidationError) -> str:
    first = error.errors()[0]
    message = str(first.get("ctx", {}).get("error", first["msg"]))
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    field, value = model.model_fields[name], given[name]
    from_variable = variable(model, name)
    said = from_variable if from_variable and os.environ.get(from_variable) == value else flag(model, name)
    if first["type"] in OUT_OF_RANGE:
        return f"{said} must {_limits(field)}, got {value}"
    if first["type"] == "literal_error":
        return f"{said} must be one of {', '.join(str(choice) for choice in get_args(_kind(field)))}, got {value!r}"
    if first["type"].endswith("_parsing"):
        return f"{said} takes {_metavar(field)}, got {value!r}"
    return f"{said}: {message}, got {value!r}"


def _limits(field: FieldInfo) -> str:
    found = {name: getattr(mark, name) for mark in field.metadata for name in WORDS if hasattr(mark, name)}
    if found.keys() == {"ge", "le"}:
        return f"lie between {found['ge']:.12g} and {found['le']:.12g}"
    return "be " + " and ".join(f"{WORDS[name]} {limit:.12g}" for name, limit in found.items())
