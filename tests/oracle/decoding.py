"""Logits of a GGUF file as exactly as llama.cpp computes them: one thread, one batch, keys and values kept in float32.

The product's own loader keeps keys and values in float16, which alone would be an error of about 5e-4.
"""

from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp


def all_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits after each of `tokens`, float32 of shape (tokens, n_vocab)."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), _model_params())
    assert model, f"llama.cpp cannot load {path}"
    try:
        return _decode(model, tokens)
    finally:
        llama_cpp.llama_model_free(model)


def encode(path: Path, text: str) -> list[int]:
    """The ids of `text` with this file's vocabulary, special tokens parsed, none added."""
    params = _model_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp cannot load the vocabulary of {path}"
    try:
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), False, True)
        assert count >= 0, f"{-count} tokens do not fit"
        return list(ids[:count])
    finally:
        llama_cpp.llama_model_free(model)


def _model_params() -> llama_cpp.llama_model_params:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    return params


def _decode(model: llama_cpp.llama_model_p, tokens: np.ndarray) -> np.ndarray:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = -(-len(tokens) // 256) * 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = int(token), index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), n_vocab)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
