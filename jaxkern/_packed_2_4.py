"""2:4-sparse arrays as they are stored."""

from dataclasses import dataclass, field

import jax

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
