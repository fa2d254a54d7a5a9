"""ARCHITECTURE.md and the READMEs are true: the paths they name exist, and every room is on the page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
PAGES = [PAGE, ROOT / "README.md", ROOT / "convert" / "README.md", ROOT / "benchmarks" / "README.md"]
HOUSES = ("models", "runtime", "convert", "benchmarks")
NAMED = re.compile(rf"`((?:{'|'.join(HOUSES)}|tests)/[\w./]*)`")
LINKED = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {ROOT / path for path in NAMED.findall(text)}
    linked = {(page.parent / path).resolve() for path in LINKED.findall(text)}
    assert named or linked
    missing = [str(path.relative_to(ROOT)) for path in named | linked if not path.exists()]
    assert not missing, f"{page.name} names what does not exist: {missing}"


def test_every_room_is_on_the_page() -> None:
    named = {path.rstrip("/") for path in NAMED.findall(PAGE.read_text(encoding="utf-8"))}
    rooms = {path.parent.relative_to(ROOT).as_posix() for house in HOUSES for path in (ROOT / house).rglob("*.py")}
    rooms -= {"models/email_triage/data", "models/debian_synopsis/data"}  # data, with the scripts that made it
    assert rooms <= named, f"rooms that ARCHITECTURE.md leaves out: {sorted(rooms - named)}"
