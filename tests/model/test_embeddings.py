"""Embeddings of the real model: as llama.cpp's own pooling gives them, alone or in company, beside text."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp

from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.llama.decode import BatchArrays
from runtime.llama.handle import ModelHandle
from runtime.llama.interface import Batch
from runtime.llama.model import Llama
from runtime.serving.chat import prepare_completion
from runtime.serving.model import ServedModel, load_model
from runtime.serving.reading import prepare_embedding

pytestmark = pytest.mark.model

INVOICES = [
    "Invoice 2231 is overdue. Please pay the outstanding amount of 400 euros by Friday.",
    "Reminder: the payment for your invoice from March has not arrived yet. Please transfer it.",
]
KERNELS = [
    "The kernel panics on boot since I upgraded the scsi driver. Does anybody have a patch?",
    "After compiling the new kernel my network driver module fails to load. Any ideas for a fix?",
]
LONG = " ".join([*INVOICES, *KERNELS] * 4)


@pytest.fixture(scope="module")
def served(email_triage: StoredModel) -> Iterator[ServedModel]:
    model = load_model(email_triage, RuntimeConfig(slots=2, context=512, threads=1))
    yield model
    model.supervisor.stop()


async def embedded(served: ServedModel, texts: list[str]) -> np.ndarray:
    call = prepare_embedding({"input": texts}, served)
    answer: Any = await call.fold(served.supervisor.submit(*call.work))
    return np.asarray([item["embedding"] for item in answer["data"]])


def embed(served: ServedModel, *texts: str) -> np.ndarray:
    """One row of length 1 for each text: their products are cosines."""
    return asyncio.run(embedded(served, list(texts)))


def test_a_text_alone_has_the_vector_it_has_in_company(served: ServedModel) -> None:
    texts = [*INVOICES, *KERNELS, LONG]
    together = embed(served, *texts)
    assert together.shape == (5, served.info.n_embd)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, together, strict=True):
        [alone] = embed(served, text)
        assert alone @ vector > 0.9999


def test_what_is_alike_is_nearer(served: ServedModel) -> None:
    cosines = (vectors := embed(served, *INVOICES, *KERNELS)) @ vectors.T
    for one, alike, others in ((0, 1, (2, 3)), (1, 0, (2, 3)), (2, 3, (0, 1)), (3, 2, (0, 1))):
        assert cosines[one, alike] > max(cosines[one, other] for other in others), cosines


def test_text_is_the_same_while_embeddings_run(served: ServedModel) -> None:
    async def written() -> str:
        call = prepare_completion({"prompt": INVOICES[0], "max_tokens": 12, "temperature": 0}, served)
        answer: Any = await call.fold(served.supervisor.submit(*call.work))
        return str(answer["choices"][0]["text"])

    async def both() -> tuple[str, np.ndarray]:
        text, vectors = await asyncio.gather(written(), embedded(served, [LONG, *KERNELS]))
        return text, vectors

    text, vectors = asyncio.run(both())
    assert text == asyncio.run(written())
    np.testing.assert_allclose(vectors, embed(served, LONG, *KERNELS), atol=2e-2)


def test_the_vector_is_llama_cpps_own_mean(base_gguf: Path, base: Llama) -> None:
    tokens = base.tokenizer.encode(LONG, add_special=True, parse_special=False)[:100]
    size = base.info.embed_n_batch
    assert size < len(tokens) <= 128, "the text goes on in a second batch"
    parts = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    rows = [base.embed(batch(part, place * size)) for place, part in enumerate(parts)]
    mean = np.concatenate(rows).mean(axis=0)
    own = pooled_by_llama_cpp(base_gguf, tokens)
    assert mean @ own / np.linalg.norm(mean) / np.linalg.norm(own) > 0.9999
    assert np.linalg.norm(mean) == pytest.approx(np.linalg.norm(own), rel=0.01)


def test_a_sequence_that_was_left_out_is_forgotten(base: Llama) -> None:
    tokens = base.tokenizer.encode(INVOICES[0], add_special=True, parse_special=False)[:12]
    first = base.embed(batch(tokens, 0))
    base.embed(batch(tokens, 0, seq_id=3))
    np.testing.assert_array_equal(base.embed(batch(tokens, 0)), first)


def batch(tokens: list[int], start: int, seq_id: int = 0) -> Batch:
    positions = np.arange(start, start + len(tokens), dtype=np.int32)
    ids = np.full(len(tokens), seq_id, np.int32)
    return Batch(np.asarray(tokens, np.int32), positions, ids, np.ones(len(tokens), np.int8))


def pooled_by_llama_cpp(path: Path, tokens: list[int]) -> np.ndarray:
    """The mean that llama.cpp makes itself, of a whole text in one batch, with nothing cut off."""
    model = ModelHandle(path)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 128
    params.n_threads = params.n_threads_batch = 1
    params.embeddings, params.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_MEAN
    context = llama_cpp.llama_init_from_model(model.pointer, params)
    assert llama_cpp.llama_decode(context, BatchArrays(128).fill(batch(tokens, 0))) == 0
    width = llama_cpp.llama_model_n_embd_out(model.pointer)
    vector = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(context, 0), (width,)).copy()
    llama_cpp.llama_free(context)
    return vector
