"""The low-rank ReLU² MLP with 2:4-sparse weights, for inference."""

import math
from collections.abc import Sequence
from functools import partial

import jax
from jaxtyping import Array, Float

from .._core import device
from .._core.checks import check_batched, check_floating, check_pair
from .._core.dispatch import Implementation, check_implementation, choose, run
from .._core.precision import matmul, relu2
from .._sparsity.packed import Packed24, check_packed_24, unpack
from .thresholds import PACKED_RELU2_TOKENS


def packed_relu2(
    x: Float[Array, "*batch d_in"],
    up: tuple[Packed24, Packed24],
    down: tuple[Packed24, Packed24],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""`low_rank_relu2` of weights that are 2:4-sparse along the axis they sum over.

    $$y = \max(x U_{in} U_{out}, 0)^2 D_{in} D_{out}$$

    Each factor, (in, out), is given as `pack_2_4` of its transpose, so that groups of
    four lie along what is summed: 9/16 of the bytes in 16 bits. Precision is that of
    `low_rank_relu2`.

    - "xla" unpacks the factors in every call, and multiplies densely.
    - "mosaic_gpu", on an H100 or H200, in bfloat16 and float16, makes all four products
      transposed, so that the weight is the sparse operand of the tensor cores: half the
      multiply-adds. Values are read in half a weight's bytes; positions are put in the
      kernel's order in every call, another fourth. Tokens that are no multiple of 64
      are padded by copies, and so are factors and what they make where ranks and sizes
      are no multiples of 128. Its gradients are those of "xla", which computes the
      forward again, of reverse mode and first order only. Under `vmap` samples run one
      by one: put them in leading axes of `x`. The order of positions in the sparse
      operand is verified on an H200.

    None picks the kernel from 4096 tokens on, where it can run. On an H200, 16384
    tokens of 7B took 1477 us of the device, and the same MLP of dense weights 1751 by
    `low_rank_relu2`'s kernels and 2097 by XLA. XLA's form of this op, which unpacks and
    then does the latter, was not timed; fewer tokens are predicted.

    Raises:
        TypeError: `x` is no floating-point array, a weight is no pair of `Packed24`, or
            the dtypes differ.
        ValueError: the shapes do not fit, or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.

    References:
        Accelerating Sparse Deep Neural Networks, https://arxiv.org/abs/2104.08378.
    """
    op = "packed_relu2"
    check_implementation(op, implementation)
    (x,) = check_floating(op, x=x)
    check_batched(op, "x", x)
    factors = _factors(op, x, up, down)
    tokens = math.prod(x.shape[:-1])
    arrays = x, *jax.tree.leaves(factors)
    unsupported = partial(device.unsupported_array, "x", x)
    faster = tokens >= PACKED_RELU2_TOKENS
    return run(
        choose(op, implementation, arrays, unsupported, faster),
        x,
        factors,
        implementation=implementation,
        xla=_unpacked,
        kernel=_packed,
    )


def _packed(x: jax.Array, factors: tuple[Packed24, ...]) -> jax.Array:
    # Mosaic is imported on first use of a kernel.
    from .hopper import packed

    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = packed.packed_relu2_mlp(rows, factors, _unpacked)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _factors(
    op: str, x: jax.Array, up: Sequence[Packed24], down: Sequence[Packed24]
) -> tuple[Packed24, ...]:
    """All four in order, whose shapes fit."""
    factors, features = [], x.shape[-1]
    for name, pair in (("up", up), ("down", down)):
        check_pair(op, name, pair)
        for i, factor in enumerate(pair):
            factor = check_packed_24(op, factor, f"{name}[{i}]")
            check_floating(op, x=x, **{f"values of {name}[{i}]": factor.values})
            if factor.values.ndim != 2 or factor.features != features:
                raise ValueError(
                    f"{op}: {name}[{i}] must be a packed matrix of {features} "
                    f"features, got values of shape {factor.values.shape} and "
                    f"{factor.features} features"
                )
            features = factor.values.shape[0]
            factors.append(factor)
    return tuple(factors)


@jax.jit
def _unpacked(x: jax.Array, factors: Sequence[Packed24]) -> jax.Array:
    up_in, up_out, down_in, down_out = (unpack(factor).mT for factor in factors)
    hidden = relu2(matmul(matmul(x, up_in), up_out))
    return matmul(matmul(hidden, down_in), down_out)
