"""Command-line options made from RuntimeConfig's fields, so that a flag and its variable are written down once."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from runtime.config import Group, RuntimeConfig, env_name, flag, settings


def with_config(*groups: Group) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a typer command that takes `config: RuntimeConfig`: it gets one option for each field of `groups`.

    A flag wins over its DESKSIDE_* variable, which wins over the default. A bad value is a usage error (exit 2).
    """
    names = [name for group in groups for name in settings(group)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            given = {name: values.pop(name) for name in names}
            return command(**values, config=_config(given))

        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name != "config"]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [_parameter(n) for n in names]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _config(given: dict[str, str | None]) -> RuntimeConfig:
    try:
        return RuntimeConfig.from_text({name: text for name, text in given.items() if text is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _parameter(name: str) -> inspect.Parameter:
    setting = settings()[name]
    default = getattr(RuntimeConfig(), name)
    shown = "auto" if default is None else str(default) if default not in ("", ()) else False
    option = typer.Option(
        flag(name), envvar=env_name(name), metavar=setting.metavar, help=setting.help, show_default=shown
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )
