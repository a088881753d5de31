"""2:4-sparse arrays in the form in which they are stored."""

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

# Bits of a position in its group of four.
POSITION_BITS = 2
POSITIONS_PER_BYTE = 4


@register
@dataclass(frozen=True, eq=False)
class Packed24(ArrayTree):
    """A 2:4-sparse array that stores two of each four entries and their positions.

    With 16-bit values it takes 9/16 of the bytes of the dense array. `pack_2_4` makes
    it, `unpack_2_4` makes it dense again, and `matmul_2_4` multiplies by it. It is a
    pytree whose arrays are `values` and `indices`. Two are equal if their arrays are.
    It pickles, and `jax.export` serializes it.

    Attributes:
        values: The two kept entries of each group in ascending order of position, of
            shape (..., 2 ceil(features / 4)).
        indices: Their positions in the group, 2 bits each, four to a byte with the
            lowest bits first: uint8 (..., ceil(values / 4)).
        features: The size of the last axis before packing, a Python integer.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        packed = jaxkern.pack_2_4(jnp.array([0.0, 5.0, 0.0, 7.0]))
        print(packed.values, packed.indices, packed.features)
        ```
        ```text
        [5. 7.] [13] 4
        ```

    References:
        Accelerating Sparse Deep Neural Networks, section 3:
            https://arxiv.org/abs/2104.08378.
    """

    values: jax.Array
    indices: jax.Array
    features: int = field(metadata={"static": True})


def one_hot(
    positions: UInt8[Array, "*batch groups 2"],
) -> Bool[Array, "*batch groups 2 4"]:
    """Return a mask of the positions in their groups."""
    return positions[..., None] == last_index((*positions.shape, GROUP))


def pack_bits(positions: UInt8[Array, "*batch kept"]) -> UInt8[Array, "*batch bytes"]:
    """Pack positions of 2 bits into bytes."""
    quads = group(positions)
    return (quads << (POSITION_BITS * last_index(quads.shape))).sum(-1, dtype=jnp.uint8)


def unpack_bits(
    packed: UInt8[Array, "*batch bytes"], kept: int
) -> UInt8[Array, "*batch kept"]:
    """Unpack the first `kept` positions of 2 bits."""
    shift = POSITION_BITS * last_index((*packed.shape, POSITIONS_PER_BYTE))
    return ungroup((packed[..., None] >> shift) % GROUP, kept)


def unpack(packed: Packed24) -> Float[Array, "*batch features"]:
    """Unpack a `Packed24` whose arrays are known to fit."""
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
    r"""Store only the two entries of each group of four that are largest.

    $$\mathrm{unpack}(\mathrm{pack}(x)) = \mathrm{sparsify}(x)$$

    where sparsify is `sparsify_2_4` with "top2". An `x` that is 2:4-sparse already
    loses nothing. The values are differentiable in `x`.

    Args:
        x: The array to pack, along its last axis.

    Returns:
        The packed array.

    Raises:
        TypeError: `x` is not a floating-point array.
        ValueError: `x` has no axis, or no features.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        x = jnp.array([[3.0, 1.0, 2.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
        packed = jaxkern.pack_2_4(x)
        print(packed.values)
        print(jaxkern.unpack_2_4(packed))
        ```
        ```text
        [[3. 4.]
         [1. 0.]]
        [[3. 0. 0. 4.]
         [1. 0. 0. 0.]]
        ```

    References:
        Accelerating Sparse Deep Neural Networks, section 3:
            https://arxiv.org/abs/2104.08378.
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
    """Check that `packed` has the dtypes and shapes of a result of `pack_2_4`.

    Returns:
        It with JAX's arrays.
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
    r"""Return the dense array of a packed one, with zeros for what was dropped.

    $$\mathrm{unpack}(\mathrm{pack}(x)) = \mathrm{sparsify}(x)$$

    It is differentiable in `packed.values`.

    Args:
        packed: The packed array.

    Returns:
        The dense array, in the dtype of the values.

    Raises:
        TypeError: `packed` is not a `Packed24`, or its arrays have other dtypes than
            `pack_2_4` gives.
        ValueError: The shapes of values and indices do not fit the features.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        x = jnp.array([0.0, 5.0, 0.0, 7.0])
        assert jnp.array_equal(jaxkern.unpack_2_4(jaxkern.pack_2_4(x)), x)
        ```

    References:
        Accelerating Sparse Deep Neural Networks, section 3:
            https://arxiv.org/abs/2104.08378.
    """
    return unpack(check_packed_24("unpack_2_4", packed))
