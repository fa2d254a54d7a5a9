"""The second, small context of a model: the last layer's rows of every token, which make up embeddings.

llama.cpp computes the logits of every token along with them: with a vocabulary of 262k that is more work than all the
layers, and 1 MiB a token, twice. So the evaluation is cut off once the rows are there, and its batches are small. The
rows are pooled by the caller, not by llama.cpp, which wants a whole text in one batch for that.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping
from typing import TypedDict, cast

import numpy as np
from llama_cpp import llama_cpp

from runtime.errors import BatchInvalid

from .decode import BatchArrays, decode_error
from .handle import Adapters, ModelHandle
from .interface import Batch, ModelInfo, Pooling

# Bounds the cells of the context, and with them the texts it takes.
MAX_CELLS = 2048
MAX_SEQUENCES = 32
# Memory for the logits of one batch: llama.cpp reserves it although they are not computed.
LOGITS_BYTES = 64 << 20
MIN_BATCH = 16
# llama.cpp's name of the rows after the last norm, and the name it gives them later.
_ROWS = (b"result_norm", b"result_embd_pooled")
# llama.cpp's `pooling_type`; a model without it is a generative one, for which the mean works best.
_POOLINGS: Mapping[str, Pooling] = {"2": "cls", "3": "last"}


class EmbedInfo(TypedDict):
    """The fields of ModelInfo that are about embeddings."""

    n_embd: int
    embed_n_ctx: int
    embed_n_seq_max: int
    embed_n_batch: int
    pooling: Pooling


def embed_info(model: ModelHandle, metadata: Mapping[str, str], n_batch: int) -> EmbedInfo:
    """The bounds of a model's EmbedContext; `n_batch` is the most tokens that one of its steps may have."""
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model.pointer))
    architecture = metadata.get("general.architecture", "")
    return EmbedInfo(
        n_embd=llama_cpp.llama_model_n_embd_out(model.pointer),
        embed_n_ctx=min(MAX_CELLS, model.n_ctx_train or MAX_CELLS),
        embed_n_seq_max=MAX_SEQUENCES,
        embed_n_batch=min(n_batch, max(MIN_BATCH, LOGITS_BYTES // (4 * n_vocab))),
        pooling=_POOLINGS.get(metadata.get(f"{architecture}.pooling_type", ""), "mean"),
    )


class EmbedContext:
    """A context that gives rows instead of logits. One thread owns it; after an error it must not be used again."""

    def __init__(self, model: ModelHandle, info: ModelInfo, adapters: Adapters) -> None:
        """Make a context with the bounds of `info`. Raises LoadFailed."""
        self._model = model  # the weights must outlive the context
        self._info = info
        self._adapters = adapters
        self._callback = _cut_after_rows()
        self._context = _new_context(model, info, self._callback)
        weakref.finalize(self, llama_cpp.llama_free, self._context).atexit = False
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._arrays = BatchArrays(info.embed_n_batch)
        self._held: set[int] = set()

    def embed(self, batch: Batch, adapter: str | None) -> np.ndarray:
        """The rows of `batch` under `adapter`, float32 of shape (tokens, n_embd), in its order. Raises EngineError."""
        n_tokens = len(batch.tokens)
        if not 0 < n_tokens <= self._info.embed_n_batch:
            raise BatchInvalid(f"a batch of {n_tokens} tokens to embed, limit {self._info.embed_n_batch}")
        continued = set(batch.seq_ids.tolist()) - set(batch.seq_ids[batch.positions == 0].tolist())
        for seq_id in self._held - continued:
            llama_cpp.llama_memory_seq_rm(self._memory, seq_id, 0, -1)
        self._adapters.apply(self._context, adapter)
        code = llama_cpp.llama_decode(self._context, self._arrays.fill(batch))
        if code != 0:
            raise decode_error(code, n_tokens)
        self._held = set(batch.seq_ids.tolist())
        rows = llama_cpp.llama_get_embeddings(self._context)
        return np.ctypeslib.as_array(rows, (n_tokens, self._info.n_embd)).copy()


def _cut_after_rows() -> object:
    """llama.cpp's callback before and after it computes a tensor; it stops the evaluation after the rows."""
    name = _tensor_name()
    if name is None:
        return None

    def wanted(tensor: int, ask: bool, _: object) -> bool:
        return ask and name(tensor) in _ROWS

    return llama_cpp.ggml_backend_sched_eval_callback(wanted)


def _tensor_name() -> Callable[[int], bytes] | None:
    """The C function `ggml_get_name`, which the binding leaves out; None where libllama does not export it."""
    function = getattr(llama_cpp._lib, "ggml_get_name", None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    return cast(Callable[[int], bytes], function)


def _new_context(model: ModelHandle, info: ModelInfo, callback: object) -> object:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = info.embed_n_ctx + info.embed_n_batch  # one text, and what joins its last batch
    params.n_batch = params.n_ubatch = info.embed_n_batch
    params.n_seq_max = info.embed_n_seq_max
    params.n_threads = params.n_threads_batch = info.n_threads
    params.kv_unified = True
    params.offload_kqv = True
    # Flash attention rounds by the rest of the batch: one text's vectors differ by 2e-4 in their cosine, not 7e-5.
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.embeddings = True
    params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    if callback is not None:
        params.cb_eval = callback
    return model.context(params, "embeddings")
