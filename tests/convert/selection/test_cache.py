"""What was found is read back while nothing it depends on has changed; a damaged file is as good as none."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from convert.selection.cache import Cache, digest
from models.quality import Loss

LOSS = Loss(positions=3, kl_mean=0.1, kl_p99=0.2, top1_agreement=0.5, perplexity_ratio=1.0)
KIND = TypeAdapter(Loss)


def never() -> Loss:
    pytest.fail("it was made again")


def test_a_value_is_made_once(tmp_path: Path) -> None:
    assert Cache(tmp_path, ["a"]).value(KIND, "x", [1], lambda: LOSS) == LOSS
    assert Cache(tmp_path, ["a"]).value(KIND, "x", [1], never) == LOSS


@pytest.mark.parametrize(("common", "name", "part"), [("b", "x", 1), ("a", "y", 1), ("a", "x", 2)])
def test_each_part_makes_another_value(tmp_path: Path, common: str, name: str, part: int) -> None:
    Cache(tmp_path, ["a"]).value(KIND, "x", [1], lambda: LOSS)
    other = LOSS.model_copy(update={"kl_mean": 9.0})
    assert Cache(tmp_path, [common]).value(KIND, name, [part], lambda: other) == other


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    Cache(tmp_path, []).value(KIND, "x", [], lambda: LOSS)
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"positions": "many"}')
    assert Cache(tmp_path, []).value(KIND, "x", [], lambda: LOSS) == LOSS
    assert Cache(tmp_path, []).value(KIND, "x", [], never) == LOSS


def test_what_is_not_to_be_kept_is_not(tmp_path: Path) -> None:
    Cache(tmp_path, []).value(KIND, "x", [], lambda: LOSS, keep=lambda found: found.kl_mean < 0.1)
    assert not list(tmp_path.rglob("*.json"))


def test_a_digest_tells_types_with_the_same_figures_from_other_figures() -> None:
    assert digest(LOSS) == digest(LOSS.model_copy())
    assert digest(LOSS) != digest(LOSS.model_copy(update={"positions": 4}))
    assert len(digest(("a", 1))) == 64
