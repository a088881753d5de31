"""2:4 sparsity: of each group of 4 neighbours on the last axis, at most 2 are kept.

A last axis that is not a multiple of 4 ends in a shorter group; what it lacks counts as
zeros that are never kept before an entry that is there.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped, UInt, UInt8

from .._core.checks import (
    check_batched,
    check_floating,
    check_key,
    check_number,
    raise_unknown,
)
from .._core.gradients import with_derivative_of
from .._core.precision import widen
from .._core.sharding import on_automatic_axes

# Entries of a group, and how many of them are kept.
GROUP = 4
KEPT = 2
# The original's, so that a group of zeros has a probability at all.
MVUE_EPSILON = 1.1920929e-7
# For what a short group lacks: too light to be drawn before an entry that is there.
MVUE_ABSENT = 1e-30

Method = Literal["top2", "soft", "mvue", "static"]
SelectionGradient = Literal["exact", "straight_through"]


def group(x: Shaped[Array, "*batch features"]) -> Shaped[Array, "*batch groups 4"]:
    *batch, features = x.shape
    missing = -features % GROUP
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, missing)])
    # Not -1 for the groups: there may be no rows to tell it from.
    return x.reshape(*batch, (features + missing) // GROUP, GROUP)


def ungroup(
    groups: Shaped[Array, "*batch groups size"], features: int
) -> Shaped[Array, "*batch features"]:
    *batch, count, size = groups.shape
    return groups.reshape(*batch, count * size)[..., :features]


def last_index(shape: tuple[int, ...]) -> UInt8[Array, "..."]:
    """The index along the last axis, which is short."""
    return lax.broadcasted_iota(jnp.uint8, shape, len(shape) - 1)


def two_largest(
    scores: Shaped[Array, "*batch groups 4"],
) -> Bool[Array, "*batch groups 4"]:
    """Exactly two of each group; of equal scores those at the lower positions."""
    position = last_index(scores.shape)
    ahead = jnp.zeros(scores.shape, jnp.int32)
    for i in range(GROUP):
        other = scores[..., i : i + 1]
        beats = (other > scores) | ((other == scores) & (i < position))
        ahead += beats.astype(jnp.int32)
    return ahead < KEPT


def magnitude(
    groups: Float[Array, "*batch groups 4"],
) -> UInt[Array, "*batch groups 4"]:
    """The bits of |x|: ordered as |x|, with NaN above all, so that it is not hidden."""
    bits = jnp.dtype(f"uint{8 * groups.dtype.itemsize}")
    return lax.bitcast_convert_type(jnp.abs(groups), bits)


def _shrink(groups: Float[Array, "*batch groups 4"]) -> Float[Array, "*batch groups 4"]:
    a, b, c, d = (jnp.abs(groups[..., i : i + 1]) for i in range(GROUP))
    # Of two sorted pairs the second smallest is the higher low or the lower high.
    higher_low = jnp.maximum(jnp.minimum(a, b), jnp.minimum(c, d))
    lower_high = jnp.minimum(jnp.maximum(a, b), jnp.maximum(c, d))
    second_smallest = jnp.minimum(higher_low, lower_high)
    return groups - jnp.clip(groups, -second_smallest, second_smallest)


def _soft(
    x: Float[Array, "*batch features"], scale: Float[Array, ""] | float | None
) -> Float[Array, "*batch features"]:
    wide, features = widen(x), x.shape[-1]
    if scale is not None:
        return ungroup(scale * _shrink(group(wide)), features).astype(x.dtype)
    # Over the row's largest, so that no square overflows or vanishes.
    largest = jnp.abs(wide).max(-1, keepdims=True)
    unit = group(wide / jnp.where(largest > 0, largest, 1))
    shrunk = _shrink(unit)
    energy = jnp.square(shrunk).sum((-2, -1), keepdims=True)
    overlap = (unit * shrunk).sum((-2, -1), keepdims=True)
    scale = jnp.where(energy > 0, overlap / jnp.where(energy > 0, energy, 1), 1)
    return ungroup(largest[..., None] * (scale * shrunk), features).astype(x.dtype)


def _draw(
    groups: Float[Array, "*batch groups 4"], features: int, key: PRNGKeyArray
) -> Float[Array, "*batch groups 4"]:
    wide = widen(groups)
    index = group(jnp.arange(1, features + 1))
    present = jnp.broadcast_to(index > 0, wide.shape)
    weight = jnp.where(present, jnp.abs(wide) + MVUE_EPSILON, MVUE_ABSENT)

    def sum_of_others(x):
        # Summed, not subtracted from the total: one may outweigh the rest by 1e7.
        return jnp.stack(
            [sum(x[..., j] for j in range(GROUP) if j != i) for i in range(GROUP)], -1
        )

    first = weight / weight.sum(-1, keepdims=True)
    second = weight * sum_of_others(first / sum_of_others(weight))
    # The two first in this race are drawn by weight, without replacement. The mode is
    # for the light ones, whose chance lies in the noise's far tail.
    noise = jax.random.gumbel(key, weight.shape, weight.dtype, mode="high")
    drawn = two_largest(jnp.log(weight) + noise)
    return jnp.where(drawn, wide / (first + second), 0).astype(groups.dtype)


def sparsify_2_4(
    x: Float[Array, "*batch features"],
    *,
    method: Method = "top2",
    key: PRNGKeyArray | None = None,
    scale: Float[Array, ""] | float | None = None,
    gradient: SelectionGradient | None = None,
) -> Float[Array, "*batch features"]:
    r"""Keep at most two entries of each group of four on the last axis.

    For the entries $a_0 ... a_3$ of a group:

    - "top2" keeps the two of largest $|a_i|$, of equal ones those that come first.
      SelectionGradient: exact.
    - "soft" keeps $\beta\,\mathrm{sign}(a_i)(|a_i| - t)$ with $t$ the group's second
      smallest $|a_i|$, continuous in $a$. $\beta$ is `scale`; where that is None it is
      $\langle a, S\rangle / \langle S, S\rangle$ of each row (1 where $S = 0$), which
      makes $\|a - \beta S\|$ least. Rows of leading axes stay independent; for the
      original's one $\beta$ of a whole weight, compute it once and pass it.
      SelectionGradient: straight through, as in the original.
    - "mvue" draws $i$ with probability $b_i/B$, then $j \ne i$ with $b_j/(B - b_i)$,
      where $b_i = |a_i| + 2^{-23}$ and $B = \sum b_i$, and keeps $a_i/p_i$, with $p_i$
      the chance that $i$ is among the two: the result's mean is `x`.
      SelectionGradient: straight through, which is the derivative of that mean.
    - "static" keeps the entries at positions 0 and 1, whatever they are.
      SelectionGradient: exact.

    `gradient` names another, for the incoming $d'$ and the mask $M$ of what is kept:

    - "exact" is the derivative, $M \odot d'$; of "soft" that of its whole formula,
      $t$, $\beta$ and a given `scale` included. "mvue" has none, since it draws.
    - "straight_through" is $d'$, as if all had been kept, and nothing for `scale`. It
      tells an entry that was dropped what it would have done, so that it may come
      back, and is biased by $(1 - M) \odot d'$ for "top2" and "static".

    "soft" and "mvue" compute in float32, or float64 if `x` is; $a_i/p_i$ can overflow
    float16. A NaN counts as the largest, so it stays. On a shard of the last axis the
    groups start anew: give each device a multiple of four features, and for "soft"
    without `scale` the whole row.

    Args:
        key: for "mvue", which needs one; the other methods take none.
        scale: for "soft" only.

    Raises:
        TypeError: `x` is no floating-point array, "mvue" has no key, or `scale` is not
            one number.
        ValueError: the method is unknown, or `key`, `scale` or `gradient` does not go
            with it.

    References:
        top2: https://arxiv.org/abs/2104.08378; straight-through:
        https://arxiv.org/abs/1308.3432; soft (S-STE, eq. 8-10):
        https://arxiv.org/abs/2409.09099; mvue: https://arxiv.org/abs/2203.10991.
    """
    op = "sparsify_2_4"
    (x,) = check_floating(op, x=x)
    check_batched(op, "x", x)
    _check_options(op, method, key, scale, gradient)
    if gradient is None:
        gradient = "exact" if method in ("top2", "static") else "straight_through"
    return _sparsify(x, key, scale, method, gradient)


@on_automatic_axes(lambda x: x)
@partial(jax.jit, static_argnames=("method", "gradient"))
def _sparsify(
    x: Float[Array, "*batch features"],
    key: PRNGKeyArray | None,
    scale: Float[Array, ""] | float | None,
    method: Method,
    gradient: SelectionGradient,
) -> Float[Array, "*batch features"]:
    features = x.shape[-1]
    match method:
        case "top2":
            groups = group(x)
            kept = jnp.where(two_largest(magnitude(groups)), groups, 0)
            kept = ungroup(kept, features)
        case "soft":
            kept = _soft(x, scale)
        case "mvue":
            assert key is not None
            kept = ungroup(_draw(group(x), features, key), features)
        case "static":
            index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
            kept = jnp.where(index % GROUP < KEPT, x, 0)
    return kept if gradient == "exact" else with_derivative_of(kept, x)


def _check_options(
    op: str, method: object, key: object, scale: Any, gradient: object
) -> None:
    if method not in get_args(Method):
        raise_unknown(op, "method", method, get_args(Method))
    if method == "mvue":
        check_key(op, key, ", for method='mvue'")
    elif key is not None:
        raise ValueError(
            f"{op}: key must be given for method='mvue' only, got one for {method!r}"
        )
    if scale is not None and method != "soft":
        raise ValueError(
            f"{op}: scale must be given for method='soft' only, got one for {method!r}"
        )
    if scale is not None:
        check_number(op, "scale", scale, finite=False, traced=True)
    valid = (None, *get_args(SelectionGradient))
    if gradient not in valid:
        raise_unknown(op, "gradient", gradient, valid)
    if gradient == "exact" and method == "mvue":
        raise ValueError(
            f"{op}: gradient must be None or 'straight_through' for method='mvue', "
            f"got {gradient!r}"
        )
