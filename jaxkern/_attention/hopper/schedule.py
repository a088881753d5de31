"""Say which tiles a block of the attention kernels takes, and where their lists are.

With lists in NumPy the host computes this, once for each launch that is traced, and the
program has it as constants. With traced lists XLA computes it in every call. That took
about 100 us on an H200, in some 40 small launches: see the rows of revision fbd33d7 in
benchmarks/results/nvidia_h200/launches.json.
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

# Bytes of the arrays that blocks walk at the same time, so that these stay in L2. An
# H100 and an H200 have 50 MB of L2 by their data sheets; the share is an estimate.
L2_CAPACITY_BYTES = 32e6
# The time to load and store a held tile, in listed blocks; an estimate.
STEPS_OF_A_TILE = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """The held tiles in the order in which blocks take them, block after block.

    Attributes:
        blocks: for each block its first tile and the number of its tiles, (blocks, 2).
        place: batch, head and number of each tile, (tiles, 3).
        rows: the lists of each tile, (tiles, lanes, heads, 4): how many partial blocks,
            where in `indices[0]` these begin, how many full blocks, and where in
            `indices[1]` those begin.
        indices: the columns of all partial blocks, and of all full blocks.
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
    """Give every block about as much to do.

    Consecutive heads whose walked arrays fit into L2 together are a group, and each
    block takes all its tiles of one group before those of the next.

    Args:
        lists: the partial and the full blocks of each row of held tokens.
        shape: batch, heads and length of the held tokens.
        heads: how many heads are walked for one held head.
        lane_rows: how many lists a tile walks side by side, and the tokens of each.
        block_size: tokens of one of the mask's blocks.
        head_bytes: bytes that are walked for one held head, divided by the number of
            held heads that walk the same.
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
    # This sort is stable, so the tiles of one block and group still fall in length.
    order = falling[xp.lexsort((falling // together, block))]
    counts = _bincount(block, None, count)
    blocks = xp.stack([counts.cumsum() - counts, counts], -1)
    place = xp.stack(xp.unravel_index(order, (batch, held_heads, tiles)), -1)
    blocks, place, rows = (x.astype(np.int32) for x in (blocks, place, rows[order]))
    return Schedule(blocks, place, rows, [xp.ravel(x.indices) for x in lists])


def _lookup(lists: BlockLists, row: np.ndarray, batch: int, heads: int):
    """Return the number of blocks and the first entry, (batch, heads, rows) each.

    Rows past the end have no blocks. Where the lists are for fewer batches they repeat,
    which is right under a `vmap` that does not map the mask.
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
    """Say which of `count` blocks takes each tile, so that the busiest ends early.

    The tiles come by falling length. In each round every block gets one, and every
    other round goes backwards. When a round would give some block more than an equal
    share of all work, the rest fill up what the blocks lack of their shares, in order;
    or they go on in rounds, if the busiest block then ends earlier. The number of steps
    is fixed, as a traced program needs it.
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
    # Twice the work that comes before a tile's middle. Half of it may be no integer.
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
