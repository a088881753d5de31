"""2:4 sparsity by sorting: select two of each four neighbours in a row."""

from typing import Any

import jax
import jax.numpy as jnp

from .rounding import activate


def keep_all(a):
    """Return `a` as it is."""
    return a


def static(a):
    """Keep the first two of each four, whatever their values are."""
    return jnp.where((jnp.arange(a.shape[1]) % 4 < 2)[None], a, 0)


def groups(a):
    """Cut rows into (rows, groups, 4), with zeros that fill up the last group."""
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % 4))).reshape(len(a), -1, 4)


def top2(a):
    """Keep the two largest magnitudes of each four; the first ones where equal."""
    order = jnp.argsort(-abs(groups(a)), stable=True)
    rank = jnp.argsort(order, stable=True)
    kept = (rank < 2).reshape(len(a), -1)[:, : a.shape[1]]
    return jnp.where(kept, a, 0)


def soft(a):
    r"""Shrink each four by its second smallest magnitude, and rescale each row (S-STE).

    $$\beta s, \quad s = \mathrm{sign}(a) \max(|a| - t, 0), \quad
    \beta = \frac{a \cdot s}{s \cdot s}$$

    where $t$ is the second smallest magnitude of the four, and the products are over a
    row. The derivative is the identity.

    References:
        https://arxiv.org/abs/2409.09099.
    """

    def shrink(a):
        fours = groups(a)
        threshold = jnp.sort(abs(fours), axis=-1)[..., 1:2]
        s = jnp.sign(fours) * jnp.maximum(abs(fours) - threshold, 0)
        s = s.reshape(len(a), -1)[:, : a.shape[1]]
        return s * (a * s).sum(1, keepdims=True) / (s * s).sum(1, keepdims=True)

    return a + jax.lax.stop_gradient(activate(shrink, a) - a)


def unpack(packed: Any) -> Any:
    """Return the dense matrix of a `Packed24`, as its docstring defines it."""
    values, indices = packed.values, packed.indices
    rows, kept = values.shape
    shifts = 2 * jnp.arange(4, dtype=jnp.uint8)
    positions = (indices[..., None] >> shifts[None, None] & 3).astype(int)
    first = jnp.arange(kept)[None] // 2 * 4
    positions = positions.reshape(rows, -1)[:, :kept] + first
    dense = jnp.zeros((rows, 2 * kept), values.dtype)
    return dense.at[jnp.arange(rows)[:, None], positions].set(values)[
        :, : packed.features
    ]
