"""Hold tiles of some arrays, walk along others: the frame of our matmul kernels.

A block holds a tile of each `held` operand in shared memory and walks the `walked`
ones, whose tiles come through a ring of slots. Two warpgroups compute, one loads. There
are no more blocks than multiprocessors: each takes one tile after the other, and the
loads of the next one run while this one is computed. Results are written by one block
each, so there are no atomics. What lies past the end of an array is zero when TMA loads
it and dropped when TMA stores it, so sizes need not be multiples of the tiles.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device
from ..._mosaic.base import SMEM_BYTES, plgpu, slot, swizzle_of, tiles
from ..._mosaic.launch import (
    BARRIER_BYTES,
    COMPUTE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROW_STEP,
    WalkTiles,
    launch_blocks,
    wait_for_last,
)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array (heads, m, n), cut into tiles along `axis`, which is 1 or 2.

    Of the other axis a tile has all, or one of several equal parts.
    """

    array: Any
    axis: int
    part: int = 0
    parts: int = 1

    @property
    def size(self) -> int:
        return self.array.shape[self.axis]

    @property
    def across(self) -> int:
        return self.array.shape[3 - self.axis] // self.parts

    def tile(self, size: int) -> tuple[int, int]:
        return (size, self.across) if self.axis == 1 else (self.across, size)

    def cut(self, gmem, head, start, size: int):
        """The tile of `gmem` that starts at `start`; it may reach past the end."""
        index = pl.ds(start, size), pl.ds(self.part * self.across, self.across)
        return gmem.at[head, *index[:: 1 if self.axis == 1 else -1]]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The walked tiles as one warpgroup sees them: `count` steps, from 0."""

    smem: Sequence[Any]
    produced: Sequence[Any]
    consumed: Sequence[Any]
    start: Any
    stride: int
    count: Any

    def _slot(self, i):
        return slot(self.start + i * self.stride, self.smem[0].shape[0])

    def wait(self, n: int, i):
        """The tile of walked operand `n` at step `i`, once it is there."""
        s = self._slot(i)
        plgpu.barrier_wait(self.produced[n].at[s])
        return self.smem[n].at[s]

    def release(self, n: int, i) -> None:
        """Let that tile be overwritten."""
        plgpu.barrier_arrive(self.consumed[n].at[self._slot(i)])


def smem_bytes(
    config: WalkTiles, held: Sequence[Operand], walked: Sequence[Operand], outs: int
) -> int:
    """Shared memory of a block, but for some alignment."""
    itemsize = held[0].array.dtype.itemsize
    tile = sum(math.prod(o.tile(config.rows)) for o in held)
    total = config.held * config.parts * tile * itemsize
    tile = sum(math.prod(o.tile(config.columns)) for o in walked)
    total += config.steps * tile * itemsize
    if config.split:
        total += 4 * outs * math.prod(held[-1].tile(config.rows))
    return total + BARRIER_BYTES * 2 * (config.held + config.steps * len(walked) + 1)


def walk(
    body: Callable[[Sequence[Any], Ring], Sequence[Any]],
    config: WalkTiles,
    held: Sequence[Operand],
    walked: Sequence[Operand],
    outs: int,
    name: str,
) -> Sequence[jax.Array]:
    """`outs` results, (heads, m, across) of the last held operand, cut along axis 1.

    body: from a warpgroup's held tiles and its ring to its float32 sums, one a result.
    """
    dtype, result = held[0].array.dtype, held[-1]
    rows, steps, parts = config.rows, config.steps, config.parts
    grid = result.array.shape[0], pl.cdiv(result.size, parts * rows)
    stride = COMPUTE if config.split else 1
    # As many steps for either warpgroup, maybe one on zeros past the end: a slot then
    # always is the same one's.
    mine = pl.cdiv(walked[0].size, stride * config.columns)
    count = mine * stride
    _check_fits(name, config, held, walked, outs)

    def kernel(*refs):
        n_in = len(held) + len(walked)
        gmem, out_gmem, scratch = refs[:n_in], refs[n_in : n_in + outs], refs[-6:]
        held_smem, walked_smem, sums, held_barriers, barriers, sums_barriers = scratch
        held_produced, held_consumed = held_barriers
        produced, consumed = barriers
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            part, first = slot(warpgroup, parts), slot(warpgroup, stride)

            @plgpu.nd_loop(grid, collective_axes="block")
            def compute_tile(info):
                here = slot(info.local_index, config.held)
                tile = [smem.at[here, part] for smem in held_smem]
                start = info.local_index * count + first
                plgpu.barrier_wait(held_produced.at[here])
                ring = Ring(walked_smem, produced, consumed, start, stride, mine)
                added = body(tile, ring)

                def store(added):
                    row = (info.index[1] * parts + part) * rows
                    for value, out in zip(added, out_gmem, strict=True):
                        target = Operand(out, 1).cut(out, info.index[0], row, rows)
                        _store(value, tile[-1], target)
                    plgpu.barrier_arrive(held_consumed.at[here])

                if config.split:
                    _add_other(warpgroup, added, sums, sums_barriers, store)
                else:
                    store(added)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def load_tile(info, carry):
                head, tile = info.index
                here = slot(info.local_index, config.held)

                @pl.when(info.local_index >= config.held)
                def _():
                    plgpu.barrier_wait(held_consumed.at[here])

                for operand, source, smem in zip(held, gmem, held_smem, strict=False):
                    for part in range(parts):
                        rows_of_part = operand.cut(
                            source, head, (tile * parts + part) * rows, rows
                        )
                        plgpu.copy_gmem_to_smem(
                            rows_of_part, smem.at[here, part], held_produced.at[here]
                        )

                def load_step(i, at):
                    s = slot(at, steps)
                    for n, operand in enumerate(walked):

                        @pl.when(at >= steps)
                        def _(n=n):
                            plgpu.barrier_wait(consumed[n].at[s])

                        source = gmem[len(held) + n]
                        columns = config.columns
                        plgpu.copy_gmem_to_smem(
                            operand.cut(source, head, i * columns, columns),
                            walked_smem[n].at[s],
                            produced[n].at[s],
                        )
                    return at + 1

                return lax.fori_loop(0, count, load_step, carry)

            loop = plgpu.nd_loop(grid, collective_axes="block", init_carry=jnp.int32(0))
            loaded = loop(load_tile)
            # A barrier must be seen to the end of its last phase.
            wait_for_last(loaded // count, config.held, [held_consumed])
            wait_for_last(loaded, steps, consumed)

    operands = [o.array for o in (*held, *walked)]
    out = jax.ShapeDtypeStruct((grid[0], result.size, result.across), dtype)
    blocks = min(device.multiprocessors(), math.prod(grid))
    scratch = _scratch(config, held, walked, outs)
    return launch_blocks(kernel, operands, [out] * outs, scratch, blocks, name)


def _scratch(config, held, walked, outs):
    """Shared memory and barriers of a block, in the order that the kernel takes."""
    dtype = held[0].array.dtype
    held_tiles = [o.tile(config.rows) for o in held]
    walked_tiles = [o.tile(config.columns) for o in walked]
    # One swizzle for all tiles, since both operands of a wgmma need the same; it must
    # tile the contracted axis too.
    minor = (shape[-1] for shape in held_tiles + walked_tiles)
    swizzle = swizzle_of(math.gcd(config.columns, *minor), dtype.itemsize)
    _check_divisible(held + walked, swizzle // dtype.itemsize)
    layout = tiles(dtype, swizzle)

    def buffers(shapes, *slots):
        return [plgpu.SMEM((*slots, *s), dtype, transforms=layout) for s in shapes]

    def ring(slots, produced, consumed):
        return [
            plgpu.Barrier(num_arrivals=n, num_barriers=slots)
            for n in (produced, consumed)
        ]

    arrivals = 1 if config.split else COMPUTE
    rings = [ring(config.steps, 1, arrivals) for _ in walked]
    sums = [plgpu.SMEM(held_tiles[-1], jnp.float32) for _ in range(outs * config.split)]
    return [
        buffers(held_tiles, config.held, config.parts),
        buffers(walked_tiles, config.steps),
        sums,
        ring(config.held, len(held) * config.parts, config.parts),
        [list(barriers) for barriers in zip(*rings, strict=True)],
        [plgpu.Barrier() for _ in range(2 * config.split)],
    ]


def _store(value, smem, gmem):
    smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _add_other(warpgroup, added, sums, barriers, store):
    """The second warpgroup's sums go to the first, which stores the total."""
    produced, consumed = barriers

    @pl.when(warpgroup == 0)
    def add():
        plgpu.barrier_wait(produced)
        total = [
            a + plgpu.load(smem, layout=plgpu.Layout.WGMMA)
            for a, smem in zip(added, sums, strict=True)
        ]
        plgpu.barrier_arrive(consumed)
        store(total)

    @pl.when(warpgroup == 1)
    def give():
        for a, smem in zip(added, sums, strict=True):
            smem[...] = a
        plgpu.barrier_arrive(produced)
        plgpu.barrier_wait(consumed)


def _check_divisible(operands, column_step):
    """Only compiling for a GPU asks for it; the emulator would take any size."""
    for operand in operands:
        rows, columns = operand.array.shape[1:]
        if rows % ROW_STEP or not column_step or columns % column_step:
            raise ValueError(
                f"walk: arrays must have multiples of {ROW_STEP} rows and "
                f"{column_step} columns, got {rows} and {columns}"
            )


def _check_fits(name, config, held, walked, outs):
    needed = smem_bytes(config, held, walked, outs)
    if needed > SMEM_BYTES:
        raise ValueError(
            f"{name}: {config} must fit {SMEM_BYTES} bytes of shared memory, "
            f"got {needed}"
        )
