"""The default model's LoRA adapter as a GGUF that llama.cpp applies hot, for tests."""

from pathlib import Path

import gguf
import numpy as np

from convert.families import BY_ARCHITECTURE
from convert.lora.adapter import read_adapter

PEFT_FOLDER = Path(__file__).parents[2] / "models" / "email_triage" / "adapter"
ARCHITECTURE = "gemma3"


def write_adapter(path: Path, *, architecture: str = ARCHITECTURE, drop: int = 0) -> Path:
    """Write email-triage's adapter to `path`, with the last `drop` inputs of every A cut off: then it fits no base."""
    adapter = read_adapter(PEFT_FOLDER)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    (alpha,) = {lora.scale * lora.a.shape[0] for lora in adapter.loras.values()}  # llama.cpp scales by alpha / rank
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, lora in adapter.loras.items():
        name = BY_ARCHITECTURE[ARCHITECTURE].tensor_name(module)
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(lora.a[:, : lora.a.shape[1] - drop]))
        writer.add_tensor(f"{name}.lora_b", lora.b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
