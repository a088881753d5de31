"""The product of a packed 2:4-sparse matrix and a dense one."""

import math
from functools import partial

import jax
from jaxtyping import Array, Float

from .._core import device
from .._core.checks import check_floating, check_shape
from .._core.dispatch import Implementation, check_implementation, run
from .._core.precision import matmul
from .packed import Packed24, check_packed_24, unpack

# The least number of rows for which None picks the kernel. On an H200, 16384 rows of
# 16512 features by 1024 took 512 us, and XLA's product of the same sizes 708 us in the
# same run, without the unpacking that it needs before. Fewer rows: predicted, not
# measured.
LEAST_ROWS = 4096


def matmul_2_4(
    packed: Packed24,
    w: Float[Array, "features d_out"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""Multiply a packed 2:4-sparse array by a dense matrix.

    $$y = \mathrm{unpack}(\mathrm{packed})\, W$$

    It is differentiable in `packed.values` and in `w`. To multiply by a sparse weight
    from the right, as in `x @ w`, pack its transpose:
    `matmul_2_4(pack_2_4(w.T), x.T).T`.

    Implementations:

    - "xla" unpacks and multiplies densely, so it saves memory but no time.
    - "mosaic_gpu" multiplies on the sparse tensor cores of an H100 or H200, in bfloat16
      and float16, with half the multiply-adds and without unpacking. It copies arrays
      whose rows are not a multiple of 8, features of 128 or `d_out` of 64. Gradients
      are dense products of XLA, in reverse mode and of first order only: `jax.jvp` and
      `grad` of `grad` need "xla". Under `vmap` samples run one by one; put them in
      leading axes of the values instead.
    - `None` uses the kernel from 4096 rows on if it supports the inputs, and "xla"
      otherwise. On an H200, 16384 rows of 16512 features took 512 us by the kernel and
      708 us by XLA's dense product of the same sizes. Smaller numbers of rows were not
      measured.

    Args:
        packed: The sparse array, its last axis packed.
        w: The dense matrix, with `packed.features` rows.
        implementation: See above.

    Returns:
        The product, in the dtype of the arguments.

    Raises:
        TypeError: `packed` is not a `Packed24`, an array is not what `pack_2_4` gives,
            or the dtypes of values and `w` differ.
        ValueError: The shapes do not fit, or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        packed = jaxkern.pack_2_4(jnp.array([[0.0, 5.0, 0.0, 7.0]]))
        print(jaxkern.matmul_2_4(packed, jnp.ones((4, 2))))
        ```
        ```text
        [[12. 12.]]
        ```

    References:
        Accelerating Sparse Deep Neural Networks, section 3:
            https://arxiv.org/abs/2104.08378.
        The instruction: PTX ISA, "wgmma.mma_async.sp".
    """
    op = "matmul_2_4"
    check_implementation(op, implementation)
    packed = check_packed_24(op, packed)
    values, w = check_floating(op, values=packed.values, w=w)
    check_shape(op, "w", w, (packed.features, "d_out"))
    return run(
        op,
        implementation,
        packed,
        w,
        xla=_multiply_unpacked,
        kernel=_multiply_packed,
        unsupported=partial(device.unsupported_array, "values", values),
        faster=math.prod(values.shape[:-1]) >= LEAST_ROWS,
    )


def _multiply_packed(packed: Packed24, w: jax.Array) -> jax.Array:
    """Multiply in the kernel, whose rows are all leading axes in one."""
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
    """Unpack and multiply densely."""
    return matmul(unpack(packed), w)
