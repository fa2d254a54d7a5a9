"""A conversion of the real base: merged exactly, asked in Gemma's turns, and refused when the adapter is not its."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import dequantize

from convert.errors import AdapterInvalid
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from models.common.console import LineReporter
from models.gguf.header import read_header
from models.store.store import Store, StoredModel
from runtime.llama.decode import last_logits
from runtime.llama.interface import LoadOptions
from runtime.llama.model import Llama, load
from runtime.prompt.prompter import Prompter
from tests.support.convert.tiny import safetensors_bytes

pytestmark = pytest.mark.model

RANK, ALPHA = 4, 8
Q3, DOWN17 = "model.layers.3.self_attn.q_proj", "model.layers.17.mlp.down_proj"
TARGETS = {Q3: ("blk.3.attn_q.weight", 1024, 640), DOWN17: ("blk.17.ffn_down.weight", 640, 2048)}
END_OF_TURN = 106
MATRICES = ("attn_v.weight", "ffn_up.weight")


def adapter_tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    tensors: dict[str, np.ndarray] = {}
    for module, (_, n_out, n_in) in TARGETS.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = random.normal(0, 0.1, (RANK, n_in)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = random.normal(0, 0.1, (n_out, RANK)).astype(np.float32)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, "F32"))
    return folder


@pytest.fixture(scope="module")
def converted(base_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    """The base with a small random adapter, quantized, its half-precision file kept."""
    home = tmp_path_factory.mktemp("convert")
    adapter = write_adapter(home / "adapter", adapter_tensors())
    request = ConvertRequest(source=str(base_gguf), name="tuned", adapter=adapter, quantization="Q8_0", keep_f16=True)
    return convert(request, Store(home / "store"), LineReporter())


@pytest.fixture(scope="module")
def tuned(converted: StoredModel) -> Iterator[Llama]:
    llama = load(converted.gguf, LoadOptions(n_ctx=512, n_batch=256, n_seq_max=1, n_threads=1))
    yield llama
    llama.close()


def tensor(path: Path, name: str) -> np.ndarray:
    """A tensor as float32, whole and without the code under test (gguf's reader needs 10 s for this vocabulary)."""
    info = read_header(path).tensors[name]
    raw = np.memmap(path, np.uint8, "r", info.offset, info.n_bytes)
    return np.asarray(dequantize(raw.reshape(*info.shape[:-1], -1), info.kind))


def test_half_precision_tensors_equal_a_numpy_merge(converted: StoredModel, base_gguf: Path) -> None:
    half = converted.folder / "tuned-F16.gguf"
    assert list(read_header(base_gguf).tensors) == list(read_header(half).tensors)
    adapter = adapter_tensors()
    for module, (name, _, _) in TARGETS.items():
        a, b = (adapter[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        merged = tensor(base_gguf, name) + (b @ a) * np.float32(ALPHA / RANK)
        # a BLAS may add in another order: one unit in the last place of a float16 at most
        np.testing.assert_allclose(tensor(half, name), merged, rtol=2**-10, atol=2**-14)
    for name in ("blk.0.attn_v.weight", "blk.17.ffn_up.weight", "blk.5.attn_norm.weight"):
        rounded = tensor(base_gguf, name).astype(np.float16 if name.endswith(MATRICES) else np.float32)
        np.testing.assert_array_equal(tensor(half, name), rounded.astype(np.float32))


def test_the_quantized_file_answers_as_the_half_precision_one(converted: StoredModel, tuned: Llama) -> None:
    tokens = tuned.tokenizer.encode("The capital of France is", add_special=True, parse_special=False)
    half = load(converted.folder / "tuned-F16.gguf", LoadOptions(n_ctx=512, n_batch=256, n_seq_max=1, n_threads=1))
    wanted, found = last_logits(half, tokens), last_logits(tuned, tokens)
    half.close()
    assert np.corrcoef(wanted, found)[0, 1] > 0.99


def test_the_adapter_changes_the_answer(base: Llama, tuned: Llama) -> None:
    tokens = tuned.tokenizer.encode("The capital of France is", add_special=True, parse_special=False)
    assert np.abs(last_logits(base, tokens) - last_logits(tuned, tokens)).max() > 1


def test_chat_prompts_are_gemmas_turns_with_one_bos(tuned: Llama) -> None:
    prompter = Prompter(tuned.tokenizer, tuned.info.chat_template, tuned.info.n_ctx)
    tokens = prompter.chat([{"role": "user", "content": "Hello"}])
    assert tokens[:3] == (2, 105, 2364)
    assert tokens.count(2) == 1
    assert END_OF_TURN in tokens
    text = "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert list(tokens) == tuned.tokenizer.encode(text, add_special=True, parse_special=True)


def test_the_end_of_turn_ends_an_answer(tuned: Llama) -> None:
    assert tuned.tokenizer.is_end(END_OF_TURN)
    assert tuned.tokenizer.is_end(1)
    assert not tuned.tokenizer.is_end(105)


def test_an_adapter_for_another_size_is_refused(base_gguf: Path, tmp_path: Path) -> None:
    """Gemma 3 1B's q_proj of layer 3 is 1024 x 1152."""
    stem = f"base_model.model.{Q3}"
    tensors = {f"{stem}.lora_A.weight": np.ones((RANK, 1152)), f"{stem}.lora_B.weight": np.ones((1024, RANK))}
    store = Store(tmp_path / "store")
    with pytest.raises(AdapterInvalid, match=r"\(1024, 1152\), 'blk\.3\.attn_q\.weight' of the base has \(1024, 640\)"):
        convert(
            ConvertRequest(source=str(base_gguf), name="x", adapter=write_adapter(tmp_path / "a", tensors)),
            store,
            LineReporter(),
        )
    assert store.names() == []
