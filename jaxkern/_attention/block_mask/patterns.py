"""Block states of the named masks: which blocks are empty, partial or full."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Int, Int8

from .predicates import Band, Function, Tiles
from .runs import (
    EMPTY,
    FULL,
    PARTIAL,
    Runs,
    Shape,
    combine,
    distinct,
    ranges,
    runs_of_slices,
)


def blocks_of(length: Any, block_size: int) -> Any:
    """Return the number of blocks that a length fills, rounded up."""
    return -(-length // block_size)


def grid_of(seq_q: int, seq_kv: int, block_size: int) -> tuple[int, int]:
    """Return the number of blocks along each axis: (q_blocks, kv_blocks)."""
    return blocks_of(seq_q, block_size), blocks_of(seq_kv, block_size)


def inside(seq_q: int, seq_kv: int, block_size: int) -> Runs:
    """Return all blocks, full except where they reach past an end."""
    rows, columns = grid_of(seq_q, seq_kv, block_size)
    whole = np.arange(seq_q // block_size)
    full = np.full(len(whole), seq_kv // block_size)
    return _part_and_full(
        (1, 1, rows, columns),
        (np.arange(rows), np.zeros(rows, int), np.full(rows, columns)),
        (whole, np.zeros_like(whole), full),
    )


def band(band: Band, seq_q: int, seq_kv: int, block_size: int) -> Runs:
    """Return the blocks of a band of diagonals."""
    rows, columns = grid_of(seq_q, seq_kv, block_size)
    lower = -seq_q if band.lower is None else band.lower
    upper = seq_kv if band.upper is None else band.upper
    row = np.arange(rows)
    first = row * block_size
    last = np.minimum(first + block_size, seq_q) - 1
    # The keys from `start` up to `stop` are seen by some query of the row.
    start, stop = np.maximum(first + lower, 0), np.minimum(last + upper + 1, seq_kv)
    seen = start < stop
    part = row[seen], start[seen] // block_size, blocks_of(stop[seen], block_size)
    # Here they are seen by all queries of the row.
    start, stop = np.maximum(last + lower, 0), np.minimum(first + upper + 1, seq_kv)
    full = row, blocks_of(start, block_size), stop // block_size
    return _part_and_full((1, 1, rows, columns), part, full)


def first_tokens(tokens: int, seq_q: int, seq_kv: int, block_size: int) -> Runs:
    """Return the blocks of the first tokens, which see all and are seen by all."""
    rows, columns = grid_of(seq_q, seq_kv, block_size)

    def cross(blocks):
        stop = np.where(np.arange(rows) < blocks, columns, blocks)
        return np.arange(rows), np.zeros(rows, int), stop

    part, full = cross(blocks_of(tokens, block_size)), cross(tokens // block_size)
    return _part_and_full((1, 1, rows, columns), part, full)


def cells(rows: int, columns: int, row: np.ndarray, column: np.ndarray) -> Runs:
    """Return the given blocks, all of them full."""
    return runs_of_slices((1, 1, rows, columns), row, column, column + 1, FULL)


def diagonals(distances: tuple[int, ...], rows: int, columns: int) -> Runs:
    """Return the blocks at these distances from the diagonal, on both sides."""
    offsets = distinct(np.array([s * d for d in distances for s in (-1, 1)]))
    row = np.tile(np.arange(rows), len(offsets))
    column = row + np.repeat(offsets, rows)
    inside = (column >= 0) & (column < columns)
    return cells(rows, columns, row[inside], column[inside])


def strided(stride: int, rows: int, columns: int) -> Runs:
    """Return the blocks at multiples of the stride from the diagonal."""
    first = np.arange(rows) % stride
    count = np.maximum(blocks_of(columns - first, stride), 0)
    row = np.repeat(np.arange(rows), count)
    return cells(rows, columns, row, first[row] + stride * ranges(0 * count, count))


def segments(ids: Int[np.ndarray, "batch seq"], block_size: int) -> Runs:
    """Return the blocks in which some tokens, or all, have the same id."""
    batch, seq = ids.shape
    rows = blocks_of(seq, block_size)
    token_block = np.arange(seq) // block_size
    _, segment = np.unique(ids, return_inverse=True)
    segment = segment.reshape(ids.shape) + np.arange(batch)[:, None] * ids.size
    segment, block = np.divmod(distinct(segment * rows + token_block), rows)
    part = _see_each_other(segment, block, rows, ids.size)
    starts = np.arange(0, seq, block_size)
    lowest, highest = (
        f.reduceat(ids, starts, axis=1) for f in (np.minimum, np.maximum)
    )
    constant = (lowest == highest)[segment // ids.size, block]
    full = _see_each_other(segment[constant], block[constant], rows, ids.size)
    return _part_and_full((batch, 1, rows, rows), part, full)


def segment_states(
    ids: Int[jax.Array, "batch seq"], block_size: int
) -> Int8[jax.Array, "batch 1 blocks blocks"]:
    """Return the states of the blocks for ids that `jax.jit` traces.

    They are exact if ids ascend. Otherwise some empty blocks are called partial.
    """
    past_the_end = -ids.shape[1] % block_size
    padded = jnp.pad(ids, ((0, 0), (0, past_the_end)), mode="edge")
    blocks = padded.reshape(ids.shape[0], 1, -1, block_size)
    lowest, highest = blocks.min(-1), blocks.max(-1)
    meets = lowest[..., :, None] <= highest[..., None, :]
    meets &= lowest[..., None, :] <= highest[..., :, None]
    constant = lowest == highest
    full = meets & constant[..., :, None] & constant[..., None, :]
    return jnp.where(full, FULL, jnp.where(meets, PARTIAL, EMPTY)).astype(jnp.int8)


def _see_each_other(
    segment: np.ndarray, block: np.ndarray, blocks: int, segments_of_batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return slices of columns: for each block of a segment, the runs of its blocks."""
    neighbours = (np.diff(block, prepend=-2) == 1) & (np.diff(segment, prepend=-1) == 0)
    begins = np.flatnonzero(~neighbours)
    ends = np.append(begins[1:], len(block))[: len(begins)] - 1
    first = np.searchsorted(segment[begins], segment, side="left")
    count = np.searchsorted(segment[begins], segment, side="right") - first
    run = ranges(first, count)
    row = segment // segments_of_batch * blocks + block
    start, stop = block[begins], block[ends] + 1
    return np.repeat(row, count), start[run], stop[run]


def _part_and_full(shape: Shape, part: Any, full: Any) -> Runs:
    """Combine slices (row, start, stop) of all blocks with slices of the full ones."""
    runs = (
        runs_of_slices(shape, row, start, stop, state)
        for (row, start, stop), state in ((part, PARTIAL), (full, FULL))
    )
    return combine(np.maximum, *runs)


def tiles(
    mask: Bool[np.ndarray, "batch heads seq_q seq_kv"], block_size: int
) -> tuple[Int8[np.ndarray, "batch heads q_blocks kv_blocks"], Tiles]:
    """Return the states of a dense mask's blocks, and its predicate."""
    batch, heads, *lengths = mask.shape
    past = [(0, -n % block_size) for n in lengths]
    rows, columns = (blocks_of(n, block_size) for n in lengths)
    padded = np.pad(mask, [(0, 0), (0, 0), *past]) if any(map(any, past)) else mask
    tiles = padded.reshape(batch, heads, rows, block_size, columns, block_size)
    bits = np.packbits(tiles, axis=-1, bitorder="little").swapaxes(3, 4)
    bits = np.ascontiguousarray(bits)
    full = np.packbits(np.ones(block_size, bool), bitorder="little")
    states = bits.any((-2, -1)).astype(np.int8) + (bits == full).all((-2, -1))
    # Each tile becomes one item. If tiles were rows of bytes, np.unique would compare
    # byte by byte and take 30 times as long.
    items = bits.reshape(states.size, -1)
    items = items.view(np.dtype((np.void, items.shape[1])))[:, 0]
    distinct, tile_of = np.unique(items, return_inverse=True)
    fn = Tiles(
        tile_of.reshape(states.shape).astype(np.int32),
        distinct.view(np.uint8).reshape(1, 1, len(distinct), *bits.shape[-2:]),
        block_size,
    )
    return states, fn


def states_of_function(
    fn: Function, seq_q: int, seq_kv: int, block_size: int
) -> Int8[jax.Array, "batch heads q_blocks kv_blocks"]:
    """Ask a function about every pair, one row of blocks at a time."""
    rows, columns = grid_of(seq_q, seq_kv, block_size)

    def row(n):
        head, i = n // rows, n % rows
        q = i * block_size + jnp.arange(block_size)[:, None]
        k = jnp.arange(columns * block_size)[None]
        attends = fn(head // fn.heads, head % fn.heads, q, k)
        attends &= (q < seq_q) & (k < seq_kv)
        tiles = attends.reshape(block_size, columns, block_size)
        return tiles.any((0, 2)).astype(jnp.int8) + tiles.all((0, 2)).astype(jnp.int8)

    # Without this, `jax.jit` would trace the states, and a mask needs their values.
    with jax.ensure_compile_time_eval():
        states = lax.map(row, jnp.arange(fn.batch * fn.heads * rows))
        return states.reshape(fn.batch, fn.heads, rows, columns)
