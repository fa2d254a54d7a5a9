"""Personal data in texts, counted by kind: patterns with their check digits, so that order numbers are not cards."""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence

from .finding import MAX_EXAMPLES, Example, Finding, keys

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d.-])")
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:|:)(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])")
_PHONE = re.compile(
    r"(?<![\w.+-])(?<!\d )(?:\+\d{1,3}[ ./-]?|\(?0|\(\d{3}\) ?|\d{3}-(?=\d{3}-))[\d(][\d ()./-]{5,16}\d(?![\w-])"
)


def _luhn(number: str) -> bool:
    digits = [int(digit) for digit in number if digit.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _mod97(iban: str) -> bool:
    plain = iban.replace(" ", "")
    turned = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(one, 36)) for one in turned)) % 97 == 1


def _address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return len(text) > 3  # "::" is punctuation


def _dialled(text: str) -> bool:
    digits = sum(character.isdigit() for character in text)
    dotted = re.fullmatch(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(?: .*)?", text)
    return 8 <= digits <= 15 and not dotted


# In order: what one kind matched is not looked at by the next.
KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("e-mail address", _EMAIL, lambda _: True),
    ("IBAN", _IBAN, _mod97),
    ("card number", _CARD, _luhn),
    ("IP address", _IPV4, _address),
    ("IP address", _IPV6, _address),
    ("phone number", _PHONE, _dialled),
)


def personal(text: str) -> list[tuple[str, str]]:
    """Every (kind, match) in the text."""
    found = []
    for kind, pattern, real in KINDS:
        for match in [match for match in pattern.finditer(text) if real(match[0])]:
            found.append((kind, match[0]))
            text = text[: match.start()] + "\0" * len(match[0]) + text[match.end() :]
    return found


def personal_findings(examples: Sequence[Example]) -> Iterator[Finding]:
    """One finding a kind. The examples are masked: a report is passed on more readily than data."""
    by_kind: dict[str, list[tuple[Example, str]]] = {}
    for example in examples:
        for kind, match in personal(example.text) + personal(example.answer):
            by_kind.setdefault(kind, []).append((example, match))
    for kind, found in by_kind.items():
        rows = list({(example.split, example.record.id): example for example, _ in found}.values())
        yield Finding(
            kind="personal data",
            severity="note",
            n=len(found),
            what=f"matches of {kind}, in {len(rows)} examples; a model that is trained on them may repeat them",
            examples=tuple(f"{example.where}: {mask(match)}" for example, match in found[:MAX_EXAMPLES]),
            mend="mask them in the file before `deskside task new`, unless the task needs them",
            rows=keys(rows),
        )


def mask(match: str) -> str:
    """The first two characters, and one more for every other letter and digit."""
    return match[:2] + re.sub(r"\w", "•", match[2:])
