"""Statistics of a model's MLPs on calibration tokens, summed batch by batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .._core.precision import widen
from ..nn._transformer import TransformerLM


class Moment(NamedTuple):
    r"""The second moment of inputs, $\sum_t x_t x_t^T / s^2$, in float32.

    Attributes:
        total: The sum over tokens.
        scale: The largest $|x|$ so far, $s$. Without it, squares of large inputs would
            overflow and those of small ones vanish.
    """

    total: Float[Array, "n n"]
    scale: Float[Array, ""]


class Loss(NamedTuple):
    r"""The sums $\sum (y - \hat y)^2 / s^2$ and $\sum y^2 / s^2$ over outputs.

    Attributes:
        lost: The first sum.
        total: The second sum.
        scale: The largest $|y|$ or $|y - \hat y|$ so far, $s$.
    """

    lost: Float[Array, ""]
    total: Float[Array, ""]
    scale: Float[Array, ""]

    def relative(self) -> float:
        r"""Return $\|y - \hat y\| / \|y\|$, or 0 for outputs that are all zero."""
        return float(jnp.sqrt(self.lost / jnp.where(self.total > 0, self.total, 1)))


def empty_moment(features: int) -> Moment:
    """Return the moment of no inputs."""
    return Moment(jnp.asarray(np.zeros((features, features), np.float32)), _zero())


def empty_loss() -> Loss:
    """Return the loss of no outputs."""
    return Loss(_zero(), _zero(), _zero())


def _zero() -> jax.Array:
    return jnp.asarray(np.float32(0))


def _grow(scale: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the next scale, and the factor of squares that were divided by this."""
    largest = scale
    for x in arrays:
        largest = jnp.maximum(largest, jnp.abs(x).max(initial=0))
    largest = jnp.where(largest > 0, largest, 1)
    return largest, jnp.square(scale / largest)


def add_inputs(moment: Moment, x: Float[Array, "*batch features"]) -> Moment:
    """Return the moment with the inputs of more tokens."""
    x = widen(x).reshape(-1, x.shape[-1])
    scale, shrink = _grow(moment.scale, x)
    unit = x / scale
    with jax.default_matmul_precision("highest"):
        return Moment(moment.total * shrink + unit.mT @ unit, scale)


def add_outputs(
    loss: Loss, y: Float[Array, "*shape"], other: Float[Array, "*shape"]
) -> Loss:
    """Return the loss with the outputs of more tokens."""
    y, lost = widen(y), widen(y) - widen(other)
    scale, shrink = _grow(loss.scale, y, lost)
    sums = (jnp.square(part / scale).sum() for part in (lost, y))
    return Loss(
        loss.lost * shrink + next(sums), loss.total * shrink + next(sums), scale
    )


class _Visited(nnx.Module):
    """An MLP whose inputs go through a function of it."""

    def __init__(self, mlp: nnx.Module, visit: Callable[..., jax.Array]):
        self.mlp = mlp
        self.visit = visit

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.visit(self.mlp, x)


def stream[State](
    model: TransformerLM,
    tokens: Any,
    batch_size: int,
    visit: Callable[[State, nnx.Module, Any, jax.Array], tuple[State, jax.Array]],
    states: dict[int, State],
    others: dict[int, Any],
) -> dict[int, State]:
    """Run the model on the tokens, and update the states of some of its layers.

    Args:
        model: A model whose layers are in a list.
        tokens: The tokens, (sequences, seq).
        batch_size: The number of sequences that are run at once.
        visit: Called as `visit(state, mlp, other, x)` with the inputs x of the MLP in a
            batch. It returns the next state and the output of the MLP.
        states: The state of each layer that is visited.
        others: Further arrays for `visit`, for each of these layers.

    Returns:
        The states after all batches.
    """
    graph, weights = nnx.split(model)

    @partial(jax.jit, donate_argnums=1)
    def step(weights, states, others, batch):
        view, updated = nnx.merge(graph, weights), {}
        # Without this, results computed inside of `jax.checkpoint` could not leave it.
        view.remat = False

        def take(i, mlp, x):
            updated[i], y = visit(states[i], mlp, others[i], x)
            return y

        for i in states:
            view.layers[i].mlp = _Visited(view.layers[i].mlp, partial(take, i))
        view.features(batch)
        return updated

    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        states = step(weights, states, others, batch)
    return states


def chosen_layers(op: str, layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """Return the indices of the chosen layers, checked and in order."""
    if layers is None:
        return list(range(num_layers))
    chosen = list(layers)
    for i in chosen:
        known = isinstance(i, int) and not isinstance(i, bool)
        if not known or not 0 <= i < num_layers:
            raise ValueError(
                f"{op}: layers must be integers from 0 to {num_layers - 1}, got {i!r}"
            )
    if not chosen or len({*chosen}) < len(chosen):
        raise ValueError(f"{op}: layers must be different and not none, got {chosen}")
    return sorted(chosen)
