"""The door to llama.cpp: load a model, decode batches, edit the KV cache. Its return codes become our errors here.

The low-level binding is used, since the package's own `Llama` class serialises requests. Sliding-window layers keep
every cell, so that prefixes can be reused.

With `streams` each sequence has a KV cache of its own, as long as the context, so that its attention reads no other's
cells. It takes memory for the cells in use only (`lazy_buffers`). llama.cpp's flash attention computes in two ways on a
CPU, so it is off, or attention is our own (`runtime/prefill/attention.h`): a token's bits do not depend on what is
computed beside it. Where pages cannot be given back, or layers
are on a GPU, the cache stays unified: sequences share it, and copying a prefix moves no data
(`llama_memory_seq_cp` of a part of a sequence aborts the process when the cache is not unified).
"""

import ctypes
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import llama_cpp as binding
import numpy as np
from llama_cpp import llama_cpp

from models.common.machine import own_pages, physical_cores
from runtime.errors import BatchInvalid, EngineError, LoadFailed
from runtime.prefill.build import Unavailable
from runtime.prefill.library import OFF
from runtime.prefill.prompts import FEWEST_ROWS, MIN_ROWS, Prompts, prepare

from .decode import (
    ROW_BLOCKS,
    BatchArrays,
    decode_error,
    fillers,
    may_take_graph,
    row_block,
    row_group,
    rows_alike,
    with_company,
)
from .embeddings import EmbedContext, embed_info
from .ggml import Ggml, lazy_buffers
from .handle import Adapters, ModelHandle, backend_name, system_info
from .interface import Batch, LoadOptions, ModelInfo
from .tokenizer import Tokenizer

_log = logging.getLogger("deskside.llama")

MAX_SEQUENCES = 256
PROBE_TOKENS = 96
# Cells of a stream beyond the context, for tokens that fill up a chunk at its end.
SPARE_CELLS = 256


class Llama:
    """A loaded model and its KV cache; `LlamaLike` over the real library. One thread owns it."""

    def __init__(
        self, model: ModelHandle, path: Path, options: LoadOptions, gpu_layers: int, *, attends: bool = False
    ) -> None:
        """Make a context; one that `attends` has attention of our own. Use `load`, which also opens the model.

        Raises LoadFailed.
        """
        self._adapters = Adapters(model, options.adapters)
        with lazy_buffers(wanted=options.streams and gpu_layers == 0) as self.has_streams:
            # Whole blocks, so that each row can have company.
            self.n_streams = -(-options.n_seq_max // ROW_BLOCKS[-1]) * ROW_BLOCKS[-1] if self.has_streams else 0
            n_seqs = self.n_streams or options.n_seq_max
            n_outputs = max(options.n_outputs or 0, n_seqs)  # llama.cpp aborts the process if a sequence has no row
            shape = _Shape(n_seqs, n_outputs, streams=self.has_streams, attends=attends)
            self._context = _new_context(model, path, options, shape)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._finalizer = weakref.finalize(self, llama_cpp.llama_free, self._context)
        self._finalizer.atexit = False
        self.n_outputs, self.attends = n_outputs, attends
        self.tokenizer = Tokenizer(model)
        self.info = _info(model, self._context, options, gpu_layers, spare=SPARE_CELLS if self.has_streams else 0)
        self._window = llama_cpp.llama_model_n_swa(model.pointer)  # 0: every layer looks at every token
        self._arrays = BatchArrays(max(options.n_batch, n_seqs))
        self._model = model
        self.row_block = 1
        self.take_over: Callable[[int], None] | None = None
        self._last: Batch | None = None  # its graph may be used again; None: unknown
        self._embedder: EmbedContext | None = None
        self._copied: tuple[int, np.ndarray] | None = None

    def decode(self, batch: Batch) -> np.ndarray:
        """Compute `batch`; the logits, float32 of shape (rows that want logits, n_vocab), valid until the next decode.

        Raises NoKvSlot and BatchInvalid (nothing was changed), DecodeAborted and DecodeFailed (part of the batch may
        lie in the cache).
        """
        self._require_open()
        n_tokens, n_rows = len(batch.tokens), int(np.count_nonzero(batch.wants_logits))
        # llama.cpp aborts the process on these two.
        if not 0 < n_tokens <= self.info.n_batch:
            raise BatchInvalid(f"a batch of {n_tokens} tokens, limit {self.info.n_batch}")
        if n_rows > self.n_outputs:
            raise BatchInvalid(f"a batch with {n_rows} rows of logits, limit {self.n_outputs}")
        self._copied = None
        if self.take_over is not None:
            if may_take_graph(batch, self._last):  # a change of control vectors, of which there are none, rebuilds it
                llama_cpp.llama_set_adapter_cvec(self._context, None, 0, self.info.n_embd, 0, 0)
            self.take_over(OFF if batch.rows else FEWEST_ROWS)
        self._last = None
        company = self._company(batch) if batch.rows and self.has_streams else {}
        if company:
            batch = with_company(batch, company)
        code = llama_cpp.llama_decode(self._context, self._arrays.fill(batch))
        for seq_id, position in company.items():
            self.remove(seq_id, position)
        if code != 0:
            raise decode_error(code, n_tokens)
        self._last = batch
        if n_rows == 0:
            return np.empty((0, self.info.n_vocab), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (n_rows, self.info.n_vocab))

    def _company(self, batch: Batch) -> dict[int, int]:
        """By stream: where a row of no meaning is computed beside those of the batch."""
        streams = fillers(batch.seq_ids.tolist(), self.row_block, self.n_streams)
        return {stream: llama_cpp.llama_memory_seq_pos_max(self._memory, stream) + 1 for stream in streams}

    def embed(self, batch: Batch, adapter: str | None = None) -> np.ndarray:
        """The last layer's rows for `batch`, float32 of shape (tokens, n_embd), as `LlamaLike.embed` says.

        The first call makes a second, small context on the same weights, so that embeddings and text share no KV cache.
        Raises LoadFailed if there is no memory for it.
        """
        self._require_open()
        if self._embedder is None:
            self._embedder = EmbedContext(self._model, self.info, self._adapters.again())
        if self.take_over is not None:
            self.take_over(FEWEST_ROWS)
        try:
            return self._embedder.embed(batch, adapter)
        except EngineError:
            self._embedder = None  # its state is unknown: the next call makes another
            raise

    def use_adapter(self, name: str | None) -> None:
        """Compute with adapter `name` of `info.adapters` from the next decode on; None: with none."""
        self._require_open()
        self._adapters.apply(self._context, name)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give `target`, an empty sequence, the first `length` tokens of `source`; the caller checks `is_whole`."""
        self._require_open()
        if not self.has_streams:
            llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, length)
            return
        if self._copied is None or self._copied[0] != source:
            self._copied = (source, self.save(source))
        self._fill(target, self._copied[1], length)

    def remove(self, seq_id: int, start: int = 0, end: int = -1) -> None:
        """Take `seq_id` out of its cells at positions start … end-1 (-1: to the end)."""
        self._require_open()
        if self._copied is not None and self._copied[0] == seq_id:
            self._copied = None
        llama_cpp.llama_memory_seq_rm(self._memory, seq_id, start, end)

    def is_whole(self, seq_id: int, length: int) -> bool:
        """True if `seq_id` holds the first `length` tokens, or all of them that the next one looks at."""
        self._require_open()
        if length == 0:
            return True
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, seq_id)
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, seq_id)
        return bool(last == length - 1 and 0 <= first <= max(0, length - (self._window or length) + 1))

    def save(self, seq_id: int) -> np.ndarray:
        """A snapshot of a sequence: bytes, as uint8. Raises EngineError, or MemoryError."""
        self._require_open()
        n_bytes = llama_cpp.llama_state_seq_get_size(self._context, seq_id)
        data = own_pages(n_bytes)
        if not n_bytes or llama_cpp.llama_state_seq_get_data(self._context, _bytes(data), n_bytes, seq_id) != n_bytes:
            raise EngineError(f"llama.cpp did not save sequence {seq_id} of {n_bytes} bytes")
        return data

    def restore(self, seq_id: int, data: np.ndarray, length: int) -> bool:
        """Fill `seq_id`, an empty sequence, from a snapshot cut to `length`. False, and still empty, if refused."""
        self._require_open()
        if self._fill(seq_id, data, length) and self.is_whole(seq_id, length):
            return True
        self.remove(seq_id)
        return False

    def _fill(self, seq_id: int, data: np.ndarray, length: int) -> bool:
        taken = llama_cpp.llama_state_seq_set_data(self._context, _bytes(data), len(data), seq_id)
        self.remove(seq_id, length)
        return bool(taken == len(data))

    def clear(self) -> None:
        """Empty the KV cache; with `streams` its memory goes back to the system."""
        self._require_open()
        self._copied = None
        llama_cpp.llama_memory_clear(self._memory, self.has_streams)

    def close(self) -> None:
        """Free the context; the weights follow with the last reference to the tokenizer. Closing twice is harmless."""
        self._finalizer()
        self._embedder = None

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise EngineError("the model is closed")


def _bytes(data: np.ndarray) -> object:
    return ctypes.cast(data.ctypes.data, ctypes.POINTER(ctypes.c_uint8))


def load(path: Path, options: LoadOptions | None = None) -> Llama:
    """Load a GGUF model.

    Raises LoadFailed if the file is missing, damaged or not GGUF, if there is no memory for the model, or if the engine
    cannot run its kind.
    """
    options = options or LoadOptions()
    can_offload = bool(llama_cpp.llama_supports_gpu_offload())
    if options.gpu_layers and not can_offload:
        raise LoadFailed(
            f"gpu_layers is {options.gpu_layers}, but the installed llama-cpp-python has no GPU backend; "
            "reinstall it for CUDA, Metal or Vulkan, or leave gpu_layers on auto"
        )
    if not 1 <= options.n_seq_max <= MAX_SEQUENCES:
        raise LoadFailed(f"n_seq_max must be 1 … {MAX_SEQUENCES}, got {options.n_seq_max}")
    gpu_layers = (-1 if can_offload else 0) if options.gpu_layers is None else options.gpu_layers
    model = ModelHandle(
        path,
        gpu_layers=gpu_layers,
        use_mmap=options.use_mmap,
        repack=options.repack,
        long_prompts=options.long_prompts,
    )
    _require_decoder(model, path)
    llama = _load_own(model, path, options, gpu_layers) or Llama(model, path, options, gpu_layers)
    if llama.has_streams and options.exact:
        llama.info = replace(llama.info, row_group=row_group(llama))
        llama.row_block = row_block(llama, llama.n_streams)
        if llama.attends:  # llama.cpp's attention computes one row of a stream in another way than several
            llama.info = replace(llama.info, rows_alike=rows_alike(llama, llama.n_outputs))
        llama.clear()
    return llama


def _load_own(model: ModelHandle, path: Path, options: LoadOptions, gpu_layers: int) -> Llama | None:
    """Load with our own products of prompts, and in streams our own attention; None where llama.cpp's are as good.

    In an exact model a token's products follow from the kind of its batch.
    """
    prompts = _own_products(path, options, gpu_layers)
    if prompts is None:
        return None
    panels = prompts.panels
    model.before_free.append(panels.close)
    for attends in (True, False) if options.streams else (False,):
        panels.attend(on=attends)
        with panels.binding():
            llama = Llama(model, path, options, gpu_layers, attends=attends)
        _decode_in_order(llama, 1)
        llama.clear()
        if bool(panels.n_attended) is attends:
            break
        llama.close()  # a model with attention of another kind
    if prompts.decide(lambda own: _prompt_seconds(llama, prompts, own=own)):
        name = "prompts and attention" if attends else "prompts"
        llama.info = replace(llama.info, backend=f"{llama.info.backend}, {name} by Deskside")
        llama.take_over = panels.take_over if options.exact and llama.has_streams else None
        llama.clear()
        return llama
    llama.close()
    panels.close()
    return None


def _own_products(path: Path, options: LoadOptions, gpu_layers: int) -> Prompts | None:
    """Panels for the prompts' products, if they are wanted and can be made. Raises LoadFailed if they must be made."""
    if options.prefill == "stock":
        return None
    try:
        if gpu_layers != 0:
            raise Unavailable("layers are offloaded to a GPU")
        if "AMX_INT8 = 1" in system_info():
            raise Unavailable("llama.cpp uses AMX here")
        return prepare(
            path,
            options.prefill,
            llama_cpp._lib,
            _operations,
            version=binding.__version__,
            n_threads=options.n_threads or physical_cores(),
        )
    except (Unavailable, EngineError) as error:
        if options.prefill == "own":
            raise LoadFailed(f"prefill is 'own', but {error}; set it to auto or stock") from error
        _log.info("llama.cpp computes prompts: %s", error)
        return None


def _operations() -> tuple[int, int]:
    ggml = Ggml(llama_cpp._lib)
    return ggml.mul_mat, ggml.attention


def _prompt_seconds(llama: Llama, prompts: Prompts, *, own: bool) -> float:
    """The seconds of one prompt, in an empty cache, with or without our own products."""
    prompts.panels.take_over(MIN_ROWS if own else OFF)
    _decode_in_order(llama, 1)  # another shape, so that the prompt's graph is built again
    llama.clear()
    start = time.perf_counter()
    _decode_in_order(llama, min(PROBE_TOKENS, llama.info.n_batch, llama.info.n_ctx))
    took = time.perf_counter() - start
    llama.clear()
    return took


def _decode_in_order(llama: Llama, n_tokens: int) -> None:
    positions = np.arange(n_tokens, dtype=np.int32)
    wanted = np.zeros(n_tokens, bool)
    wanted[-1] = True
    llama.decode(Batch(positions * 7919 % llama.info.n_vocab, positions, np.zeros(n_tokens, np.int32), wanted))


def require_servable(path: Path) -> None:
    """Raise LoadFailed for a model of a kind that the engine cannot run, as `load` does, but without its weights."""
    _require_decoder(ModelHandle(path, vocab_only=True), path)


def _require_decoder(model: ModelHandle, path: Path) -> None:
    if not llama_cpp.llama_model_has_decoder(model.pointer) or llama_cpp.llama_model_has_encoder(model.pointer):
        raise LoadFailed(f"{str(path)!r} is {model.description()}: only decoder-only models write text here")
    if llama_cpp.llama_model_is_recurrent(model.pointer) or llama_cpp.llama_model_is_hybrid(model.pointer):
        raise LoadFailed(
            f"{str(path)!r} is {model.description()}: recurrent models cannot share prefixes, and are not served"
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the vocabulary of a GGUF file in a moment, without reading the weights. Raises LoadFailed."""
    return Tokenizer(ModelHandle(path, vocab_only=True))


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sequences and rows of logits of a context, whether it has streams, and attention of our own."""

    n_seqs: int
    n_outputs: int
    streams: bool
    attends: bool


def _new_context(model: ModelHandle, path: Path, options: LoadOptions, shape: _Shape) -> object:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = options.n_ctx
    if shape.streams:
        params.n_ctx = (options.n_ctx + SPARE_CELLS) * shape.n_seqs
        if shape.attends:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        elif options.exact:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_batch = params.n_ubatch = max(options.n_batch, shape.n_seqs)
    params.n_seq_max = shape.n_seqs
    params.n_outputs_max = shape.n_outputs
    params.n_threads = params.n_threads_batch = options.n_threads or physical_cores()
    params.kv_unified = not shape.streams
    params.swa_full = True
    params.offload_kqv = True
    return model.context(params, repr(str(path)))


def _info(model: ModelHandle, context: object, options: LoadOptions, gpu_layers: int, *, spare: int) -> ModelInfo:
    metadata = model.metadata()
    return ModelInfo(
        n_vocab=llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model.pointer)),
        n_ctx=llama_cpp.llama_n_ctx_seq(context) - spare,
        n_ctx_train=model.n_ctx_train,
        n_seq_max=options.n_seq_max,
        n_batch=min(options.n_batch, llama_cpp.llama_n_batch(context)),
        n_params=llama_cpp.llama_model_n_params(model.pointer),
        size_bytes=llama_cpp.llama_model_size(model.pointer),
        description=model.description(),
        architecture=metadata.get("general.architecture", ""),
        backend=backend_name(system_info(), offloads=gpu_layers != 0),
        n_threads=llama_cpp.llama_n_threads(context),
        gpu_layers=gpu_layers,
        chat_template=metadata.get("tokenizer.chat_template"),
        metadata=metadata,
        adapters=tuple(options.adapters),
        cut_limit=llama_cpp.llama_model_n_swa(model.pointer) or llama_cpp.llama_n_ctx_seq(context),
        **embed_info(model, metadata, options.n_batch),
    )
