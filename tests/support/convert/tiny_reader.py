"""A tiny base that can be taught to tell texts apart in seconds: it knows which words are about the same thing.

Its attention averages what was read so far, and the words of a topic share a direction, as a real base's do. What the
topics are called is left to learn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .tiny import HEAD_DIM, N_EMBD, N_HEADS, N_LAYERS, TOKENS, grid, pieces, weights, write_model

TURNS = "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
# A topic's share of its words' embeddings, the weight of the average beside a token itself, and of the logits.
TOPIC, AVERAGE, SHARPNESS = 1.0, 4.0, 4.0


def write_reader(path: Path, words: Sequence[str], topics: Sequence[Sequence[str]]) -> Path:
    """Write a base with `words` in its vocabulary; `topics` are lists of some of them."""
    tokens = [*TOKENS, *pieces(words)]
    embedding = grid((len(tokens), N_EMBD), 1)
    for number, topic in enumerate(topics):
        for word in topic:
            row = tokens.index(f"▁{word}".encode())
            embedding[row] /= 2
            embedding[row, 2 * number : 2 * number + 2] += TOPIC
    passed = np.eye(HEAD_DIM, N_EMBD, dtype=np.float32)
    changes: dict[str, np.ndarray] = {
        name: array / 8 for name, array in weights("llama").items() if name.startswith("blk.")
    }
    changes |= {name: array * 8 for name, array in changes.items() if array.ndim == 1}
    for layer in range(N_LAYERS):
        changes[f"blk.{layer}.attn_v.weight"] = passed
        changes[f"blk.{layer}.attn_output.weight"] = np.tile(passed.T, (1, N_HEADS)) * (AVERAGE / N_HEADS)
    changes["token_embd.weight"] = embedding
    changes["output_norm.weight"] = np.full(N_EMBD, SHARPNESS, np.float32)
    return write_model(path, "llama", template=TURNS, words=words, changes=changes)
