"""A model's Jinja chat template, run in a sandbox with bounds on the text it writes and on its time.

The template is data that came with the weights: it may be broken, and it may be hostile.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import InvalidRequest, TemplateFailed

MAX_RENDERED_CHARS = 8 * 2**20
MAX_RENDER_SECONDS = 2.0
MAX_POWER_OPERAND = 1000


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks trained text: only its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags. Raises TemplateSyntaxError when the closing tag is missing."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Variables → text. Immutable: any thread may use it.

    `variables` are the names it reads; `written` is all text it may write by itself, comments and code left out.
    """

    def __init__(self, source: str) -> None:
        """Parse `source`. Raises TemplateFailed if it is not a Jinja template."""
        extensions = ("jinja2.ext.loopcontrols", GenerationTag)
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except TemplateError as error:
            raise TemplateFailed(f"the model's chat template does not parse: {error}") from error
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        self.written = _written(tree)

    def render(self, variables: Mapping[str, object]) -> str:
        """Render the text.

        Raises InvalidRequest if the template refuses the messages or writes too much, TemplateFailed if it fails.
        """
        deadline = time.monotonic() + MAX_RENDER_SECONDS
        try:
            return _joined(self._template.generate({**variables, "range": _timed_range(deadline)}), deadline)
        except (InvalidRequest, TemplateFailed):
            raise
        except Exception as error:  # a template can raise anything
            raise TemplateFailed(f"the chat template failed: {type(error).__name__}: {error}") from error


def _written(tree: nodes.Template) -> str:
    pieces = (node.data if isinstance(node, nodes.TemplateData) else node.value for node in _texts(tree))
    return "\n".join(piece for piece in pieces if isinstance(piece, str))


def _texts(tree: nodes.Template) -> Iterator[nodes.TemplateData | nodes.Const]:
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        assert isinstance(node, nodes.TemplateData | nodes.Const)
        yield node


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which does not bound `'x' * 10**9` by itself."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for operand, factor in ((left, right), (right, left)):
            if isinstance(operand, Sized) and isinstance(factor, int) and len(operand) * factor > MAX_RENDERED_CHARS:
                raise TemplateFailed(f"the chat template repeats something {factor} times")
        if operator == "**" and not all(
            isinstance(x, int | float) and abs(x) <= MAX_POWER_OPERAND for x in (left, right)
        ):
            raise TemplateFailed(f"the chat template computes {left!r} ** {right!r}")
        return super().call_binop(context, operator, left, right)


def _timed_range(deadline: float) -> Callable[..., Iterator[int]]:
    """`range` for a template: nested loops that write nothing are stopped too."""

    def timed(*bounds: int) -> Iterator[int]:
        for number in range(*bounds):
            _require_time(deadline)
            yield number

    return timed


def _joined(pieces: Iterator[str], deadline: float) -> str:
    written: list[str] = []
    n_chars = 0
    for piece in pieces:
        written.append(piece)
        n_chars += len(piece)
        if n_chars > MAX_RENDERED_CHARS:
            message = f"the rendered conversation exceeds {MAX_RENDERED_CHARS} characters"
            raise InvalidRequest(message, param="messages")
        _require_time(deadline)
    return "".join(written)


def _require_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TemplateFailed(f"the chat template took longer than {MAX_RENDER_SECONDS:g} s")


def _refuse(message: str) -> NoReturn:
    raise InvalidRequest(f"the model's chat template refuses the messages: {message}", param="messages")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
