"""Values that have the derivative of something else."""

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from .sharding import vary_alike


def with_derivative_of(value: Array, soft: Array) -> Array:
    """`value`, with the derivative of `soft`.

    Inside `jax.shard_map` one may vary over axes that the other does not, as a draw by
    each device's own key.
    """
    return _with_derivative_of(*vary_alike(value, soft))


@jax.custom_jvp
def _with_derivative_of(value: Array, soft: Array) -> Array:
    # Chosen from both, which XLA folds. Without this, vmap over what `soft` depends
    # on alone would give a value without the new axis a slope that has it.
    return lax.select_n(np.bool_(False), value, soft)


_with_derivative_of.defjvps(None, lambda soft_dot, out, value, soft: soft_dot)
