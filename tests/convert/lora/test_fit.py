"""Fitting adapters: each change goes to its tensor, in the GGUF's order of rows; misfits are refused."""

import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.checkpoint.source import GgufCheckpoint
from convert.errors import AdapterInvalid, ArchitectureUnknown
from convert.families import BY_ARCHITECTURE
from convert.lora.adapter import read_adapter
from convert.lora.changes import AddBias, Lora, Replace, ReplaceRows
from convert.lora.fit import Fitted, MergedCheckpoint, family_of, fit
from models.gguf.fields import Field
from models.gguf.header import Header, read_header
from tests.support.convert.tiny import (
    N_HEADS,
    N_KV_HEADS,
    TOKENS,
    adapter_tensors,
    grid,
    weights,
    write_adapter,
    write_model,
)

STEM = "base_model.model."
EMBEDDING, HEAD, NORM = f"{STEM}model.embed_tokens", f"{STEM}lm_head", f"{STEM}model.norm.weight"
Q0 = f"{STEM}model.layers.0.self_attn.q_proj"
N_VOCAB = len(TOKENS)
Tensors = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(write_model(tmp_path_factory.mktemp("base") / "tiny.gguf"))


def fitted(tmp_path: Path, tensors: Tensors, architecture: str = "gemma3", **more: Any) -> tuple[Fitted, Header]:
    """`more`: `changes` to the base's tensors, and the adapter's settings."""
    base = write_model(tmp_path / "base.gguf", architecture, changes=more.pop("changes", None))
    header = read_header(base)
    return fit(read_adapter(write_adapter(tmp_path / "adapter", tensors, **more)), header), header


def merged(tmp_path: Path, tensors: Tensors, architecture: str = "gemma3", **more: Any) -> dict[str, np.ndarray]:
    """Tensor name -> the merged tensor."""
    made, header = fitted(tmp_path, tensors, architecture, **more)
    with closing(GgufCheckpoint(header.path)) as checkpoint:
        source = MergedCheckpoint(checkpoint, made)
        assert made.changes.keys() <= source.header.tensors.keys()
        return {
            name: np.concatenate([rows for _, rows in source.slabs(info)]).reshape(info.shape)
            for name, info in source.header.tensors.items()
        }


def order(n_out: int, n_head: int) -> list[int]:
    """The llama family's rows: within a head, those of its first half and of its second half take turns."""
    size = n_out // n_head
    return [head * size + half * size // 2 + i for head in range(n_head) for i in range(size // 2) for half in (0, 1)]


def dora(module: str, n_out: int) -> dict[str, np.ndarray]:
    """A DoRA of rank 4 on one module of 64 inputs, whose rows all differ in length."""
    stem = f"{STEM}{module}"
    return {
        f"{stem}.lora_A.weight": grid((4, 64), 1, 4, 8),
        f"{stem}.lora_B.weight": grid((n_out, 4), 2, 4, 8),
        f"{stem}.lora_magnitude_vector": np.arange(n_out) / 8 + 1,
    }


@pytest.mark.parametrize(
    ("architecture", "part", "module", "heads"),
    [
        ("gemma3", "attn_q", "self_attn.q_proj", None),
        ("gemma3", "ffn_up", "mlp.up_proj", None),
        ("llama", "attn_q", "self_attn.q_proj", N_HEADS),
        ("llama", "attn_k", "self_attn.k_proj", N_KV_HEADS),
        ("llama", "attn_v", "self_attn.v_proj", None),
    ],
)
def test_dora_follows_the_rows_of_its_family(
    tmp_path: Path, architecture: str, part: str, module: str, heads: int | None
) -> None:
    base = weights(architecture)[f"blk.1.{part}.weight"]
    n_out = len(base)
    rows = list(range(n_out)) if heads is None else order(n_out, heads)
    adapter = dora(f"model.layers.1.{module}", n_out)
    a, b, magnitude = (array.astype(np.float64) for array in adapter.values())
    plain = 2 * b @ a
    plain[rows] += base  # in Hugging Face's order: row i of the GGUF came from there
    tuned = plain * (magnitude / np.linalg.norm(plain, axis=1))[:, None]
    found = merged(tmp_path, adapter, architecture, use_dora=True)
    np.testing.assert_allclose(found[f"blk.1.{part}.weight"], tuned[rows], rtol=1e-5, atol=1e-6)
    untouched = f"blk.0.{part}.weight"
    np.testing.assert_array_equal(found[untouched], weights(architecture)[untouched])


def test_whole_tensors_replace_the_bases_and_gemmas_norms_are_one_more(tmp_path: Path) -> None:
    tensors = {
        NORM: grid((64,), 5),
        f"{STEM}model.layers.1.self_attn.q_norm.weight": grid((32,), 6),
        f"{Q0}.weight": grid((64, 64), 7),
    }
    found = merged(tmp_path, tensors, modules_to_save=["norm", "q_norm", "q_proj"])
    np.testing.assert_array_equal(found["output_norm.weight"], grid((64,), 5) + 1)
    np.testing.assert_array_equal(found["blk.1.attn_q_norm.weight"], grid((32,), 6) + 1)
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], grid((64, 64), 7))


def test_whole_tensors_of_the_llama_family_are_reordered_but_norms_are_as_they_were(tmp_path: Path) -> None:
    saved, bias = grid((64, 64), 7), grid((64,), 8)
    tensors = {NORM: grid((64,), 5), f"{Q0}.base_layer.weight": saved, f"{Q0}.base_layer.bias": bias}
    changes = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    found = merged(tmp_path, tensors, "llama", bias="lora_only", changes=changes)
    np.testing.assert_array_equal(found["output_norm.weight"], grid((64,), 5))
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], saved[order(64, N_HEADS)])
    np.testing.assert_array_equal(found["blk.0.attn_q.bias"], bias[order(64, N_HEADS)])


def test_a_bias_of_b_is_added_to_the_bases(tmp_path: Path) -> None:
    tensors = adapter_tensors(targets=("self_attn.q_proj",)) | {f"{Q0}.lora_B.bias": grid((64,), 8)}
    changes = {"blk.0.attn_q.bias": grid((64,), 9)}
    found = merged(tmp_path, tensors, "llama", lora_bias=True, changes=changes)
    np.testing.assert_array_equal(found["blk.0.attn_q.bias"], grid((64,), 9) + 2 * grid((64,), 8)[order(64, N_HEADS)])
    with pytest.raises(AdapterInvalid, match=r"has a bias, which the base does not \('blk\.0\.attn_q\.bias'\)"):
        fitted(tmp_path, tensors, "llama", lora_bias=True)


def pair(stem: str, *, embedding: bool = False) -> dict[str, np.ndarray]:
    """A LoRA of rank 4 on the embedding, or the very same change on the head."""
    a, b = grid((4, 64), 1, 4, 8), grid((N_VOCAB, 4), 2, 4, 8)
    if embedding:
        return {f"{stem}.lora_embedding_A": b.T.copy(), f"{stem}.lora_embedding_B": a.T.copy()}
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


CHANGE = 2 * grid((N_VOCAB, 4), 2, 4, 8) @ grid((4, 64), 1, 4, 8)
BASE = weights()["token_embd.weight"]
OWN = {"output.weight": grid((N_VOCAB, 64), 3)}
SAVED = grid((N_VOCAB, 64), 4)
ROWS = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": grid((2, 64), 6)}
WITH_ROWS = BASE.copy()
WITH_ROWS[[9, 3]] = grid((2, 64), 6)
# what was trained, the base's own head if it has one, and what becomes of embedding and head (None: it stays tied)
HEADS: dict[str, tuple[Tensors, Tensors, np.ndarray, np.ndarray | None]] = {
    "lora on a tied head": (pair(HEAD), {}, BASE, BASE + CHANGE),
    "lora on a head": (pair(HEAD), OWN, BASE, OWN["output.weight"] + CHANGE),
    "lora on a tied embedding": (pair(EMBEDDING, embedding=True), {}, BASE + CHANGE, BASE),
    "lora on an embedding": (pair(EMBEDDING, embedding=True), OWN, BASE + CHANGE, OWN["output.weight"]),
    "the same lora on both": (pair(EMBEDDING, embedding=True) | pair(HEAD), {}, BASE + CHANGE, None),
    "saved tied head": ({f"{HEAD}.weight": SAVED}, {}, BASE, SAVED),
    "saved tied embedding": ({f"{EMBEDDING}.weight": SAVED}, {}, SAVED, BASE),
    "saved embedding": ({f"{EMBEDDING}.weight": SAVED}, OWN, SAVED, OWN["output.weight"]),
    "both saved, equal": ({f"{EMBEDDING}.weight": SAVED, f"{HEAD}.weight": SAVED}, {}, SAVED, None),
    "both saved": ({f"{EMBEDDING}.weight": SAVED, f"{HEAD}.weight": SAVED + 1}, {}, SAVED, SAVED + 1),
    "lora on what is saved": (
        {f"{HEAD}.base_layer.weight": SAVED} | pair(HEAD),
        {},
        BASE,
        SAVED + CHANGE,
    ),
    "rows of a tied embedding": (ROWS, {}, WITH_ROWS, None),
    "rows of an embedding": (ROWS, OWN, WITH_ROWS, OWN["output.weight"]),
}


@pytest.mark.parametrize("name", HEADS)
def test_embedding_and_head_become_what_they_were_trained_to_be(tmp_path: Path, name: str) -> None:
    tensors, own, embedding, head = HEADS[name]
    config = {"trainable_token_indices": [9, 3]} if tensors is ROWS else {}
    found = merged(tmp_path, tensors, "llama", changes=own, **config)
    np.testing.assert_array_equal(found["token_embd.weight"], embedding)
    assert ("output.weight" in found) == (head is not None)
    if head is not None:
        np.testing.assert_array_equal(found["output.weight"], head)


def test_an_untied_head_is_warned_about(tmp_path: Path) -> None:
    made, _ = fitted(tmp_path, {f"{HEAD}.weight": SAVED})
    assert made.unties
    assert "'output.weight' becomes a tensor of its own (0 MiB more at F16)" in made.warnings[0]
    tied, _ = fitted(tmp_path, ROWS, trainable_token_indices=[9, 3])
    assert not tied.unties
    assert tied.warnings == ()


@pytest.mark.parametrize("architecture", ["gemma", "gemma2"])
def test_a_family_that_always_ties_its_head_is_not_untied(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(AdapterInvalid, match=rf"llama\.cpp always ties them in '{architecture}'"):
        fitted(tmp_path, {f"{HEAD}.weight": SAVED}, architecture)
    both = {f"{EMBEDDING}.weight": SAVED, f"{HEAD}.weight": SAVED}
    np.testing.assert_array_equal(merged(tmp_path, both, architecture)["token_embd.weight"], SAVED)


def lora_of(module: str, n_out: int, n_in: int) -> dict[str, np.ndarray]:
    stem = f"{STEM}{module}"
    return {f"{stem}.lora_A.weight": np.ones((4, n_in)), f"{stem}.lora_B.weight": np.ones((n_out, 4))}


MISFITS: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "layer": (
        lora_of("model.layers.7.self_attn.q_proj", 64, 64),
        {},
        "'model.layers.7.self_attn.q_proj' is not in the base, which has 2 layers and no 'blk.7.attn_q.weight'",
    ),
    "layer's number": (
        lora_of("model.layers.00.self_attn.q_proj", 64, 64),
        {},
        "is not a known module of 'gemma3'",
    ),
    "module": (lora_of("model.layers.0.self_attn.qkv_proj", 64, 64), {}, "is not a known module of 'gemma3'"),
    "value head": (
        {f"{STEM}value_head.weight": np.ones((2, 64))},
        {},
        "'value_head' is not a known module of 'gemma3'",
    ),
    "fewer rows": (
        lora_of("model.layers.0.self_attn.q_proj", 32, 64),
        {},
        "make a change of shape (32, 64), 'blk.0.attn_q.weight' of the base has (64, 64)",
    ),
    "fewer columns": (lora_of("model.layers.0.self_attn.q_proj", 64, 32), {}, "make a change of shape (64, 32)"),
    "saved shape": (
        {NORM: np.ones(63)},
        {},
        "'model.norm.weight' has shape (63,), 'output_norm.weight' of the base has",
    ),
    "saved vocabulary": (
        {f"{HEAD}.weight": np.ones((9, 64))},
        {},
        "the adapter's 'output.weight' has 9 tokens, the base's 267: the vocabulary was changed in training",
    ),
    "vocabulary": (lora_of("lm_head", 300, 64), {}, "has 300 tokens, the base's 267"),
    "bias": ({f"{Q0}.bias": np.ones(64)}, {"bias": "all"}, "has a bias, which the base does not"),
    "token": (ROWS, {"trainable_token_indices": [3, 267]}, "trained rows of 64 numbers up to token 267, 'token_embd.w"),
    "row's width": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.ones((1, 63))},
        {"trainable_token_indices": [3]},
        "has trained rows of 63 numbers up to token 3",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused_naming_adapter_and_base(tmp_path: Path, header: Header, name: str) -> None:
    tensors, config, reason = MISFITS[name]
    folder = write_adapter(tmp_path / "adapter", tensors, base_model_name_or_path="them/theirs", **config)
    with pytest.raises(AdapterInvalid) as caught:
        fit(read_adapter(folder), header)
    assert reason in str(caught.value)
    assert repr(str(header.path)) in str(caught.value)
    if "is not a known module" not in reason:
        assert f"the adapter {str(folder)!r}, trained on 'them/theirs', does not fit" in str(caught.value)


def test_rows_of_a_fraction_of_a_head_are_refused(tmp_path: Path) -> None:
    changes = {"blk.0.attn_q.weight": np.ones((30, 64), np.float32)}
    base = write_model(tmp_path / "base.gguf", "llama", changes=changes)
    adapter = read_adapter(write_adapter(tmp_path / "adapter", lora_of("model.layers.0.self_attn.q_proj", 30, 64)))
    with pytest.raises(AdapterInvalid, match="has 30 rows, not a whole number of heads"):
        fit(adapter, read_header(base))


def test_another_bases_name_is_a_warning(tmp_path: Path) -> None:
    made, _ = fitted(tmp_path, adapter_tensors(), base_model_name_or_path="google/gemma-3-4b-it")
    assert "trained on 'google/gemma-3-4b-it'" in made.warnings[0]


@pytest.mark.parametrize("architecture", [*sorted(BY_ARCHITECTURE), "gemma"])
def test_every_linear_layer_of_every_family_takes_a_lora(tmp_path: Path, architecture: str) -> None:
    """One layer of each family by its table of names, made up of rows enough for four heads."""
    family = family_of(Header(Path("m.gguf"), {"general.architecture": Field.string(architecture)}, {}, 32))
    linear = [module for module in family.layer_modules if module.endswith("_proj")]
    assert len(linear) in {4, 7}
    base = write_base(
        tmp_path / "base.gguf", architecture, [f"blk.0.{family.layer_modules[name]}.weight" for name in linear]
    )
    tensors = {k: v for name in linear for k, v in lora_of(f"model.layers.0.{name}", 16, 8).items()}
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tensors))
    loras = fit(adapter, read_header(base)).loras
    assert {lora.module.removeprefix("model.layers.0.") for lora in loras.values()} == set(linear)


def write_base(path: Path, architecture: str, names: list[str]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(4)
    for name in names:
        writer.add_tensor(name, np.zeros((16, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_only_the_llama_family_reorders_q_and_k(tmp_path: Path) -> None:
    given = read_adapter(write_adapter(tmp_path / "given")).loras
    for architecture, reorders in (("gemma3", False), ("llama", True)):
        made, _ = fitted(tmp_path, adapter_tensors(), architecture)
        for part in "qkv":
            found, module = made.loras[f"blk.0.attn_{part}.weight"], f"model.layers.0.self_attn.{part}_proj"
            assert np.array_equal(found.b, given[module].b) == (part == "v" or not reorders)


def test_the_language_model_of_a_multimodal_one_is_found(tmp_path: Path) -> None:
    """PEFT wraps `Gemma3ForConditionalGeneration` around it; its vision tower is not served."""
    inner = {name.replace("model.model.", "model.model.language_model."): a for name, a in adapter_tensors().items()}
    made, _ = fitted(tmp_path, inner)
    assert made.loras.keys() == fitted(tmp_path, adapter_tensors())[0].loras.keys()
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.self_attn\.q_proj' is not a known module of 'gemma3'"):
        fitted(tmp_path, lora_of("model.vision_tower.layers.0.self_attn.q_proj", 64, 64))


def test_each_kind_of_change_keeps_its_order(tmp_path: Path) -> None:
    tensors = {f"{HEAD}.base_layer.weight": SAVED} | pair(HEAD) | ROWS | {f"{Q0}.lora_B.bias": np.ones(64)}
    tensors |= {name: array for name, array in adapter_tensors().items() if name.startswith(Q0)}
    changes = OWN | {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    made, _ = fitted(tmp_path, tensors, lora_bias=True, trainable_token_indices=[1, 2], changes=changes)
    assert {name: [type(change) for change in made.changes[name]] for name in made.changes} == {
        "output.weight": [Replace, Lora],
        "token_embd.weight": [ReplaceRows],
        "blk.0.attn_q.weight": [Lora],
        "blk.0.attn_q.bias": [AddBias],
    }


def test_an_unknown_architecture_is_refused_by_name() -> None:
    header = Header(Path("m.gguf"), {"general.architecture": Field.string("mamba")}, {}, 32)
    known = ", ".join(sorted({*BY_ARCHITECTURE, "gemma"}))
    with pytest.raises(ArchitectureUnknown, match=re.escape("'mamba' ('m.gguf'); known are " + known)):
        family_of(header)
