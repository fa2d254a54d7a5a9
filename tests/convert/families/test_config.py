"""Every number of a config.json has bounds; settings that llama.cpp does not compute are refused by name."""

import contextlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint.folder import HfCheckpoint
from convert.errors import SourceInvalid
from convert.families import BY_CLASS
from convert.families.config import Config
from models.gguf.fields import Field
from tests.support.convert.hf_tiny import CLASSES, config, open_tiny, write_folder


def fields(family: str, **changes: Any) -> dict[str, Field]:
    """The fields of a family's config, checked first; no weights are looked at."""
    found = BY_CLASS[CLASSES[family]]
    asked = Config(Path("config.json"), config(family, **changes), found.defaults)
    found.check(asked)
    found.check_head(asked)
    found.extras(asked)
    list(found.weights(asked))
    return found.fields(asked)


def without(family: str, *keys: str, **changes: Any) -> dict[str, Field]:
    found = BY_CLASS[CLASSES[family]]
    values = {key: value for key, value in config(family, **changes).items() if key not in keys}
    return found.fields(Config(Path("config.json"), values, found.defaults))


HUGE = 1 << 40
BAD_NUMBERS = [
    ("num_hidden_layers", 1001),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 2.0),
    ("num_hidden_layers", "2"),
    ("num_hidden_layers", True),
    ("num_hidden_layers", None),
    ("hidden_size", (1 << 17) + 1),
    ("hidden_size", 0),
    ("intermediate_size", HUGE),
    ("vocab_size", (1 << 20) + 1),
    ("vocab_size", 0),
    ("num_attention_heads", HUGE),
    ("num_attention_heads", 0),
    ("num_attention_heads", 6),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("head_dim", HUGE),
    ("head_dim", -2),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", 1 << 29),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", 1e39),
    ("rms_norm_eps", "small"),
    ("rope_theta", 0),
    ("rope_theta", float("inf")),
    ("rope_theta", "10000"),
    ("tie_word_embeddings", "yes"),
    ("attention_bias", 1),
    ("rope_scaling", "linear"),
]


@pytest.mark.parametrize(("key", "value"), BAD_NUMBERS, ids=lambda value: str(value)[:20])
def test_a_number_out_of_bounds_is_refused_by_name_and_value(key: str, value: Any) -> None:
    with pytest.raises(SourceInvalid) as caught:
        fields("llama", **{key: value})
    assert repr(key) in str(caught.value)
    assert repr(value)[:80] in str(caught.value)


def test_heads_of_an_odd_width_are_refused() -> None:
    with pytest.raises(SourceInvalid, match="15 elements; rotary embeddings need pairs"):
        fields("llama", head_dim=15)


REFUSED = [
    ("llama", "hidden_act", "gelu"),
    ("llama", "num_local_experts", 8),
    ("llama", "num_experts", 4),
    ("llama", "is_causal", False),
    ("llama", "rope_interleaved", True),
    ("qwen3", "partial_rotary_factor", 0.5),
    ("qwen2", "head_dim", 32),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2", "layer_types", "full_attention"),
    ("qwen3", "attention_bias", True),
    ("gemma2", "hidden_activation", "gelu"),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "final_logit_softcapping", 0),
    ("gemma2", "query_pre_attn_scalar", 256),
    ("gemma2", "tie_word_embeddings", False),
    ("gemma2", "layer_types", ["full_attention", "full_attention"]),
    ("gemma2", "layer_types", ["full_attention"]),
    ("gemma2", "sliding_window", 0),
    ("gemma3", "attn_logit_softcapping", 50.0),
    ("gemma3", "use_bidirectional_attention", True),
    ("gemma3", "attention_bias", True),
    ("gemma3", "num_experts", 8),
    ("gemma3", "layer_types", ["full_attention", "chunked_attention"]),
    ("phi3", "head_dim", 64),
    ("phi3", "sliding_window", -1),
    ("phi3", "original_max_position_embeddings", 1),
    ("granite", "logits_scaling", 0),
    ("granite", "residual_multiplier", -1),
    ("granite", "head_dim", 64),
    ("olmo2", "attention_bias", True),
    ("olmo2", "sliding_window", 4096),
    ("olmo2", "clip_qkv", 8.0),
    ("olmo2", "tie_word_embeddings", True),
    ("stablelm", "tie_word_embeddings", True),
    ("stablelm", "layer_norm_eps", None),
    ("stablelm", "use_parallel_residual", "no"),
]


@pytest.mark.parametrize(("family", "key", "value"), REFUSED, ids=lambda value: str(value)[:20])
def test_settings_that_llama_cpp_does_not_compute_are_refused(family: str, key: str, value: Any) -> None:
    with pytest.raises(SourceInvalid, match=f"'{key}' is ") as caught:
        fields(family, **{key: value})
    assert repr(value)[:80] in str(caught.value)


def test_a_qwen_with_a_window_is_refused_unless_no_layer_has_it() -> None:
    window = {"use_sliding_window": True, "sliding_window": 512}
    assert fields("qwen2", **window, max_window_layers=2)
    assert fields("qwen2", **{**window, "use_sliding_window": False}, max_window_layers=1)
    with pytest.raises(SourceInvalid, match=r"'use_sliding_window' is True; llama.cpp has no sliding window"):
        fields("qwen2", **window, max_window_layers=1)


def test_a_27b_gemma_scales_its_queries_by_the_hidden_size() -> None:
    assert fields("gemma2", num_hidden_layers=46, query_pre_attn_scalar=16)
    with pytest.raises(SourceInvalid, match=r"'query_pre_attn_scalar' is 32; llama.cpp computes with 16"):
        fields("gemma2", num_hidden_layers=46)


def test_gemmas_pattern_is_written_if_it_is_not_llama_cpps_own() -> None:
    pattern, window = "attention.sliding_window_pattern", "attention.sliding_window"
    assert pattern not in fields("gemma3", num_hidden_layers=12)
    assert pattern not in fields("gemma3", num_hidden_layers=12, sliding_window_pattern=6)
    other = fields("gemma3", num_hidden_layers=4, sliding_window_pattern=2)
    assert other[pattern].numbers == (True, False, True, False)
    kinds = ["full_attention", "sliding_attention"]
    assert fields("gemma3", layer_types=kinds)[pattern].numbers == (False, True)
    everything = fields("gemma3", sliding_window_pattern=1)
    assert window not in everything
    assert pattern not in everything


def test_omitted_values_are_transformers_defaults() -> None:
    found = without("gemma3", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_theta")
    assert found["attention.head_count"].value == 8
    assert found["attention.head_count_kv"].value == 4
    assert found["attention.key_length"].value == 256
    assert found["rope.freq_base"].value == 1_000_000
    assert without("llama", "num_key_value_heads")["attention.head_count_kv"].value == 4
    assert without("mistral", "max_position_embeddings")["context_length"].value == 131_072
    assert without("stablelm", "partial_rotary_factor")["rope.dimension_count"].value == 4
    with pytest.raises(SourceInvalid, match="'hidden_size' is None; it must be a whole number"):
        without("llama", "hidden_size")


def test_the_base_of_the_rotation_is_written_where_it_is_not_the_default() -> None:
    for family in ("gemma2", "stablelm"):
        assert "rope.freq_base" not in fields(family)
        assert fields(family, rope_theta=1e6)["rope.freq_base"].value == 1e6


def test_a_parallel_stablelm_has_one_norm(tmp_path: Path) -> None:
    found = BY_CLASS[CLASSES["stablelm"]]
    asked = Config(Path("config.json"), config("stablelm", use_parallel_residual=True), found.defaults)
    names = {weight.name for weight in found.weights(asked)}
    assert "blk.0.attn_norm.bias" in names
    assert "blk.0.ffn_norm.weight" not in names


def test_a_window_that_llama_cpp_ignores_is_warned_about(tmp_path: Path) -> None:
    def warnings(family: str, name: str, **changes: Any) -> tuple[str, ...]:
        """The warnings about a window; a Phi-3 may have others, about its rotations."""
        with closing(open_tiny(write_folder(tmp_path / name, family, **changes))) as source:
            assert isinstance(source, HfCheckpoint)
            return tuple(text for text in source.warnings if "attends to" in text)

    for family in ("mistral", "phi3"):
        assert "the model attends to the last 512 tokens only" in warnings(family, f"{family}-1", sliding_window=512)[0]
        assert warnings(family, f"{family}-2", sliding_window=None) == ()
        assert warnings(family, f"{family}-3", sliding_window=1024) == ()


ODD: list[Any] = [None, True, 0, 1, -1, 2, 3, 1 << 40, 1.5, 1e300, float("nan"), "", "x", [], [None], {}, {"a": 1}]
ODD += [{"rope_type": "llama3"}, {"type": "yarn", "factor": 2.0}, {"full_attention": 3}, {"sliding_attention": None}]
KEYS = {"rope_parameters", "rope_scaling", "head_dim", "layer_types", "sliding_window", "sliding_window_pattern"}
KEYS |= {"use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "rope_pct", "is_causal"}


@pytest.mark.parametrize("family", CLASSES)
def test_any_config_gives_a_result_or_our_error(family: str) -> None:
    for key in sorted(KEYS | config(family).keys()):
        for value in ODD:
            with contextlib.suppress(SourceInvalid):
                assert fields(family, **{key: value})
