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
    check_integer,
    check_number,
    check_shape,
    raise_unknown,
)
from .._core.precision import widen
from .rotary_scaling import (
    RotaryScaling,
    attention_factor,
    check_scaling,
    multipliers,
)

Pairs = Literal["interleaved", "halves", "mismatched"]
# 1 / (2 pi), to more digits than the product of two 64-bit integers has (39).
TURNS_A_RADIAN = Decimal("0.15915494309189533576888376337251436203445964574046")
# Decimal digits of the exact arithmetic on it.
DIGITS = 50


def rotary_embedding(
    x: Float[Array, "batch seq heads dim"],
    positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
    *,
    rope_theta: float = 1e4,
    pairs: Pairs = "interleaved",
    rotary_dim: int | None = None,
    scaling: RotaryScaling | None = None,
) -> Float[Array, "batch seq heads dim"]:
    r"""Rotate pairs of features by angles proportional to the position of the token.

    $$y_a = x_a \cos p\,\omega_i - x_b \sin p\,\omega_i, \qquad
    y_b = x_a \sin p\,\omega_i + x_b \cos p\,\omega_i, \qquad
    \omega_i = \theta^{-2i / \mathrm{dim}}$$

    Here $p$ is the position of the token and $\theta$ is `rope_theta`. The product of a
    rotated query and a rotated key depends on their positions only through the
    difference. `pairs` says which two features $(a, b)$ form pair $i$:

    - "interleaved": $(2i, 2i + 1)$, as in the paper.
    - "halves": $(i, i + \mathrm{dim}/2)$, as in the weights of GPT-NeoX and LLaMA. It
      equals "interleaved" up to the order of the features.
    - "mismatched": the pairs of "interleaved" with the angles of "halves". The two
      members of a pair turn by different angles: $p\,\omega_{a \bmod \mathrm{dim}/2}$
      in $y_a$ and $p\,\omega_{b \bmod \mathrm{dim}/2}$ in $y_b$. This is not a
      rotation, and products depend on more than the difference of positions. Use it
      only for weights that were trained with it: the published checkpoints of a
      three-layer model of squared attention and bilinear MLPs, trained on
      SimpleStories, whose architecture is `QuadraticTransformer(4096, 512, num_heads=8,
      num_layers=3)`. Their code stores sines and cosines for halves and applies them to
      interleaved pairs.

    Angles, sines and products are float32, or float64 if `x` is, and the result is
    rounded once to the dtype of `x`. Angles are reduced modulo $2\pi$ in integer
    arithmetic before they are rounded, so an angle is off by at most 4e-7 at any
    position. The float32 product $p\,\omega_i$ is off by 0.03 at position 1,000,000.

    Args:
        x: Queries or keys.
        positions: The position of each token, of any sign and integer dtype; None for
            0, 1, 2 and so on. NumPy arrays of 64 bits must have values that fit in 32
            bits, unless `jax_enable_x64` is on.
        rope_theta: The base of the frequencies, a Python number.
        pairs: The pairing of features, see above.
        rotary_dim: Rotate only the first `rotary_dim` features of a head, as if they
            were all, and leave the others, as Phi-4-mini and GPT-NeoX do; None rotates
            all.
        scaling: A change of the frequencies for long contexts, see `RotaryScaling`.

    Returns:
        The rotated features, in the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not a floating-point array, `positions` is not an integer
            array, `rope_theta` is not a number, or `scaling` is not a `RotaryScaling`.
        ValueError: The shapes do not fit, dim or `rotary_dim` is odd, `rotary_dim`
            exceeds dim, `rope_theta` is not positive and finite, or not above 1 for
            "yarn", `pairs` is unknown, `scaling` is for another number of pairs, or a
            position does not fit in 32 bits.

    Examples:
        Three tokens of one head with two features, rotated by 0, 1 and 2 radians:

        ```python
        import jax.numpy as jnp
        import jaxkern
        import numpy as np

        rotated = jaxkern.rotary_embedding(jnp.ones((1, 3, 1, 2)))
        print(np.asarray(rotated)[0, :, 0].round(3))
        ```
        ```text
        [[ 1.     1.   ]
         [-0.301  1.382]
         [-1.325  0.493]]
        ```

    References:
        RoFormer, eq. 34: https://arxiv.org/abs/2104.09864.
    """
    op = "rotary_embedding"
    (x,) = check_floating(op, x=x)
    check_shape(op, "x", x, ("batch", "seq", "heads", "dim"))
    batch, seq, _, dim = x.shape
    if rotary_dim is not None:
        rotary_dim = check_rotary_dim(op, rotary_dim, dim)
    elif dim % 2:
        raise ValueError(f"{op}: dim must be even, got {dim}")
    turned = dim if rotary_dim is None else rotary_dim
    check_number(op, "rope_theta", rope_theta, positive=True)
    if pairs not in get_args(Pairs):
        raise_unknown(op, "pairs", pairs, get_args(Pairs))
    if scaling is not None:
        check_scaling(op, "scaling", scaling, rope_theta, turned // 2)
    if positions is None:
        positions = jnp.arange(seq)
    positions = read_positions(op, positions, batch, seq)
    wide = widen(x[..., :turned])
    if positions.ndim == 1:
        positions = positions[None]
    order = np.arange(turned // 2)
    order = np.repeat(order, 2) if pairs == "interleaved" else np.tile(order, 2)
    turns = _turns(float(rope_theta), scaling, turned // 2, _bits(positions, wide))
    angles = _angles(positions, *turns, order, wide.dtype)[:, :, None]
    cos, sin = (attention_factor(scaling) * f(angles) for f in (jnp.cos, jnp.sin))
    rotated = (wide * cos + _quarter_turn(wide, pairs) * sin).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., turned:]], -1) if turned < dim else rotated


def check_rotary_dim(op: str, rotary_dim: object, dim: int) -> int:
    """Check that an even number of features, at most all, is rotated."""
    rotary_dim = check_integer(op, "rotary_dim", rotary_dim)
    if rotary_dim % 2 or rotary_dim > dim:
        raise ValueError(
            f"{op}: rotary_dim must be even and at most dim={dim}, got {rotary_dim}"
        )
    return rotary_dim


def _quarter_turn(x: jax.Array, pairs: Pairs) -> jax.Array:
    """Replace each pair (a, b) by (-b, a)."""
    if pairs == "halves":
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([-b, a], axis=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([-b, a], axis=-1).reshape(x.shape)


def _bits(positions: jax.Array, x: jax.Array) -> int:
    """Return the bits of the integers in which angles are reduced."""
    return 8 * max(positions.dtype.itemsize, x.dtype.itemsize, 4)


def _angles(
    positions: jax.Array,
    whole: np.ndarray,
    rest: np.ndarray,
    order: np.ndarray,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return positions * frequencies[order], modulo a whole turn."""
    unsigned = whole.dtype
    bits = 8 * unsigned.itemsize
    half = bits // 2
    whole, rest = whole[None, None, order], rest[None, None, order]
    p = positions[..., None]
    # The least integer has no positive counterpart, but its bits, read as an unsigned
    # integer, are its size.
    size = abs(p).astype(unsigned)
    # A turn is 2**bits units, so that integer overflow drops whole turns. Of the
    # product with the rest, which is less than a unit, only the upper bits count.
    high, low = size >> half, size & (2**half - 1)
    rest_high, rest_low = rest >> half, rest & (2**half - 1)
    turned = size * whole + high * rest_high
    turned += ((high * rest_low) >> half) + ((low * rest_high) >> half)
    turned = jnp.where(p < 0, -turned, turned).astype(f"int{bits}")
    return turned.astype(dtype) * np.asarray(2 * np.pi / 2**bits, dtype)


@cache
def _turns(
    theta: float, scaling: RotaryScaling | None, count: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies theta ** (-i / count), scaled, in 2 ** -bits turns.

    They are divided by 2 pi and split into their whole part and the rest.
    """
    factors = multipliers(scaling, theta, count)
    with localcontext(prec=DIGITS) as exact:
        base, scale = Decimal(theta), TURNS_A_RADIAN * 4**bits
        turns = [
            exact.power(base, -Decimal(i) / count) * Decimal(factor) * scale
            for i, factor in enumerate(factors)
        ]
    # Whole turns are dropped, since they do not change the angle.
    parts = [divmod(int(x) % 4**bits, 2**bits) for x in turns]
    whole, rest = np.array(parts, f"uint{bits}").T
    return whole, rest


def read_positions(
    op: str, positions: jax.Array | np.ndarray, batch: int, seq: int
) -> jax.Array:
    """Return the positions as a JAX array of at least 32 bits.

    NumPy arrays of 64 bits become 32 bits wide unless 64-bit types are on.
    """
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
