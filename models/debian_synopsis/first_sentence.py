"""Synopses without any model: the description's first sentence, as it is, and made into a phrase by rules. Pure.

The rules were written while looking at the train split's scores, and each of them raised the mean ROUGE-L there.
"""

import re
from collections.abc import Sequence

LIMIT = 79
# Words that can follow before a phrase is long enough to be cut at a clause.
_SHORTEST = 20
_SENTENCE = re.compile(r"(?<=[A-Za-z0-9)\]\"'][.!?])\s+(?=[A-Z(\[\"'])|\n")
_SUBJECT = re.compile(
    r"^(?!an? )(?:(?:this|the|these) (?:[\w-]+ ){0,2}?"
    r"(?:package|library|module|program|plugin|extension|tool|project|crate|gem)s?"
    r"|this|it|here|[^.:;]{1,60}?)(?:,? \([^)]*\))?,?"
    r" (?:is|are|provides?|contains?|offers?|implements?|includes?|ships?|adds?|allows?|installs?)"
    r" (?:only |also |just )?(?:(?:both|all|you|one|users?) )?(?:(?:an?|the|some|one of the|to) )?",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"(?:,? (?:which|that|who|where|whereas|while|because|so that|written in|based on|designed|intended|developed|"
    r"allowing|providing|using|used|including|such as|aimed|aiming|like|as well as|similar to)\b| \(|[:;,] | - | -- )"
)
_NAMED_PART = re.compile(
    r"(?:this|the) (?:[\w-]+ )?package (?:contains|provides|includes|installs|ships) (?:the |an? |some )?"
    r"(.+?)(?:\.|,| for | that | which |$)",
    re.IGNORECASE,
)
_LONGEST_PART = 6
_PARTS = (
    (r"\bdevelopment (?:files|headers|libraries|package)\b|\bheader(?:s| files)\b", " - development files"),
    (r"\b(?:documentation|manual|javadoc)\b", " - documentation"),
    (r"\b(?:debugging symbols|debug symbols)\b", " - debug symbols"),
    (r"\b(?:metapackage|meta-package|dependency package)\b", " (metapackage)"),
    (r"\b(?:shared librar(?:y|ies)|runtime librar(?:y|ies))\b", " - shared library"),
    (r"\b(?:data files|architecture[- ]independent)\b", " - data files"),
    (r"\bcommon files\b", " - common files"),
    (r"\bpython ?3\b", " (Python 3)"),
)


def first_sentence(description: str) -> str:
    """The description up to the end of its first sentence or line."""
    return _SENTENCE.split(description.strip(), maxsplit=1)[0].strip()


def first_phrase(description: str) -> str:
    """The first sentence as a phrase: without subject and verb, cut at a clause, the package's part at its end."""
    sentence = first_sentence(description)
    phrase = _SUBJECT.sub("", sentence, count=1) or sentence
    phrase = re.sub(r"^(?:an?|the) ", "", phrase, flags=re.IGNORECASE)
    cut = _CLAUSE.search(phrase, _SHORTEST)
    phrase = (phrase[: cut.start()] if cut else phrase).rstrip(" .,;:")
    return _with_part(phrase, description.strip().splitlines())


def _with_part(phrase: str, lines: Sequence[str]) -> str:
    """`phrase` with the part of the source that the last paragraph names, if it names one."""
    named = _NAMED_PART.match(lines[-1]) if len(lines) > 1 else None
    if named and len(named[1].split()) <= _LONGEST_PART:
        part = f" - {named[1]}"
    else:
        part = next((mark for pattern, mark in _PARTS if re.search(pattern, lines[-1], re.IGNORECASE)), "")
    if set(re.findall(r"\w+", part.lower())) <= set(re.findall(r"\w+", phrase.lower())):
        part = ""
    return _shortened(phrase, max(_SHORTEST, LIMIT - len(part))) + part


def _shortened(phrase: str, limit: int) -> str:
    """The whole words of `phrase` that fit into `limit` characters."""
    return phrase if len(phrase) <= limit else phrase[: limit + 1].rpartition(" ")[0].rstrip(" .,;:")
