"""2:4 sparsity: of each group of 4 neighbours on the last axis, at most 2 are kept.

A last axis that is not a multiple of 4 ends in a shorter group; what it lacks counts as
zeros that are never kept before an entry that is there.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped, UInt8

from ._checks import (
    Implementation,
    check_batched,
    check_floating,
    check_shape,
    check_xla_only,
    raise_unknown,
)
from ._matmul import matmul

GROUP = 4
KEPT = 2
POSITION_BITS = 2
POSITIONS_PER_BYTE = 4
# The original's, so that a group of zeros has a probability at all.
MVUE_EPSILON = 1.1920929e-7
# For what a short group lacks: too light to be drawn before an entry that is there.
MVUE_ABSENT = 1e-30

Method = Literal["top2", "soft", "mvue", "static"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed24:
    """A 2:4-sparse array in 9/16 of its bytes (for 16-bit values).

    values: the two kept entries of each group, in ascending order of position,
        (..., 2 * ceil(features / 4)).
    indices: their positions in the group, 2 bits each, four to a byte and the lowest
        bits first, uint8 (..., ceil(values / 4)).
    features: the length of the last axis before it was packed.
    """

    values: jax.Array
    indices: jax.Array
    features: int = field(metadata={"static": True})


def _group(x: Shaped[Array, "*batch features"]) -> Shaped[Array, "*batch groups 4"]:
    *batch, features = x.shape
    missing = -features % GROUP
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, missing)])
    # Not -1 for the groups: there may be no rows to tell it from.
    return x.reshape(*batch, (features + missing) // GROUP, GROUP)


def _ungroup(
    groups: Shaped[Array, "*batch groups size"], features: int
) -> Shaped[Array, "*batch features"]:
    *batch, count, size = groups.shape
    return groups.reshape(*batch, count * size)[..., :features]


@jax.jit
def _two_largest(
    scores: Float[Array, "*batch groups 4"],
) -> Bool[Array, "*batch groups 4"]:
    """Exactly two of each group; of equal scores those at the lower positions."""
    # A NaN counts as the largest, so that selecting does not hide it.
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    position = jnp.arange(GROUP)
    ahead = jnp.zeros(scores.shape, jnp.int8)
    for i in range(GROUP):
        other = scores[..., i : i + 1]
        beats = (other > scores) | ((other == scores) & (i < position))
        ahead += beats.astype(jnp.int8)
    return ahead < KEPT


@jax.jit
def _shrink(
    groups: Float[Array, "*batch groups 4"], scale: Float[Array, ""] | float | None
) -> Float[Array, "*batch groups 4"]:
    wide = groups.astype(jnp.float32)
    magnitude = jnp.abs(wide)
    a, b, c, d = (magnitude[..., i : i + 1] for i in range(GROUP))
    # Of two sorted pairs the second smallest is the higher low or the lower high.
    higher_low = jnp.maximum(jnp.minimum(a, b), jnp.minimum(c, d))
    lower_high = jnp.minimum(jnp.maximum(a, b), jnp.maximum(c, d))
    second_smallest = jnp.minimum(higher_low, lower_high)
    shrunk = wide - jnp.clip(wide, -second_smallest, second_smallest)
    if scale is None:
        energy = jnp.square(shrunk).sum((-2, -1), keepdims=True)
        overlap = (wide * shrunk).sum((-2, -1), keepdims=True)
        scale = jnp.where(energy > 0, overlap / jnp.where(energy > 0, energy, 1), 1)
    return (scale * shrunk).astype(groups.dtype)


@partial(jax.jit, static_argnames="features")
def _draw(
    groups: Float[Array, "*batch groups 4"], features: int, key: PRNGKeyArray
) -> Float[Array, "*batch groups 4"]:
    wide = groups.astype(jnp.float32)
    present = _group(jnp.ones(features)) > 0
    weight = jnp.where(present, jnp.abs(wide) + MVUE_EPSILON, MVUE_ABSENT)
    others = 1 - jnp.eye(GROUP)
    # Summed, not subtracted from the total: one entry may outweigh the rest by 1e7.
    rest = (weight[..., None, :] * others).sum(-1)
    first = weight / weight.sum(-1, keepdims=True)
    second = weight * ((first / rest)[..., None, :] * others).sum(-1)
    # The two first in this race are drawn by weight, without replacement.
    drawn = _two_largest(jnp.log(weight) + jax.random.gumbel(key, weight.shape))
    return jnp.where(drawn, wide / (first + second), 0).astype(groups.dtype)


@jax.custom_jvp
def _straight_through(value: Array, x: Array) -> Array:
    """`value`, with the derivative of `x`."""
    del x
    return value


_straight_through.defjvps(None, lambda x_dot, out, value, x: x_dot)


def sparsify_2_4(
    x: Float[Array, "*batch features"],
    *,
    method: Method = "top2",
    key: PRNGKeyArray | None = None,
    scale: Float[Array, ""] | float | None = None,
) -> Float[Array, "*batch features"]:
    r"""Keep at most two entries of each group of four on the last axis.

    For the entries $a_0 ... a_3$ of a group:

    - "top2" keeps the two of largest $|a_i|$, of equal ones those that come first.
      Gradient: exact, the mask times the incoming one.
    - "soft" keeps $\beta\,\mathrm{sign}(a_i)(|a_i| - t)$ with $t$ the group's second
      smallest $|a_i|$, continuous in $a$. $\beta$ is `scale`; where that is None it is
      $\langle a, S\rangle / \langle S, S\rangle$ of each row (1 where $S = 0$), which
      makes $\|a - \beta S\|$ least. Rows of leading axes stay independent; for the
      original's one $\beta$ of a whole weight, compute it once and pass it.
      Gradient: the identity, as in the original (straight through).
    - "mvue" draws $i$ with probability $b_i/B$, then $j \ne i$ with $b_j/(B - b_i)$,
      where $b_i = |a_i| + 2^{-23}$ and $B = \sum b_i$, and keeps $a_i/p_i$, with $p_i$
      the chance that $i$ is among the two: the result's mean is `x`.
      Gradient: the identity, the derivative of that mean.
    - "static" keeps the entries at positions 0 and 1, whatever they are.
      Gradient: exact.

    "soft" and "mvue" compute in float32 whatever the dtype of `x`.

    Args:
        key: for "mvue", which needs one; the other methods take none.
        scale: for "soft" only.

    Raises:
        TypeError: `x` is no floating-point array.
        ValueError: the method is unknown, or `key` or `scale` does not go with it.

    References:
        top2: https://arxiv.org/abs/2104.08378; soft (S-STE, eq. 8-10):
        https://arxiv.org/abs/2409.09099; mvue: https://arxiv.org/abs/2203.10991.
    """
    op = "sparsify_2_4"
    check_floating(op, x=x)
    check_batched(op, "x", x)
    if method not in get_args(Method):
        raise_unknown(op, "method", method, get_args(Method))
    if (key is None) == (method == "mvue"):
        got = "none" if key is None else f"one with method={method!r}"
        raise ValueError(f"{op}: key must be given for method='mvue' only, got {got}")
    if scale is not None and method != "soft":
        raise ValueError(
            f"{op}: scale must be given for method='soft' only, got method={method!r}"
        )
    features = x.shape[-1]
    match method:
        case "top2":
            groups = _group(x)
            kept = jnp.where(_two_largest(jnp.abs(groups)), groups, 0)
            return _ungroup(kept, features)
        case "soft":
            return _straight_through(_ungroup(_shrink(_group(x), scale), features), x)
        case "mvue":
            assert key is not None
            return _straight_through(
                _ungroup(_draw(_group(x), features, key), features), x
            )
        case "static":
            return jnp.where(jnp.arange(features) % GROUP < KEPT, x, 0)


def _at(positions: UInt8[Array, "*batch groups 2"]) -> Bool[Array, "*batch groups 2 4"]:
    return positions[..., None] == jnp.arange(GROUP)


def pack_2_4(x: Float[Array, "*batch features"]) -> Packed24:
    """Store only the two entries of each group that `sparsify_2_4(x)` keeps.

    `unpack_2_4(pack_2_4(x))` is `sparsify_2_4(x)`, so nothing is lost of an `x` that is
    2:4-sparse already. Differentiable in `x`.

    Raises:
        TypeError: `x` is no floating-point array.
        ValueError: `x` has no features.
    """
    check_floating("pack_2_4", x=x)
    check_batched("pack_2_4", "x", x)
    groups = _group(x)
    largest = _two_largest(jnp.abs(groups))
    first = jnp.argmax(largest, axis=-1)
    last = GROUP - 1 - jnp.argmax(largest[..., ::-1], axis=-1)
    positions = jnp.stack([first, last], axis=-1).astype(jnp.uint8)
    values = jnp.where(_at(positions), groups[..., None, :], 0).sum(-1)
    kept = KEPT * groups.shape[-2]
    positions = _ungroup(positions, kept)
    return Packed24(_ungroup(values, kept), _pack_bits(positions), x.shape[-1])


@jax.jit
def _pack_bits(positions: UInt8[Array, "*batch kept"]) -> UInt8[Array, "*batch bytes"]:
    quads = _group(positions)
    shifts = POSITION_BITS * jnp.arange(POSITIONS_PER_BYTE, dtype=jnp.uint8)
    return (quads << shifts).sum(-1, dtype=jnp.uint8)


@partial(jax.jit, static_argnames="kept")
def _unpack_bits(
    packed: UInt8[Array, "*batch bytes"], kept: int
) -> UInt8[Array, "*batch kept"]:
    shifts = POSITION_BITS * jnp.arange(POSITIONS_PER_BYTE, dtype=jnp.uint8)
    return _ungroup((packed[..., None] >> shifts) % GROUP, kept)


def unpack_2_4(packed: Packed24) -> Float[Array, "*batch features"]:
    """The array that was packed, zeros put back.

    Differentiable in `packed.values`.

    Raises:
        TypeError: the values are no floating-point array.
        ValueError: the shapes of values and indices do not fit the features.
    """
    op = "unpack_2_4"
    values, indices, features = packed.values, packed.indices, packed.features
    check_floating(op, values=values)
    check_batched(op, "values", values)
    batch, kept = values.shape[:-1], KEPT * -(-features // GROUP)
    check_shape(op, "values", values, (*batch, kept))
    check_shape(op, "indices", indices, (*batch, -(-kept // POSITIONS_PER_BYTE)))
    pairs = *batch, kept // KEPT, KEPT
    positions, values = (
        _unpack_bits(indices, kept).reshape(pairs),
        values.reshape(pairs),
    )
    return _ungroup(jnp.where(_at(positions), values[..., None], 0).sum(-2), features)


def matmul_2_4(
    packed: Packed24,
    w: Float[Array, "features d_out"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    """`unpack_2_4(packed) @ w`.

    "xla" emulates the sparse matmul: it unpacks and multiplies densely, so it saves
    memory, not time.

    Raises:
        TypeError: a dtype is not floating-point, or the two differ.
        ValueError: `w` does not have `packed.features` rows.
        NotImplementedError: `implementation` is "mosaic_gpu", which has no kernel yet.
    """
    op = "matmul_2_4"
    check_xla_only(op, implementation)
    check_floating(op, values=packed.values, w=w)
    check_shape(op, "w", w, (packed.features, "d_out"))
    return matmul(unpack_2_4(packed), w)
