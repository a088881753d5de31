"""The product of a packed 2:4-sparse matrix and a dense one."""

import math
from functools import partial

import jax
from jaxtyping import Array, Float

from .._core import device
from .._core.checks import check_floating, check_shape
from .._core.dispatch import Implementation, check_implementation, choose, run
from .._core.precision import matmul
from .packed import Packed24, check_packed_24, unpack

# None picks the kernel from so many rows on. On an H200, 16384 rows of 16512 features
# by 1024 took 512 us, and XLA's product of the same sizes 708 in the same run, without
# the unpacking that it needs before. Below 16384 rows: predicted, not measured.
LEAST_ROWS = 4096


def matmul_2_4(
    packed: Packed24,
    w: Float[Array, "features d_out"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    """`unpack_2_4(packed) @ w`, differentiable in `packed.values` and in `w`.

    - "xla" emulates the sparse matmul: it unpacks and multiplies densely, so it saves
      memory, not time.
    - "mosaic_gpu" multiplies on the sparse tensor cores of an H100 or H200, in bfloat16
      and float16: half the multiply-adds, and `packed` is never unpacked. Where rows
      are no multiple of 8, features of 128 and `d_out` of 64, arrays are copied to pad
      them. Gradients are XLA's dense matmuls, of reverse mode and first order only.
      Under `vmap` samples run one by one, and gradients of a `w` that they share are
      made for each and then added: put samples in leading axes of the values instead.
      The order of positions in the sparse operand is verified on an H200.

    None picks the kernel from 4096 rows on, where it can run. It is measured at 16384
    rows, against XLA's dense product without the unpacking (512 and 708 us on an H200),
    and predicted below.

    To multiply by a 2:4-sparse weight from the right, as in `x @ w`, pack its
    transpose: `matmul_2_4(pack_2_4(w.T), x.T).T`.

    Raises:
        TypeError: as `unpack_2_4`, or the dtypes of values and `w` differ.
        ValueError: as `unpack_2_4`, or `w` does not have `packed.features` rows.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.

    References:
        https://arxiv.org/abs/2104.08378, section 3; of the instruction, PTX ISA,
        "wgmma.mma_async.sp".
    """
    op = "matmul_2_4"
    check_implementation(op, implementation)
    packed = check_packed_24(op, packed)
    indices = packed.indices
    values, w = check_floating(op, values=packed.values, w=w)
    check_shape(op, "w", w, (packed.features, "d_out"))
    faster = math.prod(values.shape[:-1]) >= LEAST_ROWS
    unsupported = partial(device.unsupported_array, "values", values)
    return run(
        choose(op, implementation, (values, indices, w), unsupported, faster),
        packed,
        w,
        implementation=implementation,
        xla=_multiply_unpacked,
        kernel=_multiply_packed,
    )


def _multiply_packed(packed: Packed24, w: jax.Array) -> jax.Array:
    # Mosaic is imported on first use of a kernel.
    from .hopper import product

    *batch, kept = packed.values.shape
    values = packed.values.reshape(-1, kept)
    indices = packed.indices.reshape(values.shape[0], -1)
    return product.matmul(values, indices, w).reshape(*batch, w.shape[1])


@jax.jit
def _multiply_unpacked(
    packed: Packed24, w: Float[Array, "features d_out"]
) -> Float[Array, "*batch d_out"]:
    return matmul(unpack(packed), w)
