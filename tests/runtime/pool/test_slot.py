"""The memory that a model needs, estimated from its header."""

from models.gguf.header import GgufMeta, Value
from runtime.pool.slot import OVERHEAD_BYTES, model_need
from tests.support.models.gguf_heads import GEMMA


def meta(**changes: object) -> GgufMeta:
    values = {**GEMMA, **{name.replace("__", "."): value for name, value in changes.items()}}
    values["tokenizer.ggml.tokens"] = None
    return GgufMeta(values, {"tokenizer.ggml.tokens": 262_144})  # type: ignore[arg-type]


def test_cache_and_logits_follow_from_the_shape() -> None:
    need = model_need(meta(), 1000, n_ctx=8192, n_rows=32)
    assert need.cache == 8192 * 18 * 1 * (256 + 256) * 2
    assert need.logits == 2 * 32 * 262_144 * 4
    assert need.total == 1000 + need.cache + need.logits + OVERHEAD_BYTES
    assert "144 MiB of KV cache for 8192 tokens" in str(need)


def test_heads_may_differ_from_layer_to_layer_and_default_to_the_width() -> None:
    per_layer = meta(gemma3__block_count=3, gemma3__attention__head_count_kv=(4, 0, 2))
    assert model_need(per_layer, 0, n_ctx=10, n_rows=0).cache == 10 * (4 + 0 + 2) * 512 * 2
    plain: dict[str, Value] = {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64}
    old = GgufMeta({**plain, "llama.attention.head_count": 8}, {})
    assert model_need(old, 0, n_ctx=10, n_rows=0).cache == 10 * 2 * 8 * (8 + 8) * 2


def test_a_file_that_says_nothing_counts_by_its_size() -> None:
    need = model_need(GgufMeta({}, {}), 5000, n_ctx=8192, n_rows=32)
    assert need.total == 5000 + OVERHEAD_BYTES


def test_the_second_form_of_the_weights_counts() -> None:
    need, with_panels = (model_need(meta(), 1000, n_ctx=64, n_rows=1, panels=panels) for panels in (0, 5 << 20))
    assert with_panels.total == need.total + (5 << 20)
    assert "5 MiB for the products of prompts" in str(with_panels)
    assert "products" not in str(need)


def test_every_stream_has_begun_a_page_of_each_row_of_values() -> None:
    one, sixteen = (model_need(meta(), 0, n_ctx=8192, n_rows=0, n_streams=n).cache for n in (1, 16))
    none = model_need(meta(), 0, n_ctx=8192, n_rows=0).cache
    assert sixteen - none == 16 * (one - none)
    short = [model_need(meta(), 0, n_ctx=n, n_rows=0, n_streams=1).cache for n in (64, 8192)]
    assert one - none == 4096 * (short[0] - model_need(meta(), 0, n_ctx=64, n_rows=0).cache) // 128
