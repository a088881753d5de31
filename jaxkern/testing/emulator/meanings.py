"""The meanings of this library's inline functions, as jnp functions of their arrays.

A kernel's `plgpu.inline_mgpu` writes instructions, which the emulator cannot run. It
calls what `MEANINGS` has for the inline function instead, with the options that the
kernel bound to it by `functools.partial`.
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
    """Compute `select_two_of_four`: values, words and, where values shrink, sums."""
    groups = x.reshape(ROWS, WORD_COLUMNS // GROUP, GROUP)
    # Numbers are compared by their bits, as in the kernel: a NaN is the largest.
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
    """Unpack values (64, columns / 2) and words (columns / 64, 128) to (64, columns).

    A group is NaN if its two positions do not rise, for which hardware defines no
    result.
    """
    columns, indices = values.shape[1] * GROUP // KEPT, indices_of(words[None])
    positions = unpack_bits(indices, values.shape[1]).reshape(ROWS, -1, KEPT)
    rise = jnp.repeat(positions[..., 0] < positions[..., 1], GROUP, axis=1)
    return jnp.where(rise, unpack(Packed24(values, indices, columns)), jnp.nan)


def added_sparse_product(acc, values, words, right, *, transposed: bool, swizzle: int):
    """Compute `sparse_wgmma`: add the product of a sparse and a dense factor."""
    del swizzle
    right = right.T if transposed else right
    sparse = dense(values, words).astype(jnp.float32)
    return acc + jnp.dot(sparse, right.astype(jnp.float32), precision="highest")


MEANINGS: dict[Any, Callable[..., Any]] = {
    select_two_of_four: selected,
    sparse_wgmma: added_sparse_product,
}
