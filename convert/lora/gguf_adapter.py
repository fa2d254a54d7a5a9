"""Plan a LoRA GGUF of a PEFT adapter, which llama.cpp applies while it serves the base, instead of merging it.

A quantized base keeps its file, and the change is added in float32 as trained: merging would round it to the base's
grid, and could lose it. Any number of adapters share one base in memory.
llama.cpp's `src/llama-adapter.cpp` defines names and shapes: the base's tensor name with `.lora_a`, shape (rank, n_in),
and `.lora_b`, shape (n_out, rank).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from convert.errors import AdapterInvalid
from convert.gguf_writer import Layout, OutTensor
from convert.tokenizer.chat_template import TEMPLATE_FIELD, ChatFormat
from models.gguf.fields import Field
from models.gguf.header import DEFAULT_ALIGNMENT, Header

from .adapter import PeftAdapter
from .changes import Lora
from .fit import HEAD, Fitted

FULL_PRECISION = "F32"
_A, _B = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter's file: its layout, and its float32 `matrices` by tensor name."""

    layout: Layout
    matrices: Mapping[str, np.ndarray]

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The tensor `name`, in one piece."""
        yield self.matrices[name]


def check_appliable(adapter: PeftAdapter, fitted: Fitted) -> None:
    """Raise AdapterInvalid for an adapter that llama.cpp cannot apply while it serves: only LoRA on linear layers."""
    unsupported = {
        "use_dora": [lora.module for lora in adapter.loras.values() if lora.magnitude is not None],
        "modules_to_save": [name for name in adapter.saved if name.endswith(".weight")],
        "bias": [name for name in adapter.saved if name.endswith(".bias")],
        "lora_bias": list(adapter.shifts),
        "trainable_token_indices": list(adapter.tokens),
        "a LoRA on the embedding": [lora.module for lora in adapter.loras.values() if lora.on_embedding],
        "a LoRA on the output head, which this base ties to its embedding": [HEAD] if fitted.unties else [],
    }
    for what, where in unsupported.items():
        if where:
            raise AdapterInvalid(
                f"the adapter {str(adapter.folder)!r} has {what} ({where[0]!r}), which can be merged but not applied "
                "while the base is served: leave out --hot"
            )


def plan_adapter(header: Header, loras: Mapping[str, Lora], chat: ChatFormat, name: str, licence: str) -> AdapterPlan:
    """Plan the file of an adapter fitted to the base of `header`; `loras` by the base's tensor names."""
    alpha = _alpha(loras)
    matrices: dict[str, np.ndarray] = {}
    for tensor, lora in loras.items():
        # llama.cpp scales by alpha / rank; the rest of this module's scale goes into B
        rest = lora.scale * len(lora.a) / alpha
        matrices[tensor + _A] = lora.a
        matrices[tensor + _B] = lora.b * np.float32(rest)
    fields = {
        "general.architecture": Field.string(header.architecture),
        "general.type": Field.string("adapter"),
        "general.name": Field.string(name),
        "general.license": Field.string(licence),
        "adapter.type": Field.string("lora"),
        "adapter.lora.alpha": Field.float32(alpha),
    }
    if chat.template is not None:
        fields[TEMPLATE_FIELD] = Field.string(chat.template)
    tensors = [OutTensor(tensor, matrix.shape, GGMLQuantizationType.F32) for tensor, matrix in matrices.items()]
    return AdapterPlan(Layout(fields, tensors, DEFAULT_ALIGNMENT), matrices)


def _alpha(loras: Mapping[str, Lora]) -> float:
    """The file's alpha: the first module's. llama.cpp takes 0 for a missing alpha, so a scale of 0 gets 1."""
    first = next(iter(loras.values()))
    return first.scale * len(first.a) or 1.0
