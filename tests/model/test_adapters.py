"""A LoRA adapter applied hot to the real base: it does its work, and only for the requests that ask for it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import LoadFailed
from runtime.llama.interface import LoadOptions
from runtime.llama.model import Llama, load
from runtime.requests import Request, SamplingParams

from .lora_gguf import write_adapter
from .test_engine import agree, cached, run, written

pytestmark = pytest.mark.model

HOME = Path(__file__).parents[2] / "models" / "email_triage"
TRIAGE = "triage"
PARAMS = SamplingParams(8, temperature=0, logprobs=2)
N_MAILS = 12
# The served fine-tune was merged and quantized anew; the hot adapter runs on the base's Q4_K_M weights.
MOSTLY = 9


@pytest.fixture(scope="module")
def adapter_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "triage.gguf")


@pytest.fixture(scope="module")
def loaded(base_gguf: Path, adapter_gguf: Path) -> Iterator[Llama]:
    llama = load(
        base_gguf, LoadOptions(n_ctx=2048, n_batch=256, n_seq_max=16, n_threads=1, adapters={TRIAGE: adapter_gguf})
    )
    yield llama
    llama.close()


@pytest.fixture
def llama(loaded: Llama) -> Llama:
    """The base with the adapter beside it, and an empty cache."""
    loaded.clear()
    return loaded


def mails() -> list[tuple[str, str]]:
    """(mail, the label that the merged fine-tune as served gives it)."""
    answers = json.loads((HOME / "results" / "as_served.json").read_text(encoding="utf-8"))["predictions"]
    labels = {answer["id"]: answer["prediction"] for answer in answers}
    with gzip.open(HOME / "data" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for _, line in zip(range(N_MAILS), lines, strict=False)]
    return [(record["messages"][0]["content"], labels[record["id"]]) for record in records]


def ask(llama: Llama, name: str, mail: str, adapter: str | None) -> Request:
    text = f"<start_of_turn>user\n{mail.strip()}<end_of_turn>\n<start_of_turn>model\n"
    return Request(name, tuple(llama.tokenizer.encode(text, add_special=True, parse_special=True)), PARAMS, adapter)


def test_with_the_adapter_the_base_does_the_fine_tunes_work_and_without_it_does_not(llama: Llama) -> None:
    asked = mails()
    requests = [
        ask(llama, f"{adapter} {i}", mail, adapter) for i, (mail, _) in enumerate(asked) for adapter in (None, TRIAGE)
    ]
    events = run(Engine(llama, EngineOptions(max_running=8)), *requests)

    def right(adapter: str | None) -> int:
        texts = [
            b"".join(p.token_bytes for p in written(events, f"{adapter} {i}")).decode(errors="replace")
            for i in range(N_MAILS)
        ]
        return sum(text.strip() == label for text, (_, label) in zip(texts, asked, strict=True))

    assert right(TRIAGE) >= MOSTLY
    assert right(None) == 0


def test_a_batch_of_both_answers_as_each_alone(llama: Llama) -> None:
    requests = [
        ask(llama, f"{adapter} {i}", mail, adapter)
        for i, (mail, _) in enumerate(mails()[:3])
        for adapter in (None, TRIAGE)
    ]
    alone = {}
    for request in requests:
        llama.clear()
        alone[request.id] = written(run(Engine(llama), request), request.id)
    llama.clear()
    events = run(Engine(llama), *requests)
    assert {request.id: agree(alone[request.id], written(events, request.id)) for request in requests} == dict.fromkeys(
        alone, True
    )
    assert alone["None 0"][0].token != alone[f"{TRIAGE} 0"][0].token


def test_a_prefix_is_found_under_its_own_adapter_only(llama: Llama) -> None:
    engine = Engine(llama)
    mail, _ = mails()[0]
    n_prompt = len(ask(llama, "", mail, None).prompt)
    for name, adapter, found in (
        ("1", None, 0),
        ("2", TRIAGE, 0),
        ("3", TRIAGE, n_prompt - 2),
        ("4", None, n_prompt - 2),
    ):
        assert cached(run(engine, ask(llama, name, mail, adapter)), name) == found


def test_an_adapter_that_does_not_fit_says_why(base_gguf: Path, tmp_path: Path) -> None:
    narrow = write_adapter(tmp_path / "narrow.gguf", drop=64)
    foreign = write_adapter(tmp_path / "foreign.gguf", architecture="llama")
    missing = tmp_path / "missing.gguf"
    for path, reason in ((narrow, "incorrect shape"), (foreign, "arch mismatch"), (missing, "No such file")):
        with pytest.raises(LoadFailed, match=rf"{path.name}.*{reason}"):
            load(base_gguf, LoadOptions(n_ctx=256, n_batch=64, n_seq_max=2, adapters={"x": path}))
    with pytest.raises(LoadFailed, match=r"adapter 'base'.*expect general\.type to be 'adapter'"):
        load(base_gguf, LoadOptions(n_ctx=256, n_batch=64, n_seq_max=2, adapters={"base": base_gguf}))


def test_info_names_the_adapters(llama: Llama) -> None:
    assert llama.info.adapters == (TRIAGE,)
