"""2:4 sparsity of trained weights: which of them stay, and with which values.

A weight is (in, out), and two of each four neighbours along its first axis stay, which
is the axis that a product sums over.
"""

from functools import partial
from itertools import combinations, product
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from .._sparsity.select import GROUP, KEPT, two_largest

SparseMethod = Literal["magnitude", "wanda", "sparsegpt"]
# Rows that SparseGPT changes before it updates all rows behind them.
BLOCK = 128
# SparseGPT adds this part of the mean of the diagonal to the diagonal of the moment.
DAMPING = 0.01


def _transposable_patterns() -> np.ndarray:
    """Return the 90 masks of 4 x 4 with two entries in each row and each column."""
    rows = [np.isin(range(GROUP), pair) for pair in combinations(range(GROUP), KEPT)]
    masks = np.array([*product(rows, repeat=GROUP)])
    return masks[(masks.sum(1) == KEPT).all(1)]


PATTERNS = _transposable_patterns()


def select(
    scores: Float[Array, "d_in d_out"], transposable: bool
) -> Bool[Array, "d_in d_out"]:
    r"""Return the mask that keeps most of the squared scores.

    The first axis is a multiple of 4. With `transposable` the second is too, and the
    mask is 2:4 along both.

    References:
        Transposable masks: https://arxiv.org/abs/2102.08124, section 4.
    """
    d_in, d_out = scores.shape
    if not transposable:
        groups = jnp.moveaxis(scores.reshape(-1, GROUP, d_out), 1, 2)
        return jnp.moveaxis(two_largest(groups), 2, 1).reshape(d_in, d_out)
    largest = scores.max()
    squares = jnp.square(scores / jnp.where(largest > 0, largest, 1))
    blocks = squares.reshape(d_in // GROUP, GROUP, d_out // GROUP, GROUP)
    patterns = jnp.asarray(PATTERNS)

    # One row of blocks after another: all at once would take 90 / 16 of a weight.
    def of_row(row):
        with jax.default_matmul_precision("highest"):
            kept = jnp.einsum("iok,pik->op", row, patterns.astype(row.dtype))
        return jnp.moveaxis(patterns[kept.argmax(1)], 0, 1)

    return lax.map(of_row, blocks).reshape(d_in, d_out)


@partial(jax.jit, static_argnums=(2, 3))
def prune(
    w: Float[Array, "d_in d_out"],
    moment: Float[Array, "d_in d_in"] | None,
    method: SparseMethod,
    transposable: bool,
) -> Float[Array, "d_in d_out"]:
    r"""Return a weight in float32 with at most two of each four entries.

    "magnitude" keeps the largest $|w|$, and "wanda" the largest $|w_{ij}| \|x_i\|$,
    where $\|x_i\|^2$ is on the diagonal of the `moment`. "sparsegpt" takes row after
    row and changes the rows behind it so that the outputs $X W$ change least.

    References:
        Wanda, equation 1: https://arxiv.org/abs/2306.11695.
        SparseGPT, algorithm 1: https://arxiv.org/abs/2301.00774.
    """
    largest = jnp.abs(w).max()
    largest = jnp.where(largest > 0, largest, 1)
    rows = w.shape[0]
    padded = jnp.pad(w / largest, [(0, -rows % GROUP), (0, 0)])
    match method:
        case "sparsegpt":
            assert moment is not None
            pruned = _sparsegpt(padded, moment, transposable)
        case "wanda":
            assert moment is not None
            norms = jnp.pad(jnp.sqrt(jnp.diagonal(moment)), (0, -rows % GROUP))
            kept = select(jnp.abs(padded) * norms[:, None], transposable)
            pruned = jnp.where(kept, padded, 0)
        case "magnitude":
            pruned = jnp.where(select(jnp.abs(padded), transposable), padded, 0)
    return largest * pruned[:rows]


def inverse_root(moment: Float[Array, "n n"]) -> Float[Array, "n n"]:
    r"""Return the upper triangular $U$ with $U^T U = (H + \lambda I)^{-1}$."""
    mean = jnp.diagonal(moment).mean()
    damping = DAMPING * jnp.where(mean > 0, mean, 1)
    identity = jnp.eye(len(moment), dtype=moment.dtype)
    # The Cholesky factor of the reversed moment, reversed, is an upper triangular R
    # with R R^T = H, and U is its inverse: the inverse of H is never formed.
    reverse = jnp.linalg.cholesky((moment + damping * identity)[::-1, ::-1])
    return solve_triangular(reverse[::-1, ::-1], identity, lower=False)


def _sparsegpt(
    w: Float[Array, "padded d_out"],
    moment: Float[Array, "d_in d_in"],
    transposable: bool,
) -> Float[Array, "padded d_out"]:
    upper, rows = inverse_root(moment), len(w)
    block = min(BLOCK, rows)
    # Rows that are missing are zeros, of inputs that depend on no others.
    missing = -(-rows // block) * block - len(moment)
    upper = jnp.pad(upper, [(0, missing)] * 2)
    upper = upper + jnp.diag(jnp.arange(len(upper)) >= len(moment)).astype(w.dtype)
    w = jnp.pad(w, [(0, len(upper) - rows), (0, 0)])

    def prune_group(i, carry, corner):
        part, errors = carry
        first = GROUP * i
        diagonal = lax.dynamic_slice_in_dim(jnp.diagonal(corner), first, GROUP)
        group = lax.dynamic_slice_in_dim(part, first, GROUP)
        kept = select(jnp.abs(group) / diagonal[:, None], transposable)
        for k in range(GROUP):
            row = part[first + k]
            error = jnp.where(kept[k], 0, row / diagonal[k])
            # Row `first + k` of the corner is 0 before its diagonal.
            part = part - corner[first + k][:, None] * error[None]
            part = part.at[first + k].set(jnp.where(kept[k], row, 0))
            errors = errors.at[first + k].set(error)
        return part, errors

    def prune_block(i, w):
        first = block * i
        across = lax.dynamic_slice_in_dim(upper, first, block)
        corner = lax.dynamic_slice_in_dim(across, first, block, axis=1)
        part = lax.dynamic_slice_in_dim(w, first, block)
        prune_one = partial(prune_group, corner=corner)
        part, errors = lax.fori_loop(
            0, block // GROUP, prune_one, (part, jnp.zeros_like(part))
        )
        with jax.default_matmul_precision("highest"):
            w = w - across.mT @ errors
        return lax.dynamic_update_slice_in_dim(w, part, first, axis=0)

    return lax.fori_loop(0, len(w) // block, prune_block, w)[:rows]
