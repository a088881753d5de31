"""One tile of logits in XLA: a step of the online softmax, and its gradients.

`tiling.py`, the block-sparse op and the rings use these steps, on tiles of their own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._core.precision import widen, widen_range


def normalize(
    summed: Float[Array, "*rows dim"],
    top: Float[Array, "*rows"],
    total: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows dim"], Float[Array, "*rows"]]:
    """Return output and log-sum-exp, from sums that are weighted by exp(logit - top).

    Rows to which nothing was added give 0 and `nothing`, with gradient 0.
    """
    seen = total != 0
    divisor = jnp.where(seen, total, 1)
    lse = jnp.where(seen, jnp.log(divisor) + top, nothing(top.dtype))
    return jnp.where(seen[..., None], summed / divisor[..., None], 0), lse


def nothing(dtype: jnp.dtype) -> float:
    """Return what stands for -inf in logits and log-sum-exps, until a user gets them.

    It is finite, so that `jax.debug_infs` reports only infinities of the user's own
    numbers.
    """
    return float(jnp.finfo(dtype).min) / 2


def finite(top: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return `top`, or more where exp(nothing - top) would not be 0."""
    # XLA's CPU backend fuses a maximum into the product before it, but not a select.
    return jnp.maximum(top, _least(top.dtype))


def sees(lse: Float[Array, "*rows"]) -> Bool[Array, "*rows"]:
    """Return whether each row saw some key.

    A row that saw none has `nothing`, or -inf where a kernel wrote it.
    """
    return lse > _least(lse.dtype)


# Under jit, `jax.debug_infs` looks at the result only, which has no -inf where every
# row sees some key.
@jax.jit
def with_infinity(lse: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return the log-sum-exp as users get it: -inf without a key, and no gradient."""
    return jnp.where(sees(lse), lse, -jnp.inf)


def _least(dtype: jnp.dtype) -> float:
    return nothing(dtype) / 2


class Carry(NamedTuple):
    """The state of the online softmax: sums over the keys that queries met so far.

    Attributes:
        summed: values, weighted by exp(logit - top).
        top: the largest logit.
        total: the sum of the weights.
    """

    summed: Float[Array, "*batch groups rows dim_v"]
    top: Float[Array, "*batch groups rows"]
    total: Float[Array, "*batch groups rows"]


def empty_carry(query: Float[Array, "*tile dim"], dim_v: int) -> Carry:
    zero = zeros_of(query[..., :1])
    summed = jnp.broadcast_to(zero, (*query.shape[:-1], dim_v))
    return Carry(summed, zero[..., 0] + nothing(zero.dtype), zero[..., 0])


def zeros_of(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return zeros of the shape of `x`, in float32 or wider, on the same mesh axes."""
    # jnp.zeros_like forgets explicit mesh axes where no mesh is set.
    return jnp.where(False, widen(x), 0)


def _multiply(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Round `a` to the dtype of `b`, and multiply with sums in float32 or wider."""
    wide = b.dtype if b.dtype.itemsize > 4 else jnp.float32
    return jnp.einsum(pattern, a.astype(b.dtype), b, preferred_element_type=wide)


def tile_logits(
    query: Float[Array, "*batch groups rows dim"],
    key: Float[Array, "*batch columns dim"],
    visible: Bool[Array, "..."] | None,
    scale: float,
) -> Float[Array, "*batch groups rows columns"]:
    """Return the logits of one tile, `nothing` where a query does not see a key."""
    logits = _multiply("...gqd,...sd->...gqs", query, key) * scale
    if visible is None:
        return logits
    visible = jnp.expand_dims(visible, range(logits.ndim - visible.ndim))
    return jnp.where(visible, logits, nothing(logits.dtype))


def add_tile(
    carry: Carry,
    logits: Float[Array, "*batch groups rows columns"],
    value: Float[Array, "*batch columns dim_v"],
) -> Carry:
    """Return the carry after one more tile of keys: a step of the online softmax."""
    # The weights are relative to the tile's own maximum. With the running maximum they
    # would wait for the carry, which took up to 1.2 times as long on two CPU cores.
    own = logits.max(-1)
    weights = jnp.exp(logits - finite(own)[..., None])
    top = jnp.maximum(carry.top, own)
    before, now = (jnp.exp(x - finite(top)) for x in (carry.top, own))
    summed = _multiply("...gqs,...sd->...gqd", weights, value)
    return Carry(
        carry.summed * before[..., None] + summed * now[..., None],
        top,
        carry.total * before + weights.sum(-1) * now,
    )


def tile_gradients(
    logits: Float[Array, "*batch groups rows columns"],
    query: Float[Array, "*batch groups rows dim"],
    key: Float[Array, "*batch columns dim"],
    value: Float[Array, "*batch columns dim_v"],
    d_out: Float[Array, "*batch groups rows dim_v"],
    lse: Float[Array, "*batch groups rows"],
    delta: Float[Array, "*batch groups rows"],
    scale: float,
) -> tuple[
    Float[Array, "*batch groups rows dim"],
    Float[Array, "*batch columns dim"],
    Float[Array, "*batch columns dim_v"],
]:
    """Return what one tile adds to the gradients of query, key and value, in float32.

    Args:
        lse: over all keys.
        delta: sum(d_out * out) - d_lse of each row.
    """
    weights = jnp.exp(logits - finite(lse)[..., None])
    d_weights = _multiply("...gqd,...sd->...gqs", d_out, widen_range(value))
    d_logits = weights * (d_weights - delta[..., None]) * scale
    return (
        _multiply("...gqs,...sd->...gqd", d_logits, widen_range(key)),
        _multiply("...gqs,...gqd->...sd", d_logits, widen_range(query)),
        _multiply("...gqs,...gqd->...sd", weights, widen_range(d_out)),
    )


def cotangents_of(
    out: Float[Array, "*rows dim_v"],
    lse: Float[Array, "*rows"],
    d_out: Float[Array, "*rows dim_v"],
    d_lse: Float[Array, "*rows"],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "*rows dim_v"], Float[Array, "*rows"]]:
    """Return `d_out` and `delta` as `tile_gradients` takes them.

    Both are 0 in rows that see nothing. The weights are 0 there too, but 0 times a NaN
    or an infinity would be NaN.

    Args:
        out: not rounded to 16 bits. Most of a query's gradient cancels where it sees
            few keys, and the rounding error of `out` would be what is left.
        dtype: the dtype of the op's arguments, to which `d_out` is rounded. For float16
            it keeps its own range, since it may be too small. Kernels multiply a
            rounded `d_out`, and `delta` must be of the same one: in rows that see few
            keys the two cancel.
    """
    seen = sees(lse)
    if dtype == jnp.float16:
        # The digits of float16, and the range of float32.
        d_out = lax.reduce_precision(d_out, exponent_bits=8, mantissa_bits=10)
    else:
        d_out = d_out.astype(dtype)
    d_out = jnp.where(seen[..., None], d_out, 0)
    # Without this barrier XLA fuses the sum with the transposition and stacking that
    # the kernels need. That took 451 us on an H200 at (4, 4096, 16, 128), where reading
    # the arrays takes about 60.
    delta = lax.optimization_barrier((widen(d_out) * widen(out)).sum(-1))
    return d_out, delta - jnp.where(seen, d_lse, 0)


def pad_axis(
    x: Shaped[Array, "..."], axis: int, before: int, after: int, fill: float = 0
) -> Shaped[Array, "..."]:
    """Return `x` with entries of `fill` added before and after an axis."""
    widths = [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)
