"""Values that have the derivative of something else."""

import jax
from jaxtyping import Array


@jax.custom_jvp
def with_derivative_of(value: Array, soft: Array) -> Array:
    """`value`, with the derivative of `soft`."""
    del soft
    return value


with_derivative_of.defjvps(None, lambda soft_dot, out, value, soft: soft_dot)
