"""Adapters: good ones are read whatever their dtype, and each way to be wrong is refused with the tensor's name."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.architectures import FAMILIES, family_of, interleave_halves
from convert.errors import AdapterInvalid, ArchitectureUnknown
from convert.lora import fit, read_adapter
from models.gguf_fields import Field
from models.gguf_header import Header, read_header
from tests.convert.tiny import adapter_tensors, safetensors_bytes, write_adapter, write_model

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(write_model(tmp_path_factory.mktemp("base") / "tiny.gguf"))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_each_dtype_is_widened_exactly(tmp_path: Path, dtype: str) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter", dtype=dtype))
    tensors = adapter_tensors()
    for module, lora in adapter.loras.items():
        assert lora.a.dtype == lora.b.dtype == np.float32
        np.testing.assert_array_equal(lora.a, tensors[f"base_model.model.{module}.lora_A.weight"])
        np.testing.assert_array_equal(lora.b, tensors[f"base_model.model.{module}.lora_B.weight"])
    assert len(adapter.loras) == 14
    assert not adapter.is_zero


def test_bfloat16_bits_are_the_upper_half_of_float32(tmp_path: Path) -> None:
    tensors = {name: np.full_like(array, 1 / 3) for name, array in adapter_tensors().items()}
    lora = read_adapter(write_adapter(tmp_path / "adapter", tensors, dtype="BF16")).loras["model.layers.0.mlp.up_proj"]
    assert float(lora.a[0, 0]) == 0.33203125


def test_the_change_is_scale_times_b_times_a(tmp_path: Path) -> None:
    lora = read_adapter(write_adapter(tmp_path / "adapter")).loras["model.layers.1.mlp.down_proj"]
    expected = np.array(
        [[2 * sum(b * a for b, a in zip(row, column, strict=True)) for column in lora.a.T] for row in lora.b]
    )
    np.testing.assert_array_equal(lora.delta(0, 64), expected)
    np.testing.assert_array_equal(lora.delta(10, 3), expected[10:13])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 16, "use_rslora": True}, 16 / math.sqrt(4)),
        ({"lora_alpha": 16, "alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 4.0),
        ({"lora_alpha": 16, "alpha_pattern": {r"layers\.[0-4]\.self_attn\.q_proj": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"proj": 2}}, 4.0),
    ],
)
def test_scales_follow_peft(tmp_path: Path, config: Mapping[str, Any], scale: float) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter", **config))
    assert adapter.loras["model.layers.0.self_attn.q_proj"].scale == scale


def test_a_rank_pattern_sets_rank_and_scale_of_its_modules(tmp_path: Path) -> None:
    tensors = adapter_tensors(4) | {k: v for k, v in adapter_tensors(8).items() if "k_proj" in k}
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tensors, rank_pattern={"k_proj": 8}))
    assert adapter.loras["model.layers.0.self_attn.k_proj"].a.shape == (8, 64)
    assert adapter.loras["model.layers.0.self_attn.k_proj"].scale == 1.0
    assert adapter.loras["model.layers.0.self_attn.q_proj"].scale == 2.0


def test_an_untrained_adapter_is_recognised(tmp_path: Path) -> None:
    tensors = {name: array * ("lora_A" in name) for name, array in adapter_tensors().items()}
    assert read_adapter(write_adapter(tmp_path / "adapter", tensors)).is_zero


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base's weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"use_bdlora": True}, "use_bdlora = True is not known here"),
        ({"r": 0}, "r: Input should be greater"),
        ({"r": "many"}, "r: Input should be a valid integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"(": 8}}, "'(' is no regular expression"),
        ({"alpha_pattern": {"q" * 300: 8}}, "pattern of 300 characters"),
    ],
)
def test_what_changes_the_merge_is_refused(tmp_path: Path, config: Mapping[str, Any], reason: str) -> None:
    folder = write_adapter(tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(folder)
    assert reason in str(caught.value)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in adapter_tensors().items() if key != name}


WRONG_TENSORS = {
    "half a pair": (without(f"{Q0}.lora_B.weight"), f"'{Q0}.lora_B.weight' is missing"),
    "rank": (
        adapter_tensors() | {f"{Q0}.lora_A.weight": np.ones((3, 64))},
        "'model.layers.0.self_attn.q_proj' have shapes",
    ),
    "whole rank": (adapter_tensors(8), "with rank 4 they must be"),
    "dimensions": (adapter_tensors() | {f"{Q0}.lora_A.weight": np.ones(64)}, "shapes A (64,)"),
    "nan": (adapter_tensors() | {f"{Q0}.lora_A.weight": np.full((4, 64), np.nan)}, f"'{Q0}.lora_A.weight' has 256"),
    "infinity": (adapter_tensors() | {f"{Q0}.lora_A.weight": np.full((4, 64), np.inf)}, "not finite"),
    "magnitude": (
        adapter_tensors() | {f"{Q0}.lora_magnitude_vector": np.ones(64)},
        "lora_magnitude_vector' is not supp",
    ),
    "embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 9))}, "embed_tokens"),
    "saved head": (
        adapter_tensors() | {"base_model.model.lm_head.weight": np.ones((9, 64))},
        "'base_model.model.lm_head",
    ),
    "no prefix": ({"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 64))}, "is not supported"),
    "nothing": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors, reason = WRONG_TENSORS[name]
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(write_adapter(tmp_path / "adapter", tensors))
    assert reason in str(caught.value)


def test_an_integer_tensor_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    data = safetensors_bytes({f"{Q0}.lora_A.weight": np.ones((4, 64))}, "F32").replace(b'"F32"', b'"I32"')
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterInvalid, match="has type I32; known are BF16, F16 and F32"):
        read_adapter(folder)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    data = weights.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(AdapterInvalid, match="truncated or no safetensors file"):
            read_adapter(folder)
    weights.unlink()
    with pytest.raises(AdapterInvalid, match=r"has no 'adapter_model.safetensors'$"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(AdapterInvalid, match="is a pickle and is not opened"):
        read_adapter(folder)
    for content in ("[]", "{", "\xff"):
        config.write_bytes(content.encode("latin-1"))
        with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
            read_adapter(folder)
    config.unlink()
    with pytest.raises(AdapterInvalid, match="is no PEFT adapter folder"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        ("model.layers.7.self_attn.q_proj", (64, 64), "has 2 layers and no 'blk.7.attn_q.weight'"),
        ("model.layers.00.self_attn.q_proj", (64, 64), "is no linear layer"),
        ("model.layers.0.self_attn.rotary", (64, 64), "is no linear layer of 'gemma3'"),
        (
            "model.layers.0.self_attn.q_proj",
            (32, 64),
            "make a change of shape (32, 64), 'blk.0.attn_q.weight' of the base",
        ),
        ("model.layers.0.self_attn.q_proj", (64, 32), "trained on another model"),
        ("lm_head", (267, 64), "ties it to the embedding"),
    ],
)
def test_a_target_that_does_not_fit_the_base_is_refused(
    tmp_path: Path, header: Header, module: str, shape: tuple[int, int], reason: str
) -> None:
    stem = f"base_model.model.{module}"
    tensors = {f"{stem}.lora_A.weight": np.ones((4, shape[1])), f"{stem}.lora_B.weight": np.ones((shape[0], 4))}
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tensors))
    with pytest.raises(AdapterInvalid) as caught:
        fit(adapter, header, FAMILIES["gemma3"])
    assert reason in str(caught.value)
    assert repr(module) in str(caught.value)


def test_only_the_llama_family_reorders_q_and_k(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter"))
    for architecture, reorders in (("gemma3", False), ("llama", True)):
        fitted = fit(
            adapter, read_header(write_model(tmp_path / f"{architecture}.gguf", architecture)), FAMILIES[architecture]
        )
        for part, module in (
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
        ):
            same = np.array_equal(fitted[f"blk.0.{part}.weight"].b, adapter.loras[f"model.layers.0.{module}"].b)
            assert same == (part == "attn_v" or not reorders)


def test_interleaving_pairs_the_halves_of_each_head() -> None:
    """Row i of a head's first half becomes its row 2i, row i of the second half its row 2i + 1."""
    rows = np.arange(12)[:, None]
    assert interleave_halves(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_an_unknown_architecture_is_refused_by_name() -> None:
    header = Header(Path("m.gguf"), {"general.architecture": Field.string("mamba")}, {}, 32)
    with pytest.raises(ArchitectureUnknown, match=r"'mamba' .*known are gemma, gemma2, gemma3, llama, qwen2, qwen3"):
        family_of(header)
