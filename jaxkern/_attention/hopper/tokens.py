"""Tiles of tokens in shared memory: what the attention kernels hold and walk."""

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
    """Vectors (batch, seq, heads, dim), or numbers (batch, heads, count, seq).

    With a dilation they are (batch, seq, rate * vectors, dim), of which each head takes
    some.
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
        """Vectors, one for each that the heads have."""
        batch, seq, _, dim = self.array.shape
        return jax.ShapeDtypeStruct((batch, seq, self.heads, dim), self.array.dtype)

    def tile(self, size: int) -> tuple[int, int]:
        shape = self.array.shape
        return (shape[2], size) if self.numbers else (size, shape[3])

    def tile_bytes(self, size: int) -> int:
        return math.prod(self.tile(size)) * self.array.dtype.itemsize

    def cut(self, gmem, batch, head, start, size: int):
        """The tile of `gmem` that starts at `start`; it may reach past the end."""
        index = pl.ds(start, size)
        if self.numbers:
            return gmem.at[batch, head, :, index]
        if self.dilation is not None:
            head = self.dilation.index(head)
        return gmem.at[batch, index, head]

    def spread(self, x: jax.Array) -> jax.Array:
        """From the shape of the result to the array's: 0 for what no head takes."""
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
    """Those of query, key and value; a dilation is that of the query's heads."""
    if dilation is None:
        return Tokens(query), Tokens(key), Tokens(value)
    of_keys = dilation.of_keys(key.shape[2] // dilation.rate)
    return (
        Tokens(query, dilation=dilation),
        Tokens(key, dilation=of_keys),
        Tokens(value, dilation=of_keys),
    )


def rings_of(config: WalkTiles, block_size: int) -> int:
    """One if both warpgroups walk together, else one for each."""
    return 1 if block_size % (COMPUTE * config.rows) == 0 else COMPUTE


def smem_bytes(
    config: WalkTiles, held: Sequence[Tokens], walked: Groups, rings: int
) -> int:
    """Shared memory of a block, but for some alignment."""
    total = config.held * COMPUTE * sum(o.tile_bytes(config.rows) for o in held)
    step = sum(o.tile_bytes(config.columns) for o in chain(*walked))
    total += rings * config.steps * step
    barriers = 2 * (config.held + rings * config.steps * len(walked)) + 1
    # And a number for each row, on its way out.
    return total + 4 * COMPUTE * config.rows + BARRIER_BYTES * barriers


class Scratch(NamedTuple):
    """Shared memory and barriers of a block, in the order that the kernel takes.

    held: a buffer an operand, (slots, warpgroups, *tile).
    walked: of each group a buffer an operand, (slots of all rings, *tile).
    numbers: one a row, on their way out.
    filled, emptied: a barrier a slot, for each walked group.
    turn: the barrier at which both warpgroups meet, if they take turns.
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
    """The shared memory and barriers that the kernel asks for."""

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
    # One swizzle for all tiles, since both operands of a wgmma need the same; it must
    # tile the contracted axis too.
    swizzle = swizzle_of(math.gcd(columns, shape[1]), dtype.itemsize)
    return plgpu.SMEM((*slots, *shape), dtype, transforms=tiled_layout(dtype, swizzle))
