"""`/v1/embeddings` as the official client sends and reads it, over a real socket; what is refused, and why."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from runtime.errors import InvalidRequest, LoadFailed
from runtime.llama.interface import Batch
from runtime.openai.embeddings import MAX_INPUTS, parse_embedding
from runtime.openai.fields import EMBEDDING_FIELDS
from runtime.serving.reading import MAX_EMBEDDING_TOKENS
from tests.support.runtime.fakes import BOS, FAKE_WIDTH, FakeLlama
from tests.support.runtime.observed import Observed
from tests.support.runtime.serving import Gate, Running, serving, wait_until

WIDTH = FAKE_WIDTH


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=1024)) as running:
        yield running


def expected(toy: Running, tokens: tuple[int, ...]) -> np.ndarray:
    total = sum(toy.llama.row(tokens[: end + 1]).astype(np.float64) for end in range(len(tokens)))
    vector: np.ndarray = np.asarray(total / np.linalg.norm(total))
    return vector


def test_the_official_client_gets_the_same_in_its_own_base64_and_in_floats(toy: Running) -> None:
    client = toy.client()
    asked = ["a mail", "another mail"]
    default = client.embeddings.create(model="toy", input=asked)
    floats = client.embeddings.create(model="toy", input=asked, encoding_format="float")
    for place, text in enumerate(asked):
        vector = expected(toy, (BOS, *text.encode()))
        for answer in (default, floats):
            item = answer.data[place]
            assert (item.index, item.object, len(item.embedding)) == (place, "embedding", WIDTH)
            assert item.embedding == pytest.approx(vector, abs=1e-6)
            assert np.linalg.norm(item.embedding) == pytest.approx(1, abs=1e-6)
    assert default.data[0].embedding == floats.data[0].embedding, "to the last bit"
    assert (default.object, default.model) == ("list", "toy")
    assert default.usage.prompt_tokens == default.usage.total_tokens == 7 + 13


def test_base64_is_little_endian_float32(toy: Running) -> None:
    body = {"model": "toy", "input": "x", "encoding_format": "base64"}
    data = toy.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(data), "<f4") == pytest.approx(expected(toy, (BOS, *b"x")), abs=1e-6)


@pytest.mark.parametrize("asked", [[65, 66], [[65, 66]]])
def test_token_ids_are_taken_as_they_are(toy: Running, asked: Any) -> None:
    answer = toy.client().embeddings.create(model="toy", input=asked)
    assert answer.data[0].embedding == pytest.approx(expected(toy, (65, 66)), abs=1e-6)
    assert answer.usage.prompt_tokens == 2


def test_lists_of_ids_and_as_many_inputs_as_may_be(toy: Running) -> None:
    asked: Any = [[65 + n % 26, n % 256] for n in range(MAX_INPUTS)]
    answer = toy.client().embeddings.create(model="toy", input=asked)
    assert [item.index for item in answer.data] == list(range(MAX_INPUTS))
    for place in (0, 25, MAX_INPUTS - 1):
        assert answer.data[place].embedding == pytest.approx(expected(toy, tuple(asked[place])), abs=1e-6)


def test_a_control_token_in_a_text_is_mere_text(toy: Running) -> None:
    answer = toy.client().embeddings.create(model="toy", input="<eos>")
    assert answer.usage.prompt_tokens == 1 + len("<eos>")


def test_a_model_that_was_trained_with_a_last_token_gets_it() -> None:
    llama = FakeLlama()
    llama.info.metadata["tokenizer.ggml.add_eos_token"] = "true"  # type: ignore[index]
    with serving(llama) as toy:
        assert toy.client().embeddings.create(model="toy", input="x").usage.prompt_tokens == 3


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": ["x"] * (MAX_INPUTS + 1)}, "input", "at most 2048 inputs, holds 2049"),
    ({"input": ""}, "input", "input 0 is empty"),
    ({"input": ["a", ""]}, "input", "input 1 is empty"),
    ({"input": []}, "input", "none empty"),
    ({"input": [[65], []]}, "input", "none empty"),
    ({"input": {"text": "x"}}, "input", "must be a string"),
    ({"input": [1.5]}, "input", "must be a string"),
    ({"input": [-1]}, "input", "must be a string"),
    ({"input": None}, "input", "required"),
    ({"input": [65, 260]}, "input", "token id 260, the vocabulary has 260"),
    ({"input": ["x", "y" * 600]}, "input", "context length is 512 tokens. However, input[1] has 601"),
    ({"input": "y" * 100_000}, "input", "maximum context length is 1024 tokens"),
    ({"input": [[65] * 512] * 600}, "input", f"limit {MAX_EMBEDDING_TOKENS}"),
    ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ({"dimensions": 8}, "dimensions", f"have {WIDTH} and cannot be cut, got 8"),
    ({"dimensions": "16"}, "dimensions", "integer"),
    ({"model": "other"}, "model", "'toy'"),
    ({"truncate": True}, "truncate", "unknown field"),
    ({"imput": "x"}, "imput", "did you mean 'input'"),
]


@pytest.mark.parametrize(("fields", "param", "said"), REFUSED, ids=[f"{p}-{n}" for n, (_, p, _) in enumerate(REFUSED)])
def test_what_is_refused_names_the_field_and_the_reason(
    toy: Running, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = toy.http.post("/v1/embeddings", json={"model": "toy", "input": "x", **fields})
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400), error
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("name", EMBEDDING_FIELDS)
def test_every_row_of_the_table_does_what_it_says(name: str) -> None:
    fine = {"model": "toy", "input": "x", "encoding_format": "base64", "dimensions": WIDTH}
    absurd: Any = {"no": "value"}
    if EMBEDDING_FIELDS[name].treatment == "ignored":
        assert parse_embedding(fine | {name: absurd}, WIDTH) == parse_embedding(fine, WIDTH)
    else:
        parse_embedding({"input": "x", name: fine[name]}, WIDTH)
        with pytest.raises(InvalidRequest) as refused:
            parse_embedding(fine | {name: absurd}, WIDTH)
        assert refused.value.param == name


@pytest.mark.parametrize("payload", [[], "x", None, 3])
def test_a_body_that_is_no_object(toy: Running, payload: Any) -> None:
    assert toy.http.post("/v1/embeddings", json=payload).status_code == 400


def test_an_error_of_the_engine_reaches_the_client() -> None:
    def broken(_: Batch) -> None:
        raise LoadFailed("no memory")

    with serving(FakeLlama(on_embed=broken, script="hello")) as toy:
        with pytest.raises(openai.InternalServerError, match="no memory") as raised:
            toy.client().embeddings.create(model="toy", input="x")
        assert raised.value.status_code == 503
        written = toy.client().completions.create(model="toy", prompt="x", max_tokens=3)
        assert written.choices[0].text == "hel"
        assert toy.supervisor.live == 0


def test_a_client_that_leaves_frees_the_engine() -> None:
    gate = Gate()
    with serving(FakeLlama(on_embed=gate)) as toy:
        observed = Observed(toy.supervisor)

        async def leave() -> None:
            async with openai.AsyncOpenAI(base_url=f"{toy.url}/v1", api_key="none") as client:
                asking = asyncio.create_task(client.embeddings.create(model="toy", input=["x" * 200] * 50))
                await asyncio.to_thread(gate.wait)
                asking.cancel()
                await asyncio.wait([asking])

        asyncio.run(leave())
        wait_until(lambda: len(observed.cancelled) == 1)
        gate.open(3)
        wait_until(lambda: toy.supervisor.live == 0)
        gate.open()
        assert toy.client().embeddings.create(model="toy", input="x").data
