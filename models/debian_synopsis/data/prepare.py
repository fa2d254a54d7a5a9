"""Debian's package index -> descriptions and their synopses as train, validation and test examples, always the same.

    python -m models.debian_synopsis.data.prepare Packages.xz Translation-en.xz

Standard library only. A family of packages is all that is built from one source, in any version: it has one record, so
that no family is in two splits. The content decides the split. A description is used whole or not at all: its last
sentence often says which part of the source the package is, and the synopsis repeats that.
"""

import argparse
import gzip
import hashlib
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SPLITS = ("train", "validation", "test")
# Of 29 records 22 train, 3 validate and 4 test, on average.
PARTS, TEST_PARTS, VALIDATION_PARTS = 29, 4, 3
PER_SECTION = 60
CHARACTERS = (100, 600)
SHINGLE_WORDS = 3
# Packages without a description of their own: they exist so that an upgrade installs another package.
_TRANSITIONAL = re.compile(r"\b(?:transitional|dummy|obsolete)\b", re.IGNORECASE)
_ITEM = re.compile(r"[-*+•o] ")
_FIELD = re.compile(r"([A-Za-z0-9-]+):[ \t]*(.*)")


@dataclass(frozen=True)
class Package:
    """A package: `source` is what it is built from, `section` its part of the archive."""

    name: str
    source: str
    section: str
    synopsis: str
    description: str

    @cached_property
    def digest(self) -> bytes:
        """The hash of the description's letters: it decides order and split."""
        return hashlib.sha256(normalise(self.description).encode()).digest()

    @property
    def family(self) -> str:
        """The source without its version: `llvm-toolchain-14` and `-15` are one family."""
        return re.sub(r"[-.]?v?\d[\d.]*(?:-[a-z]+\d*)?$", "", self.source) or self.source

    @property
    def split(self) -> str:
        part = int.from_bytes(self.digest[:4]) % PARTS
        return "test" if part < TEST_PARTS else "validation" if part < TEST_PARTS + VALIDATION_PARTS else "train"

    def record(self) -> dict[str, object]:
        turns = (("user", self.description), ("assistant", self.synopsis))
        return {"id": self.name, "messages": [{"role": role, "content": content} for role, content in turns]}


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The records of a Debian control file: a value's further lines are kept with the blank that they begin with."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line.strip():
            if fields:
                yield fields
            fields = {}
        elif line[0] in " \t":
            fields[name] = f"{fields.get(name, '')}\n{line}"
        elif match := _FIELD.match(line):
            name, fields[match[1]] = match[1], match[2]
    if fields:
        yield fields


def read_packages(packages: Iterable[str], translations: Iterable[str]) -> Iterator[Package]:
    """Join the index of packages with the English descriptions, which a hash names; in the index's order."""
    texts = {
        (fields["Package"], fields["Description-md5"]): fields["Description-en"] for fields in stanzas(translations)
    }
    for fields in stanzas(packages):
        text = texts.get((fields["Package"], fields.get("Description-md5", "")))
        if text is not None:
            yield package_of(fields, text)


def package_of(fields: Mapping[str, str], text: str) -> Package:
    """A package from its fields in the index and its `Description` field, of which the first line is the synopsis."""
    synopsis, _, description = text.partition("\n")
    source = fields.get("Source", fields["Package"]).split()[0]
    section = fields["Section"].rsplit("/", 1)[-1]
    return Package(fields["Package"], source, section, " ".join(synopsis.split()), unwrapped(description))


def unwrapped(field: str) -> str:
    """The extended description as paragraphs: lines are joined unless they are to be shown as they are.

    Policy 5.6.13: every line begins with a blank, one that begins with two is verbatim, and ` .` is an empty line.
    """
    lines: list[str] = []
    joins = False
    for raw in field.splitlines():
        line = raw[1:].rstrip()
        verbatim = line[:1].isspace()
        text = " ".join(line.split())
        if text in ("", "."):
            lines.append("")
        elif joins and not verbatim and not _ITEM.match(text):
            lines[-1] += f" {text}"
        else:
            lines.append(text)
        joins = text not in ("", ".") and not verbatim
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()


def normalise(text: str) -> str:
    """The key by which two texts are equal: their letters, in order, in lower case."""
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold()))


def of_stated_length(packages: Iterable[Package]) -> list[Package]:
    """The packages with a description that is neither too short to tell anything nor too long to be used whole."""
    shortest, longest = CHARACTERS
    return [one for one in packages if one.synopsis and shortest <= len(one.description) <= longest]


def without_transitional(packages: Iterable[Package]) -> list[Package]:
    """The packages that are described for their own sake."""
    return [one for one in packages if not _TRANSITIONAL.search(f"{one.synopsis}\n{one.description}")]


def one_of_each_family(packages: Iterable[Package]) -> list[Package]:
    """One package of each family and of each synopsis, in the order of their digests."""
    kept: list[Package] = []
    seen: set[str] = set()
    for package in sorted(packages, key=lambda one: (one.digest[::-1], one.name)):
        keys = {f"family {package.family}", f"synopsis {normalise(package.synopsis)}"}
        if not keys & seen:
            seen |= keys
            kept.append(package)
    return kept


def without_near_copies(packages: Iterable[Package]) -> list[Package]:
    """Drop a package that shares more than half of the shorter one's runs of words with an earlier one."""
    kept: list[Package] = []
    sizes: list[int] = []
    owners: dict[tuple[str, ...], list[int]] = {}
    for package in packages:
        shingles = _shingles(package)
        common = Counter(index for shingle in shingles for index in owners.get(shingle, ()))
        if any(2 * shared > min(len(shingles), sizes[index]) for index, shared in common.items()):
            continue
        for shingle in shingles:
            owners.setdefault(shingle, []).append(len(kept))
        sizes.append(len(shingles))
        kept.append(package)
    return kept


def capped(packages: Iterable[Package]) -> list[Package]:
    """At most PER_SECTION of each section of the archive."""
    taken: Counter[str] = Counter()
    chosen = []
    for package in packages:
        taken[package.section] += 1
        if taken[package.section] <= PER_SECTION:
            chosen.append(package)
    return chosen


STEPS: dict[str, Callable[[Iterable[Package]], list[Package]]] = {
    "description of 100 to 600 characters": of_stated_length,
    "not transitional": without_transitional,
    "one of each family and synopsis": one_of_each_family,
    "no near-copies": without_near_copies,
    "at most 60 of a section": capped,
}


def _shingles(package: Package) -> set[tuple[str, ...]]:
    words = normalise(package.description).split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def opened(path: Path) -> io.TextIOBase:
    """Open an index as text, unpacked if it is an .xz file."""
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")


def write_jsonl_gz(path: Path, records: Iterable[dict[str, object]]) -> str:
    """Write without name or time in the gzip header, so that equal records give equal bytes; returns their sha256."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="dists/bookworm/main/binary-amd64/Packages or Packages.xz")
    parser.add_argument("translations", type=Path, help="dists/bookworm/main/i18n/Translation-en or Translation-en.xz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the three files")
    arguments = parser.parse_args()
    with opened(arguments.packages) as packages, opened(arguments.translations) as translations:
        everything = list(read_packages(packages, translations))
    chosen = everything
    for name, step in STEPS.items():
        chosen = step(chosen)
        print(f"{name:<40}{len(chosen):>6} of {len(everything)}")
    for split in SPLITS:
        part = [package for package in chosen if package.split == split]
        digest = write_jsonl_gz(arguments.out / f"{split}.jsonl.gz", (package.record() for package in part))
        print(f"{split:<11}{len(part):>5}  sha256 {digest}")


if __name__ == "__main__":
    main()
