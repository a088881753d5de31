"""The keys and values that decoding keeps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer


class KVCache(NamedTuple):
    """The keys and values of the tokens so far, of all layers, and their number.

    `TransformerLM.make_cache` makes an empty one, and `TransformerLM.extend` returns
    one with more tokens. It is a named tuple, a pytree, and `jax.export` serializes it.
    Two are equal if their arrays are.

    A layer with a window of w tokens keeps the last w only: token t is in place t mod
    w. Any other layer keeps token t in place t.

    Attributes:
        keys: The rotated keys of the layers without a window; None if there are none.
        values: The values of these layers.
        length: The number of tokens, one for all sequences or one for each.
        window_keys: The rotated keys of the layers with a window; None if there are
            none.
        window_values: The values of these layers.

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

    keys: Float[Array, "layers batch capacity kv_heads dim"] | None
    values: Float[Array, "layers batch capacity kv_heads dim"] | None
    length: Integer[Array, ""] | Integer[Array, " batch"]
    window_keys: Float[Array, "window_layers batch window kv_heads dim"] | None = None
    window_values: Float[Array, "window_layers batch window kv_heads dim"] | None = None

    def positions(self, seq: int) -> Integer[Array, "rows {seq}"]:
        """Return the positions of `seq` new tokens, of all rows or of each."""
        order = jnp.arange(seq, dtype=self.length.dtype)
        return self.length.reshape(-1, 1) + order[None]

    # Without these methods a comparison of named tuples would ask arrays for their
    # truth value, which they do not have.
    def __eq__(self, other: object) -> bool:
        """Whether all arrays are equal; not under `jit`."""
        if not isinstance(other, KVCache):
            return False
        pairs: Any = zip(self, other, strict=True)
        return all(np.array_equal(ours, others) for ours, others in pairs)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise TypeError("unhashable type: 'KVCache'")


export.register_namedtuple_serialization(KVCache, serialized_name="jaxkern.nn.KVCache")


def places_with_cache(tokens: P) -> tuple[P, KVCache]:
    """Say where features and cache lie, by the placement of the tokens."""
    batch = tokens[:1]
    kept = P(None, *batch)
    return P(*batch), KVCache._make([kept, kept, P(), kept, kept])


def empty_cache(
    windows: Sequence[int | None], shape: tuple[int, int, int, int], dtype: Any
) -> KVCache:
    """Make an empty cache.

    Args:
        windows: The window of each layer.
        shape: The shape (batch, capacity, kv_heads, dim) of a layer without a window.
        dtype: The dtype of keys and values.
    """
    batch, capacity, *features = shape
    sizes = [w for w in windows if w is not None]

    def make(layers, places):
        if not layers:
            return None
        return jnp.zeros((layers, batch, places, *features), dtype)

    # Each array is made anew: one array in two fields could not be donated.
    (keys, values), (window_keys, window_values) = (
        [make(layers, places) for _ in range(2)]
        for layers, places in (
            (len(windows) - len(sizes), capacity),
            (len(sizes), min([capacity, *sizes])),
        )
    )
    length = jnp.zeros((), jnp.int32)
    return KVCache(keys, values, length, window_keys, window_values)


def remember(
    cache: KVCache,
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    *,
    window: int | None,
    number: int | Integer[Array, ""],
    count: int | Integer[Array, " batch"],
) -> tuple[KVCache, jax.Array, jax.Array, Integer[Array, "rows places"]]:
    """Put new keys and values of one layer behind a cache.

    Args:
        cache: The cache, whose length stays the same.
        key: The keys of the new tokens.
        value: Their values.
        window: The window of the layer, or None.
        number: The number of the layer among those that have a window, or have none.
        count: How many of the new tokens are kept, the first ones.

    Returns:
        The cache, the keys and values that the new tokens may see, and the positions of
        these, which are negative where there is no token.
    """
    names = "keys", "values"
    if window is not None:
        names = "window_keys", "window_values"
    kept = [getattr(cache, name) for name in names]
    batch, places = kept[0].shape[1:3]
    positions = cache.positions(key.shape[1])
    start = cache.length.reshape(-1, 1)
    end = start + jnp.reshape(jnp.asarray(count, start.dtype), (-1, 1))
    # Only the last tokens have a place. The others are put beyond the end, and dropped.
    stays = (positions < end) & (positions >= end - places)
    slots = jnp.where(stays, positions % places, places)
    rows = jnp.arange(batch)[:, None]
    grown = [
        old.at[number, rows, slots].set(new.astype(old.dtype), mode="drop")
        for old, new in zip(kept, (key, value), strict=True)
    ]
    cache = cache._replace(**dict(zip(names, grown, strict=True)))
    if key.shape[1] == 1 or places != window:
        key, value = (x[number] for x in grown)
        return cache, key, value, _positions(end, places)
    # The last of several new tokens take places of old ones that the first still see.
    key, value = (
        jnp.concatenate([old[number], new.astype(old.dtype)], 1)
        for old, new in zip(kept, (key, value), strict=True)
    )
    before = _positions(start, places)
    positions = jnp.broadcast_to(positions, (len(before), positions.shape[1]))
    return cache, key, value, jnp.concatenate([before, positions], 1)


def _positions(end, places):
    """Return the position of the token in each place, negative where there is none.

    It is the last one before `end` that belongs there.
    """
    last = end - 1
    return last - (last - jnp.arange(places, dtype=end.dtype)[None]) % places
