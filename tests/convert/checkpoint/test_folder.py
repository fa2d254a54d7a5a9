"""Opening a Hugging Face folder: its header and tensors, and an error message of its own for each fault."""

import gc
import json
import os
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.checkpoint.folder import HfCheckpoint
from convert.checkpoint.safetensors import SafetensorsFile
from convert.checkpoint.source import open_checkpoint
from convert.errors import ArchitectureUnknown, SourceInvalid
from convert.tokenizer.read import VocabularyFields
from tests.support.convert.hf_tiny import N_EMBD, N_VOCAB, open_tiny, weights, write_folder, write_shards
from tests.support.convert.tiny import grid, safetensors_bytes, write_model

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def read(source: HfCheckpoint, name: str) -> np.ndarray:
    return np.concatenate([rows for _, rows in source.slabs(source.header.tensors[name])])


def refused(folder: Path, message: str, kind: type[Exception] = SourceInvalid) -> str:
    with pytest.raises(kind, match=message) as caught:
        open_tiny(folder)
    return str(caught.value)


def test_the_header_has_the_fields_llama_cpp_needs(tmp_path: Path) -> None:
    with closing(open_tiny(write_folder(tmp_path / "Tiny-Llama-1M", "qwen3"))) as source:
        header = source.header
        assert header.architecture == "qwen3"
        assert header.integer("qwen3.embedding_length") == N_EMBD
        assert header.text("general.name") == "Tiny Llama 1M"
        assert header.text("tokenizer.ggml.model") == f"{N_VOCAB} rows"
        assert header.tensors["token_embd.weight"].shape == (N_VOCAB, N_EMBD)
        assert header.tensors["token_embd.weight"].kind.name == "BF16"
        assert header.path == tmp_path / "Tiny-Llama-1M"


def test_q_and_k_of_a_llama_are_reordered_and_v_is_not(tmp_path: Path) -> None:
    made = weights("mistral")
    with closing(open_tiny(write_folder(tmp_path / "folder", "mistral", dtype="F32"))) as source:
        for part, heads in (("q", 4), ("k", 2)):
            folder_rows = made[f"model.layers.1.self_attn.{part}_proj.weight"]
            head = len(folder_rows) // heads
            order = [h * head + half * head // 2 + i for h in range(heads) for i in range(head // 2) for half in (0, 1)]
            np.testing.assert_array_equal(read(source, f"blk.1.attn_{part}.weight"), folder_rows[order])
        v = made["model.layers.1.self_attn.v_proj.weight"]
        np.testing.assert_array_equal(read(source, "blk.1.attn_v.weight"), v)


def test_gemmas_norms_are_one_more(tmp_path: Path) -> None:
    with closing(open_tiny(write_folder(tmp_path / "folder", "gemma3", dtype="F32"))) as source:
        for name, part in (("model.norm", "output_norm"), ("model.layers.0.self_attn.k_norm", "blk.0.attn_k_norm")):
            wanted = weights("gemma3")[f"{name}.weight"] + 1
            np.testing.assert_array_equal(read(source, f"{part}.weight")[0], wanted)
        assert source.header.tensors["output_norm.weight"].kind.name == "F32"


def test_the_heads_norms_of_a_stablelm_are_stacked(tmp_path: Path) -> None:
    with closing(open_tiny(write_folder(tmp_path / "folder", "stablelm", dtype="F32"))) as source:
        assert source.header.tensors["blk.0.attn_q_norm.weight"].shape == (4, 16)
        one = weights("stablelm")["model.layers.0.self_attn.q_layernorm.norms.3.weight"]
        np.testing.assert_array_equal(read(source, "blk.0.attn_q_norm.weight")[3], one)


def test_only_a_slab_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.checkpoint.folder.CACHED_SLAB_ELEMENTS", 1 << 16)
    rows = 40_000
    made = {**weights("qwen2"), "model.embed_tokens.weight": np.ones((rows, N_EMBD), np.float32)}
    with closing(open_tiny(write_folder(tmp_path / "folder", "qwen2", made, vocab_size=rows))) as source:
        gc.collect()
        tracemalloc.start()
        total = sum(len(slab) for _, slab in source.slabs(source.header.tensors["token_embd.weight"]))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == rows
    assert peak < 8 * (1 << 16) * 4 < rows * N_EMBD * 4


def test_slabs_outlive_their_source(tmp_path: Path) -> None:
    source = open_tiny(write_folder(tmp_path / "folder", "qwen2", dtype="F32"))
    kept = read(source, "token_embd.weight")
    source.close()
    np.testing.assert_array_equal(kept, weights("qwen2")["model.embed_tokens.weight"])


def test_a_tied_head_is_left_out_with_a_warning(tmp_path: Path) -> None:
    made = weights("qwen2") | {"lm_head.weight": weights("qwen2")["model.embed_tokens.weight"]}
    with closing(open_tiny(write_folder(tmp_path / "folder", "qwen2", made))) as source:
        assert "output.weight" not in source.header.tensors
        assert any("'lm_head.weight' is left out" in warning for warning in source.warnings)
    with closing(open_tiny(write_folder(tmp_path / "folder", "qwen2", made, tie_word_embeddings=False))) as source:
        assert "output.weight" in source.header.tensors
        assert source.warnings == ()


def test_a_head_that_was_trained_apart_is_written_whatever_config_json_says(tmp_path: Path) -> None:
    """One number of 4,608 is enough; transformers, too, keeps such a head."""
    head = weights("qwen2")["model.embed_tokens.weight"].copy()
    head[-1, -1] += 0.5
    made = weights("qwen2") | {"lm_head.weight": head}
    with closing(open_tiny(write_folder(tmp_path / "folder", "qwen2", made, dtype="F32"))) as source:
        np.testing.assert_array_equal(read(source, "output.weight"), head)
        assert source.warnings == (
            "'lm_head.weight' is written, although config.json says 'tie_word_embeddings': it was trained apart",
        )


def test_a_tied_head_of_another_type_is_compared_by_its_numbers(tmp_path: Path) -> None:
    exact = grid((N_VOCAB, N_EMBD), 3)
    embedding = weights("qwen2") | {"model.embed_tokens.weight": exact}
    folder = write_folder(tmp_path / "folder", "qwen2", embedding, dtype="F32")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes(safetensors_bytes({"lm_head.weight": exact}, "BF16"))
    where = dict.fromkeys(embedding, "one.safetensors") | {"lm_head.weight": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    with closing(open_tiny(folder)) as source:
        assert "output.weight" not in source.header.tensors


def test_a_family_that_llama_cpp_cannot_tie_gets_the_head_that_is_there(tmp_path: Path) -> None:
    made = weights("olmo2") | {"lm_head.weight": weights("olmo2")["model.embed_tokens.weight"]}
    with closing(open_tiny(write_folder(tmp_path / "folder", "olmo2", made, tie_word_embeddings=True))) as source:
        assert "output.weight" in source.header.tensors


def test_a_head_that_llama_cpp_would_not_read_is_refused(tmp_path: Path) -> None:
    made = weights("gemma2") | {"lm_head.weight": weights("gemma2")["model.embed_tokens.weight"] + 1}
    refused(write_folder(tmp_path / "folder", "gemma2", made), "an output that was trained apart: train neither, or")
    made["lm_head.weight"] = made["model.embed_tokens.weight"]
    with closing(open_tiny(write_folder(tmp_path / "folder", "gemma2", made))) as source:
        assert "output.weight" not in source.header.tensors


def test_a_missing_head_is_told_with_both_causes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "qwen2", tie_word_embeddings=False)
    refused(folder, "'tie_word_embeddings' is False; but .* has no tensor 'lm_head.weight'.*set .* to true.*save the m")


@pytest.mark.parametrize(
    "stated",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"compression_config": {}, "quantization_config": {"quant_method": "awq"}},
    ],
)
def test_plain_weights_are_plain_whatever_config_json_says(tmp_path: Path, stated: dict[str, Any]) -> None:
    """As merging an adapter onto a 4-bit base in 16 bits leaves it."""
    folder = write_folder(tmp_path / "folder", "llama", **stated)
    with closing(open_tiny(folder)) as source:
        assert any("says that the weights are quantized" in warning for warning in source.warnings)
    plain = write_folder(tmp_path / "plain", "llama")
    (plain / "hf_quant_config.json").write_text("{}")
    with closing(open_tiny(plain)) as source:
        assert any(warning.startswith("hf_quant_config.json says") for warning in source.warnings)


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    made = weights("llama") | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    with closing(open_tiny(write_folder(tmp_path / "folder", "llama", made))) as source:
        assert len(source.header.tensors) == len(weights("llama")) + 1  # and rope_freqs


def test_the_language_model_of_a_multimodal_gemma_is_taken_out(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", "gemma3")
    text = json.loads((plain / "config.json").read_text())
    text.pop("architectures")
    for spelling in ("language_model.model.", "model.language_model."):
        made = {name.replace("model.", spelling, 1): array for name, array in weights("gemma3").items()}
        made["vision_tower.vision_model.head.weight"] = made["model.multi_modal_projector.x"] = np.ones((2, 2))
        folder = write_folder(tmp_path / spelling, "gemma3", made)
        config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
        (folder / "config.json").write_text(json.dumps(config))
        with closing(open_tiny(plain)) as one, closing(open_tiny(folder)) as other:
            assert one.header.tensors.keys() == other.header.tensors.keys()
            own = {key: field for key, field in one.header.fields.items() if not key.startswith("general.")}
            assert own.items() <= other.header.fields.items()
            np.testing.assert_array_equal(read(one, "blk.1.attn_q.weight"), read(other, "blk.1.attn_q.weight"))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_an_adapter(folder: Path) -> None:
    no_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def only_a_subfolder(folder: Path) -> None:
    (folder / "checkpoint-20").mkdir()
    (folder / "config.json").rename(folder / "checkpoint-20" / "config.json")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"")
    os.mkfifo(folder / "fifo.bin")  # opening it would block for ever
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    (folder / "pytorch_model.bin").chmod(0)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def shards_without_an_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def setting(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def text(file: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text(content)

    return change


def tensor(name: str, array: np.ndarray | None, dtype: str = "BF16") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        made = weights("llama") | ({name: array} if array is not None else {})
        if array is None:
            del made[name]
        (folder / "model.safetensors").write_bytes(safetensors_bytes(made, dtype))

    return change


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


_DOWN = "model.layers.0.mlp.down_proj"


def quantized(method: str | None, *more: str, dtype: str | None = None) -> Callable[[Path], None]:
    """Weights with tensors `more`, and a matrix stored as `dtype`; config.json names the `method`."""

    def change(folder: Path) -> None:
        made = weights("llama") | {f"{_DOWN}.{name}": np.ones((2, 2), np.float32) for name in more}
        packed = {f"{_DOWN}.weight": dtype} if dtype is not None else {}
        (folder / "model.safetensors").write_bytes(safetensors_bytes(made, "BF16", packed))
        if method is not None:
            setting(quantization_config={"quant_method": method})(folder)

    return change


def yarn(**settings: Any) -> Callable[[Path], None]:
    return setting(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **settings})


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (no_config, "has no 'config.json'$"),
    "in a subfolder": (only_a_subfolder, "has no 'config.json'; '.*checkpoint-20' has one: give that folder"),
    "classification": (
        setting(architectures=["LlamaForSequenceClassification"]),
        "'LlamaForSequenceClassification': it has a classification head, .*Train the labels as text",
    ),
    "a head without a class": (
        tensor("score.weight", np.ones((3, 64))),
        "holds 'score.weight': it has a classification",
    ),
    "recurrent": (
        setting(architectures=["Lfm2ForCausalLM"]),
        "'Lfm2ForCausalLM', whose layers are recurrent: .* Fine-tune a base of one of these instead: LlamaForCausalLM",
    ),
    "byte order mark": (
        text("config.json", "\ufeff{}"),
        r"config.json' begins with a byte order mark, .*: save it as UTF-8 without one \(tail -c \+4",
    ),
    "more rows": (
        tensor("model.embed_tokens.weight", np.ones((80, 64))),
        r"has shape \(80, 64\); by config.json it is \(72, 64\). If tokens were added: set 'vocab_size' to 80 ",
    ),
    "an adapter": (only_an_adapter, "holds an adapter, give it with --adapter"),
    "config is not valid JSON": (text("config.json", "{'a': 1}"), "config.json' is not valid JSON"),
    "config is no table": (text("config.json", "[1]"), "holds a list; it must be a table"),
    "config is too deep": (text("config.json", "[" * 100_000), "config.json' is not valid JSON"),
    "pickles": (pickled, "'pytorch_model.bin', a pickle: opening it could run any code.*safe_serialization=True"),
    "no weights": (no_weights, "has no 'model.safetensors'$"),
    "shards without an index": (shards_without_an_index, "'model-00001-of-00001.safetensors', but no '" + INDEX),
    "bitsandbytes": (quantized("bitsandbytes", "weight.absmax", dtype="U8"), r"\(bitsandbytes, .*dequantize\(\)"),
    "bitsandbytes, untold": (
        quantized(None, "weight.quant_state.bitsandbytes__nf4"),
        r"\(bitsandbytes, .*dequantize\(\)",
    ),
    "8 bits, untold": (quantized(None, "SCB", dtype="I8"), r"already \(bitsandbytes, by tensor '.*down_proj.SCB'\)"),
    "gptq": (quantized("gptq", "qweight", "g_idx"), r"already \(GPTQ, .*full-precision checkpoint"),
    "awq": (quantized("awq", "qweight", "qzeros"), r"already \(GPTQ or AWQ, "),
    "fp8": (quantized("fp8", dtype="F8_E4M3"), r"already \(FP8, by tensor '.*down_proj.weight'\)"),
    "compressed": (quantized("compressed-tensors", "weight_packed"), r"already \(compressed-tensors, "),
    "MLX": (
        quantized(None, "scales", "biases", dtype="U32"),
        r"already \(MLX, by tensor .*mlx_lm.convert --dequantize",
    ),
    "packed": (quantized(None, dtype="I32"), r"already \(a tool that stores I32, by tensor '.*down_proj.weight'\)"),
    "odd name": (quantized("quark", "weight_scale", dtype="I8"), r"already \(quark, by '.*down_proj.weight_scale'\)"),
    "text_config is no table": (setting(text_config=[1]), "'text_config' is"),
    "YaRN's betas": (yarn(beta_fast=24.0), "'beta_fast' is 24.0, which llama.cpp ignores: it computes with 32"),
    "YaRN's attention": (yarn(attention_factor=1.0), r"'attention_factor' is 1.0, .*computes with 1.13863"),
    "YaRN unrounded": (yarn(truncate=False), "'truncate' false is not supported"),
    "truncated": (truncated, "model.safetensors' is truncated: its tensors end at byte"),
    "missing tensor": (
        tensor("model.layers.1.mlp.up_proj.weight", None),
        "no tensor 'model.layers.1.mlp.up_proj.weight', which config.json asks for",
    ),
    "unknown tensor": (
        tensor("model.layers.2.mlp.up_proj.weight", np.ones((2, 2))),
        "1 tensors that config.json does not explain, such as 'model.layers.2.mlp.up_proj.weight'",
    ),
    "wrong shape": (
        tensor("model.norm.weight", np.ones(65)),
        r"'model.norm.weight' has shape \(65,\); by config.json it is \(64,\)",
    ),
    "transposed": (
        tensor("model.layers.0.mlp.down_proj.weight", np.ones((96, 64))),
        r"'model.layers.0.mlp.down_proj.weight' has shape \(96, 64\); by config.json it is \(64, 96\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_own_message(tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    folder = write_folder(tmp_path / "folder")
    spoil(folder)
    kind = ArchitectureUnknown if case in {"classification", "recurrent"} else SourceInvalid
    assert str(folder) in refused(folder, message, kind)


def test_yarn_settings_that_llama_cpp_computes_with_are_accepted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "llama")
    yarn(beta_fast=32, beta_slow=1.0, attention_factor=1.138629436111989)(folder)
    with closing(open_tiny(folder)) as source:
        assert source.header.text("llama.rope.scaling.type") == "yarn"


def test_an_unknown_architecture_is_refused_with_the_known_ones_and_a_workaround(tmp_path: Path) -> None:
    namings: list[Any] = [["GPT2LMHeadModel"], [], None, "LlamaForCausalLM", [{}]]
    for named in namings:
        folder = write_folder(tmp_path / "folder", architectures=named)
        message = refused(folder, "known are LlamaForCausalLM, .*StableLmForCausalLM.*--gguf FILE", ArchitectureUnknown)
        if named == ["GPT2LMHeadModel"]:
            assert "'GPT2LMHeadModel'" in message


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "llama")
    path = folder / "model.safetensors"
    head = path.read_bytes().replace(b'"BF16"', b'"I16" ', 1)
    path.write_bytes(head)
    refused(folder, "tensor 'model.embed_tokens.weight' has type I16; known are F32, F16, BF16")


def test_values_that_are_not_finite_are_found_while_reading(tmp_path: Path) -> None:
    made = weights("llama")
    made["model.layers.1.self_attn.q_proj.weight"][5, 7] = np.nan
    with (
        closing(open_tiny(write_folder(tmp_path / "folder", "llama", made))) as source,
        pytest.raises(SourceInvalid, match=r"'model.layers.1.self_attn.q_proj.weight' that are not finite \(NaN\)"),
    ):
        read(source, "blk.1.attn_q.weight")


def spoil_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model.safetensors", "'../model.safetensors', which is not a safetensors file"),
        ("/etc/passwd", "'/etc/passwd', which is not a safetensors file"),
        ("pytorch_model.bin", "'pytorch_model.bin', which is not a safetensors file"),
        (7, "7, which is not a safetensors file"),
        ("other.safetensors", "other.safetensors' is missing: .*download it again"),
    ],
)
def test_an_index_cannot_point_anywhere(tmp_path: Path, name: Any, message: str) -> None:
    folder = write_shards(tmp_path / "folder")
    refused(spoil_index(folder, lambda found: found.update({"model.norm.weight": name})), message)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "folder")
    (folder / SECOND).unlink()
    refused(folder, f"{SECOND}' is missing: '{INDEX}' names it; download it again")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "folder")
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])
    refused(folder, f"{SECOND}' is truncated")


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    folder = spoil_index(write_shards(tmp_path / "a"), lambda found: found.update({"lost.weight": SECOND}))
    refused(folder, f"says tensor 'lost.weight' is in '{SECOND}', where it is not")
    first = SECOND.replace("2", "1", 1)
    moved = spoil_index(
        write_shards(tmp_path / "b"),
        lambda found: found.update({"model.norm.weight": first if found["model.norm.weight"] == SECOND else SECOND}),
    )
    refused(moved, "says tensor 'model.norm.weight' is in .*, where it is not")


def test_a_tensor_that_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    folder = spoil_index(write_shards(tmp_path / "folder"), lambda found: found.pop("model.norm.weight"))
    refused(folder, f"holds tensor 'model.norm.weight', which '{INDEX}' does not list")


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "folder")
    (folder / SECOND).write_bytes(safetensors_bytes(weights("llama"), "BF16"))
    refused(folder, "tensor '.*' is in both .*00001-of-00002.* and .*00002-of-00002")


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "folder")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights("llama"), "BF16"))
    refused(folder, "remove the one that is out of date")


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "folder")
    for content in ('{"weight_map": []}', "{}"):
        (folder / INDEX).write_text(content)
        refused(folder, "has no table 'weight_map'")


def test_nothing_stays_open_when_opening_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    close = SafetensorsFile.close

    def record(file: SafetensorsFile) -> None:
        closed.append(file.path.name)
        close(file)

    monkeypatch.setattr(SafetensorsFile, "close", record)

    def fail(at: Path, config: Any, n_rows: int) -> VocabularyFields:
        raise SourceInvalid(f"no tokenizer for {n_rows} rows")

    with pytest.raises(SourceInvalid, match="no tokenizer for 72 rows"):
        HfCheckpoint(write_shards(tmp_path / "folder"), fail)
    assert closed == [SECOND.replace("2", "1", 1), SECOND]


def test_a_checkpoint_is_a_gguf_file_or_a_folder(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "tiny.gguf", "gemma3"))
    assert source.header.architecture == "gemma3"
    source.close()
    folder = write_folder(tmp_path / "folder")
    with pytest.raises(Exception, match="tokenizer"):
        open_checkpoint(folder)
    with pytest.raises(SourceInvalid, match=r"is one file of a checkpoint: give the folder with its config.json"):
        open_checkpoint(folder / "model.safetensors")
