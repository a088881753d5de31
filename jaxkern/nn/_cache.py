"""The keys and values that decoding keeps."""

from typing import NamedTuple

import numpy as np
from jax import export
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer


class KVCache(NamedTuple):
    """The keys and values of the tokens so far, of all layers, and their number.

    `TransformerLM.make_cache` makes an empty one, and `TransformerLM.extend` returns
    one with more tokens. It is a named tuple, a pytree, and `jax.export` serializes it.
    Two are equal if their arrays are.

    Attributes:
        keys: The rotated keys.
        values: The values.
        length: The number of tokens, one for all sequences or one for each.

    Examples:
        ```python
        import jax.numpy as jnp
        from jaxkern import nn

        empty = jnp.zeros((1, 2, 8, 2, 4))  # (layers, batch, capacity, kv_heads, dim)
        cache = nn.KVCache(empty, empty, jnp.int32(0))
        print(cache.keys.shape, cache.length)
        ```
        ```text
        (1, 2, 8, 2, 4) 0
        ```
    """

    keys: Float[Array, "layers batch capacity kv_heads dim"]
    values: Float[Array, "layers batch capacity kv_heads dim"]
    length: Integer[Array, ""] | Integer[Array, " batch"]

    # Without these methods a comparison of named tuples would ask arrays for their
    # truth value, which they do not have.
    def __eq__(self, other: object) -> bool:
        """Whether all arrays are equal; not under `jit`."""
        return isinstance(other, KVCache) and all(map(np.array_equal, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise TypeError("unhashable type: 'KVCache'")


export.register_namedtuple_serialization(KVCache, serialized_name="jaxkern.nn.KVCache")


def places_with_cache(tokens: P) -> tuple[P, KVCache]:
    """Say where features and cache lie, by the placement of the tokens."""
    batch = tokens[:1]
    return P(*batch), KVCache._make([P(None, *batch), P(None, *batch), P()])
