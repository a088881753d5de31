"""Which tiles a block of the attention kernels takes, and where their lists are."""

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
# What a tile takes beside its steps: to load it, to store it, and for both to begin.
STEPS_OF_A_TILE = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """Tiles in the order in which they are taken, those of one block together.

    blocks: the first tile of a block, and how many there are, (blocks, 2).
    place: batch, head and number of a tile, (items, 3).
    rows: where the lists of its rows lie, (items, lanes, heads, 4): number of partial
        blocks, their first entry in `indices[0]`, and of full ones in `indices[1]`.
    """

    blocks: Any
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

    Every block has about as much to do, and takes heads whose walked tiles fit in L2
    together one after the other.

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
    length = STEPS_OF_A_TILE + rows[..., 0::2].sum((-1, -2)).max(-1).ravel()
    count = min(multiprocessors(), len(place))
    block = assign(length, count)
    together = max(1, int(L2_BYTES // head_bytes)) * tiles
    order = jnp.lexsort((-length, jnp.arange(len(place)) // together, block))
    counts = jnp.bincount(block, length=count)
    blocks = jnp.stack([jnp.cumsum(counts) - counts, counts], -1)
    rows = rows.reshape(-1, lanes, heads, 4)
    blocks, place, rows = (
        x.astype(jnp.int32) for x in (blocks, place[order], rows[order])
    )
    indices = [jnp.asarray(x.indices).ravel() for x in lists]
    return Schedule(blocks, place, rows, indices)


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


def assign(length: jax.Array, count: int) -> jax.Array:
    """Which of `count` blocks takes each tile, so that the busiest has little to do.

    By falling length, one round after the other, every other one backwards; but only as
    long as no block has more than its share. The rest fill what the blocks have left of
    their shares, in order, or go on in rounds if that ends sooner. In a fixed number of
    steps, which a GPU takes in microseconds; the best is within a few percent.
    """
    tiles = len(length)
    order = jnp.argsort(-length)
    falling = length[order]
    at = jnp.arange(tiles)
    turn, place = at // count, at % count
    in_turn = jnp.where(turn % 2 == 1, count - 1 - place, place)
    loads = jnp.zeros((pl.cdiv(tiles, count), count), length.dtype)
    loads = loads.at[turn, in_turn].set(falling).cumsum(0)
    share = -(-falling.sum() // count)
    rounds = (loads.max(1) <= share).sum()
    begun = jnp.where(rounds > 0, loads[jnp.maximum(rounds - 1, 0)], 0)
    rest = jnp.where(turn >= rounds, falling, 0)
    middle = rest.cumsum() - rest / 2
    filled = jnp.searchsorted((share - begun).cumsum(), middle, side="right")
    filled = jnp.where(turn >= rounds, jnp.minimum(filled, count - 1), in_turn)
    busiest = jnp.bincount(filled, falling, length=count).max()
    block = jnp.where(busiest < loads[-1].max(), filled, in_turn)
    return jnp.zeros_like(block).at[order].set(block)
