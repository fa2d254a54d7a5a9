"""Rotary embeddings in both of transformers' forms, each kind of scaling, and unsupported settings."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.errors import SourceInvalid
from convert.families import BY_CLASS
from convert.families.config import Config
from models.gguf.fields import Field
from tests.support.convert.hf_tiny import CLASSES, CONFIGS, config

from .test_config import fields

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def rope(found: dict[str, Field]) -> dict[str, Any]:
    return {key.removeprefix("rope."): field.value for key, field in found.items() if key.startswith("rope.")}


def extras(family: str, **changes: Any) -> dict[str, np.ndarray]:
    found = BY_CLASS[CLASSES[family]]
    return found.extras(Config(Path("config.json"), config(family, **changes), found.defaults))


def test_linear_scaling_in_both_spellings() -> None:
    old = fields("qwen2", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4})
    new = fields("qwen2", rope_theta=None, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})
    assert rope(old) == rope(new) == {"freq_base": 5e5, "scaling.type": "linear", "scaling.factor": 4.0}


def test_yarn_with_all_its_settings() -> None:
    said = {"attention_factor": 0.1 * math.log(4.0) + 1.0, "beta_fast": 32, "beta_slow": 1}
    assert rope(fields("qwen2", rope_scaling={**YARN, **said})) == {
        "freq_base": 1e6,
        "scaling.type": "yarn",
        "scaling.factor": 4.0,
        "scaling.original_context_length": 256,
        "scaling.yarn_attn_factor": pytest.approx(1.1386294),
        "scaling.yarn_beta_fast": 32.0,
        "scaling.yarn_beta_slow": 1.0,
    }
    without_original = {"type": "yarn", "factor": 4.0}
    assert rope(fields("qwen2", rope_scaling=without_original))["scaling.original_context_length"] == 1024


def test_gemma_3_has_two_rotations_in_both_spellings() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = fields("gemma3", rope_scaling=linear)
    nested = {
        "full_attention": {**linear, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    new = fields("gemma3", rope_theta=None, rope_local_base_freq=None, rope_parameters=nested)
    assert rope(old) == rope(new)
    assert rope(new) == {
        "freq_base": 1e6,
        "freq_base_swa": 10_000.0,
        "scaling.type": "linear",
        "scaling.factor": 8.0,
    }


def test_llama_3s_factors_follow_the_rule() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    found = extras("llama", rope_scaling=scaling, hidden_size=512, rope_theta=500_000.0)["rope_freqs.weight"]
    assert found.dtype == np.float32
    assert found.shape == (64,)
    for index, factor in enumerate(found):
        length = 2 * math.pi * 500_000 ** (2 * index / 128)
        if length < 8192 / 4:
            wanted = 1.0
        elif length > 8192:
            wanted = 8.0
        else:
            smooth = (8192 / length - 1) / 3
            wanted = 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(wanted, rel=1e-5)
    assert {float(found[0]), float(found[-1])} == {1.0, 8.0}


def test_longrope_has_factors_for_both_lengths_and_a_scale() -> None:
    found = extras("phi3")
    assert list(found) == ["rope_factors_long.weight", "rope_factors_short.weight"]
    assert found["rope_factors_long.weight"].tolist() == pytest.approx([1 + 0.9 * index for index in range(6)])
    assert found["rope_factors_short.weight"].tolist() == pytest.approx([1 + 0.05 * index for index in range(6)])
    told = rope(fields("phi3"))
    assert told["scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))
    assert told["scaling.original_context_length"] == 256
    assert told["dimension_count"] == 12
    assert "scaling.attn_factor" not in rope(fields("phi3", rope_scaling=None))
    longer = fields("phi3", original_max_position_embeddings=2048)
    assert rope(longer)["scaling.attn_factor"] == 1.0


LONG = CONFIGS["phi3"]["rope_scaling"]
REFUSED = [
    (
        "qwen2",
        {"type": "dynamic", "factor": 2.0},
        "'dynamic' is not supported for this family; default, linear, yarn",
    ),
    ("qwen2", {"rope_type": "llama3", "factor": 8.0}, "'llama3' is not supported"),
    ("llama", LONG, "'longrope' is not supported"),
    ("gemma2", {"type": "linear", "factor": 2.0}, "'linear' is not supported"),
    ("gemma3", YARN, "'yarn' is not supported"),
    ("stablelm", {"type": "linear", "factor": 2.0}, "'linear' is not supported"),
    ("phi3", {"type": "linear", "factor": 2.0}, "'linear' is not supported"),
    ("llama", {"rope_type": ["llama3"]}, "is not supported"),
    ("llama", {"type": "linear"}, "'factor' of the 'linear' scaling must be a positive number, not None"),
    ("llama", {"type": "linear", "factor": -1}, "must be a positive number, not -1"),
    ("llama", {"type": "linear", "factor": True}, "must be a positive number, not True"),
    ("llama", {"rope_type": "llama3", "factor": 8.0}, "'low_freq_factor' of the 'llama3' scaling must be"),
    (
        "llama",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        "'low_freq_factor' 4 must be smaller than 'high_freq_factor' 4",
    ),
    ("qwen2", {**YARN, "mscale_all_dim": 1.0}, "'mscale_all_dim' of the 'yarn' scaling is not supported"),
    ("qwen2", {**YARN, "truncate": False}, "'truncate' false is not supported"),
    ("qwen2", {**YARN, "original_max_position_embeddings": 0}, "whole number between 1 and"),
    ("phi3", {**LONG, "long_factor": [1.0]}, "'long_factor' has 1 numbers, 6 are needed"),
    ("phi3", {**LONG, "short_factor": None}, "'short_factor' must be a list of 6 positive numbers"),
    ("phi3", {**LONG, "short_factor": [0.0] * 6}, "'short_factor' must be a list of 6 positive numbers"),
    ("phi3", {**LONG, "short_mscale": 1.2}, "'short_mscale' of the 'longrope' scaling is not supported"),
]


@pytest.mark.parametrize(("family", "scaling", "message"), REFUSED, ids=lambda value: str(value)[:24])
def test_scaling_that_a_gguf_cannot_express_is_refused(family: str, scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceInvalid, match=r"'rope_scaling' is|'original_max_position_embeddings' is") as caught:
        fields(family, rope_scaling=scaling)
    assert message in str(caught.value)


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.01, 1.5, "half"])
def test_a_part_of_a_head_that_cannot_be_rotated_is_refused(factor: Any) -> None:
    for family in ("phi3", "stablelm"):
        with pytest.raises(SourceInvalid, match=r"partial_rotary_factor|would be rotated"):
            fields(family, partial_rotary_factor=factor, rope_scaling=None)
