"""The known trap, with the real thing: the default model's base lies on Q4_K_M's grid, and so does a plain Q4_K_M.

The default adapter was trained for long, and part of it survives being rounded to that grid. At half its strength its
change is smaller than the grid's steps: merged, it is whole; rounded to Q8_0 it stays; rounded to Q4_K_M it is gone.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from convert.child import StepProgress
from convert.measure.examples import split_examples
from convert.measure.speed import ServingLoad, SpeedReport
from convert.measure.tasks import tasks_of
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.quantize.layouts import plain
from convert.selection.ladder import LadderInputs, Provenance, Tools, run_ladder
from models.common.chat_records import read_chat_records
from models.common.console import LineReporter
from models.manifest import read_manifest
from models.quality import Candidate, Quality
from models.store.store import Store

HOME = Path(__file__).parents[2] / "models" / "email_triage"
MAILS = HOME / "data" / "validation.jsonl.gz"
N_MAILS = 10
ALPHA = 32

pytestmark = pytest.mark.model


def untimed(files: Mapping[str, Path], how: ServingLoad, progress: StepProgress) -> SpeedReport:
    """No speeds: what is loaded beside the tests decides nothing here."""
    return SpeedReport({}, {}, {}, None, "")


def run(base: Path, alpha: float, names: tuple[str, ...], home: Path) -> Quality:
    """The ladder of the default adapter at strength alpha / ALPHA, on its base."""
    shutil.copytree(HOME / "adapter", home / "adapter")
    settings = home / "adapter" / "adapter_config.json"
    config = json.loads(settings.read_text())
    assert config["lora_alpha"] == ALPHA
    settings.write_text(json.dumps(config | {"lora_alpha": alpha}))
    half = convert(
        ConvertRequest(source=str(base), name="tuned", adapter=home / "adapter", quantization="F16"),
        Store(home / "store"),
        LineReporter(),
    ).gguf
    manifest = read_manifest(HOME)
    mails = sorted(read_chat_records(MAILS), key=lambda record: len(record.prompt[0].content))[: 2 * N_MAILS]
    held_out = split_examples(mails, N_MAILS).held_out
    tasks = tasks_of(half, held_out, "classify", manifest.labels, manifest.prompt)
    inputs = LadderInputs(half, "tuned", tasks, tuple(map(plain, names)), base=base)
    origin = Provenance(MAILS.name, "0" * 64, 0)
    quality, chosen = run_ladder(inputs, origin, home / "work", LineReporter(), Tools(speeds=untimed))
    assert chosen.is_file()
    return quality


@pytest.fixture(scope="module")
def halved(base_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    return run(base_gguf, ALPHA / 2, ("Q8_0", "Q4_K_M"), tmp_path_factory.mktemp("halved"))


def named(quality: Quality, name: str) -> Candidate:
    return next(one for one in quality.candidates if one.name == name)


def test_q4_k_m_is_refused_since_it_answers_as_the_base(halved: Quality) -> None:
    refused = named(halved, "Q4_K_M")
    assert refused.verdict == "undoes the fine-tune"
    assert refused.loss is not None
    assert refused.kl_to_base is not None
    assert refused.kl_to_base < refused.loss.kl_mean / 4
    assert "rounded to the very grid their base lay on (Q4_K, Q5_0, Q6_K)" in refused.reason


def test_q8_0_keeps_the_fine_tune_and_is_chosen(halved: Quality) -> None:
    kept = named(halved, "Q8_0")
    assert kept.verdict == "chosen"
    assert kept.loss is not None
    assert kept.kl_to_base is not None
    assert kept.loss.kl_mean < halved.budget.kl_mean < kept.kl_to_base
    assert halved.chosen == "Q8_0"


def test_the_fine_tune_lies_far_beyond_the_noise(halved: Quality) -> None:
    assert halved.noise is not None
    assert halved.base_distance is not None
    assert halved.base_distance.kl_mean > 10 * max(halved.noise.kl_mean, halved.budget.kl_mean)


def test_at_full_strength_q4_k_m_is_over_budget_for_the_same_cause(base_gguf: Path, tmp_path: Path) -> None:
    quality = run(base_gguf, ALPHA, ("Q4_K_M",), tmp_path)
    refused = named(quality, "Q4_K_M")
    assert refused.verdict == "over budget"
    assert "mean KL divergence" in refused.reason
    assert "rounded to the very grid their base lay on (Q4_K, Q5_0, Q6_K)" in refused.reason
    assert quality.chosen == "F16"
