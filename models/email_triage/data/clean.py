"""Raw mail -> the text a triage model may see: subject and the start of the body, without traces of the list.

Every rule here prevents leakage: a classifier that reads `[ILUG]` or a mailman footer has learnt nothing. Text
about a list's topic is content, and stays.
"""

import re
from email import message_from_bytes
from email.header import decode_header, make_header
from email.message import Message
from html.parser import HTMLParser

BODY_CHARACTERS = 350

_LIST_NAMES = (
    r"(?:exmh[-_ ](?:users?|workers?)|razor-users?|(?:spamassassin|sa)-?(?:talk|devel?)|rpm-(?:zzz)?list|ilug)"
)
_LIST_HOSTS = (
    r"(?:linux\.ie|xent\.com|freshrpms\.net|sourceforge\.net|sf\.net|redhat\.com|taint\.org|netnoteinc\.com"
    r"|slashnull\.org|jmason\.org)"
)
# A footer, a signature or a quoted mail begins at the first match.
_TAIL = re.compile(
    r"^(?:-- ?$|_{8,}\s*$|-{5,} ?original message|-{3,} ?forwarded|begin:vcard|-----begin pgp signature"
    r"|-{20,}\s*$\s*(?:this (?:sf\.?net|sourceforge)|in remembrance|sponsored by|welcome to geek|don't miss)"
    r"|this (?:sf\.?net|sourceforge)\S* (?:e?mail|newsletter)"
    r"|.{0,40}mailing list\s*$|irish linux users' group|to (?:un)?subscribe,? .{0,60}(?:list|mailman|majordomo)"
    r"|-{10,}.*yahoo! groups sponsor)",
    re.IGNORECASE | re.MULTILINE,
)
_PGP_HEAD = re.compile(r"^-----BEGIN PGP SIGNED MESSAGE-----\n(?:[A-Za-z]+: .*\n)*", re.MULTILINE)
_QUOTED = re.compile(r"^[ \t]{0,3}(?:[A-Za-z]{0,4}[>|]|[:#%}] ).*$", re.MULTILINE)
_HEADER_LINE = re.compile(
    r"^[ \t>]*(?:from|to|cc|bcc|sent|date|reply-to|sender|message-id|subject|list-\w+|x-\S+|delivered-to)[ \t]*:.*$",
    re.IGNORECASE | re.MULTILINE,
)
_ATTRIBUTION = re.compile(
    r"^(?!$)(?:[^\n]*\n)?[^\n]*(?:\b(?:wrote|writes|said|says|typed|spake|scribbled|uttered|posted|mentioned|stated|claiming|signs)\b[^\n:]{0,60}:"
    r"|^quoting [^\n]*:"
    r"|^[^\n]*(?:\w@\w|\b(?:19|20)\d\d\b|\d:\d\d)[^\n]*:)[ \t-]*$",
    re.IGNORECASE | re.MULTILINE,
)
_LIST_URL = re.compile(
    rf"<?\b(?:https?|ftp)://\S*(?:mailman|listinfo|/lists/|lists?\.|listman|{_LIST_NAMES}|{_LIST_HOSTS})\S*>?",
    re.IGNORECASE,
)
_LIST_ADDRESS = re.compile(
    rf"<?(?:mailto:)?[\w.+-]+@(?:[\w-]+\.)*{_LIST_HOSTS}>?|<?[\w.+-]*(?:{_LIST_NAMES}|\bfork|[yz]{{4,}})[\w.+-]*@[\w.-]+>?",
    re.IGNORECASE,
)
_LIST_WORD = re.compile(rf"\[?(?<![\w-]){_LIST_NAMES}(?![\w])\]?", re.IGNORECASE)
_FORK_WORD = re.compile(r"\bFoRK\w*|\bF[Oo]RK['-](?:list|ers)\b")
_ARTEFACT = re.compile(r"\b[\w.-]*taint\.org\b|\b[yz]{4,}\w*\b", re.IGNORECASE)
_SUBJECT_TAG = re.compile(r"\[[^\]]{1,60}\]")


class _TextReader(HTMLParser):
    """The visible text of an HTML mail."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style", "title")
        if tag in ("br", "p", "div", "tr", "li", "table"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "title"):
            self._hidden = max(0, self._hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def parse(raw: bytes) -> Message:
    """Parse an RFC 822 mail, tolerant of the malformations of spam."""
    if raw.startswith(b"From "):
        raw = raw.partition(b"\n")[2]
    return message_from_bytes(raw)


def subject_of(mail: Message) -> str:
    """The decoded subject without [tags] and list names, on one line."""
    value = mail.get("Subject", "")
    try:
        text = str(make_header(decode_header(value)))
    except (LookupError, ValueError):
        text = str(value)
    return _squeeze(without_list(_SUBJECT_TAG.sub(" ", text)))


def body_of(mail: Message) -> str:
    """The author's own words: text/plain if there is any, else the HTML's text; at most BODY_CHARACTERS characters."""
    text = _first_text(mail).replace("\r\n", "\n").replace("\xa0", " ")
    text = _PGP_HEAD.sub("", text)
    tail = _TAIL.search(text)
    text = text[: tail.start()] if tail else text
    text = _QUOTED.sub("", text)
    text = _HEADER_LINE.sub("", _ATTRIBUTION.sub("", text))
    lines = (_squeeze(line) for line in without_list(text).splitlines())
    return "\n".join(line for line in lines if line)[:BODY_CHARACTERS].rstrip()


def normalise(body: str) -> str:
    """The key by which two mails are equal: their letters, in order, in lower case."""
    return " ".join(re.findall(r"[^\W\d_]+", body.casefold()))


def without_list(text: str) -> str:
    """`text` without the list's name, addresses, URLs and footers."""
    for pattern in (_LIST_URL, _LIST_ADDRESS, _LIST_WORD, _FORK_WORD, _ARTEFACT):
        text = pattern.sub(" ", text)
    return text


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _first_text(mail: Message) -> str:
    parts = [part for part in mail.walk() if not part.is_multipart()]
    for part in parts:
        if part.get_content_type() == "text/plain" and (text := _decoded(part)).strip():
            return text
    for part in parts:
        if part.get_content_type() == "text/html":
            reader = _TextReader()
            reader.feed(_decoded(part))
            return "".join(reader.parts)
    return ""


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    raw = payload if isinstance(payload, bytes) else str(payload).encode()
    try:
        return raw.decode(part.get_content_charset() or "utf-8")
    except (LookupError, UnicodeDecodeError):
        return raw.decode("latin-1")
