"""One step of training and one of validation, compiled by JAX layer by layer.

The layers below the trained ones never change: their hidden states are computed once for each row and kept on disk
(see `states`). A trained layer returns what its backward pass needs, so that all trained layers share two compilations
for each shape; the last layer is computed for the answers' columns alone, together with the loss.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .base import GROUPS, DecoderShape, DecoderWeights
from .decoder import Geometry, block, geometry, group_mask, logits
from .examples import LabelBranches, TokenBatch, TokenRow, causal, lengths_of, padded_targets
from .settings import FinetuneSettings

Parameters = list[dict[str, Any]]
"""For each trained layer: group -> (A, B), or the layer's own arrays where whole matrices are trained."""
_PARTS = ("parameters", "first", "second")
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled steps in `folder`, for later runs on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclass
class TrainingState:
    """All that a step changes: the parameters, AdamW's two moments of each, and the number of steps done."""

    parameters: Parameters
    first: Parameters
    second: Parameters
    step: int = 0

    @classmethod
    def start(cls, parameters: Parameters) -> "TrainingState":
        """The state before the first step."""
        return cls(parameters, jax.tree.map(jnp.zeros_like, parameters), jax.tree.map(jnp.zeros_like, parameters))

    def tensors(self) -> dict[str, np.ndarray]:
        """All numbers by name, for a checkpoint."""
        return {
            f"{part}/{place}": np.asarray(leaf)
            for part in _PARTS
            for place, leaf in enumerate(jax.tree.leaves(getattr(self, part)))
        }

    def load(self, tensors: Mapping[str, np.ndarray], step: int) -> None:
        """Take the numbers and the step of a checkpoint."""
        for part in _PARTS:
            leaves, form = jax.tree.flatten(getattr(self, part))
            stored = [jnp.asarray(tensors[f"{part}/{place}"]) for place in range(len(leaves))]
            setattr(self, part, jax.tree.unflatten(form, stored))
        self.step = step


class DecoderSteps:
    """The compiled steps of one base with its top `n_trained` layers in training."""

    def __init__(self, base: DecoderWeights, settings: FinetuneSettings, n_trained: int) -> None:
        self.shape = base.shape
        self.settings = settings
        self.train_top(n_trained)
        self._base = base
        self._layers = [{name: jnp.asarray(array) for name, array in layer.items()} for layer in base.layers]
        self._outer = (jnp.asarray(base.output_norm), jnp.asarray(base.head))
        self._masks = {
            group: jnp.asarray(group_mask(base.shape, group, settings.rank, settings.targets)) for group in GROUPS
        }
        self._compile()

    @property
    def n_vocab(self) -> int:
        """The number of tokens that have logits."""
        return len(self._base.head)

    def train_top(self, n_trained: int) -> None:
        """Train the top `n_trained` layers from now on."""
        self.n_frozen = self.shape.n_layers - n_trained

    def _compile(self) -> None:
        shape, adapted = self.shape, self._adapted
        self._frozen = jax.jit(lambda x, weights, place: block(shape, x, weights, {}, place))
        self._eval = jax.jit(lambda x, weights, trained, place: block(shape, x, *adapted(weights, trained), place))

        def forward(x: Array, weights: Any, trained: Any, place: Geometry) -> Any:
            return jax.vjp(lambda x, trained: block(shape, x, *adapted(weights, trained), place), x, trained)

        def last(trained: Any, x: Array, weights: Any, outer: Any, place: Geometry, wanted: Any) -> Array:
            targets, counts = wanted
            hidden = block(shape, x, *adapted(weights, trained), place, targets.shape[1])
            log_p = jax.nn.log_softmax(logits(shape, hidden, *outer))
            picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
            return -(picked * counts).sum() / counts.sum()

        def scored(x: Array, weights: Any, trained: Any, outer: Any, place: Geometry, n_last: int) -> Array:
            hidden = block(shape, x, *adapted(weights, trained), place, n_last)
            return logits(shape, hidden, *outer)

        self._forward = jax.jit(forward)
        self._backward = jax.jit(lambda pull, gradient: pull(gradient))
        self._last = jax.jit(jax.value_and_grad(last, argnums=(0, 1)))
        self._last_loss = jax.jit(last)
        self._scored = jax.jit(scored, static_argnums=5)
        self._update = jax.jit(functools.partial(_adamw, self.settings), donate_argnums=(0, 1, 2))
        self._square = jax.jit(lambda tree: sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))

    def _adapted(self, weights: Any, trained: Any) -> tuple[Any, Any]:
        """The weights and adapters of a trained layer."""
        if self.settings.method == "full":
            return trained, {}
        scale = self.settings.alpha / self.settings.rank
        return weights, {group: (a, b * (self._masks[group] * scale)) for group, (a, b) in trained.items()}

    def initial(self) -> Parameters:
        """The parameters before the first step, by the seed: B is zero, as in PEFT, so that nothing is changed yet."""
        trained = self._layers[self.n_frozen :]
        if self.settings.method == "full":
            return [{name: jnp.array(array) for name, array in layer.items()} for layer in trained]
        chance = np.random.default_rng(self.settings.seed)
        parameters: Parameters = []
        for _ in trained:
            layer = {}
            for group in GROUPS:
                n_in, (n_out, n_rank) = self.shape.inputs(group), self._masks[group].shape
                bound = n_in**-0.5
                a = chance.uniform(-bound, bound, (n_rank, n_in)).astype(np.float32)
                layer[group] = (jnp.asarray(a), jnp.zeros((n_out, n_rank), jnp.float32))
            parameters.append(layer)
        return parameters

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """The hidden states of tokens before the first layer."""
        embedded: np.ndarray = self._base.embedding[tokens] * np.float32(self.shape.embedding_scale)
        return embedded

    def places(
        self, rows: Sequence[TokenRow], batch: TokenBatch, branches: LabelBranches | None = None
    ) -> tuple[Geometry, Geometry]:
        """The geometry of a batch in full layers and in windowed ones."""
        width, lengths = batch.shape.width, lengths_of(rows, batch)
        positions, structure = (
            causal(width) if branches is None else (branches.positions(width), branches.structure(width))
        )
        full, windowed = self._base.frequencies
        window = self.shape.window
        return geometry(full, positions, structure, lengths, 0), geometry(
            windowed, positions, structure, lengths, window
        )

    def freeze(self, x: np.ndarray, places: tuple[Geometry, Geometry]) -> np.ndarray:
        """The hidden states below the trained layers."""
        hidden: Any = x
        for after in self.hidden(x, places):
            hidden = after
        return np.asarray(hidden)

    def hidden(self, x: np.ndarray, places: tuple[Geometry, Geometry]) -> Iterator[Array]:
        """Yield the hidden states after each of the layers below the trained ones."""
        hidden = jnp.asarray(x)
        for layer in range(self.n_frozen):
            hidden = self._frozen(hidden, self._layers[layer], places[self.shape.windowed[layer]])
            yield hidden

    def gradients(
        self,
        parameters: Parameters,
        x: np.ndarray,
        places: tuple[Geometry, Geometry],
        rows: Sequence[TokenRow],
        batch: TokenBatch,
    ) -> tuple[float, Parameters]:
        """The mean loss of a batch's answer tokens, and its gradient."""
        hidden, pulls = jnp.asarray(x), []
        *inner, last = range(self.n_frozen, self.shape.n_layers)
        for layer in inner:
            trained, place = parameters[layer - self.n_frozen], places[self.shape.windowed[layer]]
            hidden, pull = self._forward(hidden, self._frozen_part(layer), trained, place)
            pulls.append(pull)
        wanted, place = padded_targets(rows, batch), places[self.shape.windowed[last]]
        loss, (gradient, back) = self._last(parameters[-1], hidden, self._frozen_part(last), self._outer, place, wanted)
        found = [gradient]
        while pulls:
            back, gradient = self._backward(pulls.pop(), back)
            found.append(gradient)
        return float(loss), found[::-1]

    def apply(self, state: TrainingState, gradients: Parameters, rate: float) -> None:
        """One step of AdamW, with the gradients shortened to the longest that is allowed."""
        state.step += 1
        length = float(np.sqrt(sum(float(self._square(layer)) for layer in gradients)))
        shrink = min(1.0, self.settings.clip / (length + 1e-6))
        for index, gradient in enumerate(gradients):
            moved = self._update(
                state.parameters[index],
                state.first[index],
                state.second[index],
                gradient,
                np.float32(shrink),
                np.float32(rate),
                np.float32(state.step),
            )
            state.parameters[index], state.first[index], state.second[index] = moved

    def loss(
        self,
        parameters: Parameters,
        x: np.ndarray,
        places: tuple[Geometry, Geometry],
        rows: Sequence[TokenRow],
        batch: TokenBatch,
    ) -> tuple[float, int]:
        """The summed loss of a batch's answer tokens, and their number."""
        hidden, weights, place = self._below_last(parameters, x, places)
        wanted = padded_targets(rows, batch)
        mean = self._last_loss(parameters[-1], hidden, weights, self._outer, place, wanted)
        n_tokens = int(wanted[1].sum())
        return float(mean) * n_tokens, n_tokens

    def logits(
        self, parameters: Parameters, x: np.ndarray, places: tuple[Geometry, Geometry], n_last: int
    ) -> np.ndarray:
        """The logits of the last columns, (rows, n_last, n_vocab)."""
        hidden, weights, place = self._below_last(parameters, x, places)
        return np.asarray(self._scored(hidden, weights, parameters[-1], self._outer, place, n_last))

    def _below_last(
        self, parameters: Parameters, x: np.ndarray, places: tuple[Geometry, Geometry]
    ) -> tuple[Array, Mapping[str, Array], Geometry]:
        """The hidden states below the last layer, that layer's frozen weights, and its geometry."""
        hidden = jnp.asarray(x)
        *inner, last = range(self.n_frozen, self.shape.n_layers)
        for layer in inner:
            trained, place = parameters[layer - self.n_frozen], places[self.shape.windowed[layer]]
            hidden = self._eval(hidden, self._frozen_part(layer), trained, place)
        return hidden, self._frozen_part(last), places[self.shape.windowed[last]]

    def _frozen_part(self, layer: int) -> dict[str, Array]:
        """The weights of a trained layer that stay as they are."""
        return {} if self.settings.method == "full" else self._layers[layer]


def _adamw(
    settings: FinetuneSettings,
    parameters: Any,
    first: Any,
    second: Any,
    gradient: Any,
    shrink: Array,
    rate: Array,
    step: Array,
) -> tuple[Any, Any, Any]:
    """AdamW (https://arxiv.org/abs/1711.05101) on one layer."""
    gradient = jax.tree.map(lambda one: one * shrink, gradient)
    first = jax.tree.map(lambda mean, one: _BETA_1 * mean + (1 - _BETA_1) * one, first, gradient)
    second = jax.tree.map(lambda mean, one: _BETA_2 * mean + (1 - _BETA_2) * one * one, second, gradient)

    def moved(parameter: Array, mean: Array, square: Array) -> Array:
        length = jnp.sqrt(square / (1 - _BETA_2**step)) + _EPSILON
        return parameter * (1 - rate * settings.weight_decay) - rate * (mean / (1 - _BETA_1**step)) / length

    return jax.tree.map(moved, parameters, first, second), first, second


def shape_memory(shape: DecoderShape, rows: int, width: int, n_last: int, n_vocab: int, n_trained: int) -> int:
    """The bytes that one step holds for its backward pass, by the sizes of the arrays that a layer keeps."""
    wide = 3 * (shape.n_head + 2 * shape.n_head_kv) * shape.head_dim + 8 * shape.n_ff + 12 * shape.n_embd
    layer = 4 * rows * width * (wide + 3 * shape.n_head * width)
    return layer * (n_trained + 1) + 4 * 4 * rows * n_last * n_vocab
