"""Which tile a block of the attention kernels takes when, and where its lists are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._block_lists import BlockLists
from ._mgpu import multiprocessors

# Keys and values, or queries, that heads walk at the same time are to stay in L2, of
# which an H100 and an H200 have 50 MB.
L2_BYTES = 32e6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """In the order in which tiles are taken; block i takes every n-th from the i-th.

    place: batch, head and number of a tile, (items, 3).
    rows: where the lists of its rows lie, (items, lanes, heads, 4): number of partial
        blocks, their first entry in `indices[0]`, and of full ones in `indices[1]`.
    """

    place: Any
    rows: Any
    indices: Sequence[Any]


def make_schedule(
    lists: tuple[BlockLists, BlockLists],
    shape: tuple[int, int, int],
    heads: int,
    lane_rows: tuple[int, int],
    block_size: int,
    head_bytes: float,
) -> Schedule:
    """Of the tiles (batch, heads, tokens) that are held, for `heads` walked by each.

    The longest first, so that those that end last are short; every other round goes the
    other way. Heads whose walked tiles fit in L2 together go together.

    lane_rows: how many lanes walk a row of their own, and the tokens of each.
    """
    batch, held_heads, seq = shape
    lanes, tokens = lane_rows
    tiles = pl.cdiv(seq, lanes * tokens)
    row = jnp.arange(lanes * tiles) * tokens // block_size
    found = [_lookup(x, row, batch, held_heads * heads) for x in lists]
    rows = jnp.stack([x for pair in found for x in pair], -1)
    rows = rows.reshape(batch, held_heads, heads, tiles, lanes, 4)
    rows = rows.transpose(0, 1, 3, 4, 2, 5)
    place = jnp.stack(jnp.indices(rows.shape[:3]), -1).reshape(-1, 3)
    length = rows[..., 0::2].sum((-1, -2)).max(-1).ravel()
    order = _order(length, tiles, head_bytes)
    indices = [jnp.asarray(x.indices).ravel() for x in lists]
    rows = rows.reshape(-1, lanes, heads, 4)
    return Schedule(
        place[order].astype(jnp.int32), rows[order].astype(jnp.int32), indices
    )


def _lookup(lists: BlockLists, row, batch: int, heads: int):
    """Number of blocks and first entry, (batch, heads, rows); none past the end."""
    counts, starts, indices = (
        jnp.asarray(x) for x in (lists.num_blocks, lists.starts, lists.indices)
    )
    mask_batch, mask_heads, entries = indices.shape
    head = jnp.arange(mask_batch * mask_heads).reshape(mask_batch, mask_heads, 1)
    counts = counts.at[..., row].get(mode="fill", fill_value=0)
    starts = starts.at[..., row].get(mode="fill", fill_value=0) + head * entries
    return [jnp.broadcast_to(x, (batch, heads, len(row))) for x in (counts, starts)]


def _order(length, tiles: int, head_bytes: float):
    items = len(length)
    at_once = max(1, int(L2_BYTES // head_bytes)) * tiles
    order = jnp.lexsort((-length, jnp.arange(items) // at_once))
    programs = min(multiprocessors(), items)
    at = jnp.arange(items)
    turn, place = at // programs, at % programs
    back = (turn % 2 == 1) & (turn < items // programs)
    return order[turn * programs + jnp.where(back, programs - 1 - place, place)]
