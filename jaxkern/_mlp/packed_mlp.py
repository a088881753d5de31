"""The low-rank ReLU² MLP with 2:4-sparse weights, for inference."""

import math
from collections.abc import Sequence
from functools import partial

import jax
from jaxtyping import Array, Float

from .._core.checks import check_batched, check_floating
from .._core.dispatch import Implementation, check_implementation, choose
from .._core.precision import matmul, relu2
from .._core.sharding import vary_alike
from .._sparsity.packed import Packed24, check_packed, unpack
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
    check_floating(op, x=x)
    check_batched(op, "x", x)
    factors = _factors(op, x, up, down)
    tokens = math.prod(x.shape[:-1])
    arrays = x, *jax.tree.leaves(factors)
    faster = tokens >= PACKED_RELU2_TOKENS
    match choose(op, implementation, arrays, partial(_unsupported, x), faster):
        case "mosaic_gpu":
            count = len(factors)
            rows, *leaves = vary_alike(
                x.reshape(tokens, x.shape[-1]),
                *(factor.values for factor in factors),
                *(factor.indices for factor in factors),
            )
            features = tuple(factor.features for factor in factors)
            y = _in_kernels(rows, leaves[:count], leaves[count:], features)
            return y.reshape(*x.shape[:-1], y.shape[1])
        case "xla":
            return _unpacked(x, factors)


def _unsupported(x: jax.Array) -> str | None:
    # Mosaic is imported on first use of a kernel.
    from .._mosaic.matmul import unsupported

    return unsupported("x", x)


def _factors(op: str, x: jax.Array, up: object, down: object) -> tuple[Packed24, ...]:
    """All four in order, whose shapes fit."""
    factors, features = [], x.shape[-1]
    for name, pair in (("up", up), ("down", down)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            kind = type(pair).__name__
            raise TypeError(f"{op}: {name} must be a pair of Packed24, got {kind}")
        for i, factor in enumerate(pair):
            check_packed(op, factor, f"{name}[{i}]")
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


def _unpacked(x: jax.Array, factors: Sequence[Packed24]) -> jax.Array:
    up_in, up_out, down_in, down_out = (unpack(factor).mT for factor in factors)
    hidden = relu2(matmul(matmul(x, up_in), up_out))
    return matmul(matmul(hidden, down_in), down_out)


def _factors_of(
    values: Sequence[jax.Array], indices: Sequence[jax.Array], features: Sequence[int]
) -> list[Packed24]:
    return [Packed24(*one) for one in zip(values, indices, features, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_kernels(x, values, indices, features):
    from .hopper import packed

    return packed.relu2_mlp(x, *_factors_of(values, indices, features))


def _in_kernels_fwd(x, values, indices, features):
    return _in_kernels(x, values, indices, features), (x, values, indices)


def _in_kernels_bwd(features, saved, dy):
    x, values, indices = saved

    def unpacked(x, values):
        return _unpacked(x, _factors_of(values, indices, features))

    # Positions are integers, which have no gradients.
    return *jax.vjp(unpacked, x, values)[1](dy), None


_in_kernels.defvjp(_in_kernels_fwd, _in_kernels_bwd)
