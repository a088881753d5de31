"""Tiles of tokens in shared memory: what the attention kernels hold and walk."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._mgpu import SMEM_BYTES, plgpu, swizzle_of, tiles
from ._mgpu_walk import BARRIER_BYTES, COMPUTE, Config


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Vectors (batch, seq, heads, dim), or numbers (batch, heads, count, seq)."""

    array: Any
    numbers: bool = False

    @property
    def seq(self) -> int:
        return self.array.shape[3 if self.numbers else 1]

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
        return gmem.at[batch, index, head]


Groups = Sequence[Sequence[Tokens]]


def rings_of(config: Config, block_size: int) -> int:
    """One if both warpgroups walk together, else one for each."""
    return 1 if block_size % (COMPUTE * config.rows) == 0 else COMPUTE


def smem_bytes(
    config: Config, held: Sequence[Tokens], walked: Groups, rings: int
) -> int:
    """Shared memory of a block, but for some alignment."""
    total = config.held * COMPUTE * sum(o.tile_bytes(config.rows) for o in held)
    step = sum(o.tile_bytes(config.columns) for o in chain(*walked))
    total += rings * config.steps * step
    barriers = 2 * (config.held + rings * config.steps * len(walked)) + 1
    # And a number for each row, on its way out.
    return total + 4 * COMPUTE * config.rows + BARRIER_BYTES * barriers


def scratch(
    config: Config,
    held: Sequence[Tokens],
    walked: Groups,
    rings: int,
    takes_turns: bool,
) -> list[Any]:
    """Shared memory and barriers of a block."""

    def buffers(operands, size, *slots):
        return [_buffer(o, size, slots, config.columns) for o in operands]

    def barriers(slots, produced, consumed):
        return [
            plgpu.Barrier(num_arrivals=n, num_barriers=slots)
            for n in (produced, consumed)
        ]

    slots = rings * config.steps
    pairs = [barriers(slots, len(g), COMPUTE // rings) for g in walked]
    turns = takes_turns and rings == 1
    return [
        buffers(held, config.rows, config.held, COMPUTE),
        [buffers(group, config.columns, slots) for group in walked],
        plgpu.SMEM((COMPUTE, config.rows), jnp.float32),
        barriers(config.held, len(held) * COMPUTE, COMPUTE),
        [list(pair) for pair in zip(*pairs, strict=True)],
        [plgpu.Barrier(num_arrivals=COMPUTE)] * turns,
    ]


def _buffer(operand: Tokens, size: int, slots: tuple[int, ...], columns: int):
    shape, dtype = operand.tile(size), operand.array.dtype
    if operand.numbers:
        return plgpu.SMEM((*slots, *shape), dtype)
    # One swizzle for all tiles, since both operands of a wgmma need the same; it must
    # tile the contracted axis too.
    swizzle = swizzle_of(math.gcd(columns, shape[1]), dtype.itemsize)
    return plgpu.SMEM((*slots, *shape), dtype, transforms=tiles(dtype, swizzle))


def check_fits(
    name: str,
    config: Config,
    held: Sequence[Tokens],
    walked: Groups,
    rings: int,
) -> None:
    """
    Raises:
        ValueError: a block needs more shared memory than there is.
    """
    needed = smem_bytes(config, held, walked, rings)
    if needed > SMEM_BYTES:
        raise ValueError(
            f"{name}: {config} must fit {SMEM_BYTES} bytes of shared memory, "
            f"got {needed}"
        )
