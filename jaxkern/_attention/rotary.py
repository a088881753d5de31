"""Rotary position embedding."""

from decimal import Decimal, localcontext
from functools import cache
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from .._core.checks import (
    check_array,
    check_floating,
    check_number,
    check_shape,
    raise_unknown,
)
from .._core.precision import widen

Pairs = Literal["interleaved", "halves", "mismatched"]
# 1 / (2 pi), to more digits than the product of two 64-bit integers has.
TURNS_A_RADIAN = Decimal("0.15915494309189533576888376337251436203445964574046")
DIGITS = 50


def rotary_embedding(
    x: Float[Array, "batch seq heads dim"],
    positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
    *,
    rope_theta: float = 1e4,
    pairs: Pairs = "interleaved",
) -> Float[Array, "batch seq heads dim"]:
    r"""Rotate pairs of features by angles that grow with the token's position.

    $$y_a = x_a \cos p\,\omega_i - x_b \sin p\,\omega_i, \quad
    y_b = x_a \sin p\,\omega_i + x_b \cos p\,\omega_i, \quad
    \omega_i = \theta^{-2i / \mathrm{dim}}$$

    where $p$ is the position and $\theta$ is `rope_theta`. The product of a query and a
    key so rotated depends on their positions only through the difference. `pairs` says
    which features $(a, b)$ are pair $i$:

    - "interleaved": $(2i, 2i + 1)$, as in the paper;
    - "halves": $(i, i + \mathrm{dim}/2)$, as in the weights of GPT-NeoX and LLaMA; the
      same as "interleaved" up to an order of the features;
    - "mismatched": the pairs of "interleaved" with the angles of "halves", so that the
      two members of a pair turn by different angles: $p\,\omega_{a \bmod
      \mathrm{dim}/2}$ in $y_a$ and $p\,\omega_{b \bmod \mathrm{dim}/2}$ in $y_b$. This
      is no rotation, and products depend on more than the difference of positions. It
      is for weights that were trained with it: the checkpoints of three layers with
      squared attention and bilinear MLPs, trained on SimpleStories, whose architecture
      is `QuadraticTransformer(4096, 512, num_heads=8, num_layers=3)`. Their code stores
      sines and cosines for halves and applies them to interleaved pairs.

    Angles, sines and products are float32, float64 if `x` is; the result is rounded
    once. An angle is reduced modulo $2 \pi$ in exact integer arithmetic before it is
    rounded, so that it is off by at most 4e-7 at any position, where the float32
    product $p\,\omega_i$ is off by 0.03 at a million.

    ```python
    >>> import jax.numpy as jnp, jaxkern, numpy as np
    >>> x = jnp.ones((1, 3, 1, 2))
    >>> print(np.asarray(jaxkern.rotary_embedding(x))[0, :, 0].round(3))
    [[ 1.     1.   ]
     [-0.301  1.382]
     [-1.325  0.493]]

    ```

    Args:
        positions: of the tokens, of any sign and integer dtype; None for 0, 1, ...
            NumPy's must fit in 32 bits where JAX's 64-bit types are off.
        rope_theta: a number known when traced.

    Raises:
        TypeError: `x` is no floating-point array, `positions` no integer array, or
            `rope_theta` no number.
        ValueError: the shapes do not fit, dim is odd, `rope_theta` is not positive and
            finite, `pairs` is unknown, or a position does not fit in 32 bits.

    References:
        RoFormer, eq. 34: https://arxiv.org/abs/2104.09864.
    """
    op = "rotary_embedding"
    (x,) = check_floating(op, x=x)
    check_shape(op, "x", x, ("batch", "seq", "heads", "dim"))
    batch, seq, _, dim = x.shape
    if dim % 2:
        raise ValueError(f"{op}: dim must be even, got {dim}")
    check_number(op, "rope_theta", rope_theta, positive=True)
    if pairs not in get_args(Pairs):
        raise_unknown(op, "pairs", pairs, get_args(Pairs))
    if positions is None:
        positions = jnp.arange(seq)
    positions = _check_positions(op, positions, batch, seq)
    wide = widen(x)
    if positions.ndim == 1:
        positions = positions[None]
    order = np.arange(dim // 2)
    order = np.repeat(order, 2) if pairs == "interleaved" else np.tile(order, 2)
    angles = _angles(positions, float(rope_theta), order, wide.dtype)[:, :, None]
    rotated = wide * jnp.cos(angles) + _quarter_turn(wide, pairs) * jnp.sin(angles)
    return rotated.astype(x.dtype)


def _quarter_turn(x: jax.Array, pairs: Pairs) -> jax.Array:
    """(-b, a) in the places of each pair (a, b)."""
    if pairs == "halves":
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([-b, a], axis=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([-b, a], axis=-1).reshape(x.shape)


def _angles(
    positions: jax.Array, theta: float, order: np.ndarray, dtype: jnp.dtype
) -> jax.Array:
    """Return positions * theta ** (-order / len), modulo a whole turn."""
    bits = 8 * max(positions.dtype.itemsize, dtype.itemsize, 4)
    half, unsigned = bits // 2, np.dtype(f"uint{bits}")
    whole, rest = (x[None, None, order] for x in _turns(theta, len(order) // 2, bits))
    p = positions[..., None]
    # Without the sign; that of the least integer is right as an unsigned one.
    size = abs(p).astype(unsigned)
    # A turn is 2**bits: the lower bits of a product are its place in the turn. Of what
    # is less than a unit only the upper bits of the product count.
    high, low = size >> half, size & (2**half - 1)
    rest_high, rest_low = rest >> half, rest & (2**half - 1)
    turned = size * whole + high * rest_high
    turned += ((high * rest_low) >> half) + ((low * rest_high) >> half)
    turned = jnp.where(p < 0, -turned, turned).astype(f"int{bits}")
    return turned.astype(dtype) * np.asarray(2 * np.pi / 2**bits, dtype)


@cache
def _turns(theta: float, count: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return theta ** (-i / count) / (2 pi), whole and rest, in 2 ** -bits turns."""
    with localcontext(prec=DIGITS) as exact:
        base, scale = Decimal(theta), TURNS_A_RADIAN * 4**bits
        turns = [exact.power(base, -Decimal(i) / count) * scale for i in range(count)]
    # The turns beyond the first one are none.
    parts = [divmod(int(x) % 4**bits, 2**bits) for x in turns]
    whole, rest = np.array(parts, f"uint{bits}").T
    return whole, rest


def _check_positions(
    op: str, positions: jax.Array | np.ndarray, batch: int, seq: int
) -> jax.Array:
    """In at least 32 bits; NumPy's in 32 unless 64-bit types are on."""
    check_array(op, "positions", positions, "integer")
    if positions.shape not in ((seq,), (batch, seq)):
        raise ValueError(
            f"{op}: positions must have shape ({seq},) or ({batch}, {seq}), "
            f"got {positions.shape}"
        )
    if positions.dtype.itemsize < 4:
        return jnp.asarray(positions, jnp.int32)
    narrow = jax.dtypes.canonicalize_dtype(positions.dtype)
    if narrow == positions.dtype or positions.size == 0:
        return jnp.asarray(positions)
    least, most = int(positions.min()), int(positions.max())
    for dtype in (jnp.int32, jnp.uint32):
        if jnp.iinfo(dtype).min <= least and most <= jnp.iinfo(dtype).max:
            return jnp.asarray(positions, dtype)
    raise ValueError(
        f"{op}: positions must fit in int32 or in uint32 unless jax_enable_x64 is on, "
        f"got {least} to {most}"
    )
