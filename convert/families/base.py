"""The base of all model families: the names of tensors, the GGUF fields that a config.json becomes, a folder's tensors.

Keys and value types are those that llama.cpp's own converter writes, so that both give the same file. A setting that
llama.cpp would compute differently from the checkpoint is refused. Converting a folder, merging a LoRA onto a GGUF and
writing an adapter as a GGUF all use the same names and the same order of rows.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from models.gguf.fields import Field
from models.gguf.header import Header

from .config import MAX_CONTEXT, Config, Sizes, read_sizes
from .rope import Rope, read_rope, scaling_fields

# Buffers that old versions of transformers saved; config.json determines them.
_HARMLESS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.([a-z_.]+)")

ATTENTION: MappingProxyType[str, str] = MappingProxyType(
    {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
)
MLP: MappingProxyType[str, str] = MappingProxyType(
    {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
)
QK_NORMS: MappingProxyType[str, str] = MappingProxyType(
    {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
)
PRE_NORMS: MappingProxyType[str, str] = MappingProxyType(
    {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
)
OUTER: MappingProxyType[str, str] = MappingProxyType(
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
)


@dataclass(frozen=True)
class Weight:
    """A tensor of the GGUF and the folder's tensors it is made of, each of `shape`, stacked if there are several.

    `heads`: rows are reordered within that many heads. `offset` is added to every value.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int | None = None
    offset: float = 0.0

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape in the GGUF."""
        return self.shape if len(self.sources) == 1 else (len(self.sources), *self.shape)


class Family:
    """The rules most families share; a family overrides those in which it differs."""

    architecture: ClassVar[str]
    """`general.architecture`"""
    layer_modules: ClassVar[Mapping[str, str]] = ATTENTION | MLP | PRE_NORMS
    """A layer's module -> its part of the GGUF tensor's name."""
    permutes_qk: ClassVar[bool] = False
    """q and k are reordered: llama.cpp rotates neighbouring rows in this family, Hugging Face the halves of a head."""
    norm_offset: ClassVar[float] = 0.0
    """Added to the folder's norm weights on their way into the GGUF."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """transformers' values for keys that config.json omits."""
    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    activations: ClassVar[tuple[str, ...]] = ("silu",)
    rotates_part: ClassVar[bool] = False
    """Rotary embeddings may cover a part of each head."""
    fixed_head_dim: ClassVar[bool] = False
    """llama.cpp takes the hidden size divided by the number of heads for a head's width."""
    may_tie: ClassVar[bool] = True
    """llama.cpp can use the embedding as the output matrix."""

    def tensor_name(self, module: str, kind: str = "weight") -> str | None:
        """The GGUF tensor of a module such as `model.layers.0.self_attn.q_proj`; None for an unknown module.

        `kind` is "weight" or "bias".
        """
        if module in OUTER:
            return f"{OUTER[module]}.{kind}"
        match = _LAYER.fullmatch(module)
        part = self.layer_modules.get(match[2]) if match else None
        return f"blk.{match[1]}.{part}.{kind}" if match and part else None

    def permuted_heads(self, module: str, n_head: int, n_head_kv: int) -> int | None:
        """The number of heads for `interleave_halves` to reorder the rows of `module`; None: rows stay in place."""
        if not self.permutes_qk or not module.endswith((".q_proj", ".k_proj")):
            return None
        return n_head if module.endswith(".q_proj") else n_head_kv

    def repack_rows(self, module: str, rows: np.ndarray, header: Header) -> np.ndarray:
        """The output rows of `module`, shape (n_out, …), in the GGUF's order."""
        n_head = header.integer(f"{self.architecture}.attention.head_count")
        key = f"{self.architecture}.attention.head_count_kv"
        n_head_kv = header.integer(key) if key in header.fields else n_head
        heads = self.permuted_heads(module, n_head, n_head_kv)
        return rows if heads is None else interleave_halves(rows, heads)

    def offset(self, module: str) -> float:
        """The number added to every value of `module`'s weight in the GGUF: 1 for Gemma's norms, else 0."""
        return self.norm_offset if module.endswith("norm") else 0.0

    def sizes(self, config: Config) -> Sizes:
        """The model's sizes. Raises SourceInvalid naming the value at fault."""
        sizes = read_sizes(config)
        if self.fixed_head_dim and sizes.n_q != sizes.n_embd:
            raise config.bad("head_dim", f"in this family llama.cpp needs {sizes.n_embd} / {sizes.n_head}")
        return sizes

    def check(self, config: Config) -> None:
        """Raise SourceInvalid, with name and value, for settings that llama.cpp would compute differently."""
        config.require(self.activation_key(config), self.activations)
        for key in ("num_local_experts", "num_experts", "n_routed_experts"):
            config.require(key, (None, 0, 1), "mixtures of experts are not supported")
        config.require("is_causal", (None, True))
        config.require("rope_interleaved", (None, False))
        if not self.rotates_part and self.rope(config).partial != 1:
            raise config.bad("partial_rotary_factor", "in this family llama.cpp rotates whole heads")

    def check_head(self, config: Config) -> None:
        """Raise SourceInvalid if llama.cpp cannot use such an output matrix; `is_tied` here agrees with the weights."""
        if self.is_tied(config) and not self.may_tie:
            raise config.bad("tie_word_embeddings", f"llama.cpp needs a {self.architecture} model's output matrix")

    def activation_key(self, config: Config) -> str:
        """The key of config.json that names the MLP's activation."""
        return "hidden_act"

    def source_name(self, name: str) -> str | None:
        """The name in `weights` of a tensor of the folder; None for a tensor that is not a weight."""
        return None if name.endswith(_HARMLESS) else name

    def warnings(self, config: Config) -> tuple[str, ...]:
        """Warnings for the user about running the model in llama.cpp."""
        return ()

    def is_tied(self, config: Config) -> bool:
        """True if the embedding is also the output matrix."""
        return config.flag("tie_word_embeddings")

    def rope(self, config: Config) -> Rope:
        """The rotary embeddings of layers with full attention."""
        return read_rope(config, self.rope_kinds)

    def fields(self, config: Config) -> dict[str, Field]:
        """The fields; their keys lack the prefix `{architecture}.` here."""
        sizes = self.sizes(config)
        fields = {
            "block_count": Field.uint32(sizes.n_layers),
            "context_length": Field.uint32(config.integer("max_position_embeddings", MAX_CONTEXT)),
            "embedding_length": Field.uint32(sizes.n_embd),
            "feed_forward_length": Field.uint32(sizes.n_ff),
            "attention.head_count": Field.uint32(sizes.n_head),
            "attention.head_count_kv": Field.uint32(sizes.n_head_kv),
            **{f"rope.{key}": field for key, field in scaling_fields(self.rope(config)).items()},
            "attention.layer_norm_rms_epsilon": Field.float32(config.number("rms_norm_eps")),
        }
        return fields | self.head_fields(config)

    def head_fields(self, config: Config) -> dict[str, Field]:
        """The width of a head, if config.json gives it."""
        if config.get("head_dim") is None:
            return {}
        width = Field.uint32(self.sizes(config).head_dim)
        return {"attention.key_length": width, "attention.value_length": width}

    def extras(self, config: Config) -> dict[str, np.ndarray]:
        """Tensors computed from config.json: GGUF name -> float32."""
        return {}

    def biases(self, config: Config) -> frozenset[str]:
        """The modules of a layer that have a bias."""
        return frozenset()

    def weights(self, config: Config) -> Iterator[Weight]:
        """Every tensor that a folder must hold, in no particular order."""
        sizes = self.sizes(config)
        yield self.weight("model.embed_tokens", (sizes.n_vocab, sizes.n_embd))
        if not self.is_tied(config):
            yield self.weight("lm_head", (sizes.n_vocab, sizes.n_embd))
        yield from self.norm("model.norm", sizes)
        biased = self.biases(config)
        for layer in range(sizes.n_layers):
            for part in self.parts(config):
                yield from self.layer_weights(f"model.layers.{layer}.{part}", part, sizes, part in biased)

    def parts(self, config: Config) -> Iterator[str]:
        """The modules of a layer."""
        yield from self.layer_modules

    def layer_weights(self, module: str, part: str, sizes: Sizes, biased: bool) -> Iterator[Weight]:
        """The tensors of one module of a layer."""
        if part.endswith("norm"):
            yield from self.norm(module, sizes)
            return
        shape = self.matrix_shape(part, sizes)
        heads = self.permuted_heads(module, sizes.n_head, sizes.n_head_kv)
        yield self.weight(module, shape, heads)
        if biased:
            yield self.weight(module, shape[:1], heads, "bias")

    def norm(self, module: str, sizes: Sizes) -> Iterator[Weight]:
        """The tensors of a norm: over the hidden size, or over a head of q or k."""
        width = sizes.head_dim if module.endswith((".q_norm", ".k_norm")) else sizes.n_embd
        yield self.weight(module, (width,))

    def matrix_shape(self, part: str, sizes: Sizes) -> tuple[int, int]:
        """(outputs, inputs) of a layer's matrix."""
        outputs = {
            "q_proj": sizes.n_q,
            "k_proj": sizes.n_kv,
            "v_proj": sizes.n_kv,
            "qkv_proj": sizes.n_q + 2 * sizes.n_kv,
            "gate_proj": sizes.n_ff,
            "up_proj": sizes.n_ff,
            "gate_up_proj": 2 * sizes.n_ff,
        }
        inputs = {"o_proj": sizes.n_q, "down_proj": sizes.n_ff}
        short = part.rpartition(".")[2]
        return outputs.get(short, sizes.n_embd), inputs.get(short, sizes.n_embd)

    def weight(self, module: str, shape: tuple[int, ...], heads: int | None = None, kind: str = "weight") -> Weight:
        """The weight or bias of a module."""
        name = self.tensor_name(module, kind)
        assert name is not None, f"{module!r} has no name in {self.architecture!r}"
        return Weight(name, (f"{module}.{kind}",), shape, heads, self.offset(module))


def window_warning(config: Config) -> tuple[str, ...]:
    """A warning if the model's sliding window matters, for families in which llama.cpp ignores it."""
    if config.get("sliding_window") is None:
        return ()
    window = config.integer("sliding_window", MAX_CONTEXT, least=0)
    if not 0 < window < config.integer("max_position_embeddings", MAX_CONTEXT):
        return ()
    return (
        f"the model attends to the last {window} tokens only, llama.cpp to all: prompts longer than that may get "
        "other answers than from the checkpoint",
    )


def interleave_halves(rows: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder each head's rows from (first half, second half) to neighbouring pairs; shape (n_out, …) stays."""
    halves = rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
