"""A base model's shape and weights for training, read through the same checkpoint reader as for conversion.

Matrices that share an input are stored as one: q, k and v; gate and up. Rows of q and k have Hugging Face's order, so
that an adapter's do, too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from convert.checkpoint.source import Checkpoint, open_checkpoint
from convert.errors import ArchitectureUnknown, SourceInvalid
from convert.families.base import Family
from convert.families.gemma import Gemma2Family, Gemma3Family
from convert.lora.fit import EMBEDDING, HEAD, family_of
from convert.planning.plan import layout_of, write_f16
from convert.trim.depth import ShallowCheckpoint
from models.common.console import Reporter
from models.gguf.fields import Field
from models.gguf.header import Header, TensorInfo

COVERED = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
_GEMMAS: Mapping[str, type[Gemma2Family] | type[Gemma3Family]] = {"gemma2": Gemma2Family, "gemma3": Gemma3Family}
_FACTORS = "rope_freqs.weight"
_ROPE_BASE = 10_000.0
_FILE_TYPE_F16 = 1
NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")
# Matrix of the decoder -> the GGUF's tensors it is made of, with Hugging Face's modules.
GROUPS: Mapping[str, Mapping[str, str]] = {
    "qkv": {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    "o": {"attn_output": "self_attn.o_proj"},
    "gate_up": {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"},
    "down": {"ffn_down": "mlp.down_proj"},
}

LayerWeights = dict[str, np.ndarray]
"""A layer's arrays: the norms by their GGUF names, the GROUPS, and `GROUP_bias` where there is a bias."""


@dataclass(frozen=True)
class DecoderShape:
    """All numbers of a decoder but its weights. `windowed`: for each layer, true if its attention has the window."""

    architecture: str
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    eps: float
    windowed: tuple[bool, ...]
    window: int
    is_gelu: bool
    scale: float
    embedding_scale: float
    attention_cap: float
    final_cap: float

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.windowed)

    def rows(self, group: str) -> dict[str, int]:
        """Hugging Face's modules of a group, with the rows of each."""
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        known = {"q_proj": n_q, "k_proj": n_kv, "v_proj": n_kv, "gate_proj": self.n_ff, "up_proj": self.n_ff}
        modules = GROUPS[group].values()
        return {module: known.get(module.rpartition(".")[2], self.n_embd) for module in modules}

    def inputs(self, group: str) -> int:
        """The width of a group's input."""
        return {"o": self.n_head * self.head_dim, "down": self.n_ff}.get(group, self.n_embd)

    @property
    def layer_elements(self) -> int:
        """The numbers in a layer's matrices."""
        return sum(self.inputs(group) * sum(self.rows(group).values()) for group in GROUPS)


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A base in memory, float32. `frequencies`: of the rotary embeddings, in full layers and in windowed ones."""

    shape: DecoderShape
    layers: tuple[LayerWeights, ...]
    embedding: np.ndarray
    head: np.ndarray
    output_norm: np.ndarray
    frequencies: tuple[np.ndarray, np.ndarray] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """The memory that the weights take."""
        arrays = [self.embedding, *(array for layer in self.layers for array in layer.values())]
        own_head = 0 if self.head is self.embedding else self.head.nbytes
        return sum(array.nbytes for array in arrays) + own_head


def read_shape(header: Header) -> DecoderShape:
    """The shape of a base. Raises ArchitectureUnknown or SourceInvalid for a model that cannot be trained here."""
    arch = header.architecture
    if arch not in COVERED:
        raise ArchitectureUnknown(
            f"{str(header.path)!r} has architecture {arch!r}, which cannot be trained here; {', '.join(COVERED)} can. "
            "Train an adapter elsewhere (PEFT) and give it to `deskside convert --adapter`"
        )
    get = _reader(header)
    n_head, n_embd, n_layers = get("attention.head_count"), int(get("embedding_length")), int(get("block_count"))
    head_dim = int(get("attention.key_length", n_embd // n_head))
    if get("attention.value_length", head_dim) != head_dim:
        raise _refused(header, "attention.value_length", "heads of two widths are not covered")
    if get("rope.dimension_count", head_dim) != head_dim:
        raise _refused(header, "rope.dimension_count", "only whole heads can be rotated")
    if get("expert_count", 0):
        raise _refused(header, "expert_count", "mixtures of experts cannot be trained here")
    gemma = _GEMMAS.get(arch)
    width = n_embd // n_head if gemma is not None and n_layers == gemma.largest else head_dim
    return DecoderShape(
        architecture=arch,
        n_embd=n_embd,
        n_head=int(n_head),
        n_head_kv=int(get("attention.head_count_kv", n_head)),
        head_dim=head_dim,
        n_ff=int(get("feed_forward_length")),
        eps=float(get("attention.layer_norm_rms_epsilon")),
        windowed=_windowed(header, n_layers),
        window=int(get("attention.sliding_window", 0)) if gemma is not None else 0,
        is_gelu=gemma is not None,
        scale=float(width) ** -0.5,
        embedding_scale=float(n_embd) ** 0.5 if gemma is not None else 1.0,
        attention_cap=float(get("attn_logit_softcapping", 50.0)) if arch == "gemma2" else 0.0,
        final_cap=float(get("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0)),
    )


def read_weights(
    checkpoint: Checkpoint, advance: Callable[[int, int], None] = lambda done, total: None
) -> DecoderWeights:
    """Read a base into memory as float32. Raises as `read_shape`, and SourceInvalid naming a missing tensor."""
    header = checkpoint.header
    shape, family = read_shape(header), family_of(header)
    layers = []
    for layer in range(shape.n_layers):
        layers.append(_layer(checkpoint, family, layer))
        advance(layer + 1, shape.n_layers)
    embedding = read_tensor(checkpoint, EMBEDDING)
    head = read_tensor(checkpoint, HEAD) if HEAD in header.tensors else embedding
    norm = read_tensor(checkpoint, "output_norm.weight")
    return DecoderWeights(shape, tuple(layers), embedding, head, norm, _frequencies(checkpoint, shape))


def read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A whole tensor, float32, in its own shape. Raises SourceInvalid if the checkpoint lacks it."""
    info = checkpoint.header.tensors.get(name)
    if info is None:
        raise SourceInvalid(f"{str(checkpoint.header.path)!r} has no tensor {name!r}")
    out = np.empty((info.n_elements // info.shape[-1], info.shape[-1]), np.float32)
    for start, rows in checkpoint.slabs(info):
        out[start : start + len(rows)] = rows
    return out.reshape(info.shape)


def hf_order(family: Family, module: str, n_rows: int, header: Header) -> np.ndarray:
    """For each row of the GGUF, its place in Hugging Face's matrix."""
    return family.repack_rows(f"model.layers.0.{module}", np.arange(n_rows), header)


def _layer(checkpoint: Checkpoint, family: Family, layer: int) -> LayerWeights:
    tensors, stem = checkpoint.header.tensors, f"blk.{layer}."
    known = {f"{stem}{name}.weight" for name in NORMS}
    weights: LayerWeights = {
        name: read_tensor(checkpoint, f"{stem}{name}.weight") for name in NORMS if f"{stem}{name}.weight" in tensors
    }
    for group, parts in GROUPS.items():
        for kind, key in (("weight", group), ("bias", f"{group}_bias")):
            names = [f"{stem}{part}.{kind}" for part in parts]
            known.update(names)
            if kind == "bias" and not any(name in tensors for name in names):
                continue
            pieces = []
            for name, module in zip(names, parts.values(), strict=True):
                gguf_rows = read_tensor(checkpoint, name)
                rows = np.empty_like(gguf_rows)
                rows[hf_order(family, module, len(rows), checkpoint.header)] = gguf_rows
                pieces.append(rows)
            weights[key] = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    if unknown := sorted(name for name in tensors if name.startswith(stem) and name not in known):
        path = str(checkpoint.header.path)
        raise SourceInvalid(f"{path!r} has tensor {unknown[0]!r}, which the trainer would leave out of its computation")
    return weights


def _frequencies(checkpoint: Checkpoint, shape: DecoderShape) -> tuple[np.ndarray, np.ndarray]:
    header = checkpoint.header
    get = _reader(header)
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    full = float(get("rope.freq_base", _ROPE_BASE)) ** -exponents
    kind = header.fields.get(f"{shape.architecture}.rope.scaling.type")
    if kind is not None and kind.value not in {"none", "linear"}:
        raise _refused(header, "rope.scaling.type", "only linear scaling and Llama 3's are covered")
    if kind is not None and kind.value == "linear":
        full = full / float(get("rope.scaling.factor", 1.0))
    if _FACTORS in header.tensors:
        full = full / read_tensor(checkpoint, _FACTORS).astype(np.float64)
    windowed = float(get("rope.freq_base_swa", _ROPE_BASE)) ** -exponents if shape.architecture == "gemma3" else full
    return full, windowed


def _windowed(header: Header, n_layers: int) -> tuple[bool, ...]:
    gemma = _GEMMAS.get(header.architecture)
    if gemma is None or f"{header.architecture}.attention.sliding_window" not in header.fields:
        return (False,) * n_layers
    stated = header.fields.get(f"{header.architecture}.attention.sliding_window_pattern")
    if stated is not None and stated.numbers is not None:
        return tuple(map(bool, stated.numbers))
    return tuple((layer + 1) % gemma.period != 0 for layer in range(n_layers))


def _reader(header: Header) -> Callable[..., float]:
    """A function that returns the family's own number `key`; a given default where the field is missing."""

    def get(key: str, default: float | None = None) -> float:
        name = f"{header.architecture}.{key}"
        found = header.fields.get(name)
        if found is None and default is not None:
            return default
        if found is None or isinstance(found.value, bool) or not isinstance(found.value, int | float):
            raise SourceInvalid(f"{str(header.path)!r} has no number {name!r}")
        return found.value

    return get


def _refused(header: Header, key: str, why: str) -> SourceInvalid:
    name = f"{header.architecture}.{key}"
    return SourceInvalid(f"{str(header.path)!r} has {name!r} {header.fields[name].value!r}: {why}")


class RetrainedCheckpoint:
    """`source` with whole layers replaced: `layers` by their number. Closing it leaves `source` open."""

    def __init__(self, source: Checkpoint, shape: DecoderShape, layers: Mapping[int, LayerWeights]) -> None:
        self._source = source
        self.header = source.header
        self._replaced: dict[str, np.ndarray] = {}
        family = family_of(source.header)
        for layer, weights in layers.items():
            for name, array in weights.items():
                group, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
                if group not in GROUPS:
                    self._replaced[f"blk.{layer}.{name}.weight"] = array
                    continue
                start = 0
                for part, (module, rows) in zip(GROUPS[group], shape.rows(group).items(), strict=True):
                    ordered = array[start : start + rows][hf_order(family, module, rows, source.header)]
                    self._replaced[f"blk.{layer}.{part}.{kind}"] = ordered
                    start += rows

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)) of the retrained tensor until it is read."""
        found = self._replaced.get(tensor.name)
        if found is None:
            yield from self._source.slabs(tensor)
        else:
            yield 0, found.reshape(-1, found.shape[-1])

    def close(self) -> None:
        """Do nothing: the source stays open."""


def write_model(checkpoint: Checkpoint, target: Path, stage: str, report: Reporter) -> str:
    """Write a checkpoint as an F16 GGUF, which `deskside convert` takes, and return its sha256."""
    fields = {**checkpoint.header.fields, "general.file_type": Field.uint32(_FILE_TYPE_F16)}
    return write_f16(checkpoint, layout_of(replace(checkpoint.header, fields=fields)), target, stage, report)


def write_shallow(base: Path, kept: Sequence[int], target: Path, report: Reporter) -> str:
    """Write the base with only the layers `kept` as an F16 GGUF, to train and to convert; returns its sha256.

    Raises RequestInvalid for layers that the base does not have, and what opening it raises.
    """
    with closing(ShallowCheckpoint(open_checkpoint(base), kept)) as checkpoint:
        return write_model(checkpoint, target, f"write {len(kept)} layers", report)
