"""The predicates of block masks inside a kernel: a tile of pairs at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._block_lists import FULL, PARTIAL
from ._block_mask import BlockMask
from ._block_predicates import Blocks, Both, Either, Segments, Tiles
from ._mgpu import plgpu

TILE = 128


def readable(mask: BlockMask) -> tuple[Any, list[jax.Array]]:
    """The predicate's tree, and its data as a kernel can read them: tiles are whole."""
    fn = jax.tree.map(_readable, mask.mask_fn, is_leaf=_has_data)
    data, tree = jax.tree.flatten(fn)
    return tree, data


def _has_data(fn: Any) -> bool:
    return isinstance(fn, Segments | Tiles)


def _readable(fn: Any) -> Any:
    match fn:
        case Segments(ids):
            missing = -ids.shape[-1] % TILE
            return Segments(jnp.pad(ids.astype(jnp.int32), [(0, 0)] * 2 + [(0, missing)]))
        case Tiles(tile_of, bits, size):
            places = jnp.arange(8, dtype=jnp.uint8)
            bits = jnp.asarray(bits)[..., None] >> places & 1
            bits = bits.reshape(*bits.shape[:-2], -1)[..., :size]
            return Tiles(tile_of, bits.astype(jnp.int8), size)
    return fn


def visible_in(tree, data, batch, head, q, k, sizes, q_axis: int, kv_len: int):
    """Which pairs of the tile from (q, k) attend; queries lie along `q_axis`."""
    fn = jax.tree.unflatten(tree, data)
    starts = [q, k] if q_axis == 0 else [k, q]
    positions = [
        start
        + plgpu.broadcasted_iota(jnp.int32, sizes, axis, layout=plgpu.Layout.WGMMA)
        for axis, start in enumerate(starts)
    ]
    at_q, at_k = positions[q_axis], positions[1 - q_axis]

    def index(ref, *rest):
        pair = zip((batch, head), ref.shape, strict=False)
        return *(i if n > 1 else 0 for i, n in pair), *rest

    def of_tokens(ref, axis):
        row = ref.at[index(ref, pl_ds(starts[axis], sizes[axis]))]
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        values = plgpu.load(row, layout=layout, optimized=False)
        return lax.broadcast_in_dim(values, sizes, [axis])

    def ask(fn):
        match fn:
            case Both(first, second):
                return ask(first) & ask(second)
            case Either(first, second):
                return ask(first) | ask(second)
            case Segments(ids):
                return of_tokens(ids, 0) == of_tokens(ids, 1)
            case Blocks(states, inner, size):
                state = states[index(states, q // size, k // size)].astype(jnp.int32)
                state = jnp.broadcast_to(state, sizes)
                if inner is None:
                    return state == FULL
                return (state == FULL) | ((state == PARTIAL) & ask(inner))
            case Tiles(tile_of, bits, size):
                tile = tile_of[index(tile_of, q // size, k // size)]
                raise NotImplementedError(tile, bits)
        return jnp.broadcast_to(fn(batch, head, at_q, at_k), sizes)

    return ask(fn) & (at_k < kv_len)


def pl_ds(start, size):
    from jax.experimental import pallas as pl

    return pl.ds(start, size)
