"""CTranslate2 on the weights of a Gemma 3 GGUF file. Run by the peers' Python, not by Deskside's.

    python run_ctranslate2.py convert MODEL.gguf FOLDER
    python run_ctranslate2.py label FOLDER THREADS BATCH END… < prompts.json > answers.json

CTranslate2's own converter requires the Hugging Face checkpoint and torch; its specification also takes numpy arrays,
so the weights come from the GGUF file and are quantized to int8 by CTranslate2. Prompts and answers are lists of token
ids; END are the ids that end an answer. A GGUF file stores Gemma's norm weights with 1 already added.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.converters import utils
from ctranslate2.specs import common_spec, transformer_spec
from gguf import GGUFReader, dequantize

LOCAL_ROPE_BASE = 10000.0
GLOBAL_EVERY = 6
EOS, BOS, UNKNOWN = 1, 2, 3
MAX_NEW_TOKENS = 12


class Weights:
    """A GGUF file's metadata and its tensors as float32."""

    def __init__(self, path: str) -> None:
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def fact(self, name: str) -> Any:
        """A metadata value of the `gemma3` family."""
        return self._reader.fields[f"gemma3.{name}"].contents()

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[f"{name}.weight"]
        return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def specification(weights: Weights) -> Any:
    """The model as CTranslate2 describes it, filled from `weights`; tokens are named by their number."""
    head_dim = weights.fact("attention.key_length")
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        weights.fact("block_count"),
        weights.fact("attention.head_count"),
        activation=common_spec.Activation.GELUTanh,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=head_dim,
        rotary_interleave=False,
        rotary_base=LOCAL_ROPE_BASE,
        num_heads_kv=weights.fact("attention.head_count_kv"),
        head_dim=head_dim,
        sliding_window=weights.fact("attention.sliding_window"),
        pre_post_layer_norm=True,
        quant_type=common_spec.Quantization.CT2,
        qk_norm=True,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = True
    decoder.start_from_zero_embedding = False
    decoder.embeddings.weight = decoder.projection.weight = weights["token_embd"]
    decoder.layer_norm.gamma = weights["output_norm"]
    for index, layer in enumerate(decoder.layer):
        _fill(layer, weights, index)
    spec.register_vocabulary([str(token) for token in range(decoder.embeddings.weight.shape[0])])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = str(BOS), str(EOS), str(UNKNOWN)
    spec.config.layer_norm_epsilon = weights.fact("attention.layer_norm_rms_epsilon")
    return spec


def _fill(layer: Any, weights: Weights, index: int) -> None:
    block, attention = f"blk.{index}.", layer.self_attention
    if (index + 1) % GLOBAL_EVERY == 0:
        attention.rotary_base = np.float32(weights.fact("rope.freq_base"))
        attention.sliding_window = np.int32(0)
    norms = {
        "attn_norm": layer.input_layer_norm,
        "post_attention_norm": layer.post_attention_layer_norm,
        "ffn_norm": layer.pre_feedforward_layer_norm,
        "post_ffw_norm": layer.post_feedforward_layer_norm,
        "attn_q_norm": attention.q_norm,
        "attn_k_norm": attention.k_norm,
    }
    for name, norm in norms.items():
        norm.gamma = weights[block + name]
    split = [common_spec.LinearSpec() for _ in range(3)]
    for part, name in zip(split, ("attn_q", "attn_k", "attn_v"), strict=True):
        part.weight = weights[block + name]
    utils.fuse_linear(attention.linear[0], split)
    attention.linear[1].weight = weights[block + "attn_output"]
    layer.ffn.linear_0.weight = weights[block + "ffn_gate"]
    layer.ffn.linear_0_noact.weight = weights[block + "ffn_up"]
    layer.ffn.linear_1.weight = weights[block + "ffn_down"]


def convert(gguf: str, folder: str) -> None:
    """Write the int8 model, whole or not at all."""
    unfinished = Path(f"{folder}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    spec = specification(Weights(gguf))
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(unfinished))
    unfinished.rename(folder)


def label(folder: str, threads: int, batch: int, ends: list[str]) -> None:
    """Answer the prompts in order, greedily, `batch` at a time, each up to one of `ends`."""
    prompts: list[list[int]] = json.load(sys.stdin)
    generator = ctranslate2.Generator(folder, compute_type="int8", inter_threads=1, intra_threads=threads)
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        results = generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts[start : start + batch]],
            max_length=MAX_NEW_TOKENS,
            end_token=ends,
            include_prompt_in_result=False,
        )
        answers += [list(result.sequences_ids[0]) for result in results]
    json.dump(answers, sys.stdout)


def main() -> None:
    """Run one of the two commands above."""
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        label(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])


if __name__ == "__main__":
    main()
