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
    layers: Any, kinds: Sequence[LayerKind], step: Callable[..., Any], carry: Any
) -> Any:
    """Run `step` for one layer after another.

    Stacked layers are scanned, in groups of one of each kind if there are several.

    Args:
        layers: The layers, as `make_layers` makes them.
        kinds: The kinds of the layers, in the order in which they repeat.
        step: Called as `step(kind, carry, layer, number)`, with the number of the layer
            among those of its kind; returns the next carry.
        carry: The first carry, a tree of arrays.

    Returns:
        The last carry.
    """
    size = len(kinds)

    def run(carry, group, members, layer_of):
        """Run the first members of a group."""
        for i in range(members):
            kind = kinds[i]
            number = group * kinds.count(kind) + kinds[:i].count(kind)
            carry = step(kind, carry, layer_of(i), number)
        return carry

    if isinstance(layers, nnx.List):
        for first in range(0, len(layers), size):
            members = layers[first : first + size]
            carry = run(carry, first // size, len(members), members.__getitem__)
        return carry
    count = len(jax.tree.leaves(layers)[0])
    groups, rest = divmod(count, size)
    stacked = layers
    if size > 1:
        stacked = jax.tree.map(
            lambda x: x[: groups * size].reshape(groups, size, *x.shape[1:]), layers
        )

    def run_group(carry, numbered):
        group, members = numbered
        layer_of = partial(_part, members) if size > 1 else lambda _: members
        return run(carry, group, size, layer_of), None

    numbers = jnp.arange(groups, dtype=jnp.int32)
    carry, _ = lax.scan(run_group, carry, (numbers, stacked))
    return run(carry, groups, rest, lambda i: _part(layers, groups * size + i))


def _part(tree: Any, i: int) -> Any:
    return jax.tree.map(itemgetter(i), tree)
