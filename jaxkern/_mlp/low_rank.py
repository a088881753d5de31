"""Weights that are kept as two thin factors, and products with one."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from .._core.checks import check_batched, check_floating, check_pair, check_shape, given
from .._core.dispatch import Implementation, check_implementation
from .._core.precision import matmul

Pair = tuple[jax.Array, jax.Array]


def check_pairs(op: str, x: Any, **pairs: Pair) -> tuple[Any, ...]:
    """Return `x` and the pairs as JAX arrays, after a check of their dtypes."""
    arrays = {"x": x}
    for name, pair in pairs.items():
        check_pair(op, name, pair)
        arrays |= {f"{name}[{i}]": factor for i, factor in enumerate(pair)}
    x, *factors = check_floating(op, **arrays)
    return x, *zip(factors[::2], factors[1::2], strict=True)


def check_low_rank(
    op: str,
    name: str,
    pair: Pair,
    d_in: int | str,
    d_out: int | str,
    because: str = "",
) -> None:
    """Check the shapes of a pair, and warn about a rank that saves nothing."""
    check_shape(op, f"{name}[0]", pair[0], (d_in, "rank"), because)
    rank = pair[0].shape[1]
    check_shape(op, f"{name}[1]", pair[1], (rank, d_out))
    n_in, n_out = pair[0].shape[0], pair[1].shape[1]
    if rank * (n_in + n_out) >= n_in * n_out:
        warnings.warn(
            f"{op}: rank of {name} should be below d_in d_out / (d_in + d_out) = "
            f"{n_in * n_out / (n_in + n_out):.1f}, from which on the full-rank weight "
            f"is no larger, got {rank}",
            stacklevel=4,
        )


def unsupported(
    x: jax.Array,
    ranks: Sequence[int] = (),
    sparsity: str | None = None,
    gradient: str | None = None,
) -> str | None:
    """Return why no kernel takes these arguments, or None if one does."""
    # Mosaic is imported on first use of a kernel.
    from .hopper import fused

    return fused.unsupported(x, ranks, sparsity, gradient)


def low_rank_matmul(
    x: Float[Array, "*batch d_in"],
    weight: tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""Multiply by a weight that is kept as two thin factors.

    $$y = (x W_{in}) W_{out}$$

    The product $W_{in} W_{out}$ is never formed: a token costs
    $2\,\mathrm{rank}\,(d_{in} + d_{out})$ FLOPs instead of $2\,d_{in} d_{out}$. Matmuls
    accumulate in float32, and each result is rounded once to the dtype of `x`.

    Args:
        x: The tokens, with any leading axes.
        weight: The factors $(W_{in}, W_{out})$.
        implementation: None and "xla" are the same here, since this op has no kernel.

    Returns:
        The product, in the dtype of `x`.

    Raises:
        TypeError: An argument is not a floating-point array, `weight` is not a pair, or
            the dtypes differ.
        ValueError: The shapes do not fit, or `implementation` is unknown.
        NotImplementedError: `implementation` is "mosaic_gpu".

    Warns:
        UserWarning: The rank is so large that the full-rank weight is no larger.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        w_in, w_out = jnp.ones((8, 2)), jnp.ones((2, 8))
        print(jaxkern.low_rank_matmul(jnp.ones((3, 8)), (w_in, w_out))[0])
        ```
        ```text
        [16. 16. 16. 16. 16. 16. 16. 16.]
        ```

    References:
        LoRA, section 4.1, without the frozen weight: https://arxiv.org/abs/2106.09685.
    """
    op = "low_rank_matmul"
    check_implementation(op, implementation)
    x, weight = check_pairs(op, x, weight=weight)
    check_batched(op, "x", x)
    check_low_rank(op, "weight", weight, x.shape[-1], "d_out", given(x))
    if implementation == "mosaic_gpu":
        raise NotImplementedError(
            f"{op}: implementation must be None or 'xla', got 'mosaic_gpu', for which "
            "this op has no kernel"
        )
    return multiply_low_rank(x, weight)


@jax.jit
def multiply_low_rank(x: jax.Array, weight: Pair) -> jax.Array:
    return matmul(matmul(x, weight[0]), weight[1])


def rows_of(x: jax.Array) -> jax.Array:
    """Return `x` with all batch axes in one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
