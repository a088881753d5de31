"""2:4 on Hopper's sparse tensor cores: a packed matrix times a dense one.

The pipeline of the kernel is drawn in `_sparsity.hopper.matmul`. A sparse product has
half the multiply-adds of a dense one, and reads 9/16 of the bytes of its left factor:
half of the values, and 2 bits for the position of each.

What limits it: for each sparse instruction m64n256k32, the tensor cores read 16 KiB of
the dense factor and 2 KiB of values from shared memory. At twice the dense rate that
would take 128 clocks, in which shared memory gives 128 bytes each, 16 KiB. So a sparse
product reaches at most 16 / 18 = 0.89 of twice the dense rate. From L2 it reads as much
of the dense factor as a dense product with the same tiles does.

When selecting activations pays, by arithmetic (not measured): the selection of two of
four is the epilogue of the matmul that makes them, and takes 10 instructions of a
thread for each activation (counted in the compiled kernels), 0.08 clocks of a
multiprocessor. The dense product that follows takes rank / 2048 clocks for each, the
sparse one 0.56 of that. So selecting is won back from a rank of 260 on, if the tensor
cores run at 0.7 of their rate, or of 360, if they run at all of it.

The order of positions among threads was verified on an H200.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.sharding import vary_alike
from ..._mosaic.base import IN_KERNEL, pad_to, round_up
from ..._mosaic.launch import ROW_STEP, pad_rows
from ..._mosaic.matmul import Epilogue, Factor, multiply
from ..._mosaic.work import Work, choose_columns
from ..packed import POSITIONS_PER_BYTE, Packed24, unpack
from ..select import GROUP, KEPT
from .matmul import SPARSE_STEP, SparseProduct
from .wgmma import FIRST_TWO, words_of

# The time of a sparse product as a fraction of a dense one's, in the tensor cores: half
# the multiply-adds at 0.89 of the rate, which reading shared memory limits.
SPARSE_DENSITY = 0.5 / 0.89


def sparse_matmul(
    transposed: bool = False, activation: str = "identity", columns: int | None = None
):
    """Return the kernel of the sparse product.

    It takes values, words and the right factor.

    transposed: whether the right factor lies transposed in memory.
    activation: the name of what is applied to each number of the result.
    columns: columns of the tiles; by default `choose_columns` chooses them.
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
    """Return the product of a packed matrix (m, depth) and a dense one (depth, n).

    The arrays must vary over the same mesh axes. The product has no derivative here.

    values: (m, 2 ceil(depth / 4)).
    indices: as `pack_2_4` returns them.
    transposed: whether `right` is (n, depth).
    activation: the name of what is applied to each number of the result.
    """
    (m, kept), n = values.shape, right.shape[0 if transposed else 1]
    columns = round_up(kept * GROUP // KEPT, SPARSE_STEP)
    if kept % POSITIONS_PER_BYTE:
        # The last byte has room for a group that does not exist. Its two positions must
        # differ, since equal ones are invalid.
        last = indices[:, -1:] | np.uint8(FIRST_TWO & 0xF0)
        indices = jnp.concatenate([indices[:, :-1], last], axis=1)
    values = pad_to(values, round_up(m, ROW_STEP), columns // KEPT)
    words = words_of(indices, columns)
    y = sparse_matmul(transposed, activation)(values, words, pad_rows(right))
    return y[:m, :n]


def matmul(values: jax.Array, indices: jax.Array, w: jax.Array) -> jax.Array:
    """Return `product`, with gradients of the values and of w by dense matmuls."""
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
