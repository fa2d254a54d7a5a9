"""Fit an adapter to a base: assign each change to a tensor of the GGUF, with rows in the GGUF's order; merge it.

A base of another shape, with fewer layers or other modules is refused before anything is written. If the base ties its
output head to the embedding and the adapter trained one of them alone, the head becomes a tensor of its own, as in
training. (PEFT's merge_and_unload works in place and changes both then.)
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from convert.checkpoint.source import Checkpoint
from convert.errors import AdapterInvalid, ArchitectureUnknown
from convert.families import BY_ARCHITECTURE
from convert.families.base import Family
from convert.families.gemma import Gemma1Family
from models.gguf.header import Header, TensorInfo

from .adapter import PeftAdapter
from .changes import AddBias, Change, Lora, Replace, ReplaceRows, SavedTensor

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# llama.cpp always uses the embedding as the head in these families (its src/models/gemma.cpp and gemma2.cpp).
_ALWAYS_TIED = ("gemma", "gemma2")
_NAMES = ("general.name", "general.basename", "general.base_model.0.name", "general.source.huggingface.repository")
# Endings of a model's name that say how its weights are stored.
_STORAGE = re.compile(
    r"(gguf|hf|unsloth|bnb|[248]bit|gptq|awq|fp?16|fp?32|bf16|i?q[1-8]|[01]|k|nl|xxs|xs|s|m|l|xl|ud)", re.IGNORECASE
)


@dataclass(frozen=True)
class Fitted:
    """The changes of each of the base's tensors, by name, in the order to apply them, and warnings for the user.

    `unties`: the base has no output head of its own and gets one, which starts as a copy of the embedding.
    """

    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    unties: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def loras(self) -> dict[str, Lora]:
        """Tensor name -> its low-rank change, for tensors that have one."""
        return {name: one for name, changes in self.changes.items() for one in changes if isinstance(one, Lora)}


def fit(adapter: PeftAdapter, header: Header) -> Fitted:
    """Fit `adapter` to the base of `header`. Raises AdapterInvalid naming the misfit, and ArchitectureUnknown."""
    return _Fitting(adapter, header, family_of(header)).fitted()


def family_of(header: Header) -> Family:
    """The family of a GGUF. Raises ArchitectureUnknown naming its architecture and the known ones."""
    families: dict[str, Family] = {Gemma1Family.architecture: Gemma1Family(), **BY_ARCHITECTURE}
    family = families.get(header.architecture)
    if family is None:
        raise ArchitectureUnknown(
            f"no adapter can be merged into architecture {header.architecture!r} ({str(header.path)!r}); "
            f"known are {', '.join(sorted(families))}"
        )
    return family


def base_warning(adapter: PeftAdapter, header: Header) -> str | None:
    """A warning if the adapter names another base than that of `header`; None also if it names none."""
    if not _is_hub_name(adapter.base):
        return None
    own = [header.path.stem, header.path.name, header.path.parent.name]
    own += [str(header.fields[key].value) for key in _NAMES if key in header.fields]
    if _stem(adapter.base) in {_stem(name) for name in own}:
        return None
    called = header.fields["general.name"].value if "general.name" in header.fields else header.path.name
    return (
        f"the adapter {str(adapter.folder)!r} was trained on {adapter.base!r}, this base calls itself {called!r}: "
        "on another model an adapter does harm even if its shapes fit"
    )


class _Fitting:
    """One fit under way: collects the changes by tensor name."""

    def __init__(self, adapter: PeftAdapter, header: Header, family: Family) -> None:
        self._adapter = adapter
        self._header = header
        self._family = family
        self._changes: dict[str, tuple[Change, ...]] = {}

    def fitted(self) -> Fitted:
        for parameter, saved in self._adapter.saved.items():
            self._replace(parameter, saved)
        for module, lora in self._adapter.loras.items():
            self._add_lora(module, lora)
        for parameter, values in self._adapter.shifts.items():
            self._add_bias(parameter, values)
        for module, rows in self._adapter.tokens.items():
            self._replace_rows(module, rows)
        unties = self._unties_head()
        warnings = [base_warning(self._adapter, self._header)]
        if unties:
            size = self._header.tensors[EMBEDDING].n_elements * 2 / 2**20
            warnings.append(
                f"the base ties its output head to the embedding, the adapter trained them apart: {HEAD!r} becomes a "
                f"tensor of its own ({size:.0f} MiB more at F16)"
            )
        return Fitted(self._changes, unties, tuple(warning for warning in warnings if warning is not None))

    def _replace(self, parameter: str, saved: SavedTensor) -> None:
        module, _, kind = parameter.rpartition(".")
        name, wanted = self._target(module, kind)
        if saved.shape != wanted:
            self._refuse_vocabulary(name, saved.shape, wanted)
            raise self._misfit(
                f"adapter tensor {parameter!r} has shape {saved.shape}, {name!r} of the base has {wanted}"
            )
        offset = self._family.offset(module) if kind == "weight" else 0.0
        self._append(name, Replace(saved, self._order(module, wanted[0]), offset))

    def _add_lora(self, module: str, lora: Lora) -> None:
        name, wanted = self._target(module)
        shape = (lora.b.shape[0], lora.a.shape[1])
        if shape != wanted:
            self._refuse_vocabulary(name, shape, wanted)
            raise self._misfit(
                f"adapter tensors of {module!r} make a change of shape {shape}, {name!r} of the base has {wanted}"
            )
        order = self._order(module, wanted[0])
        if order is not None:
            magnitude = lora.magnitude[order] if lora.magnitude is not None else None
            lora = Lora(module, lora.a, lora.b[order], lora.scale, magnitude, lora.on_embedding)
        self._append(name, lora)

    def _add_bias(self, parameter: str, values: np.ndarray) -> None:
        module = parameter.removesuffix(".bias")
        name, wanted = self._target(module, "bias")
        if values.shape != wanted:
            raise self._misfit(
                f"adapter bias {parameter!r} has shape {values.shape}, {name!r} of the base has {wanted}"
            )
        order = self._order(module, wanted[0])
        self._append(name, AddBias(values if order is None else values[order]))

    def _replace_rows(self, module: str, rows: ReplaceRows) -> None:
        name, (n_rows, n_in) = self._target(module)
        if int(rows.ids[-1]) >= n_rows or rows.values.shape[1] != n_in:
            raise self._misfit(
                f"adapter target {module!r} has trained rows of {rows.values.shape[1]} numbers up to token "
                f"{rows.ids[-1]}, {name!r} of the base has {(n_rows, n_in)}"
            )
        self._append(name, rows)
        if name == EMBEDDING and self._is_tied:  # as PEFT does in a tied model
            self._append(HEAD, rows)

    @property
    def _is_tied(self) -> bool:
        return HEAD not in self._header.tensors and EMBEDDING in self._header.tensors

    def _append(self, name: str, change: Change) -> None:
        self._changes[name] = (*self._changes.get(name, ()), change)

    def _target(self, module: str, kind: str = "weight") -> tuple[str, tuple[int, ...]]:
        """The name and shape of the GGUF tensor that a module's parameter became. Raises AdapterInvalid."""
        known = self._family.source_name(f"{module}.{kind}") or ""
        name = self._family.tensor_name(known.removesuffix(f".{kind}"), kind)
        if name is None:
            raise AdapterInvalid(
                f"adapter target {module!r} is not a known module of {self._family.architecture!r} "
                f"({str(self._header.path)!r})"
            )
        found = self._header.tensors.get(EMBEDDING if name == HEAD and self._is_tied else name)
        if found is not None:
            return name, found.shape
        if kind == "bias":
            raise self._misfit(f"adapter target {module!r} has a bias, which the base does not ({name!r})")
        layers = self._header.integer(f"{self._header.architecture}.block_count")
        raise self._misfit(f"adapter target {module!r} is not in the base, which has {layers} layers and no {name!r}")

    def _order(self, module: str, n_out: int) -> np.ndarray | None:
        """The order of `module`'s rows: row i of the GGUF is Hugging Face's row `order[i]`. None: unchanged."""
        rows = np.arange(n_out)
        try:
            order = self._family.repack_rows(module, rows, self._header)
        except (ValueError, ZeroDivisionError):
            raise self._misfit(f"adapter target {module!r} has {n_out} rows, not a whole number of heads") from None
        return None if order is rows else order

    def _refuse_vocabulary(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if name in {EMBEDDING, HEAD} and shape[1:] == wanted[1:]:
            raise self._misfit(
                f"the adapter's {name!r} has {shape[0]} tokens, the base's {wanted[0]}: the vocabulary was changed in "
                "training (merge it with PEFT's merge_and_unload and convert the merged folder)"
            )

    def _misfit(self, what: str) -> AdapterInvalid:
        trained = f", trained on {self._adapter.base!r}," if self._adapter.base else ""
        adapter, base = str(self._adapter.folder), str(self._header.path)
        return AdapterInvalid(f"{what}: the adapter {adapter!r}{trained} does not fit the base {base!r}")

    def _unties_head(self) -> bool:
        """True if a tied head becomes a tensor of its own. A head changed exactly as the embedding stays tied."""
        if not self._is_tied or not {EMBEDDING, HEAD} & self._changes.keys():
            return False
        embedding, head = self._changes.get(EMBEDDING, ()), self._changes.get(HEAD, ())
        if len(embedding) == len(head) and all(map(_is_same, embedding, head)):
            del self._changes[HEAD]
            return False
        if self._header.architecture in _ALWAYS_TIED:
            raise AdapterInvalid(
                f"the adapter {str(self._adapter.folder)!r} trained the embedding and the output head of "
                f"{str(self._header.path)!r} apart, but llama.cpp always ties them in {self._header.architecture!r}: "
                "train neither, or both with ensure_weight_tying"
            )
        return True


def _is_same(first: Change, second: Change) -> bool:
    if isinstance(first, Lora) and isinstance(second, Lora):
        return (
            first.scale == second.scale
            and first.magnitude is second.magnitude
            and np.array_equal(first.a, second.a)
            and np.array_equal(first.b, second.b)
        )
    if isinstance(first, Replace) and isinstance(second, Replace):
        return first.saved.equals(second.saved)
    return first is second


def _is_hub_name(name: str) -> bool:
    """True for OWNER/NAME and for a plain name, false for a path on the machine it was trained on."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.startswith(".")


def _stem(name: str) -> str:
    words = re.split(r"[^a-z0-9]+", name.rsplit("/", 1)[-1].lower())
    while len(words) > 1 and _STORAGE.fullmatch(words[-1]):
        words.pop()
    return "".join(words)


class MergedCheckpoint:
    """`source` with the changes of `fitted` applied, a slab of rows at a time. Closing it closes `source`."""

    def __init__(self, source: Checkpoint, fitted: Fitted) -> None:
        self._source = source
        self._changes = fitted.changes
        self._header = merged_header(source.header, fitted)

    @property
    def header(self) -> Header:
        """The source's header, with an output head if the adapter unties it."""
        return self._header

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)) of the merged tensor until it is read."""
        # a head that was tied starts as the embedding
        origin = self._source.header.tensors.get(tensor.name) or self._source.header.tensors[EMBEDDING]
        for start, rows in self._source.slabs(origin):
            for change in self._changes.get(tensor.name, ()):
                rows = change.apply(start, rows)
            yield start, rows

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def merged_header(header: Header, fitted: Fitted) -> Header:
    """`header`, with an output head of the embedding's shape and type if `fitted` unties it."""
    if not fitted.unties:
        return header
    return replace(header, tensors={**header.tensors, HEAD: replace(header.tensors[EMBEDDING], name=HEAD)})
