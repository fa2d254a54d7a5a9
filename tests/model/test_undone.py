"""The known trap, with the real thing: the default model's base lies on Q4_K_M's grid, and so does a plain Q4_K_M.

Merged, the fine-tune is whole; rounded to Q8_0 it stays; rounded to Q4_K_M again it is gone, and the ladder says so.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from convert.candidates import plain
from convert.examples import split_examples
from convert.inputs import ConvertRequest
from convert.ladder import LadderInputs, Provenance, Tools, run_ladder
from convert.measure_tasks import tasks_of
from convert.pipeline import convert
from convert.progress import LineReporter
from convert.speed import Progress, Served, SpeedReport
from models.chat_records import read_chat_records
from models.manifest import read_manifest
from models.quality import Candidate, Quality
from models.store import Store

HOME = Path(__file__).parents[2] / "models" / "email_triage"
MAILS = HOME / "data" / "validation.jsonl.gz"
N_MAILS = 16

pytestmark = pytest.mark.model


def untimed(files: Mapping[str, Path], how: Served, progress: Progress) -> SpeedReport:
    """No speeds: what is loaded beside the tests decides nothing here."""
    return SpeedReport({}, {}, {}, None, "")


@pytest.fixture(scope="module")
def measured(base_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    home = tmp_path_factory.mktemp("undone")
    request = ConvertRequest(str(base_gguf), "tuned", HOME / "adapter", "F16")
    half = convert(request, Store(home / "store"), LineReporter()).gguf
    manifest = read_manifest(HOME)
    held_out = split_examples(read_chat_records(MAILS), N_MAILS).held_out
    tasks = tasks_of(half, held_out, "classify", manifest.labels, manifest.prompt.template)
    inputs = LadderInputs(half, "tuned", tasks, (plain("Q8_0"), plain("Q4_K_M")), base=base_gguf)
    quality, chosen = run_ladder(
        inputs, Provenance(MAILS.name, "0" * 64, 0), home / "work", LineReporter(), Tools(speeds=untimed)
    )
    assert chosen.is_file()
    return quality


def named(quality: Quality, name: str) -> Candidate:
    return next(one for one in quality.candidates if one.name == name)


def test_q4_k_m_is_refused_since_it_answers_as_the_base(measured: Quality) -> None:
    refused = named(measured, "Q4_K_M")
    assert refused.verdict == "undoes the fine-tune"
    assert refused.loss is not None
    assert refused.kl_to_base is not None
    assert refused.kl_to_base < refused.loss.kl_mean
    assert "rounded to the very grid their base lay on" in refused.reason
    assert refused.answers is not None
    assert refused.answers.flips > N_MAILS / 4


def test_q8_0_keeps_the_fine_tune_and_is_chosen(measured: Quality) -> None:
    kept = named(measured, "Q8_0")
    assert kept.verdict == "chosen"
    assert kept.loss is not None
    assert kept.kl_to_base is not None
    assert kept.loss.kl_mean < measured.budget.kl_mean < kept.kl_to_base
    assert measured.chosen == "Q8_0"


def test_the_fine_tune_lies_far_beyond_the_noise(measured: Quality) -> None:
    assert measured.noise is not None
    assert measured.base_distance is not None
    assert measured.noise.kl_mean < 0.02
    assert measured.base_distance.kl_mean > 10 * measured.noise.kl_mean
