"""2:4-sparse arrays as they are stored."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from .._core.checks import (
    check_array,
    check_batched,
    check_floating,
    check_shape,
    kind_of,
)
from .._core.sharding import on_automatic_axes
from .._core.trees import ArrayTree, register
from .select import GROUP, KEPT, group, last_index, magnitude, two_largest, ungroup

POSITION_BITS = 2
POSITIONS_PER_BYTE = 4


@register
@dataclass(frozen=True, eq=False)
class Packed24(ArrayTree):
    """A 2:4-sparse array in 9/16 of its bytes (for 16-bit values).

    Two with the same arrays are equal. It pickles, and `jax.export` serializes it.

    values: the two kept entries of each group, in ascending order of position,
        (..., 2 * ceil(features / 4)).
    indices: their positions in the group, 2 bits each, four to a byte and the lowest
        bits first, uint8 (..., ceil(values / 4)).
    features: the length of the last axis before it was packed.
    """

    values: jax.Array
    indices: jax.Array
    features: int = field(metadata={"static": True})


def one_hot(
    positions: UInt8[Array, "*batch groups 2"],
) -> Bool[Array, "*batch groups 2 4"]:
    return positions[..., None] == last_index((*positions.shape, GROUP))


def pack_bits(positions: UInt8[Array, "*batch kept"]) -> UInt8[Array, "*batch bytes"]:
    quads = group(positions)
    return (quads << (POSITION_BITS * last_index(quads.shape))).sum(-1, dtype=jnp.uint8)


def unpack_bits(
    packed: UInt8[Array, "*batch bytes"], kept: int
) -> UInt8[Array, "*batch kept"]:
    shift = POSITION_BITS * last_index((*packed.shape, POSITIONS_PER_BYTE))
    return ungroup((packed[..., None] >> shift) % GROUP, kept)


def unpack(packed: Packed24) -> Float[Array, "*batch features"]:
    return _unpack(packed.values, packed.indices, packed.features)


@on_automatic_axes(lambda values: values)
@partial(jax.jit, static_argnames="features")
def _unpack(
    values: Float[Array, "*batch kept"],
    indices: UInt8[Array, "*batch bytes"],
    features: int,
) -> Float[Array, "*batch features"]:
    *batch, kept = values.shape
    pairs = *batch, kept // KEPT, KEPT
    positions = unpack_bits(indices, kept).reshape(pairs)
    values = values.reshape(pairs)
    spread = jnp.where(one_hot(positions), values[..., None], 0).sum(-2)
    return ungroup(spread, features)


def pack_2_4(x: Float[Array, "*batch features"]) -> Packed24:
    """Store only the two entries of each group that `sparsify_2_4(x)` keeps.

    `unpack_2_4(pack_2_4(x))` is `sparsify_2_4(x)`, so nothing is lost of an `x` that is
    2:4-sparse already. Differentiable in `x`.

    Raises:
        TypeError: `x` is no floating-point array.
        ValueError: `x` has no features.
    """
    (x,) = check_floating("pack_2_4", x=x)
    check_batched("pack_2_4", "x", x)
    values, indices = _pack(x)
    return Packed24(values, indices, x.shape[-1])


@on_automatic_axes(lambda x: (x, x))
@jax.jit
def _pack(
    x: Float[Array, "*batch features"],
) -> tuple[Float[Array, "*batch kept"], UInt8[Array, "*batch bytes"]]:
    groups = group(x)
    largest = two_largest(magnitude(groups))
    first = jnp.argmax(largest, axis=-1)
    last = GROUP - 1 - jnp.argmax(largest[..., ::-1], axis=-1)
    positions = jnp.stack([first, last], axis=-1).astype(jnp.uint8)
    values = jnp.where(one_hot(positions), groups[..., None, :], 0).sum(-1)
    kept = KEPT * groups.shape[-2]
    positions = ungroup(positions, kept)
    return ungroup(values, kept), pack_bits(positions)


def check_packed_24(op: str, packed: Packed24, name: str = "packed") -> Packed24:
    """`packed` has the dtypes and shapes that `pack_2_4` gives it.

    Returns it with JAX's arrays.
    """
    if not isinstance(packed, Packed24):
        kind = kind_of(packed)
        raise TypeError(f"{op}: {name} must be a Packed24, got {kind}")
    values, indices, features = packed.values, packed.indices, packed.features
    (values,) = check_floating(op, values=values)
    check_batched(op, "values", values)
    check_array(op, "indices", indices, "integer")
    if indices.dtype != jnp.uint8:
        raise TypeError(f"{op}: indices must be uint8, got {indices.dtype}")
    batch, kept = values.shape[:-1], KEPT * -(-features // GROUP)
    check_shape(op, "values", values, (*batch, kept))
    check_shape(op, "indices", indices, (*batch, -(-kept // POSITIONS_PER_BYTE)))
    return Packed24(values, jnp.asarray(indices), features)


def unpack_2_4(packed: Packed24) -> Float[Array, "*batch features"]:
    """The array that was packed, zeros put back.

    Differentiable in `packed.values`.

    Raises:
        TypeError: `packed` is no Packed24, or has other dtypes than `pack_2_4` gives.
        ValueError: the shapes of values and indices do not fit the features.
    """
    return unpack(check_packed_24("unpack_2_4", packed))
