"""The low-rank ReLU² MLP with 2:4-sparse weights, for inference."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from .._core import device
from .._core.checks import check_batched, check_floating, check_pair
from .._core.dispatch import Implementation, run
from .._core.precision import matmul, relu2
from .._sparsity.packed import Packed24, check_packed_24, unpack
from .low_rank import rows_of
from .thresholds import PACKED_RELU2_TOKENS


def is_packed(*pairs: Any) -> bool:
    """Say whether some factor of low-rank weights is packed; then all must be."""
    factors = (x for pair in pairs if isinstance(pair, tuple | list) for x in pair)
    return any(isinstance(factor, Packed24) for factor in factors)


def packed_low_rank_relu2(
    op: str,
    x: jax.Array,
    up: Any,
    down: Any,
    implementation: Implementation | None,
) -> jax.Array:
    """Compute `low_rank_relu2` with packed factors."""
    (x,) = check_floating(op, x=x)
    check_batched(op, "x", x)
    factors = _factors(op, x, up, down)
    return run(
        op,
        implementation,
        x,
        factors,
        xla=_unpacked,
        kernel=_packed,
        unsupported=partial(device.unsupported_array, "x", x),
        faster=math.prod(x.shape[:-1]) >= PACKED_RELU2_TOKENS,
    )


def _packed(x: jax.Array, factors: tuple[Packed24, ...]) -> jax.Array:
    # Mosaic is imported on first use of a kernel.
    from .hopper import packed

    y = packed.packed_relu2_mlp(rows_of(x), factors, _unpacked)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _factors(
    op: str, x: jax.Array, up: Sequence[Packed24], down: Sequence[Packed24]
) -> tuple[Packed24, ...]:
    """Return all four factors in order, after a check that their shapes fit."""
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
