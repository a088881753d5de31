"""Two of each four neighbours in a row, by sorting."""

from typing import Any

import jax
import jax.numpy as jnp

from .rounding import activate


def keep_all(a):
    """Select nothing: `a`."""
    return a


def static(a):
    """Keep the first two of each four, whatever they are."""
    return jnp.where((jnp.arange(a.shape[1]) % 4 < 2)[None], a, 0)


def groups(a):
    """(rows, groups, 4), the last group filled up with zeros."""
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % 4))).reshape(len(a), -1, 4)


def top2(a):
    """Keep the two largest magnitudes of each four; of equal ones the first."""
    order = jnp.argsort(-abs(groups(a)), stable=True)
    rank = jnp.argsort(order, stable=True)
    kept = (rank < 2).reshape(len(a), -1)[:, : a.shape[1]]
    return jnp.where(kept, a, 0)


def soft(a):
    """Shrink each four by its second smallest magnitude, and rescale each row (S-STE).

    The derivative is the identity.
    """

    def shrink(a):
        fours = groups(a)
        threshold = jnp.sort(abs(fours), axis=-1)[..., 1:2]
        s = jnp.sign(fours) * jnp.maximum(abs(fours) - threshold, 0)
        s = s.reshape(len(a), -1)[:, : a.shape[1]]
        return s * (a * s).sum(1, keepdims=True) / (s * s).sum(1, keepdims=True)

    return a + jax.lax.stop_gradient(activate(shrink, a) - a)


def unpack(packed: Any) -> Any:
    """The dense matrix of a `Packed24`, by what its docstring says."""
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
