"""2:4-sparse arrays as they are stored."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped, UInt8

GROUP = 4
KEPT = 2
POSITION_BITS = 2
POSITIONS_PER_BYTE = 4


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


def one_hot(
    positions: UInt8[Array, "*batch groups 2"],
) -> Bool[Array, "*batch groups 2 4"]:
    return positions[..., None] == last_index((*positions.shape, GROUP))


@jax.jit
def pack_bits(positions: UInt8[Array, "*batch kept"]) -> UInt8[Array, "*batch bytes"]:
    quads = group(positions)
    return (quads << (POSITION_BITS * last_index(quads.shape))).sum(-1, dtype=jnp.uint8)


@partial(jax.jit, static_argnames="kept")
def unpack_bits(
    packed: UInt8[Array, "*batch bytes"], kept: int
) -> UInt8[Array, "*batch kept"]:
    shift = POSITION_BITS * last_index((*packed.shape, POSITIONS_PER_BYTE))
    return ungroup((packed[..., None] >> shift) % GROUP, kept)


def unpack(packed: Packed24) -> Float[Array, "*batch features"]:
    *batch, kept = packed.values.shape
    pairs = *batch, kept // KEPT, KEPT
    positions = unpack_bits(packed.indices, kept).reshape(pairs)
    values = packed.values.reshape(pairs)
    spread = jnp.where(one_hot(positions), values[..., None], 0).sum(-2)
    return ungroup(spread, packed.features)
