"""Operands of the attention kernels, and the shared memory for their tiles.

A block's shared memory for `attention_forward` at dim 128, with 2 slots of each, both
warpgroups in one row of blocks, and tiles of 128 columns:

    held[0][2][2]    64 x 128 of Q    4 x 16 KB    slot, warpgroup
    walked[0][2]    128 x 128 of K    2 x 32 KB    slot
    walked[1][2]    128 x 128 of V    2 x 32 KB    slot
    numbers[2]       64 float32         512 B      warpgroup
    barriers                             8 B each

That is 192 KB of the 227 KB of a block, so a third slot of either would not fit.
"""

import dataclasses
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..._core.precision import widen
from ..._mosaic.base import plgpu, swizzle_of, tiled_layout
from ..._mosaic.launch import BARRIER_BYTES, COMPUTE, WalkTiles
from ..dilation import HeadStride


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An array with a vector, or some numbers, for each token of each head.

    Attributes:
        array: vectors (batch, seq, heads, dim), or numbers (batch, heads, count, seq).
            With a dilation, vectors (batch, seq, rate * vectors, dim).
        numbers: whether the array holds numbers.
        dilation: which vector of each row a head takes; None if every head has one.
    """

    array: Any
    numbers: bool = False
    dilation: HeadStride | None = None

    @property
    def seq(self) -> int:
        return self.array.shape[3 if self.numbers else 1]

    @property
    def heads(self) -> int:
        if self.dilation is not None:
            return self.dilation.heads
        return self.array.shape[1 if self.numbers else 2]

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """The shape of vectors for the heads, without vectors that no head takes."""
        batch, seq, _, dim = self.array.shape
        return jax.ShapeDtypeStruct((batch, seq, self.heads, dim), self.array.dtype)

    def tile(self, size: int) -> tuple[int, int]:
        shape = self.array.shape
        return (shape[2], size) if self.numbers else (size, shape[3])

    def tile_bytes(self, size: int) -> int:
        return math.prod(self.tile(size)) * self.array.dtype.itemsize

    def cut(self, gmem, batch, head, start, size: int):
        """Return the tile of `gmem` that starts at `start`.

        It may reach past the end of the array.
        """
        index = pl.ds(start, size)
        if self.numbers:
            return gmem.at[batch, head, :, index]
        if self.dilation is not None:
            head = self.dilation.index(head)
        return gmem.at[batch, index, head]

    def spread(self, x: jax.Array) -> jax.Array:
        """Bring a result to the shape of the array, with 0 where no head takes any.

        Vectors that several heads take get the sum of their results.
        """
        if self.dilation is None:
            return x
        rate, group = self.dilation.rate, self.dilation.group
        x = self.dilation.spread(x, axis=2, fill=0.0)
        x = x.reshape(*x.shape[:2], rate, -1, group, x.shape[-1])
        return widen(x).sum(4).astype(x.dtype).reshape(self.array.shape)


Groups = Sequence[Sequence[Tokens]]


def tokens_of(
    dilation: HeadStride | None, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[Tokens, Tokens, Tokens]:
    """Return the operands of query, key and value.

    Args:
        dilation: which vectors the query's heads take; the keys' follow from it.
    """
    if dilation is None:
        return Tokens(query), Tokens(key), Tokens(value)
    of_keys = dilation.of_keys(key.shape[2] // dilation.rate)
    return (
        Tokens(query, dilation=dilation),
        Tokens(key, dilation=of_keys),
        Tokens(value, dilation=of_keys),
    )


def rings_of(config: WalkTiles, block_size: int) -> int:
    """Return how many rings each walked group has.

    It is one if both warpgroups walk one list, else one for each warpgroup.
    """
    return 1 if block_size % (COMPUTE * config.rows) == 0 else COMPUTE


def smem_bytes(
    config: WalkTiles, held: Sequence[Tokens], walked: Groups, rings: int
) -> int:
    """Return the shared memory of a block in bytes, without what alignment adds."""
    total = config.held * COMPUTE * sum(o.tile_bytes(config.rows) for o in held)
    step = sum(o.tile_bytes(config.columns) for o in chain(*walked))
    total += rings * config.steps * step
    barriers = 2 * (config.held + rings * config.steps * len(walked)) + 1
    # One float32 number a row passes through shared memory on its way out.
    return total + 4 * COMPUTE * config.rows + BARRIER_BYTES * barriers


class Scratch(NamedTuple):
    """Shared memory and barriers of a block, in the order that the kernel takes.

    Attributes:
        held: a buffer for each operand, (slots, warpgroups, *tile).
        walked: a buffer for each operand of each group, (slots of all rings, *tile).
        numbers: a number for each row of each warpgroup, on its way out.
        held_filled: a barrier for each slot. All loads of both parts arrive.
        held_emptied: a barrier for each slot. Both computing warpgroups arrive.
        filled: for each walked group a barrier for each slot. The group's loads arrive.
        emptied: for each walked group a barrier for each slot. The warpgroups that
            share the ring arrive.
        turn: the barrier at which both warpgroups meet; empty if they take no turns.
    """

    held: Sequence[Any]
    walked: Sequence[Sequence[Any]]
    numbers: Any
    held_filled: Any
    held_emptied: Any
    filled: Sequence[Any]
    emptied: Sequence[Any]
    turn: Sequence[Any]


def make_scratch(
    config: WalkTiles,
    held: Sequence[Tokens],
    walked: Groups,
    rings: int,
    takes_turns: bool,
) -> Scratch:
    """Declare the shared memory and the barriers of a block."""

    def buffers(operands, size, *slots):
        return [_buffer(o, size, slots, config.columns) for o in operands]

    def barrier(arrivals, slots):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)

    slots = rings * config.steps
    meets = takes_turns and rings == 1
    return Scratch(
        held=buffers(held, config.rows, config.held, COMPUTE),
        walked=[buffers(group, config.columns, slots) for group in walked],
        numbers=plgpu.SMEM((COMPUTE, config.rows), jnp.float32),
        held_filled=barrier(len(held) * COMPUTE, config.held),
        held_emptied=barrier(COMPUTE, config.held),
        filled=[barrier(len(group), slots) for group in walked],
        emptied=[barrier(COMPUTE // rings, slots) for _ in walked],
        turn=[plgpu.Barrier(num_arrivals=COMPUTE)] if meets else [],
    )


def _buffer(operand: Tokens, size: int, slots: tuple[int, ...], columns: int):
    shape, dtype = operand.tile(size), operand.array.dtype
    if operand.numbers:
        return plgpu.SMEM((*slots, *shape), dtype)
    # Both factors of a wgmma in shared memory need the same swizzle, so all tiles have
    # one. A swizzled row of elements must divide the features, and also the tokens of a
    # walked tile, over which some products are summed.
    swizzle = swizzle_of(math.gcd(columns, shape[1]), dtype.itemsize)
    return plgpu.SMEM((*slots, *shape), dtype, transforms=tiled_layout(dtype, swizzle))
