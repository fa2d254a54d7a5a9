"""The default model's adapter, applied hot to its Q4_K_M base: what merging onto that grid loses is kept."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from models.common.console import LineReporter
from models.store.store import Store, StoredModel
from runtime.llama.decode import last_logits
from runtime.llama.interface import LoadOptions
from runtime.llama.model import Llama, load
from runtime.prompt.prompter import Prompter

from .test_embeddings import batch

pytestmark = pytest.mark.model

RECIPE = Path(__file__).parents[2] / "models" / "email_triage"
N_MAILS = 6


@pytest.fixture(scope="module")
def hot(base_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    store = Store(tmp_path_factory.mktemp("hot"))
    stored = convert(
        ConvertRequest(source=str(base_gguf), name="triage", adapter=RECIPE / "adapter", hot=True),
        store,
        LineReporter(),
    )
    options = LoadOptions(n_ctx=512, n_batch=512, n_seq_max=1, n_threads=1, adapters={"triage": stored.gguf})
    llama = load(base_gguf, options)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def merged(whole_fine_tune: StoredModel) -> Iterator[Llama]:
    llama = load(whole_fine_tune.gguf, LoadOptions(n_ctx=512, n_batch=512, n_seq_max=1, n_threads=1))
    yield llama
    llama.close()


def prompts(merged: Llama) -> list[tuple[int, ...]]:
    prompter = Prompter(merged.tokenizer, merged.info.chat_template, merged.info.n_ctx)
    with gzip.open(RECIPE / "data" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        mails = [json.loads(next(lines))["messages"][:1] for _ in range(N_MAILS)]
    return [prompter.chat(mail) for mail in mails]


def test_it_answers_as_the_merged_model_and_not_as_the_base(hot: Llama, merged: Llama) -> None:
    agreed = 0
    for prompt in prompts(merged):
        hot.use_adapter(None)
        bare = last_logits(hot, prompt)
        hot.use_adapter("triage")
        tuned, wanted = last_logits(hot, prompt), last_logits(merged, prompt)
        assert np.corrcoef(tuned, wanted)[0, 1] > 0.99
        assert np.corrcoef(bare, wanted)[0, 1] < 0.9
        agreed += int(tuned.argmax() == wanted.argmax())
    assert agreed >= N_MAILS - 1  # one may be a near tie: the merged one was rounded to Q8_0


def test_embeddings_are_made_under_the_adapter_too(hot: Llama) -> None:
    tokens = hot.tokenizer.encode("Cheap loans, click here", add_special=True, parse_special=False)
    bare, tuned, again = (hot.embed(batch(tokens, 0), name) for name in (None, "triage", None))
    np.testing.assert_array_equal(bare, again)
    assert np.abs(tuned - bare).max() > 1
