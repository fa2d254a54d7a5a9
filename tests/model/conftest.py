"""The real models, as `make setup` installs them. A test that needs one fails without it: skipping would hide it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from models.common.console import LineReporter
from models.errors import ModelError
from models.store.store import Store, StoredModel
from runtime.llama.interface import LoadOptions
from runtime.llama.model import Llama, load

ADAPTER = Path(__file__).parents[2] / "models" / "email_triage" / "adapter"


@pytest.fixture(scope="module", autouse=True)
def threads(pytestconfig: pytest.Config) -> Iterator[None]:
    """Beside other workers each server computes on one thread: threads that wait for each other crawl."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(pytestconfig, "workerinput"):
            patch.setenv("DESKSIDE_THREADS", "1")
        yield


def installed(name: str) -> StoredModel:
    try:
        return Store().get(name)
    except ModelError as error:
        pytest.fail(f"the tests need the model {name!r}, which `make setup` installs: {error}", pytrace=False)


@pytest.fixture(scope="session")
def base_gguf() -> Path:
    """The base model's file: Gemma 3 270M, not fine-tuned."""
    return installed("gemma-3-270m").gguf


@pytest.fixture(scope="session")
def email_triage() -> StoredModel:
    """The default fine-tuned model."""
    return installed("email-triage")


@pytest.fixture(scope="session")
def whole_fine_tune(base_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    """The default model's adapter merged, the vocabulary left whole: its rows of logits are as long as the base's."""
    store = Store(tmp_path_factory.mktemp("whole"))
    return convert(ConvertRequest(source=str(base_gguf), name="whole", adapter=ADAPTER), store, LineReporter())


@pytest.fixture(scope="session")
def loaded_base(base_gguf: Path) -> Iterator[Llama]:
    """The base model with few cells, loaded once. Use `base`, which empties it.

    On one thread: two that wait for each other at every layer crawl when a machine is busy.
    """
    llama = load(base_gguf, LoadOptions(n_ctx=256, n_batch=128, n_seq_max=8, n_threads=1))
    yield llama
    llama.close()


@pytest.fixture
def base(loaded_base: Llama) -> Llama:
    """The base model with an empty cache: 256 cells, 8 sequence ids, 128 tokens a batch."""
    loaded_base.clear()
    return loaded_base
