"""The low-rank ReLU² MLP around a 2:4 selection, on sparse tensor cores.

Two launches of the frame in `_mosaic.matmul` make the forward, and the hidden features
go to memory packed: two of each four values, and two bits for each value's position.

    core, up --[relu2_select: dense matmul, selection as its epilogue]--> values, words
    values, words, down --[sparse_matmul: sparse tensor cores]--> y

At rank 1024, hidden 16512 and 16384 tokens in bfloat16, they took 878 and 512 us on an
H200, where the dense pair took 781 (`relu2 forward 256`) and XLA's 708 (`xla matmul NN
down`; all in `benchmarks/results/nvidia_h200/launches.json`, with `select 256` and
`sparse matmul 256`). The backward is that of the dense MLP, on features that XLA
unpacks.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..._mosaic.base import IN_KERNEL
from ..._mosaic.launch import padded
from ..._mosaic.matmul import Factor, Products, multiply
from ..._mosaic.work import Work, choose_columns
from ..._sparsity.hopper.matmul import ROW_SUMS, Selection
from ..._sparsity.hopper.product import sparse_matmul
from ..._sparsity.hopper.wgmma import indices_of
from ..._sparsity.packed import Packed24, unpack
from ..._sparsity.select import GROUP, KEPT
from .fused import relu2_gradients

# Clocks of a multiprocessor to activate and select a hidden feature: instructions of a
# thread over the 128 lanes, counted by `python -m benchmarks.kernels` in the compiled
# kernels.
SELECT_CLOCKS = 12 / 128
# The same where the selected ones are also shrunk, as S-STE does.
SHRINK_CLOCKS = 16 / 128
# Numbers of 16 bits written for each hidden feature: two of four, and two bits for each
# of these.
PACKED_NUMBERS = 9 / 16
# Columns of the tiles to choose from, the largest first. 16384 x 1024 x 16512 took 878
# us with 256 of them and 916 with 128 (H200, `launches.json`: `select 256`, `select
# 128`).
SELECT_COLUMNS = (256, 128)


class Chosen(NamedTuple):
    """Hidden features, two of each four, as the kernels store them.

    values: the values that were kept, (tokens, columns / 2).
    words: their positions, in the order of `_sparsity.hopper.wgmma`.
    """

    values: jax.Array
    words: jax.Array


def dense(chosen: Chosen, features: int) -> jax.Array:
    """Return the first `features` of the hidden features, with zeros put back."""
    values, words = chosen
    indices = indices_of(words)[: len(values)]
    stored = values.shape[1] * GROUP // KEPT
    return unpack(Packed24(values, indices, stored))[:, :features]


def select_forward(shrink: bool, keep: bool, columns: int | None = None):
    """Return the kernel that selects two of each four of max(core up, 0)^2.

    Its results are the values, the words, all hidden features if `keep`, and S-STE's
    sums if `shrink`.
    """

    @jax.custom_batching.sequential_vmap
    def kernel(core, up):
        clocks = SHRINK_CLOCKS if shrink else SELECT_CLOCKS
        moved = PACKED_NUMBERS + 1 if keep else PACKED_NUMBERS
        tokens, rank = core.shape
        work = Work(tokens, rank, up.shape[1], moved=moved, clocks=clocks)
        chosen = columns or choose_columns(work, SELECT_COLUMNS)
        selection = Selection(
            lambda sums: IN_KERNEL["relu2"].value(sums[0]), shrink, keep
        )
        products = Products([Factor(core)], [Factor(up)])
        return tuple(multiply("relu2_select", products, selection, chosen))

    return kernel


def sparse_relu2_mlp(
    core: jax.Array, up: jax.Array, down: jax.Array, *, shrink: bool, exact: bool
) -> jax.Array:
    """Return S(max(core up, 0)^2) down, where S keeps two of each four features.

    core: (tokens, rank). up: (rank, hidden). down: (hidden, rank).
    shrink: whether S is S-STE's, which shrinks what it keeps and scales each token. The
        product with `down` is rounded before it is scaled and after. Otherwise S keeps
        the two largest as they are.
    exact: whether only the hidden features that were kept get a gradient. Otherwise all
        of them get one, straight through S.
    """
    args = padded(core, up, down)
    return _relu2(*args, shrink, exact)[: core.shape[0], : down.shape[1]]


def _scale(sums: jax.Array) -> jax.Array:
    """Return S-STE's scale (beta) of each token, float32 (tokens, 1)."""
    both = sums.reshape(len(sums), -1, ROW_SUMS // 2, 2).sum((1, 2))
    overlap, energy = both[:, :1], both[:, 1:]
    return jnp.where(energy > 0, overlap / jnp.where(energy > 0, energy, 1), 1)


def _forward(core, up, down, shrink: bool, keep: bool):
    """Return the result, and what the backward needs.

    The backward needs the selected features, their scale (None without `shrink`), and
    all hidden features (None without `keep`).
    """
    values, words, *more = select_forward(shrink, keep)(core, up)
    y = sparse_matmul()(values, words, down)
    hidden = more[0] if keep else None
    if not shrink:
        return y, Chosen(values, words), None, hidden
    scale = _scale(more[-1])
    y = (y.astype(scale.dtype) * scale).astype(y.dtype)
    return y, Chosen(values, words), scale, hidden


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _relu2(core, up, down, shrink, exact):
    return _forward(core, up, down, shrink, keep=False)[0]


def _relu2_fwd(core, up, down, shrink, exact):
    y, chosen, scale, hidden = _forward(core, up, down, shrink, keep=not exact)
    return y, (core, up, down, chosen, scale, hidden)


def _relu2_bwd(shrink, exact, saved, dy) -> Any:
    core, up, down, chosen, scale, hidden = saved
    kept = dense(chosen, down.shape[0])
    if scale is not None:
        kept = (kept.astype(scale.dtype) * scale).astype(kept.dtype)
    # Dropped features are 0 in `kept`, and ReLU²'s derivative is 2 sqrt of it: so they
    # get no gradient, which is the exact gradient's mask.
    return relu2_gradients(core, up, down, kept if exact else hidden, kept, dy)


_relu2.defvjp(_relu2_fwd, _relu2_bwd)
