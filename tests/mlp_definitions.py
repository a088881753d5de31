"""Arguments and float64 definitions that several tests of low-rank MLPs share."""

from typing import Any

import jax.numpy as jnp
from helpers import normal, pair, pair_gradient, swiglu_float64, to_float64

# Small arguments, for tests of refusals.
X, W, V = jnp.ones((2, 8)), jnp.ones((8, 12)), jnp.ones((12, 8))
UP, DOWN = (jnp.ones((8, 3)), jnp.ones((3, 12))), (jnp.ones((12, 3)), jnp.ones((3, 8)))


def low_rank_swiglu_float64(args, g):
    x, *pairs, g = to_float64((*args, g))
    products = [w_in @ w_out for w_in, w_out in pairs]
    y, (d_x, *d_weights) = swiglu_float64(*[x, *products, g])
    d_pairs = [pair_gradient(p, d) for p, d in zip(pairs, d_weights, strict=True)]
    return y, (d_x, *d_pairs)


def make(size, dtype=jnp.bfloat16) -> Any:
    """Return x, gate, up, down and a cotangent.

    size: (tokens, d_in, hidden, rank of gate and up, rank of down).
    """
    tokens, d_in, hidden, rank, other = size
    gate, up = (pair(seed, d_in, rank, hidden, dtype) for seed in (10, 20))
    down = pair(30, hidden, other, d_in, dtype)
    x, g = (normal(seed, (tokens, d_in), dtype) for seed in (0, 1))
    return x, gate, up, down, g
