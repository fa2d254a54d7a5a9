"""The files of a run: hidden states kept on disk, the checkpoint, the log, and the result, each written whole or not.

A stopped run leaves its checkpoint and its kept states; the same command finds them and resumes. No file is a pickle.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint.safetensors import SafetensorsFile
from convert.errors import FinetuneFailed
from convert.lora.adapter import ADAPTER_WEIGHTS_FILE
from convert.lora.config import ADAPTER_CONFIG_FILE
from models.common.files import check_free, write_atomic

from .base import GROUPS, DecoderShape
from .examples import TokenBatch, TokenRow
from .settings import EpochScore, FinetuneSettings, TrainingCost

CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE = "training.json"
Tensors = Mapping[str, np.ndarray]


class KeptStates:
    """Hidden states of rows of tokens, in a file mapped into memory: float16, each token scaled by its largest number.

    Hidden states reach beyond float16's range in some models; scaled, they keep its eleven bits.
    """

    def __init__(self, folder: Path, name: str, rows: Sequence[TokenRow], n_embd: int, key: object) -> None:
        """`key` names all that the states depend on beside the rows' tokens."""
        tokens = b"".join(row.tokens.tobytes() for row in rows)
        digest = hashlib.sha256(repr((key, [len(row.tokens) for row in rows])).encode() + tokens).hexdigest()[:16]
        self._starts = np.cumsum([0, *(len(row.tokens) for row in rows)])
        self._n_embd = n_embd
        self._path = folder / f"{name}-{digest}.states"
        self._part = self._path.with_suffix(".part")
        self._whole: Any = None

    @property
    def n_bytes(self) -> int:
        """The size of the file."""
        return int(self._starts[-1]) * (self._n_embd * 2 + 4)

    @property
    def is_complete(self) -> bool:
        """True if an earlier run has computed all."""
        return self._path.is_file() and self._path.stat().st_size == self.n_bytes

    def fill(self, computed: Iterator[tuple[TokenBatch, np.ndarray]]) -> None:
        """Write the states of all batches, each (rows, width, n_embd) with a row's tokens at its end."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        check_free(self._path.parent, self.n_bytes)
        whole: Any = np.memmap(self._part, np.uint8, "w+", shape=(self.n_bytes,))
        values, scales = self._parts(whole)
        for batch, states in computed:
            for place, member in enumerate(batch.members):
                start, stop = self._starts[member : member + 2]
                row = states[place, -(stop - start) :]
                scale = np.maximum(np.abs(row).max(axis=1, keepdims=True), 1e-30) / 1024
                values[start:stop], scales[start:stop] = row / scale, scale
        whole.flush()
        self._part.replace(self._path)

    def read(self, batch: TokenBatch) -> np.ndarray:
        """The states of a batch, (rows, width, n_embd), zeros where there are no tokens."""
        if self._whole is None:
            self._whole = np.memmap(self._path, np.uint8, "r", shape=(self.n_bytes,))
        values, scales = self._parts(self._whole)
        out = np.zeros((batch.shape.rows, batch.shape.width, self._n_embd), np.float32)
        for place, member in enumerate(batch.members):
            start, stop = self._starts[member : member + 2]
            out[place, -(stop - start) :] = values[start:stop].astype(np.float32) * scales[start:stop]
        return out

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    def _parts(self, whole: Any) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of each token, and its scale."""
        n_tokens = int(self._starts[-1])
        at = n_tokens * self._n_embd * 2
        values = whole[:at].view(np.float16).reshape(n_tokens, self._n_embd)
        return values, whole[at:].view(np.float32).reshape(n_tokens, 1)


def write_checkpoint(folder: Path, tensors: Tensors, facts: Mapping[str, Any]) -> None:
    """Write tensors and facts (JSON) as the checkpoint. Raises StoreError when the disk is full."""
    check_free(folder, sum(array.nbytes for array in tensors.values()))
    write_atomic(folder / CHECKPOINT_FILE, _safetensors(tensors, {"facts": json.dumps(facts)}))


def read_checkpoint(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The tensors and facts of the checkpoint in `folder`; None without one. Raises SourceInvalid if it is damaged."""
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    tensors = read_tensors_of(path)
    with path.open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return tensors, json.loads(head["__metadata__"]["facts"])


def read_tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, float32. Raises SourceInvalid."""
    file = SafetensorsFile(path)
    try:
        return {
            name: np.concatenate([file.rows(tensor, 0, int(np.prod(tensor.shape[:-1], dtype=int)))]).reshape(
                tensor.shape
            )
            for name, tensor in file.tensors.items()
        }
    finally:
        file.close()


class RunLog:
    """A run's own account, kept over its resumptions: settings, estimate, every step's loss, every epoch's score.

    `identity` is all that must be the same when a run resumes.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.cost: TrainingCost | None = None
        self.steps: list[dict[str, float]] = []
        self.scores: list[EpochScore] = []
        self._since = time.monotonic(), time.process_time()
        self._taken: tuple[float, float] | None = None

    def resume(self, facts: Mapping[str, Any], folder: Path, layers: int | None, epochs: int | None) -> TrainingCost:
        """Continue the account of a checkpoint. Raises FinetuneFailed if it is another run's."""
        check_same(facts, self.identity, folder)
        check_same(facts["estimate"], _asked(layers, epochs), folder)
        return self._take(facts)

    def is_finished(self, folder: Path, layers: int | None, epochs: int | None) -> bool:
        """True if `folder` holds a finished run of the same; its account is taken over then."""
        try:
            facts = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        wanted = {**self.identity, "finished": True}
        same: bool = facts.items() >= wanted.items() and facts["estimate"].items() >= _asked(layers, epochs).items()
        if same:
            self._take(facts)
            self._taken = facts["wall_seconds"], facts["cpu_seconds"]
        return same

    def _take(self, facts: Mapping[str, Any]) -> TrainingCost:
        self.cost = TrainingCost(**facts["estimate"])
        self.steps = facts["steps"]
        self.scores = [EpochScore(**score) for score in facts["epochs"]]
        started = (time.monotonic(), time.process_time())
        self._since = started[0] - facts["wall_seconds"], started[1] - facts["cpu_seconds"]
        return self.cost

    @property
    def seconds(self) -> tuple[float, float]:
        """Wall and CPU seconds so far; of a finished run all that it took."""
        return self._taken or (time.monotonic() - self._since[0], time.process_time() - self._since[1])

    @property
    def best(self) -> EpochScore | None:
        """The score of the epoch that was kept last."""
        return next((score for score in reversed(self.scores) if score.kept), None)

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        wall, cpu = self.seconds
        return {
            **self.identity,
            "estimate": asdict(self.cost) if self.cost is not None else None,
            "wall_seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "epochs": [asdict(score) for score in self.scores],
            "steps": self.steps,
        }

    def write(self, folder: Path, *, finished: bool = False) -> None:
        """Write `training.json`."""
        if finished:
            wall, cpu = self.seconds
            self._taken = round(wall, 1), round(cpu, 1)
        write_atomic(folder / LOG_FILE, json.dumps({**self.facts(), "finished": finished}, indent=1) + "\n")


def _asked(layers: int | None, epochs: int | None) -> dict[str, int]:
    return {name: value for name, value in (("layers", layers), ("epochs", epochs)) if value is not None}


def write_adapter(
    folder: Path, shape: DecoderShape, settings: FinetuneSettings, first_layer: int, layers: Sequence[Any], base: str
) -> None:
    """Write `layers` (group -> (A, B)) as a PEFT adapter; the first belongs to layer `first_layer` of the base."""
    tensors: dict[str, np.ndarray] = {}
    for index, layer in enumerate(layers):
        for group in GROUPS:
            a, b = (np.asarray(one) for one in layer[group])
            start = 0
            for place, (module, rows) in enumerate(shape.rows(group).items()):
                columns = slice(place * settings.rank, (place + 1) * settings.rank)
                if module.rpartition(".")[2] in settings.targets:
                    stem = f"base_model.model.model.layers.{first_layer + index}.{module}"
                    tensors[f"{stem}.lora_A.weight"] = a[columns]
                    tensors[f"{stem}.lora_B.weight"] = b[start : start + rows, columns]
                start += rows
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(settings.targets),
        "inference_mode": True,
    }
    if first_layer:
        config |= {
            "layers_to_transform": list(range(first_layer, first_layer + len(layers))),
            "layers_pattern": "layers",
        }
    write_atomic(folder / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    write_atomic(folder / ADAPTER_WEIGHTS_FILE, _safetensors(tensors, {"format": "pt"}))


def _safetensors(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of float32 tensors (https://github.com/huggingface/safetensors#format)."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    data: list[bytes] = []
    start = 0
    for name in sorted(tensors):
        piece = np.ascontiguousarray(tensors[name], dtype="<f4").tobytes()
        head[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, start + len(piece)]}
        data.append(piece)
        start += len(piece)
    encoded = json.dumps(head).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(data)


def check_same(facts: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise FinetuneFailed if a checkpoint belongs to a run with other settings, base or examples."""
    for name, value in wanted.items():
        if facts.get(name) != value:
            raise FinetuneFailed(
                f"{str(folder / CHECKPOINT_FILE)!r} was made with {name} {facts.get(name)!r}, asked is {value!r}: "
                "give the same options, another --out, or remove the file to start again"
            )
