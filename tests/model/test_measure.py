"""The real classifier measured beside itself and beside its base: what loses nothing, and what has lost it all."""

from pathlib import Path

import pytest

from convert.measure.compare import ReferenceRun, compare, take_reference
from convert.measure.examples import labels_of, split_examples
from convert.measure.tasks import tasks_of
from models.common.chat_records import read_chat_records
from models.store.store import StoredModel

pytestmark = pytest.mark.model

TEST_SPLIT = Path(__file__).parents[2] / "models" / "email_triage" / "data" / "test.jsonl.gz"
N_MAILS = 10


def ignore(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def reference(
    email_triage: StoredModel, whole_fine_tune: StoredModel, tmp_path_factory: pytest.TempPathFactory
) -> ReferenceRun:
    assert email_triage.manifest is not None
    records = read_chat_records(TEST_SPLIT)
    labels = labels_of(records, email_triage.manifest.labels)
    held_out = split_examples(records, N_MAILS).held_out
    tasks = tasks_of(whole_fine_tune.gguf, held_out, "classify", labels, email_triage.manifest.prompt)
    assert tasks.tasks[0].prompt.count(2) == 1, "one BOS"
    return take_reference(whole_fine_tune.gguf, tasks, tmp_path_factory.mktemp("reference"), ignore)


def test_the_fine_tune_beside_itself_has_lost_nothing(reference: ReferenceRun) -> None:
    assert reference.totals.correct > N_MAILS // 2
    (same,) = compare(reference.model, (reference,), ignore)
    assert same.loss is not None
    assert same.loss.kl_p99 < 1e-4
    assert same.loss.top1_agreement > 0.99
    assert same.answers.flips == 0


def test_the_base_is_far_from_its_fine_tune(reference: ReferenceRun, base_gguf: Path) -> None:
    """It has no chat template; the tokens are the fine-tune's."""
    (base,) = compare(base_gguf, (reference,), ignore)
    assert base.loss is not None
    assert base.loss.kl_mean > 1
    assert base.answers.flips > N_MAILS // 2
    assert base.answers.difference_high < 0
