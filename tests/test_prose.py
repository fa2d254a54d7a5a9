"""Docstrings and comments read as technical English: a noun or a verb first, and none of the circumlocutions listed."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSES = ("models", "runtime", "convert", "benchmarks")
FILES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))
# A docstring that begins with one of these is a noun clause without a main verb.
CLAUSE = re.compile(r"(What|Whether|How|Whose|Who|Where|When|Which|Why)\b")
CIRCUMLOCUTION = re.compile(
    r"\b(anew|nobody|somebody|whoever|whatever|otherwise|stands|told|goes on|whose)\b", re.IGNORECASE
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_and_comments_are_plain(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = [
        f"{path.name}:{line}: begins with {match[0]!r}"
        for line, text in docstrings(source)
        if (match := CLAUSE.match(text))
    ]
    for line, text in [*docstrings(source), *comments(source)]:
        found += [f"{path.name}:{line}: {word!r}" for word in CIRCUMLOCUTION.findall(text)]
    assert not found, "\n".join(found)


def test_the_check_sees_what_it_should() -> None:
    source = 'def f():\n    """Whether it stands."""\n    # nobody knows\n'
    assert [CLAUSE.match(text) is not None for _, text in docstrings(source)] == [True]
    words = [word for _, text in [*docstrings(source), *comments(source)] for word in CIRCUMLOCUTION.findall(text)]
    assert words == ["stands", "nobody"]
