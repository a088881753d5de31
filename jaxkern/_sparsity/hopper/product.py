"""2:4 on Hopper's sparse tensor cores: a packed matrix times a dense one.

A sparse product has half the multiply-adds, and of its left factor 9/16 of the bytes.
The selection of two activations of four is the epilogue of the matmul that makes them,
so that they go to memory packed, and never else. It takes 10 instructions for each of
them (counted in the compiled kernels), 0.08 clocks of a multiprocessor. The dense
product that follows takes rank / 2048 clocks, the sparse one 0.56 of that: so from a
rank of 260 (tensor cores at 0.7 of their rate) to 360 (at all of it) on, selecting is
won back in arithmetic, whatever the number of tokens. But tiles are no larger, and of
the dense factor a sparse product reads as much from L2 as a dense one does, which is
predicted to be its limit.

B is read from shared memory once for each sparse instruction of 64 rows, 16 KB in 128
clocks at 256 columns, and A is 2 KB: more than the 128 bytes a clock that there are.
A sparse product therefore reaches 0.89 of twice the dense rate at most.

The order of positions among threads is verified on an H200.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.sharding import vary_alike
from ..._mosaic.base import IN_KERNEL, pad_to, round_up
from ..._mosaic.launch import ROW_STEP
from ..._mosaic.matmul import (
    Epilogue,
    Factor,
    Work,
    choose_columns,
    multiply,
    pad_rows,
)
from ..packed import POSITIONS_PER_BYTE, Packed24, unpack
from ..select import GROUP, KEPT
from .matmul import SPARSE_STEP, SparseProduct
from .wgmma import FIRST_TWO, words_of

# Share of the dense multiply-adds: half, at 0.89 of the rate, which reading shared
# memory limits.
SPARSE_DENSITY = 0.5 / 0.89


def sparse_matmul(
    transposed: bool = False, activation: str = "identity", columns: int | None = None
):
    """The kernel of the sparse product, of values, words and the right factor.

    transposed: the right factor lies transposed in memory.
    columns: of the tiles; by default those that `choose_columns` takes.
    """

    @jax.custom_batching.sequential_vmap
    def kernel(values, words, right):
        factor = Factor(right, transposed)
        depth, n = factor.shape
        work = Work(values.shape[0], depth, n, density=SPARSE_DENSITY)
        epilogue = Epilogue(lambda sums, aux: [IN_KERNEL[activation].value(sums[0])])
        product = SparseProduct(values, words, factor)
        name = f"sparse_matmul_{activation}"
        return multiply(name, product, epilogue, columns or choose_columns(work))[0]

    return kernel


def product(
    values: jax.Array,
    indices: jax.Array,
    right: jax.Array,
    transposed: bool = False,
    activation: str = "identity",
) -> jax.Array:
    """The product of a packed matrix (m, depth) and a dense one (depth, n).

    All three vary over the same mesh axes, and none is differentiated.

    values: (m, 2 ceil(depth / 4)), indices as `pack_2_4` has them.
    transposed: `right` is (n, depth).
    activation: of each number of the result.
    """
    (m, kept), n = values.shape, right.shape[0 if transposed else 1]
    columns = round_up(kept * GROUP // KEPT, SPARSE_STEP)
    if kept % POSITIONS_PER_BYTE:
        # The positions of a group that is not there: two equal ones are invalid.
        last = indices[:, -1:] | np.uint8(FIRST_TWO & 0xF0)
        indices = jnp.concatenate([indices[:, :-1], last], axis=1)
    values = pad_to(values, round_up(m, ROW_STEP), columns // KEPT)
    words = words_of(indices, columns)
    y = sparse_matmul(transposed, activation)(values, words, pad_rows(right))
    return y[:m, :n]


def matmul(values: jax.Array, indices: jax.Array, w: jax.Array) -> jax.Array:
    """`product`, differentiable in the values and in w, by dense matmuls."""
    return _matmul(*vary_alike(values, indices, w))


@jax.custom_vjp
def _matmul(values: jax.Array, indices: jax.Array, w: jax.Array) -> jax.Array:
    return product(values, indices, w)


def _matmul_fwd(values, indices, w):
    return product(values, indices, w), (values, indices, w)


def _matmul_bwd(saved, dy):
    values, indices, w = saved

    def as_dense(values):
        return unpack(Packed24(values, indices, w.shape[0]))

    filled, pull = jax.vjp(as_dense, values)
    (d_values,) = pull(jnp.matmul(dy, w.T))
    return d_values, None, jnp.matmul(filled.T, dy)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
