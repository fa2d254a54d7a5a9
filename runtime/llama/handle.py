"""A model file in memory: opened, described, and freed when the last user of its weights or vocabulary is gone.

LoRA adapters are opened with it and applied to a context, one at a time and for a whole decode. After a change
llama.cpp reserves the context's compute buffers again.

LongRoPE models (Phi-3, Phi-4-mini) have two sets of rotary divisors, for prompts within the length before scaling and
for longer ones. transformers takes the set that fits the prompt. llama.cpp takes one set for a whole context: the long
one if the context has more cells than that length, also for a prompt of ten tokens. The number of cells says nothing
about a prompt here: the short set is kept, and the length of a request bounded, unless long prompts are wanted.
"""

import copy
import ctypes
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import Array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as binding
from llama_cpp import llama_cpp

from models.errors import BadGguf
from models.gguf.header import read_tensors
from runtime.errors import EngineError, LoadFailed
from runtime.prefill.prompts import describe

_SETS = {"rope_factors_long.weight", "rope_factors_short.weight"}
_ORIGINAL = "rope.scaling.original_context_length"
_INTEGER = 0  # LLAMA_KV_OVERRIDE_TYPE_INT
_NEVER_REACHED = 1 << 30


@dataclass(frozen=True)
class ShortSet:
    """The short set of a file: `length` is the most tokens it is meant for, `key` the field that says so."""

    key: str
    length: int


def short_set(path: Path) -> ShortSet | None:
    """The file's short set; None for a model with one set, and for a file that cannot be read."""
    try:
        fields, tensors = read_tensors(path)
    except BadGguf:
        return None  # llama.cpp's own complaint is the one to show
    architecture = fields.get("general.architecture")
    key = f"{architecture.value}.{_ORIGINAL}" if architecture is not None else ""
    length = fields[key].value if key in fields else None
    return ShortSet(key, length) if isinstance(length, int) and tensors.keys() >= _SETS else None


def keep_short(short: ShortSet) -> Array[llama_cpp.llama_model_kv_override]:
    """Values for `kv_overrides`, in place of the file's own, with which llama.cpp keeps the short set."""
    overrides: Array[llama_cpp.llama_model_kv_override] = (
        llama_cpp.llama_model_kv_override * 2
    )()  # the last is empty: it ends the list
    # the last is empty, which ends the list
    overrides[0].tag = _INTEGER
    overrides[0].key = short.key.encode()
    overrides[0].value.val_i64 = _NEVER_REACHED
    return overrides


_log = logging.getLogger("deskside.llama")

# ggml.h's levels → ours. A failure also raises an error that quotes llama.cpp's lines, so none is logged above INFO.
_LEVELS = {2: logging.DEBUG, 3: logging.INFO, 4: logging.INFO}
_ERROR = 4
_KEPT_LINES = 4


def _write(level: int, text: bytes, _user_data: object) -> None:
    _log.log(_LEVELS.get(level, logging.DEBUG), "%s", text.decode(errors="replace").rstrip())


# C keeps the pointer only: the callback object must live as long as the process.
_TO_LOGGING = llama_cpp.llama_log_callback(_write)


def route_log() -> None:
    """Send llama.cpp's log to the logger `deskside.llama`."""
    llama_cpp.llama_log_set(_TO_LOGGING, ctypes.c_void_p(None))


@contextmanager
def last_errors() -> Iterator[deque[str]]:
    """Collect the last error lines that llama.cpp writes during the block, from any thread of the process."""
    lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def collect(level: int, text: bytes, user_data: object) -> None:
        if level == _ERROR and text.strip():
            lines.append(text.decode(errors="replace").strip())
        _write(level, text, user_data)

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(None))
    try:
        yield lines
    finally:
        route_log()


def reason(errors: Iterable[str]) -> str:
    """The lines of `last_errors` as one."""
    return "; ".join(errors) or "llama.cpp gives no reason"


_GGUF_MAGIC = b"GGUF"
_BUILT_FOR_AMX = "AMX_INT8 = 1"
_AMX_MENDED = "deskside_amx_mended"  # the symbol that `amx.h` leaves in a library
AMX_UNUSED = "AMX unused"
_NOTABLE_FEATURES = (
    *("AVX2", "AVX512", "AVX512_VNNI", "AVX_VNNI", "AMX_INT8", AMX_UNUSED, "FMA"),
    *("NEON", "DOTPROD", "SVE", "BLAS"),
)


class ModelHandle:
    """llama.cpp's `llama_model`, freed with the last reference, so that no reader outlives its vocabulary."""

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int = 0,
        use_mmap: bool = True,
        repack: bool = True,
        vocab_only: bool = False,
        long_prompts: bool = False,
    ) -> None:
        """Open a GGUF file. Raises LoadFailed with llama.cpp's reason. `long_prompts` as in LoadOptions."""
        check_file(path)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_AUTO if use_mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        params.vocab_only = vocab_only
        params.use_extra_bufts = repack and _trusts_amx()
        self.short = None if vocab_only or long_prompts else short_set(path)
        if self.short is not None:
            params.kv_overrides = keep_short(self.short)
        with last_errors() as errors:
            llama_cpp.llama_backend_init()
            self.pointer: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise LoadFailed(f"{str(path)!r} cannot be loaded: {reason(errors)}")
        self.before_free: list[Callable[[], None]] = []
        # Not at interpreter exit: a thread may still be decoding then, and the system takes the memory back anyway.
        weakref.finalize(self, _free, self.pointer, self.before_free).atexit = False

    @property
    def n_ctx_train(self) -> int:
        """The most tokens that a text may have for the model to make sense of it; 0 if the file does not say."""
        trained: int = llama_cpp.llama_model_n_ctx_train(self.pointer)
        return trained if self.short is None else min(trained or self.short.length, self.short.length)

    def context(self, params: Any, purpose: str) -> object:
        """A new `llama_context` of the model, the caller's to free. Raises LoadFailed with llama.cpp's reason."""
        with last_errors() as errors:
            context: object = llama_cpp.llama_init_from_model(self.pointer, params)
        if not context:
            raise LoadFailed(f"no context of {params.n_ctx} tokens for {purpose}: {reason(errors)}")
        return context

    def metadata(self) -> dict[str, str]:
        """The file's scalar metadata as text."""
        count = llama_cpp.llama_model_meta_count(self.pointer)
        keys = (_text(llama_cpp.llama_model_meta_key_by_index, self.pointer, i) for i in range(count))
        values = (_text(llama_cpp.llama_model_meta_val_str_by_index, self.pointer, i) for i in range(count))
        return dict(zip(keys, values, strict=True))

    def description(self) -> str:
        """llama.cpp's own description: family, size, quantization."""
        return _text(llama_cpp.llama_model_desc, self.pointer)


def _free(pointer: object, before: Iterable[Callable[[], None]]) -> None:
    for step in before:
        step()
    llama_cpp.llama_model_free(pointer)


def system_info() -> str:
    """llama.cpp's line on the instructions it was built for; shows AMX as unused where it is not trusted."""
    line: str = llama_cpp.llama_print_system_info().decode()
    return line if _trusts_amx() else line.replace(_BUILT_FOR_AMX, f"{AMX_UNUSED} = 1")


def _trusts_amx() -> bool:
    """True if llama.cpp may repack weights, which it does for AMX tiles if it was built for them.

    Built by some releases of GCC, it crashes or answers garbage with them. `amx.h` explains why and prevents it; a
    library that it was compiled into has its symbol. Without the symbol there is no sign of the compiler's release.
    """
    return _BUILT_FOR_AMX not in llama_cpp.llama_print_system_info().decode() or hasattr(llama_cpp._lib, _AMX_MENDED)


def check_file(path: Path) -> None:
    """Raise LoadFailed unless `path` is a readable GGUF file, with a clearer reason than llama.cpp's."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise LoadFailed(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if magic != _GGUF_MAGIC:
        raise LoadFailed(f"{str(path)!r} is not a GGUF file: it begins with {magic!r}, expected {_GGUF_MAGIC!r}")


def _text(function: Callable[..., int], *arguments: object) -> str:
    """Call a C function that fills a buffer and returns the text's whole length, as snprintf does."""
    room = 256
    while True:
        buffer = ctypes.create_string_buffer(room)
        length = function(*arguments, buffer, room)
        if length < room:
            return buffer.value.decode(errors="replace")
        room = length + 1


def backend_name(line: str, *, offloads: bool) -> str:
    """`CPU (AVX2, FMA)` or `CUDA + CPU (…)` from llama.cpp's line: `CPU : SSE3 = 1 | AVX2 = 1 | …`."""
    fields = [field.strip() for field in line.split("|")]
    devices = [field.partition(" : ")[0] for field in fields if " : " in field]
    on = {field.rpartition(" : ")[2].removesuffix(" = 1") for field in fields if field.endswith(" = 1")}
    features = ", ".join(feature for feature in _NOTABLE_FEATURES if feature in on)
    gpus = [device for device in devices if device != "CPU"] if offloads else []
    return " + ".join([*gpus, f"CPU ({features})" if features else "CPU"])


def library_release() -> str:
    """The library that computes, and its release."""
    return f"llama-cpp-python {binding.__version__}"


def describe_build() -> tuple[str, bool]:
    """(the backend a model would run on, True if layers can be offloaded to a GPU)."""
    offloads = bool(llama_cpp.llama_supports_gpu_offload())
    return backend_name(system_info(), offloads=offloads), offloads


def describe_prompts() -> str:
    """The matrix products that compute prompts on this machine, in one line."""
    if llama_cpp.llama_supports_gpu_offload() or "AMX_INT8 = 1" in system_info():
        return "by llama.cpp: it uses a GPU or AMX here"
    return describe(binding.__version__)


class Adapters:
    """The adapters by name. The weights belong to the model and are freed with it."""

    def __init__(self, model: ModelHandle, paths: Mapping[str, Path]) -> None:
        """Open LoRA GGUF files, before there is a context. Raises LoadFailed with llama.cpp's reason."""
        self._pointers = {name: _open(model, name, path) for name, path in paths.items()}
        self._applied: str | None = None

    def again(self) -> "Adapters":
        """The same adapters, for another context of the model."""
        other = copy.copy(self)
        other._applied = None
        return other

    def apply(self, context: Any, name: str | None) -> None:
        """Make `context` compute with adapter `name` (None: with none). Costs nothing if it does already."""
        if name == self._applied:
            return
        chosen = [] if name is None else [self._pointers[name]]
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*(1.0 for _ in chosen))
        code = llama_cpp.llama_set_adapters_lora(context, pointers, len(chosen), scales)
        if code != 0:
            raise EngineError(f"llama_set_adapters_lora gave {code} for adapter {name!r}")
        self._applied = name


def _open(model: ModelHandle, name: str, path: Path) -> Any:
    check_file(path)
    with last_errors() as errors:
        pointer = llama_cpp.llama_adapter_lora_init(model.pointer, str(path).encode())
    if not pointer:
        raise LoadFailed(f"adapter {name!r} ({str(path)!r}) cannot be loaded: {reason(errors)}")
    return pointer
