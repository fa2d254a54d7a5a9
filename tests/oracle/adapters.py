"""Merge adapters on the checkpoints of `families` with PEFT. Run by the oracle's Python, after reference.py.

    python -m tests.oracle.adapters LLAMA_CPP TARGET

writes, for each adapter, TARGET/adapters/NAME/ (as PEFT saves it) and TARGET/ref/adapter-NAME-f32.gguf: the model that
PEFT merged it into, converted by llama.cpp's own converter.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.oracle.families import ADAPTERS, BY_NAME, AdapterCase
from tests.oracle.reference import convert, prepare

_SPREAD = 0.3


def make_adapter(adapter: AdapterCase, target: Path) -> None:
    """Train nothing: an adapter of random numbers, saved, merged, and the merged model converted."""
    base = target / "ckpt" / adapter.base
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter.config))
    _randomize(tuned)
    tuned.save_pretrained(target / "adapters" / adapter.name)
    merged = tuned.merge_and_unload()
    folder = target / "merged" / adapter.name
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    merged.save_pretrained(folder)
    shutil.copy(base / "config.json", folder)
    convert(BY_NAME[adapter.base], folder, target / "ref" / f"adapter-{adapter.name}-f32.gguf", "f32")


def _randomize(tuned: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in tuned.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + _SPREAD * noise.abs())
        elif "modules_to_save" in name:
            parameter.data.add_(_SPREAD * noise)
        else:
            parameter.data.copy_(_SPREAD * noise)


def main() -> None:
    """Make every adapter."""
    target = prepare()
    for adapter in ADAPTERS:
        make_adapter(adapter, target)
        print(adapter.name, flush=True)


if __name__ == "__main__":
    main()
