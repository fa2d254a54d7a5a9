"""A probe of a base: how well its hidden states tell the labels after each of its layers, without any training.

The states of a text's tokens are averaged, and a linear model is fitted to the averages. Layers above those where it
is as good as anywhere are not needed to read the text, only to answer.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.checkpoint.source import open_checkpoint
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.task.words.logistic import fit, probabilities

from .base import read_shape, read_weights
from .examples import TokenRow, batches_of, read_data, training_rows
from .settings import FinetuneSettings

if TYPE_CHECKING:
    from .steps import DecoderSteps

# By measured steps of 8 x 104 tokens, 0.6 s for 9 layers of Gemma 3 270M on two AVX2 cores, this is two minutes.
PROBE_TOKENS = 80_000
_STRENGTH = 10.0


def probe_layers(
    base: Path,
    train: Sequence[ChatRecord],
    validation: Sequence[ChatRecord],
    labels: Sequence[str],
    settings: FinetuneSettings,
    progress: Reporter,
) -> tuple[tuple[float, ...], int]:
    """The accuracy on validation examples after each layer of `base`, and the number of those examples.

    Of both splits as many examples are read as have `PROBE_TOKENS` tokens together, a third of them to validate on.
    Raises as the training does.
    """
    from .steps import DecoderSteps

    with closing(open_checkpoint(base)) as checkpoint:
        n_layers = read_shape(checkpoint.header).n_layers
        data = read_data(checkpoint, train, validation, labels, settings.max_tokens)
        assert data.validation is not None, "a depth is chosen by labelled validation examples"
        progress.stage("probe the layers", n_layers)
        steps = DecoderSteps(read_weights(checkpoint), settings, 0)
    parts = ((data.train, 2 * PROBE_TOKENS // 3), (data.validation, PROBE_TOKENS // 3))
    found = []
    for tasks, n_tokens in parts:
        rows = _within(training_rows(tasks), n_tokens)
        classes = np.array([data.labels.index(task.expected) for task in tasks.tasks[: len(rows)]], np.int64)
        found.append((_means(steps, rows, progress), classes))
    (known, classes), (held, expected) = found
    shares = []
    for layer in range(n_layers):
        centre, spread = known[layer].mean(axis=0), known[layer].std(axis=0) + 1e-6
        points, tested = ((states[layer] - centre) / spread / np.sqrt(states.shape[-1]) for states in (known, held))
        weights = fit(points, classes, len(data.labels), _STRENGTH)
        shares.append(float((probabilities(weights, tested).argmax(axis=1) == expected).mean()))
    return tuple(shares), len(expected)


def _within(rows: list[TokenRow], n_tokens: int) -> list[TokenRow]:
    """The first rows that have at most `n_tokens` tokens together, one at least."""
    ends = np.cumsum([len(row.tokens) for row in rows])
    return rows[: max(1, int((ends <= n_tokens).sum()))]


def _means(steps: "DecoderSteps", rows: Sequence[TokenRow], progress: Reporter) -> np.ndarray:
    """The mean hidden states of each row's prompt after each layer, (layers, rows, n_embd), float64."""
    n_layers, batches = steps.shape.n_layers, batches_of(rows, steps.settings.batch, None)
    means = np.zeros((n_layers, len(rows), steps.shape.n_embd))
    for done, batch in enumerate(batches):
        progress.advance(done * n_layers // len(batches), n_layers)
        places = steps.places(rows, batch)
        x = np.zeros((batch.shape.rows, batch.shape.width, steps.shape.n_embd), np.float32)
        for place, member in enumerate(batch.members):
            x[place, -len(rows[member].tokens) :] = steps.embed(rows[member].tokens)
        for layer, hidden in enumerate(steps.hidden(x, places)):
            states = np.asarray(hidden)
            for place, member in enumerate(batch.members):
                row = rows[member]
                n_answer = len(row.targets) - 1  # the first target is that of the prompt's last token
                prompt = states[place, -len(row.tokens) : -n_answer or None]
                means[layer, member] = prompt.mean(axis=0)
    return means
