r"""Regular expressions as schemas' patterns read them: `\d`, `\w` and `\s` are ASCII, not any script's. Pure."""

import re

_CLASSES = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[0-9A-Za-z_]",
    "W": "[^0-9A-Za-z_]",
    "s": r"[ \t\n\r\f\v]",
    "S": r"[^ \t\n\r\f\v]",
}
# A string, a comment or a regular expression of a Lark grammar.
_LARK = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|(/(?:\\.|[^/\\])+/)', re.DOTALL)


def ascii_regex(pattern: str) -> str:
    """The pattern with ASCII classes. They nest in brackets too, as the dialect allows."""
    return re.sub(r"\\(.)", lambda found: _CLASSES.get(found[1], found[0]), pattern, flags=re.DOTALL)


def ascii_lark(source: str) -> str:
    """A Lark grammar with ASCII classes in its regular expressions."""
    return _LARK.sub(lambda found: ascii_regex(found[0]) if found[1] else found[0], source)
