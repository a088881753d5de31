"""Evaluate the predicates of block masks inside a kernel, a tile of pairs at a time.

A kernel asks only in partial blocks. A tile's values lie in registers as the sums of a
wgmma do, so that masking needs no exchange between threads. Which pairs attend is

- arithmetic of positions for bands, global tokens and a user's function;
- one value for the whole tile, where the predicate is the same for all pairs of a
  block (`Diagonals`, `Strided`, the states of `Blocks`);
- read from global memory for `Segments`, `Keys` and `Tiles`, whose data are padded
  or unpacked beforehand so that a tile reads neighbouring numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._mosaic.base import plgpu
from ..block_mask.mask import BlockMask
from ..block_mask.predicates import (
    Blocks,
    Both,
    Diagonals,
    Either,
    Function,
    Keys,
    Segments,
    Strided,
    Tiles,
)
from ..block_mask.runs import FULL, PARTIAL

# Tokens of the largest tile of a kernel. Data of tokens are padded to a multiple.
LARGEST_TILE = 128
# The primitives that a kernel computes on arrays of positions.
ELEMENTWISE = frozenset(
    "abs add and broadcast_in_dim clamp convert_element_type cos div eq exp ge gt "
    "integer_pow jit le log lt max min mul ne neg not or pjit pow reduce_precision rem "
    "rsqrt select_n sign sin sqrt squeeze stop_gradient sub tanh xor".split()
)


def unreadable(fn: Any) -> str | None:
    """Return why a kernel cannot compute the predicate, or None if it can."""
    match fn:
        case Both(first, second) | Either(first, second):
            return unreadable(first) or unreadable(second)
        case Blocks(_, inner, _):
            return unreadable(inner)
        case Function():
            position = jax.ShapeDtypeStruct((8, 8), jnp.int32)
            number = jax.ShapeDtypeStruct((), jnp.int32)
            jaxpr = jax.make_jaxpr(fn)(number, number, position, position)
            return _not_elementwise(jaxpr)
    return None


def _not_elementwise(jaxpr: Any) -> str | None:
    wanted = "mask_fn must be elementwise arithmetic of b, h, q and k for mosaic_gpu"
    if any(jnp.ndim(x) for x in jaxpr.consts):
        shapes = [jnp.shape(x) for x in jaxpr.consts if jnp.ndim(x)]
        return f"{wanted}, got one that holds an array of shape {shapes[0]}"
    for equation in jaxpr.eqns:
        if equation.primitive.name not in ELEMENTWISE:
            return f"{wanted}, got {equation.primitive.name}"
        for inner in equation.params.values():
            if hasattr(inner, "eqns") and (reason := _not_elementwise(inner)):
                return reason
    return None


@dataclass(frozen=True)
class Predicate:
    """A mask's predicate, with its data as a kernel reads them.

    Attributes:
        tree: the structure of the predicate, a pytree whose leaves are `data`.
        data: its arrays, which the kernel gets as references.
        q_axis: the axis of a tile along which queries lie.
    """

    tree: Any
    data: Sequence[jax.Array]
    seq_kv: int
    q_axis: int

    def visible(self, sizes, data, batch, head, row, column):
        """Say which pairs of the tile that starts at (row, column) attend."""
        starts = row, column
        where = _Where(sizes, batch, head, starts, self.q_axis)
        inside = where.positions(1 - self.q_axis) < self.seq_kv
        return where.ask(jax.tree.unflatten(self.tree, data)) & inside


def make_predicate(mask: BlockMask, q_axis: int) -> Predicate:
    def readable(fn):
        return _readable(fn, q_axis)

    def has_data(fn):
        return isinstance(fn, Segments | Keys | Tiles)

    fn = jax.tree.map(readable, mask.mask_fn, is_leaf=has_data)
    data, tree = jax.tree.flatten(fn)
    return Predicate(tree, data, mask.seq_kv, q_axis)


def _readable(fn: Any, q_axis: int) -> Any:
    match fn:
        case Segments(ids):
            return Segments(_whole_tiles(ids))
        case Keys(seen):
            return Keys(_whole_tiles(seen))
        case Tiles(tile_of, bits, size):
            # One byte for each pair: a thread's share of a tile is never the eight
            # neighbours that one byte of bits holds.
            places = jnp.arange(8, dtype=jnp.uint8)
            bits = jnp.asarray(bits)[..., None]
            bits = bits >> jnp.expand_dims(places, range(bits.ndim - 1)) & 1
            bits = bits.reshape(*bits.shape[:-2], -1)[..., :size]
            bits = bits.swapaxes(-1, -2) if q_axis else bits
            return Tiles(tile_of, bits.astype(jnp.int8), size)
    return fn


def _whole_tiles(numbers: Any) -> jax.Array:
    """Pad the numbers of tokens to whole tiles, since a tile may reach past the end."""
    missing = -numbers.shape[-1] % LARGEST_TILE
    return jnp.pad(numbers.astype(jnp.int32), [(0, 0), (0, 0), (0, missing)])


@dataclass(frozen=True)
class _Where:
    """A tile of pairs of tokens, and the batch and head that it belongs to.

    Attributes:
        sizes: rows and columns of the tile.
        starts: the position of its first row and of its first column.
        q_axis: the axis along which queries lie.
    """

    sizes: tuple[int, int]
    batch: Any
    head: Any
    starts: tuple[Any, Any]
    q_axis: int

    def positions(self, axis: int):
        layout = plgpu.Layout.WGMMA
        count = plgpu.broadcasted_iota(jnp.int32, self.sizes, axis, layout=layout)
        return self.starts[axis] + count

    def of_head(self, ref, *index):
        """Return the index into a leaf, whose batch and heads may be 1."""
        head = zip((self.batch, self.head), ref.shape, strict=False)
        return *(i if n > 1 else 0 for i, n in head), *index

    def block(self, ref, size: int):
        """Return the number that a leaf has for the block around the tile."""
        q, k = self.starts[self.q_axis], self.starts[1 - self.q_axis]
        return ref[self.of_head(ref, lax.div(q, size), lax.div(k, size))]

    def of_tokens(self, ref, axis: int):
        """Return the numbers that a leaf has for the tokens along an axis."""
        index = self.of_head(ref, pl.ds(self.starts[axis], self.sizes[axis]))
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        numbers = plgpu.load(ref.at[index], layout=layout, optimized=False)
        return lax.broadcast_in_dim(numbers, self.sizes, [axis])

    def everywhere(self, condition):
        number = jnp.where(condition, 1, 0)
        return jnp.broadcast_to(number, self.sizes) == 1

    def ask(self, fn: Any):
        match fn:
            case Both(first, second):
                return self.ask(first) & self.ask(second)
            case Either(first, second):
                return self.ask(first) | self.ask(second)
            case Segments(ids):
                return self.of_tokens(ids, 0) == self.of_tokens(ids, 1)
            case Keys(seen):
                return self.of_tokens(seen, 1 - self.q_axis) != 0
            case Diagonals() | Strided():
                # The first pair answers for all pairs of the block.
                q, k = self.starts[self.q_axis], self.starts[1 - self.q_axis]
                return self.everywhere(fn(self.batch, self.head, q, k))
            case Blocks(states, inner, size):
                state = self.block(states, size)
                full = self.everywhere(state == FULL)
                if inner is None:
                    return full
                return full | (self.everywhere(state == PARTIAL) & self.ask(inner))
            case Tiles(tile_of, bits, size):
                rows, columns = (
                    pl.ds(lax.rem(start, size), n)
                    for start, n in zip(self.starts, self.sizes, strict=True)
                )
                tile = bits.at[0, 0, self.block(tile_of, size), rows, columns]
                layout = plgpu.Layout.WGMMA
                return plgpu.load(tile, layout=layout, optimized=False) != 0
        q, k = self.positions(self.q_axis), self.positions(1 - self.q_axis)
        return jnp.broadcast_to(fn(self.batch, self.head, q, k), self.sizes)
