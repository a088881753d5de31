"""The low-rank ReLU² MLP with 2:4-sparse weights, for inference."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.checks import check_batched, check_floating
from .._core.dispatch import Implementation, check_implementation, choose
from .._core.precision import matmul, relu2
from .._mosaic import matmul as matmul_frame
from .._mosaic.matmul import FEATURE_STEP, pad
from .._sparsity.hopper import product
from .._sparsity.packed import Packed24, unpack
from .._sparsity.select import check_packed


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
      are no multiples of 128. It has no gradient. Under `vmap` samples run one by
      one: put them in leading axes of `x`. The order of positions in the sparse operand
      is verified on an H200.

    None is "xla".

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
    sizes = tokens, *(n for p in factors for n in p.values.shape)
    unsupported = partial(matmul_frame.unsupported, sizes, x.dtype)
    arrays = x, *(factor.values for factor in factors)
    # The kernel is not picked: it was not measured against XLA in the same run.
    match choose(op, implementation, arrays, unsupported, faster=False):
        case "mosaic_gpu":
            y = _transposed(x.reshape(tokens, x.shape[-1]), *factors)
            return y.reshape(*x.shape[:-1], y.shape[1])
        case "xla":
            return _dense(x, *factors)


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


def _dense(x: jax.Array, *factors: Packed24) -> jax.Array:
    up_in, up_out, down_in, down_out = (unpack(factor).mT for factor in factors)
    hidden = relu2(matmul(matmul(x, up_in), up_out))
    return matmul(matmul(hidden, down_in), down_out)


def _transposed(x: jax.Array, *factors: Packed24) -> jax.Array:
    """Features are the rows from the first product on, as tokens are of x."""
    y, tokens = pad(x, FEATURE_STEP, 1), len(x)
    for i, factor in enumerate(factors):
        activation = "relu2" if i == 1 else "identity"
        y = product.product(
            factor.values, factor.indices, y, transposed=i == 0, activation=activation
        )
    return jnp.transpose(y)[:tokens]
