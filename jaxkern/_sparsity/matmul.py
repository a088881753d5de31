"""The product of a packed 2:4-sparse matrix and a dense one."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Float

from .._core.checks import check_floating, check_shape
from .._core.dispatch import Implementation, check_implementation, choose
from .._core.precision import matmul
from .._core.sharding import vary_alike
from .packed import Packed24, unpack
from .select import check_packed


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

    None is "xla". To multiply by a 2:4-sparse weight from the right, as in `x @ w`,
    pack its transpose: `matmul_2_4(pack_2_4(w.T), x.T).T`.

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
    check_packed(op, packed)
    values = packed.values
    check_floating(op, values=values, w=w)
    check_shape(op, "w", w, (packed.features, "d_out"))
    sizes = *values.shape, *w.shape
    unsupported = partial(_unsupported, sizes, values.dtype)
    # The kernel is not picked: it was not measured against XLA in the same run.
    match choose(op, implementation, (values, w), unsupported, faster=False):
        case "mosaic_gpu":
            # Mosaic is imported on first use of a kernel.
            from .hopper import product

            rows = math.prod(values.shape[:-1])
            flat = (a.reshape(rows, a.shape[-1]) for a in (values, packed.indices))
            y = product.matmul(*vary_alike(*flat, w))
            return y.reshape(*values.shape[:-1], w.shape[1])
        case "xla":
            return matmul(unpack(packed), w)


def _unsupported(sizes: Sequence[int], dtype: Any) -> str | None:
    from .._mosaic import matmul

    return matmul.unsupported(sizes, dtype)
