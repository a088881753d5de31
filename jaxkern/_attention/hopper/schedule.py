"""Which tiles a block of the attention kernels takes, and where their lists are.

Of lists in NumPy this is computed on the host, once for each launch that is traced, and
enters the program as constants. Of traced ones XLA computes the same in every call, in
some fifty small launches: about 100 us on an H200.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ..._core import device
from ..block_mask.runs import AnyArray, BlockLists, module_of

# What keys and values, or queries, that heads walk at the same time may take of L2, so
# that they stay there: an H100 and an H200 have 50 MB of it by their data sheets.
L2_CAPACITY_BYTES = 32e6
# What a tile takes beside its steps, in steps: it is loaded and stored, and both begin.
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
    xp = module_of(*(array for x in lists for array in x.arrays))
    batch, held_heads, seq = shape
    lanes, tokens = lane_rows
    tiles = pl.cdiv(seq, lanes * tokens)
    row = np.arange(lanes * tiles) * tokens // block_size
    found = [_lookup(x, row, batch, held_heads * heads) for x in lists]
    rows = xp.stack([x for pair in found for x in pair], -1)
    rows = rows.reshape(batch, held_heads, heads, tiles, lanes, 4)
    rows = rows.transpose(0, 1, 3, 4, 2, 5).reshape(-1, lanes, heads, 4)
    length = STEPS_OF_A_TILE + rows[..., 0::2].sum((-1, -2)).max(-1)
    count = min(device.multiprocessors(), len(rows))
    falling = xp.lexsort((-length,))
    block = assign(length[falling], count)
    together = max(1, int(L2_CAPACITY_BYTES // head_bytes)) * tiles
    # Stable, so that the tiles of one block and group still fall.
    order = falling[xp.lexsort((falling // together, block))]
    counts = _bincount(block, None, count)
    blocks = xp.stack([counts.cumsum() - counts, counts], -1)
    place = xp.stack(xp.unravel_index(order, (batch, held_heads, tiles)), -1)
    blocks, place, rows = (x.astype(np.int32) for x in (blocks, place, rows[order]))
    return Schedule(blocks, place, rows, [xp.ravel(x.indices) for x in lists])


def _lookup(lists: BlockLists, row: np.ndarray, batch: int, heads: int):
    """Number of blocks and first entry, (batch, heads, rows); none past the end.

    The lists of fewer batches repeat, as `vmap` over others than the mask wants it.
    """
    xp = module_of(*lists.arrays)
    mask_batch, mask_heads, entries = lists.indices.shape
    head = np.arange(mask_batch * mask_heads, dtype=np.int32).reshape(
        mask_batch, mask_heads, 1
    )
    row = np.minimum(row, lists.num_blocks.shape[2])
    counts, starts = (
        xp.pad(x, [(0, 0), (0, 0), (0, 1)])[..., row]
        for x in (lists.num_blocks, lists.starts)
    )
    shape = batch // mask_batch, mask_batch, heads, len(row)
    return [
        xp.broadcast_to(x, shape).reshape(batch, heads, len(row))
        for x in (counts, starts + head * entries)
    ]


def assign(falling: AnyArray, count: int) -> AnyArray:
    """Which of `count` blocks takes each tile, so that the busiest has little to do.

    By falling length, one round after the other, every other one backwards; but only as
    long as no block has more than its share. The rest fill what the blocks have left of
    their shares, in order, or go on in rounds if that ends sooner. In a fixed number of
    steps, as a program needs it; the best is within a few percent.
    """
    xp = module_of(falling)
    at = np.arange(len(falling))
    turn, place = at // count, at % count
    in_turn = np.where(turn % 2 == 1, count - 1 - place, place)
    loads = xp.pad(falling, (0, -len(falling) % count)).reshape(-1, count)
    backwards = np.arange(len(loads))[:, None] % 2 == 1
    loads = xp.where(backwards, loads[:, ::-1], loads).cumsum(0)
    share = -(-falling.sum() // count)
    rounds = (loads.max(1) <= share).sum()
    begun = xp.where(rounds > 0, loads[xp.maximum(rounds - 1, 0)], 0)
    rest = xp.where(turn >= rounds, falling, 0)
    # Twice what lies before a tile's middle, which then is an integer.
    middle = 2 * rest.cumsum() - rest
    filled = xp.searchsorted(2 * (share - begun).cumsum(), middle, side="right")
    filled = xp.minimum(filled, count - 1)
    in_turn = in_turn.astype(filled.dtype)
    filled = xp.where(turn >= rounds, filled, in_turn)
    busiest = _bincount(filled, falling, count).max()
    return xp.where(busiest < loads[-1].max(), filled, in_turn)


def _bincount(x: AnyArray, weights: AnyArray | None, count: int) -> AnyArray:
    if isinstance(x, np.ndarray):
        return np.bincount(x, weights, count)
    return jnp.bincount(x, weights, length=count)
