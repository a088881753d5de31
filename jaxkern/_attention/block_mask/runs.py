"""The states of blocks: as runs to compute with, as index lists to attend with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8, Int32

from ..._core.trees import register

# The states of a block, ordered so that `&` of two masks is the minimum and `|` the
# maximum.
EMPTY, PARTIAL, FULL = 0, 1, 2

Shape = tuple[int, int, int, int]
AnyArray = jax.Array | np.ndarray
# An array, or what `jax.tree.map` puts in its place, such as a PartitionSpec.
Leaf = Any


@register
@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each row of blocks, the ascending indices of some of its columns.

    Row i of batch b and head h lists `indices[b, h, starts[b, h, i] : starts[b, h, i] +
    num_blocks[b, h, i]]`. Slices may overlap: `indices` begins with 0, 1, 2, ..., and
    every run of neighbouring columns is a slice of that, so that a causal mask takes
    O(rows) memory. All arrays are int32: `num_blocks` and `starts` have the shape
    (batch, heads, rows), `indices` has the shape (batch, heads, entries).
    """

    num_blocks: Leaf
    starts: Leaf
    indices: Leaf

    @property
    def arrays(self) -> tuple[Leaf, Leaf, Leaf]:
        return self.num_blocks, self.starts, self.indices

    def padded(self, width: int) -> Int32[AnyArray, "batch heads rows {width}"]:
        """Return one list for each row, with zeros after its end."""
        xp = module_of(self.indices)
        slot = xp.arange(width, dtype=np.int32)[None, None, None]
        entry = xp.minimum(self.starts[..., None] + slot, self.indices.shape[-1] - 1)
        listed = xp.take_along_axis(self.indices[:, :, None], entry, axis=-1)
        return xp.where(slot < self.num_blocks[..., None], listed, np.int32(0))

    def to_dense(self, columns: int) -> Bool[Array, "batch heads rows {columns}"]:
        """Return a boolean for each block, True if it is listed."""
        listed = (
            jnp.arange(columns)[None, None, None]
            < jnp.asarray(self.num_blocks)[..., None]
        )
        index = jnp.where(listed, self.padded(columns), columns)
        empty = jnp.zeros(columns, bool)
        mark = jnp.vectorize(
            lambda row: empty.at[row].set(True, mode="drop"), signature="(n)->(n)"
        )
        return mark(index)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class KnownLists(BlockLists):
    """Lists in NumPy as a pytree without leaves, which no transformation traces.

    They are static, so JAX compares and hashes them to find a compiled program. Masks
    with equal lists share one program.
    """

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KnownLists):
            return NotImplemented
        pairs = zip(self.arrays, other.arrays, strict=True)
        # Equal lists are mostly the same array, whose values need not be compared.
        return all(x is y or np.array_equal(x, y) for x, y in pairs)

    def __hash__(self) -> int:
        return hash(tuple(x.shape for x in self.arrays))


def module_of(*arrays: Leaf) -> Any:
    """Return numpy if all arrays are on the host, else jax.numpy."""
    return np if all(isinstance(x, np.ndarray) for x in arrays) else jnp


def lists_of_dense(blocks: Bool[Array, "batch heads rows columns"]) -> BlockLists:
    """List the blocks with room for every one.

    Under `jax.jit` the lengths of lists cannot depend on values.
    """
    batch, heads, rows, columns = blocks.shape
    order = jnp.argsort(~blocks, axis=-1, stable=True).astype(jnp.int32)
    starts = columns * jnp.arange(rows, dtype=jnp.int32)
    return BlockLists(
        blocks.sum(-1, dtype=jnp.int32),
        jnp.broadcast_to(starts, (batch, heads, rows)),
        order.reshape(batch, heads, rows * columns),
    )


@dataclass(frozen=True, eq=False)
class Runs:
    """The state of every block as a step function, on the host.

    Blocks are counted along the rows of blocks, then over heads and batches. From block
    `at[i]` up to `at[i + 1]` the state is `state[i]`. Every operation takes time and
    memory in the number of steps, not of blocks.
    """

    shape: Shape
    at: np.ndarray
    state: np.ndarray

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """The number of blocks in each run."""
        return np.diff(self.at, append=self.blocks)

    def lookup(self, at: np.ndarray) -> np.ndarray:
        """Return the states of the blocks at these numbers."""
        return self.state[np.searchsorted(self.at, at, side="right") - 1]

    def to_dense(self) -> np.ndarray:
        """Return the state of every block."""
        return np.repeat(self.state, self.lengths).reshape(self.shape)

    def broadcast(self, batch: int, heads: int) -> "Runs":
        """Repeat a batch or a head of 1."""
        shape = batch, heads, *self.shape[2:]
        if shape == self.shape:
            return self
        size = self.shape[2] * self.shape[3]
        head_starts = size * np.arange(self.shape[0] * self.shape[1])
        split = _split(self, head_starts)
        own = np.searchsorted(split.at, head_starts)
        count = np.diff(own, append=len(split.at))
        index = np.arange(self.shape[0] * self.shape[1]).reshape(self.shape[:2])
        source = np.broadcast_to(index, (batch, heads)).ravel()
        taken = ranges(own[source], count[source])
        moved = size * np.repeat(np.arange(batch * heads) - source, count[source])
        return _merged(shape, split.at[taken] + moved, split.state[taken])

    def transpose(self) -> "Runs":
        """Turn rows into columns; steps lie where a block differs from that above."""
        batch, heads, rows, columns = self.shape
        size = rows * columns
        split = _split(self, columns * np.arange(batch * heads * rows))
        at = distinct(np.concatenate([split.at, split.at + columns]))
        at = at[at < self.blocks]
        here = self.lookup(at)
        above = self.lookup(np.maximum(at - columns, 0))
        differs = (here != above) | (at % size < columns)
        lengths = np.diff(at, append=self.blocks)[differs]
        cells = ranges(at[differs], lengths)
        state = np.repeat(here[differs], lengths)
        head, row, column = cells // size, cells % size // columns, cells % columns
        moved = head * size + column * rows + row
        order = np.argsort(moved)
        return _merged((batch, heads, columns, rows), moved[order], state[order])

    def lists(self, state: int) -> BlockLists:
        """Return the lists of the blocks in this state."""
        batch, heads, rows, columns = self.shape
        split = _split(self, columns * np.arange(batch * heads * rows))
        chosen = split.state == state
        at, lengths = split.at[chosen], split.lengths[chosen]
        row = at // columns
        runs = np.bincount(row, minlength=batch * heads * rows)
        num_blocks = np.bincount(row, lengths, batch * heads * rows).astype(np.int32)
        starts = np.zeros(batch * heads * rows, np.int64)
        alone = runs[row] == 1
        starts[row[alone]] = at[alone] % columns
        # Lists of several runs are written out, one after the other, in each head.
        cells = ranges(at[~alone], lengths[~alone])
        head = cells // (rows * columns)
        first_of_head = np.searchsorted(head, np.arange(batch * heads))
        entry = columns + np.arange(len(cells)) - first_of_head[head]
        indices = np.zeros((batch * heads, int(entry.max(initial=columns - 1)) + 1))
        indices = indices.astype(np.int32)
        indices[:, :columns] = np.arange(columns)
        indices[head, entry] = cells % columns
        several, first_cell = np.unique(cells // columns, return_index=True)
        starts[several] = entry[first_cell]
        return BlockLists(
            num_blocks.reshape(batch, heads, rows),
            starts.astype(np.int32).reshape(batch, heads, rows),
            indices.reshape(batch, heads, -1),
        )


def combine(
    op: Callable[[np.ndarray, np.ndarray], np.ndarray], a: Runs, b: Runs
) -> Runs:
    """Apply `op` to both states of each block; a batch or heads of 1 stands for all."""
    batch, heads = np.broadcast_shapes(a.shape[:2], b.shape[:2])
    a, b = a.broadcast(batch, heads), b.broadcast(batch, heads)
    at = distinct(np.concatenate([a.at, b.at]))
    return _merged(a.shape, at, op(a.lookup(at), b.lookup(at)))


def runs_of_dense(states: Int8[np.ndarray, "batch heads rows columns"]) -> Runs:
    """Return the runs of an array of states."""
    flat = states.ravel()
    at = np.concatenate([[0], 1 + np.flatnonzero(flat[1:] != flat[:-1])])
    return Runs(states.shape, at, flat[at])


def runs_of_slices(
    shape: Shape, row: np.ndarray, start: np.ndarray, stop: np.ndarray, state: int
) -> Runs:
    """Return runs with `state` in slices of rows, from `start` up to `stop`.

    Slices may overlap.
    """
    start, stop = np.clip(start, 0, shape[3]), np.clip(stop, 0, shape[3])
    used = start < stop
    at = np.concatenate([row[used] * shape[3] + x[used] for x in (start, stop)])
    order = np.argsort(at, kind="stable")
    opened = np.repeat([1, -1], used.sum())[order].cumsum()
    at = np.concatenate([[0], at[order]])
    return _merged(shape, at, np.concatenate([[EMPTY], state * (opened > 0)]))


def runs_of_lists(lists: BlockLists, columns: int, state: int) -> Runs:
    """Return the runs of the listed blocks; this inverts `Runs.lists`.

    It reads each run of neighbours once.
    """
    num_blocks, starts, indices = (
        np.asarray(x, np.int64) for x in (lists.num_blocks, lists.starts, lists.indices)
    )
    batch, heads, rows = num_blocks.shape
    pool = indices.ravel()
    head = np.repeat(np.arange(batch * heads), rows)
    row = np.flatnonzero(num_blocks)
    start = (head * indices.shape[2] + starts.ravel())[row]
    stop = start + num_blocks.ravel()[row]
    # A run ends at its list's end or where the next index is not the next column.
    jumps = np.flatnonzero(np.diff(pool) != 1) + 1
    inside = [np.searchsorted(jumps, x) for x in (start + 1, stop)]
    count = inside[1] - inside[0]
    owner = np.concatenate([np.arange(len(row)), np.repeat(np.arange(len(row)), count)])
    begins = np.concatenate([start, jumps[ranges(inside[0], count)]])
    order = np.lexsort([begins, owner])
    owner, begins = owner[order], begins[order]
    last = np.diff(owner, append=len(row)) > 0
    ends = np.where(last, stop[owner], np.roll(begins, -1))
    shape = batch, heads, rows, columns
    first = pool[begins]
    return runs_of_slices(shape, row[owner], first, first + ends - begins, state)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return `counts[i]` numbers from `starts[i]` on, for each i in turn."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


def distinct(x: np.ndarray) -> np.ndarray:
    """Return each value once, in ascending order."""
    # np.unique builds a hash table, which takes 30 times as long. This sort is fast,
    # since it merges parts that are sorted already.
    x = np.sort(x, axis=None, kind="stable")
    return x[np.diff(x, prepend=x[0] - 1) > 0]


def _split(runs: Runs, at: np.ndarray) -> Runs:
    """Return the same states with a step at each of `at`."""
    at = distinct(np.concatenate([runs.at, at]))
    return Runs(runs.shape, at, runs.lookup(at))


def _merged(shape: Shape, at: np.ndarray, state: np.ndarray) -> Runs:
    """Return the runs with as few steps as possible.

    Steps come in ascending order; among equal ones the last holds.
    """
    last = np.diff(at, append=np.prod(shape, dtype=np.int64)) > 0
    at, state = at[last], state[last].astype(np.int8)
    changes = np.diff(state, prepend=-1) != 0
    return Runs(shape, at[changes], state[changes])
