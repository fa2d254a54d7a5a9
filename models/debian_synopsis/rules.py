"""Debian's written rules for a synopsis, as checks. Pure.

The rules of Debian Policy 3.4 and of the Developer's Reference 6.2.2, as far as a program can check them. The checks
are of our own making, and stricter or laxer than a reader at the margins: how many of the maintainers' own synopses
pass each is on the data's card. A rule that many of them break is measured, but is no part of conformity.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

LIMIT = 80
_ABBREVIATION = re.compile(r"(?:\b(?:etc|inc|ltd|co|al|vs)|\b[a-z](?:\.[a-z])+)\.$", re.IGNORECASE)
_SENTENCES = re.compile(r"[a-z)\]]{2}[.!?] +[A-Z]")
_CLAUSE = re.compile(
    r"^(?:this|these|it|you)\b|\bis (?:an?|the)\b|\bare (?:an?|the)\b|\b(?:this|the) package\b", re.IGNORECASE
)
_VERB = re.compile(
    r"^(?:provides|allows|enables|contains|implements|converts|creates|adds|makes|lets|gives|displays|shows|generates|"
    r"manages|handles|helps|includes|supports|offers|runs|uses|reads|writes|checks|finds|is|are)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Draft:
    """A synopsis to be judged, with the package's name and its description."""

    package: str
    description: str
    synopsis: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A check with its source; `required`: a part of conformity."""

    name: str
    source: str
    holds: Callable[[Draft], bool]
    required: bool = True


def is_one_line(draft: Draft) -> bool:
    """True for a text without a line break, and without a blank at either end."""
    return draft.synopsis != "" and draft.synopsis.splitlines() == [draft.synopsis.strip()]


def is_brief(draft: Draft) -> bool:
    """True below 80 characters."""
    return len(draft.synopsis) < LIMIT


def is_no_single_word(draft: Draft) -> bool:
    """True from two words on: one does not describe a package."""
    return len(draft.synopsis.split()) > 1


def has_no_article_first(draft: Draft) -> bool:
    """True unless it begins with an article; "A/V" and "A*" are none."""
    return re.match(r"(?:an?|the)\s", draft.synopsis, re.IGNORECASE) is None


def has_no_full_stop(draft: Draft) -> bool:
    """True unless it ends in a full stop that is not an abbreviation's."""
    text = draft.synopsis.rstrip()
    return not text.endswith((".", "!")) or text.endswith("...") or _ABBREVIATION.search(text) is not None


def is_no_sentence(draft: Draft) -> bool:
    """True for a phrase: neither "this is a …" nor "X is a …" nor two sentences."""
    return _CLAUSE.search(draft.synopsis) is None and _SENTENCES.search(draft.synopsis) is None


def is_no_verb_phrase(draft: Draft) -> bool:
    """True unless it begins with a verb of which the package would be the subject ("provides …")."""
    return _VERB.match(draft.synopsis) is None


def has_no_name_first(draft: Draft) -> bool:
    """True unless it begins with the package's name as a word of its own."""
    name = re.escape(draft.package)
    return re.match(rf"{name}(?![\w+-])", draft.synopsis, re.IGNORECASE) is None


def is_no_copy_of_first_line(draft: Draft) -> bool:
    """True unless the description begins with the very same words: it should not repeat the synopsis."""
    begin = " ".join(draft.description.split()).casefold()
    return not begin.startswith(draft.synopsis.rstrip(" .").casefold())


def has_no_needless_capital(draft: Draft) -> bool:
    """True unless it begins with a capital for no reason.

    A word has no reason for it if the description writes it in lower case. Acronyms and mixed case keep theirs.
    """
    first = re.match(r"[A-Z][a-z]+(?![\w/+.-])", draft.synopsis)
    return first is None or first[0].lower() not in re.findall(r"[\w/+.-]+", draft.description)


POLICY, REFERENCE = "Policy 3.4.1", "Developer's Reference 6.2.2"
RULES = (
    Rule("one line", POLICY, is_one_line),
    Rule("fewer than 80 characters", POLICY, is_brief),
    Rule("more than one word", POLICY, is_no_single_word),
    Rule("not the package's name first", POLICY, has_no_name_first),
    Rule("no article first", REFERENCE, has_no_article_first),
    Rule("no full stop at the end", REFERENCE, has_no_full_stop),
    Rule("not a sentence", REFERENCE, is_no_sentence),
    Rule("not a verb phrase", REFERENCE, is_no_verb_phrase),
    Rule("not the first words of the description", "Policy 3.4.2", is_no_copy_of_first_line),
    # One in seven of the maintainers' own synopses has one: information, no part of conformity.
    Rule("no needless capital", REFERENCE, has_no_needless_capital, required=False),
)


def broken(draft: Draft) -> list[str]:
    """The names of the rules that `draft` breaks, all of them."""
    return [rule.name for rule in RULES if not rule.holds(draft)]


def conforms(draft: Draft) -> bool:
    """True if it keeps every required rule."""
    return all(rule.holds(draft) for rule in RULES if rule.required)
