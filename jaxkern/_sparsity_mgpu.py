"""2:4 on Hopper's sparse tensor cores: the product, and an MLP around the selection.

A sparse product has half the multiply-adds, and of its left factor 9/16 of the bytes.
The selection of two activations of four is the epilogue of the matmul that makes them,
so that they go to memory packed, and never else. It takes 10 instructions for each of
them (counted in the compiled kernels), 0.08 clocks of a multiprocessor. The dense
product that follows takes rank / 2048 clocks, the sparse one 0.56 of that: so from a
rank of 260 (tensor cores at 0.7 of their rate) to 360 (at all of it) on, selecting is
won back in arithmetic, whatever the number of tokens. But tiles are no larger, and of
the dense factor a sparse product reads as much from L2 as a dense one does, which is
predicted to be its limit: `benchmarks.mlp --break-even` draws what remains.

B is read from shared memory once for each sparse instruction of 64 rows, 16 KB in 128
clocks at 256 columns, and A is 2 KB: more than the 128 bytes a clock that there are.
A sparse product therefore reaches 0.89 of twice the dense rate at most.

The order of positions among threads is verified on an H200.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._matmul_mgpu import (
    FEATURE_STEP,
    Work,
    choose_columns,
    pad,
    padded,
    plain,
    relu2_gradients,
    run,
)
from ._mesh import vary_alike
from ._mgpu import IN_KERNEL
from ._mgpu_matmul import Epilogue, Operand, Products
from ._mgpu_sparse import FIRST_TWO, indices_of, words_of
from ._mgpu_sparse_matmul import DEPTH, SUMS, Selection, SparseProduct
from ._mgpu_walk import ROW_STEP
from ._packed_2_4 import GROUP, KEPT, POSITIONS_PER_BYTE, Packed24, unpack

# Clocks of a multiprocessor for one number: 12 instructions on 128 lanes, with the
# activation, or 16 where they shrink too; of `benchmarks.kernels`, select less matmul.
SELECT_CLOCKS, SHRINK_CLOCKS = 12 / 128, 16 / 128
# Of the dense multiply-adds: half, at 0.89 of the rate, which shared memory limits.
SPARSE_DENSITY = 0.5 / 0.89
SELECT_COLUMNS = 256, 128


class Chosen(NamedTuple):
    """Hidden features, two of each four; as the kernels store them."""

    values: jax.Array
    words: jax.Array


def dense(chosen: Chosen, features: int) -> jax.Array:
    """With the zeros put back; what is stored past the features are zeros too."""
    values, words = chosen
    indices = indices_of(words)[: len(values)]
    stored = values.shape[1] * GROUP // KEPT
    return unpack(Packed24(values, indices, stored))[:, :features]


def select_forward(shrink: bool, keep: bool, columns: int | None = None):
    """The kernel of max(core up, 0)^2, selected; and, to be kept, not selected.

    Its results are values, words, the hidden features if kept, and S-STE's sums.
    """

    @jax.custom_batching.sequential_vmap
    def kernel(core, up):
        clocks = SHRINK_CLOCKS if shrink else SELECT_CLOCKS
        work = Work(
            core.shape[0],
            core.shape[1],
            up.shape[1],
            moved=0.5625 + keep,
            clocks=clocks,
        )
        chosen = columns or choose_columns(work, SELECT_COLUMNS)
        selection = Selection(
            lambda sums: IN_KERNEL["relu2"].value(sums[0]), shrink, keep
        )
        products = Products([Operand(core)], [Operand(up)])
        return tuple(run("relu2_select", products, selection, chosen))

    return kernel


def sparse_matmul(
    transposed: bool = False, activation: str = "identity", columns: int | None = None
):
    """The kernel of the sparse product, of values, words and the right factor."""

    @jax.custom_batching.sequential_vmap
    def kernel(values, words, right):
        operand = Operand(right, transposed)
        depth, n = operand.shape
        work = Work(values.shape[0], depth, n, density=SPARSE_DENSITY)
        epilogue = Epilogue(lambda sums, aux: [IN_KERNEL[activation].value(sums[0])])
        product = SparseProduct(values, words, operand)
        name = f"sparse_matmul_{activation}"
        return run(name, product, epilogue, columns or choose_columns(work))[0]

    return kernel


def product(
    values: jax.Array,
    indices: jax.Array,
    right: jax.Array,
    transposed: bool = False,
    activation: str = "identity",
) -> jax.Array:
    """Of a packed matrix (m, depth) and a dense one (depth, n), or its transpose.

    values: (m, 2 ceil(depth / 4)), indices as `pack_2_4` has them; not differentiated.
    """
    (m, kept), n = values.shape, right.shape[0 if transposed else 1]
    columns = -(-kept * GROUP // KEPT // DEPTH) * DEPTH
    if kept % POSITIONS_PER_BYTE:
        # Of a group that is not there; two equal positions are invalid.
        last = indices[:, -1:] | np.uint8(FIRST_TWO & 0xF0)
        indices = jnp.concatenate([indices[:, :-1], last], axis=1)
    values = pad(values, ROW_STEP, columns // KEPT)
    steps = ROW_STEP, FEATURE_STEP
    words = words_of(indices, columns)
    args = vary_alike(values, words, pad(right, *steps))
    return sparse_matmul(transposed, activation)(*args)[:m, :n]


@jax.custom_vjp
def matmul(values: jax.Array, indices: jax.Array, w: jax.Array) -> jax.Array:
    """`product`, differentiable in the values and in w, by dense matmuls."""
    return product(values, indices, w)


def _matmul_fwd(values, indices, w):
    return product(values, indices, w), (values, indices, w)


def _matmul_bwd(saved, dy):
    values, indices, w = saved

    def as_dense(values):
        return unpack(Packed24(values, indices, w.shape[0]))

    filled, pull = jax.vjp(as_dense, values)
    (d_values,) = pull(plain(Operand(dy), Operand(w, transposed=True)))
    return d_values, None, plain(Operand(filled, transposed=True), Operand(dy))


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def relu2_mlp(
    core: jax.Array, up: jax.Array, down: jax.Array, shrink: bool, exact: bool
) -> jax.Array:
    """S(max(core up, 0)^2) down, of (tokens, rank), (rank, hidden), (hidden, rank).

    shrink: S is S-STE's, with a scale for each token, and not the two largest.
        The product with `down` is rounded before it is scaled and after.
    exact: the gradient is that of what was kept; else the hidden features get all.
    """
    args = padded(core, up, down)
    return _relu2(*args, shrink, exact)[: core.shape[0], : down.shape[1]]


def _scale(sums: jax.Array) -> jax.Array:
    """S-STE's beta of each token, float32 (tokens, 1)."""
    both = sums.reshape(len(sums), -1, SUMS // 2, 2).sum((1, 2))
    overlap, energy = both[:, :1], both[:, 1:]
    return jnp.where(energy > 0, overlap / jnp.where(energy > 0, energy, 1), 1)


def _forward(core, up, down, shrink: bool, keep: bool):
    """The result, what was selected, its scale, and the hidden features if kept."""
    values, words, *more = select_forward(shrink, keep)(core, up)
    y = sparse_matmul()(values, words, down)
    hidden = more[0] if keep else None
    if not shrink:
        return y, Chosen(values, words), None, hidden
    scale = _scale(more[-1])
    return (y * scale).astype(y.dtype), Chosen(values, words), scale, hidden


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
        kept = (kept * scale).astype(kept.dtype)
    # Where nothing was kept, the square root of nothing is the exact gradient's mask.
    return relu2_gradients(core, up, down, kept if exact else hidden, kept, dy)


_relu2.defvjp(_relu2_fwd, _relu2_bwd)
