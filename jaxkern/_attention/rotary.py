"""Rotary position embedding."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._core.checks import (
    check_array,
    check_floating,
    check_number,
    check_shape,
    raise_unknown,
)
from .._core.precision import widen

Pairs = Literal["interleaved", "halves", "seed"]


def rotary_embedding(
    x: Float[Array, "batch seq heads dim"],
    positions: Int[Array, " seq"] | Int[Array, "batch seq"] | None = None,
    *,
    theta: float = 1e4,
    pairs: Pairs = "interleaved",
) -> Float[Array, "batch seq heads dim"]:
    r"""Rotate pairs of features by angles that grow with the token's position.

    $$y_a = x_a \cos p\,\omega_i - x_b \sin p\,\omega_i, \quad
    y_b = x_a \sin p\,\omega_i + x_b \cos p\,\omega_i, \quad
    \omega_i = \theta^{-2i / \mathrm{dim}}$$

    The product of a query and a key so rotated depends on their positions only through
    the difference. `pairs` says which features $(a, b)$ are pair $i$:

    - "interleaved": $(2i, 2i + 1)$, as in the paper;
    - "halves": $(i, i + \mathrm{dim}/2)$, as in GPT-NeoX and LLaMA's published weights;
      the same up to an order of the features;
    - "seed": the pairs of "interleaved", of which each member has an angle of its own,
      as if the pairs were "halves": $p\,\omega_{a \bmod \mathrm{dim}/2}$ in $y_a$ and
      $p\,\omega_{b \bmod \mathrm{dim}/2}$ in $y_b$. This is no rotation: it is for
      weights that were trained with it.

    Angles, sines and products are float32, float64 if `x` is; the result is rounded
    once. An angle is reduced modulo $2 \pi$ in 64 bits of integer arithmetic before it
    is rounded, so that it is off by at most 4e-7 at any position, where the float32
    product $p\,\omega_i$ is off by 0.03 at a million.

    Args:
        positions: of the tokens, of any sign; None for 0, 1, ...
        theta: a number known when traced.

    Raises:
        TypeError: `x` is no floating-point array, `positions` no integer array, or
            `theta` no number.
        ValueError: the shapes do not fit, dim is odd, `theta` is not positive and
            finite, or `pairs` is unknown.

    References:
        RoFormer, eq. 34: https://arxiv.org/abs/2104.09864.
    """
    op = "rotary_embedding"
    (x,) = check_floating(op, x=x)
    check_shape(op, "x", x, ("batch", "seq", "heads", "dim"))
    batch, seq, _, dim = x.shape
    if dim % 2:
        raise ValueError(f"{op}: dim must be even, got {dim}")
    check_number(op, "theta", theta, positive=True)
    if pairs not in get_args(Pairs):
        raise_unknown(op, "pairs", pairs, get_args(Pairs))
    if positions is None:
        positions = jnp.arange(seq)
    _check_positions(op, positions, batch, seq)
    omega = float(theta) ** (-2 * np.arange(dim // 2) / dim)
    omega = np.repeat(omega, 2) if pairs == "interleaved" else np.tile(omega, 2)
    wide = widen(x)
    if positions.ndim == 1:
        positions = positions[None]
    angles = _angles(positions, omega[None, None], wide.dtype)[:, :, None]
    rotated = wide * jnp.cos(angles) + _quarter_turn(wide, pairs) * jnp.sin(angles)
    return rotated.astype(x.dtype)


def _quarter_turn(x: jax.Array, pairs: Pairs) -> jax.Array:
    """(-b, a) in the places of each pair (a, b)."""
    if pairs == "halves":
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([-b, a], axis=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([-b, a], axis=-1).reshape(x.shape)


def _angles(positions: jax.Array, omega: np.ndarray, dtype: jnp.dtype) -> jax.Array:
    """positions * omega, modulo a whole turn."""
    if dtype.itemsize > 4:
        return positions.astype(dtype)[..., None] * omega
    # A turn is 2**32: whole parts multiply exactly modulo 2**32, as unsigned integers
    # do, and what the fractions add to them is small.
    units = omega / (2 * math.pi) * 2**32
    whole = np.rint(units)
    fraction = (units - whole).astype(np.float32)
    p = positions.astype(jnp.int32)[..., None]
    turned = p * (whole % 2**32).astype(np.uint32).astype(np.int32)
    turned += jnp.rint(p.astype(jnp.float32) * fraction).astype(jnp.int32)
    return turned.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def _check_positions(op: str, positions: jax.Array, batch: int, seq: int) -> None:
    check_array(op, "positions", positions, "integer")
    if positions.shape not in ((seq,), (batch, seq)):
        raise ValueError(
            f"{op}: positions must have shape ({seq},) or ({batch}, {seq}), "
            f"got {positions.shape}"
        )
