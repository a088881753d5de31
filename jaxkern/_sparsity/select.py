"""2:4 selection: at most two of each group of four neighbours on the last axis stay.

A last axis whose size is not a multiple of 4 ends in a shorter group. What this group
lacks counts as zeros, which are never kept before an entry that is there.
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

# Entries of a group.
GROUP = 4
# Entries of a group that are kept at most.
KEPT = 2
# 2 ** -23, as in the code of the MVUE paper. Without this, a group of zeros would have
# no probabilities.
MVUE_EPSILON = 1.1920929e-7
# The weight of what a short group lacks: too small to be drawn before an entry that is
# there.
MVUE_ABSENT = 1e-30

Method = Literal["top2", "soft", "mvue", "static"]
SelectionGradient = Literal["exact", "straight_through"]


def group(x: Shaped[Array, "*batch features"]) -> Shaped[Array, "*batch groups 4"]:
    """Split the last axis into groups of 4, filled up with zeros."""
    *batch, features = x.shape
    missing = -features % GROUP
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, missing)])
    # The number of groups is not -1, which JAX cannot infer for an array without rows.
    return x.reshape(*batch, (features + missing) // GROUP, GROUP)


def ungroup(
    groups: Shaped[Array, "*batch groups size"], features: int
) -> Shaped[Array, "*batch features"]:
    """Join the groups again, without what filled up the last one."""
    *batch, count, size = groups.shape
    return groups.reshape(*batch, count * size)[..., :features]


def last_index(shape: tuple[int, ...]) -> UInt8[Array, "..."]:
    """Return the index along the last axis, which must be short enough for uint8."""
    return lax.broadcasted_iota(jnp.uint8, shape, len(shape) - 1)


def two_largest(
    scores: Shaped[Array, "*batch groups 4"],
) -> Bool[Array, "*batch groups 4"]:
    """Select exactly two entries of each group; of equal scores, the first ones."""
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
    """Return the bits of |x|, which are ordered as |x| is, with NaN above all."""
    bits = jnp.dtype(f"uint{8 * groups.dtype.itemsize}")
    return lax.bitcast_convert_type(jnp.abs(groups), bits)


def _shrink(groups: Float[Array, "*batch groups 4"]) -> Float[Array, "*batch groups 4"]:
    """Soft-threshold each group by its second smallest magnitude."""
    a, b, c, d = (jnp.abs(groups[..., i : i + 1]) for i in range(GROUP))
    # In two sorted pairs, the second smallest of all four is the smaller of the higher
    # minimum and the lower maximum.
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
    # Without this division by the row's largest, squares would overflow or vanish.
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
    """Draw two entries of each group and divide them by their probabilities."""
    wide = widen(groups)
    index = group(jnp.arange(1, features + 1))
    present = jnp.broadcast_to(index > 0, wide.shape)
    weight = jnp.where(present, jnp.abs(wide) + MVUE_EPSILON, MVUE_ABSENT)

    def sum_of_others(x):
        # A sum, not the total minus one: one may outweigh the others by 1e7, and their
        # sum would be lost in the difference.
        return jnp.stack(
            [sum(x[..., j] for j in range(GROUP) if j != i) for i in range(GROUP)], -1
        )

    first = weight / weight.sum(-1, keepdims=True)
    second = weight * sum_of_others(first / sum_of_others(weight))
    # The two largest of log(weight) + Gumbel noise are a draw by weight without
    # replacement. Without mode="high" the noise would end too early for light entries,
    # whose chance lies in its far tail.
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

    $$y = M \odot \tilde x, \qquad \sum_{i \in \mathrm{group}} M_i \le 2$$

    The method decides which entries stay (the mask $M$) and with which values
    $\tilde x$. For the entries $a_0 ... a_3$ of a group:

    - "top2" keeps the two of largest $|a_i|$, and of equal ones the first. Default
      gradient: exact.
    - "soft" keeps $\beta\,\mathrm{sign}(a_i)\max(|a_i| - t, 0)$, which is continuous in
      $a$; $t$ is the second smallest $|a_i|$ of the group. $\beta$ is `scale`. If that
      is None, each row has the $\beta$ that minimizes $\|a - \beta S\|$, namely
      $\langle a, S\rangle / \langle S, S\rangle$, where $S$ is the result for
      $\beta = 1$ (and $\beta = 1$ where $S = 0$). The paper has one $\beta$ for a whole
      weight: compute it once and pass it. Default gradient: straight-through, as in the
      paper.
    - "mvue" draws $i$ with probability $b_i/B$, then $j \ne i$ with $b_j/(B - b_i)$,
      where $b_i = |a_i| + 2^{-23}$ and $B = \sum b_i$. It keeps $a_i/p_i$, where $p_i$
      is the probability that $i$ is one of the two, so the mean of the result is `x`.
      Default gradient: straight-through, which is the derivative of that mean.
    - "static" keeps the entries at positions 0 and 1, whatever they are. Default
      gradient: exact.

    `gradient` overrides the default. With $d$ the gradient of $y$:

    - "exact" gives $M \odot d$, the derivative. For "soft" it is the derivative of the
      whole formula, with $t$, $\beta$ and a given `scale`. "mvue" has no derivative.
    - "straight_through" gives $d$, as if all entries had been kept, and no gradient for
      `scale`. Entries that were dropped learn what they would have done and may come
      back. For "top2" and "static" it is biased by $(1 - M) \odot d$.

    "soft" and "mvue" compute in float32, or float64 if `x` is; $a_i/p_i$ can overflow
    float16. A NaN counts as the largest entry, so it stays. Where devices share the
    last axis inside `jax.shard_map`, groups start anew on each: give each device a
    multiple of four features, and for "soft" without `scale` the whole row.

    Args:
        x: The array to select from.
        method: The rule of selection, see above.
        key: The random key of "mvue", which needs one. The other methods take none.
        scale: The factor $\beta$ of "soft". The other methods take none.
        gradient: The rule of the backward pass, see above. None is the method's
            default.

    Returns:
        An array like `x` whose dropped entries are 0.

    Raises:
        TypeError: `x` is not a floating-point array, "mvue" has no key, or `scale` is
            not one number.
        ValueError: The method is unknown, or `key`, `scale` or `gradient` does not go
            with it.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        x = jnp.array([3.0, -1.0, 2.0, -4.0])
        print(jaxkern.sparsify_2_4(x))
        print(jaxkern.sparsify_2_4(x, method="soft", scale=1.0))
        print(jax.grad(lambda x: jaxkern.sparsify_2_4(x).sum())(x))
        ```
        ```text
        [ 3.  0.  0. -4.]
        [ 1.  0.  0. -2.]
        [1. 0. 0. 1.]
        ```

    References:
        top2: Accelerating Sparse Deep Neural Networks,
            https://arxiv.org/abs/2104.08378.
        straight_through: https://arxiv.org/abs/1308.3432.
        soft: S-STE, eq. 8-10, https://arxiv.org/abs/2409.09099.
        mvue: https://arxiv.org/abs/2203.10991.
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
