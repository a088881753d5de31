"""The inline functions of this library's kernels, as jnp functions of their arrays.

A kernel's `plgpu.inline_mgpu` writes instructions, which an emulator cannot read: it
asks `MEANINGS` for what they compute. Options that a kernel binds to an inline function
by `functools.partial` are its meaning's too.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..._sparsity.hopper.wgmma import (
    CHUNK,
    ROWS,
    STORED,
    WORD_COLUMNS,
    indices_of,
    select_two_of_four,
    sparse_wgmma,
    words_of,
)
from ..._sparsity.packed import GROUP, KEPT, Packed24, pack_bits, unpack, unpack_bits


def selected(x, *, shrink: bool) -> Any:
    """`select_two_of_four`: values, words and, where they shrink, sums."""
    groups = x.reshape(ROWS, WORD_COLUMNS // GROUP, GROUP)
    # By their bits, as threads do: a NaN is the largest.
    bits = lax.bitcast_convert_type(groups, jnp.uint16).astype(jnp.int32)
    order = jnp.argsort(-bits, axis=-1, stable=True)
    kept = jnp.sort(order[..., :KEPT], axis=-1)
    values = jnp.take_along_axis(groups, kept, axis=-1).astype(jnp.float32)
    indices = pack_bits(kept.reshape(ROWS, STORED).astype(jnp.uint8))
    padded = jnp.pad(indices, [(0, ROWS), (0, 8)])
    words = words_of(padded, 2 * WORD_COLUMNS)[0, 0]
    if not shrink:
        return values.astype(x.dtype).reshape(ROWS, STORED), words
    third = jnp.take_along_axis(groups, order[..., 2:3], axis=-1).astype(jnp.float32)
    shrunk = (values - third).astype(x.dtype)
    wide = shrunk.astype(jnp.float32)
    per_chunk = ROWS, WORD_COLUMNS // CHUNK, -1
    sums = [(values * wide).reshape(per_chunk), (wide * wide).reshape(per_chunk)]
    sums = jnp.stack([one.sum(-1) for one in sums], axis=-1).reshape(ROWS, 8)
    return shrunk.reshape(ROWS, STORED), words, sums


def dense(values, words):
    """(64, columns) of values (64, columns / 2) and words (columns / 64, 128).

    NaN where the two positions of a group do not rise: hardware does not define that.
    """
    columns, indices = values.shape[1] * GROUP // KEPT, indices_of(words[None])
    positions = unpack_bits(indices, values.shape[1]).reshape(ROWS, -1, KEPT)
    rise = jnp.repeat(positions[..., 0] < positions[..., 1], GROUP, axis=1)
    return jnp.where(rise, unpack(Packed24(values, indices, columns)), jnp.nan)


def added_sparse_product(acc, values, words, right, *, transposed: bool, swizzle: int):
    """`sparse_wgmma`."""
    del swizzle
    right = right.T if transposed else right
    sparse = dense(values, words).astype(jnp.float32)
    return acc + jnp.dot(sparse, right.astype(jnp.float32), precision="highest")


MEANINGS: dict[Any, Callable[..., Any]] = {
    select_two_of_four: selected,
    sparse_wgmma: added_sparse_product,
}
