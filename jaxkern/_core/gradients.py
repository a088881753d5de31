"""The derivative of another value, and values that the backward computes again."""

from functools import partial

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from .sharding import vary_alike


def with_derivative_of(value: Array, soft: Array) -> Array:
    """Return `value`, whose derivative is that of `soft`.

    Inside `jax.shard_map`, one of the two may vary over mesh axes that the other does
    not vary over, such as a sample that each device draws with a key of its own.
    """
    return _with_derivative_of(*vary_alike(value, soft))


@jax.custom_jvp
def _with_derivative_of(value: Array, soft: Array) -> Array:
    # XLA folds this selection. Without it, under a vmap over arrays that only `soft`
    # depends on, the value would lack the new axis that its derivative has.
    return lax.select_n(np.bool_(False), value, soft)


_with_derivative_of.defjvps(None, lambda soft_dot, out, value, soft: soft_dot)


# For activations: the backward computes them again from the matmuls' results. That is
# cheap, and keeping their float32 intermediates costs up to 16 bytes an element.
recompute = partial(jax.checkpoint, prevent_cse=False)
