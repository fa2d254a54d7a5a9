"""Reading adapters: every dtype is accepted, every fault is refused with the tensor's name."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.errors import AdapterInvalid
from convert.lora.adapter import read_adapter
from tests.support.convert.tiny import adapter_tensors, safetensors_bytes, write_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"


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


def test_the_names_of_a_bare_state_dict_are_read(tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` and trainers that filter it by 'lora_' leave the adapter's name in."""
    saved = {
        f"{EMBEDDING}.lora_embedding_A": np.ones((4, 8)),
        f"{EMBEDDING}.lora_embedding_B": np.ones((6, 4)),
        "base_model.model.lm_head.weight": np.ones((6, 8)),
        f"{Q0}.lora_magnitude_vector": np.ones(64),
    }
    tensors = {**adapter_tensors(), **saved}
    plain: dict[str, Any] = {"modules_to_save": ["lm_head"], "use_dora": True}
    usual = {name: array for name, array in tensors.items() if "magnitude" in name or "lora" not in name}
    usual |= {name: array for name, array in tensors.items() if Q0 in name}
    bare = {
        "base_model.model.lm_head.original_module.weight": np.zeros((6, 8)),
        "base_model.model.lm_head.modules_to_save.default.weight": np.ones((6, 8)),
        f"{Q0}.lora_magnitude_vector.default.weight": np.ones(64),
        **{
            re.sub(r"lora_([AB])", r"lora_\1.my-adapter_2", name): array
            for name, array in usual.items()
            if "lora_A" in name or "lora_B" in name
        },
    }
    one = read_adapter(write_adapter(tmp_path / "one", usual, **plain))
    two = read_adapter(write_adapter(tmp_path / "two", bare, **plain))
    assert one.loras.keys() == two.loras.keys() == {Q0.removeprefix("base_model.model.")}
    assert one.saved.keys() == two.saved.keys() == {"lm_head.weight"}
    embedded = {name: array for name, array in saved.items() if "embedding" in name}
    renamed = {f"{name}.default": array for name, array in embedded.items()}
    assert read_adapter(write_adapter(tmp_path / "three", renamed)).loras.keys() == {"model.embed_tokens"}


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = {
        name.replace(".weight", f".{which}.weight"): array
        for name, array in adapter_tensors().items()
        for which in ("default", "other")
    }
    with pytest.raises(AdapterInvalid, match="which occurs twice"):
        read_adapter(write_adapter(tmp_path / "adapter", tensors))


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
        ({"use_dora": True}, "lora_magnitude_vector' is missing"),
        ({"use_dora": "some"}, "use_dora: Input should be a valid boolean"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head', but the adapter holds no tensor"),
        ({"bias": "some"}, "bias: Input should be 'none', 'all' or 'lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported: only GPT-2's"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base's weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        (
            {"trainable_token_indices": [5]},
            "trainable_token_indices names 'embed_tokens', but the adapter holds no rows",
        ),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"use_bdlora": True}, "use_bdlora = True is unknown"),
        ({"r": 0}, "r: Input should be greater"),
        ({"r": "many"}, "r: Input should be a valid integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"(": 8}}, "'(' is not a regular expression"),
        ({"alpha_pattern": {"q" * 300: 8}}, "pattern of 300 characters"),
    ],
)
def test_settings_that_change_the_merge_are_refused(tmp_path: Path, config: Mapping[str, Any], reason: str) -> None:
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
    "nan": (
        adapter_tensors() | {f"{Q0}.lora_A.weight": np.full((4, 64), np.nan)},
        f"has 256 values in tensor '{Q0}.lora_A.weight'",
    ),
    "infinity": (adapter_tensors() | {f"{Q0}.lora_A.weight": np.full((4, 64), np.inf)}, "not finite"),
    "magnitude": (
        adapter_tensors() | {f"{Q0}.lora_magnitude_vector": np.ones(64)},
        "lora_magnitude_vector' exists, but use_dora is not set",
    ),
    "half an embedding": (
        {f"{EMBEDDING}.lora_embedding_A": np.ones((4, 9))},
        "embed_tokens.lora_embedding_B' is missing",
    ),
    "bias of B": (
        adapter_tensors() | {f"{Q0}.lora_B.bias": np.ones(64)},
        "lora_B.bias' exists, but lora_bias is not set",
    ),
    "only a bias of B": ({f"{Q0}.lora_B.bias": np.ones(64)}, f"'{Q0}.lora_A.weight' is missing"),
    "twice": (
        {f"{Q0}.weight": np.ones((64, 64)), f"{Q0}.base_layer.weight": np.ones((64, 64))},
        "'weight' of 'model.layers.0.self_attn.q_proj', which occurs twice",
    ),
    "scalar": ({f"{Q0}.weight": np.ones(())}, "has shape (): neither a matrix nor a vector"),
    "empty": ({f"{Q0}.weight": np.ones((0, 64))}, "has shape (0, 64): neither"),
    "convolution": ({f"{Q0}.weight": np.ones((2, 2, 2))}, "has shape (2, 2, 2): neither"),
    "rows of no tokens": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.ones((2, 64))},
        "has trained rows of shape (2, 64) for 0 trainable_token_indices",
    ),
    "unknown part": ({f"{Q0}.hada_w1_a": np.ones((4, 64))}, "hada_w1_a' is not supported: known are"),
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
    with pytest.raises(AdapterInvalid, match="of type I32; known are F32, F16, BF16"):
        read_adapter(folder)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    data = weights.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(AdapterInvalid, match=r"is truncated|not a safetensors file|header"):
            read_adapter(folder)
    weights.unlink()
    with pytest.raises(AdapterInvalid, match=r"has no 'adapter_model.safetensors'$"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(AdapterInvalid, match="is a pickle, which could run any code"):
        read_adapter(folder)
    for content in ("[]", "{", "\xff"):
        config.write_bytes(content.encode("latin-1"))
        with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
            read_adapter(folder)
    config.unlink()
    with pytest.raises(AdapterInvalid, match="is not a PEFT adapter folder"):
        read_adapter(folder)


def test_tensors_trained_beside_the_lora_are_read(tmp_path: Path) -> None:
    tensors = adapter_tensors(targets=("self_attn.q_proj",))
    tensors |= {
        f"{name.removesuffix('lora_B.weight')}lora_magnitude_vector": np.ones(64)
        for name in list(tensors)
        if "_B" in name
    }
    tensors |= {
        "base_model.model.model.norm.weight": np.full(64, 0.5),
        f"{Q0}.base_layer.bias": np.full(64, 0.25),
        f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.stack([np.full(64, 7), np.full(64, 5)]),
    }
    config: dict[str, Any] = {
        "use_dora": True,
        "bias": "lora_only",
        "modules_to_save": ["norm"],
        "trainable_token_indices": [7, 5],
    }
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tensors, base_model_name_or_path="x/y", **config))
    assert [lora.magnitude is not None for lora in adapter.loras.values()] == [True, True]
    assert {name: saved.array.tolist() for name, saved in adapter.saved.items()} == {
        "model.norm.weight": [0.5] * 64,
        "model.layers.0.self_attn.q_proj.bias": [0.25] * 64,
    }
    assert adapter.tokens["model.embed_tokens"].ids.tolist() == [5, 7]
    assert adapter.tokens["model.embed_tokens"].values[:, 0].tolist() == [5, 7]
    assert adapter.base == "x/y"


def test_a_bias_of_b_is_scaled_like_b(tmp_path: Path) -> None:
    tensors = adapter_tensors(targets=("self_attn.q_proj",)) | {f"{Q0}.lora_B.bias": np.full(64, 3)}
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tensors, lora_bias=True, lora_alpha=6))
    assert {name: shift.tolist() for name, shift in adapter.shifts.items()} == {
        "model.layers.0.self_attn.q_proj.bias": [4.5] * 64
    }


@pytest.mark.parametrize(
    ("parts", "config", "reason"),
    [
        ({"lora_magnitude_vector": np.ones(63)}, {"use_dora": True}, "has shape (63,); its B has 64 rows"),
        ({"lora_B.bias": np.ones((64, 1))}, {"lora_bias": True}, "has shape (64, 1); its B has 64 rows"),
    ],
)
def test_vectors_of_another_length_than_b_are_refused(
    tmp_path: Path, parts: Mapping[str, np.ndarray], config: Mapping[str, Any], reason: str
) -> None:
    tensors = {name: array for name, array in adapter_tensors().items() if name.startswith(Q0)}
    tensors |= {f"{Q0}.{part}": array for part, array in parts.items()}
    with pytest.raises(AdapterInvalid, match=re.escape(reason)):
        read_adapter(write_adapter(tmp_path / "adapter", tensors, **config))


def test_dora_on_an_embedding_is_refused_with_a_workaround(tmp_path: Path) -> None:
    parts = {"lora_embedding_A": (4, 267), "lora_embedding_B": (64, 4), "lora_magnitude_vector": (64,)}
    tensors = {f"{EMBEDDING}.{part}": np.ones(shape) for part, shape in parts.items()}
    with pytest.raises(AdapterInvalid, match=r"is an embedding under DoRA.*merge_and_unload"):
        read_adapter(write_adapter(tmp_path / "adapter", tensors, use_dora=True))


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ({"base_model.model.model.norm.weight": np.zeros(64)}, {}),
        ({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.zeros((1, 64))}, {"trainable_token_indices": [1]}),
        ({f"{Q0}.lora_B.bias": np.ones(64)}, {"lora_bias": True}),
    ],
)
def test_an_adapter_that_trained_anything_else_is_not_zero(
    tmp_path: Path, more: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
    zero = {name: 0 * array for name, array in adapter_tensors().items()}
    assert read_adapter(write_adapter(tmp_path / "zero", zero)).is_zero
    assert not read_adapter(write_adapter(tmp_path / "adapter", {**zero, **more}, **config)).is_zero


OTHER_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "MLX": (
        {"peft_type": None, "lora_parameters": {"rank": 8}},
        "an adapter of MLX, not of PEFT: fuse it .mlx_lm.fuse",
    ),
    "IA3": ({"peft_type": "IA3"}, "only 'LORA' can be merged here: merge it with PEFT .merge_and_unload"),
    "no kind": ({"peft_type": None}, "peft_type is None, only 'LORA' can be merged here"),
    "prompts": ({"peft_type": "PREFIX_TUNING"}, "trained vectors before the prompt .*: train a LoRA"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_of_adapter_is_told_with_the_way_out(tmp_path: Path, kind: str) -> None:
    config, reason = OTHER_KINDS[kind]
    with pytest.raises(AdapterInvalid, match=reason):
        read_adapter(write_adapter(tmp_path / "adapter", **config))


def test_a_folder_without_an_adapter_is_told_with_what_it_is(tmp_path: Path) -> None:
    write_adapter(tmp_path / "out" / "checkpoint-20")
    with pytest.raises(
        AdapterInvalid, match=r"has no 'adapter_config.json'; '.*checkpoint-20' has one: give that folder"
    ):
        read_adapter(tmp_path / "out")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(AdapterInvalid, match="it is a whole model, give it as SOURCE"):
        read_adapter(tmp_path / "model")
    marked = write_adapter(tmp_path / "marked") / "adapter_config.json"
    marked.write_text("\ufeff" + marked.read_text())
    with pytest.raises(AdapterInvalid, match="begins with a byte order mark"):
        read_adapter(tmp_path / "marked")


@pytest.mark.parametrize("head", ["score", "classifier"])
def test_an_adapter_with_a_classification_head_is_told_what_to_train(tmp_path: Path, head: str) -> None:
    tensors = adapter_tensors() | {f"base_model.model.{head}.weight": np.ones((3, 64))}
    folder = write_adapter(tmp_path / "adapter", tensors, task_type="SEQ_CLS", modules_to_save=[head])
    with pytest.raises(
        AdapterInvalid, match=rf"{head}.weight': it has a classification head, .*Train the labels as text"
    ):
        read_adapter(folder)
    plain = write_adapter(tmp_path / "plain", task_type="SEQ_CLS")
    assert len(read_adapter(plain).loras) == 14, "a flag is not believed over the tensors"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\na,b\n", "is a CSV file, not the folder of a PEFT adapter.*given by --examples"),
        ("GGUF", "is a GGUF file.*give the PEFT folder"),
    ],
)
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "given").write_text(content)
    with pytest.raises(AdapterInvalid, match=says):
        read_adapter(tmp_path / "given")


def test_the_weights_file_leads_to_its_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterInvalid, match=r"give '.*adapter'"):
        read_adapter(folder / "adapter_model.safetensors")
