"""The layers of the language model, stacked or in a list, made and run."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ._transformer_block import LayerKind


def make_layers(make_block, num_layers: int, scan_layers: bool, rngs: nnx.Rngs):
    """Make the layers, stacked or in a list.

    Each has a key of its own, which is the same in both forms.
    """

    def make(key):
        return make_block(rngs=nnx.Rngs(key))

    keys = jax.random.split(rngs.params(), num_layers)
    if not scan_layers:
        return nnx.List(make(key) for key in keys)
    return nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})(keys)


def layers_in_list(layers: Any, num_layers: int) -> Any:
    """Return a list of the layers of a model, which may be stacked.

    The new layers share their arrays with those given if these are a list.
    """
    if isinstance(layers, nnx.List):
        return nnx.List(nnx.clone(layer) for layer in layers)
    stacked = {nnx.PARTITION_NAME: "layers"}
    each = []
    for i in range(num_layers):
        each.append(nnx.spmd.remove_axis(_layer_of(layers, i), 0, stacked))
    return nnx.List(each)


@jax.jit
def _layer_of(layers: Any, i: jax.Array) -> Any:
    def take(a):
        return lax.dynamic_index_in_dim(a, i, keepdims=False)

    return jax.tree.map(take, layers)


def run_layers(
    layers: Any,
    kinds: Sequence[LayerKind],
    step: Callable[..., tuple[Any, Any]],
    x: jax.Array,
    inputs: Any,
) -> tuple[jax.Array, Any]:
    """Scan `step` over the layers, each with its kind and its part of the inputs.

    Layers of several kinds are scanned in groups of one of each.

    Args:
        layers: The layers, as `make_layers` makes them.
        kinds: The kinds of the layers, in the order in which they repeat.
        step: Called as `step(kind, x, (layer, input))`; returns the next x and an
            output.
        x: The first x.
        inputs: A tree of arrays with one part for each layer along their first axis.

    Returns:
        The last x, and the outputs, stacked.
    """
    if isinstance(layers, nnx.List):
        parts = [(layer, _part(inputs, i)) for i, layer in enumerate(layers)]
        return _run_each(kinds, step, x, parts)
    stacked = layers, inputs
    if len(kinds) == 1:
        return lax.scan(partial(step, kinds[0]), x, stacked)
    size, count = len(kinds), len(jax.tree.leaves(layers)[0])
    groups = count // size
    outputs = []

    def run(x, group):
        return _run_each(kinds, step, x, [_part(group, i) for i in range(size)])

    if groups:
        grouped = jax.tree.map(
            lambda a: a[: groups * size].reshape(groups, size, *a.shape[1:]), stacked
        )
        x, output = lax.scan(run, x, grouped)
        outputs.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), output))
    if rest := range(groups * size, count):
        x, output = _run_each(kinds, step, x, [_part(stacked, i) for i in rest])
        outputs.append(output)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _run_each(kinds, step, x, layers):
    """Run `step` for one layer after another, the first of the first kind."""
    outputs = []
    for i, layer in enumerate(layers):
        x, output = step(kinds[i % len(kinds)], x, layer)
        outputs.append(output)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _part(tree: Any, i: int) -> Any:
    return jax.tree.map(itemgetter(i), tree)
