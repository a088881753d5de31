"""Hold tiles of some arrays and walk along others: the frame of `flash_mlp`'s kernels.

A block holds a tile of each `held` operand and walks along the `walked` ones, each of
which has its own ring. Warpgroup 2 loads, warpgroups 0 and 1 compute:

    warpgroup 2   for each tile: held operands --TMA--> held slot, 1 or 2 of them
                  for each step: walked n      --TMA--> slot of ring n, `steps` of them
    warpgroups    wait held filled
    0 and 1       each step: for each n: wait filled[n], wgmmas, arrive emptied[n]
                  sums --> 16 bits --> slot of the last held operand --TMA--> result
                  once TMA has read it: arrive held emptied

    barrier        arrivals in a phase                     who waits
    held filled    one TMA load an operand and part        warpgroups 0 and 1
    held emptied   one of each part                        warpgroup 2
    filled[n]      1, of the TMA load                      who computes this step
    emptied[n]     2, or 1 if `tiles.split`                warpgroup 2

A held slot has two parts of `rows` rows, one a warpgroup, and both walk all steps. If
`tiles.split`, both hold the same rows: each takes every other step, and at the end
warpgroup 1 hands its sums through shared memory to warpgroup 0, which adds and stores.

There are at most as many blocks as multiprocessors, and each takes one tile after the
other. With two held slots, the loads of the next tile run while this one is computed. A
result has one writer, so there are no atomics. What lies past the end of an array is
zero when TMA loads it and dropped when TMA stores it, so sizes need not be multiples of
the tiles.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device
from ..._mosaic import base
from ..._mosaic.base import plgpu, slot, swizzle_of
from ..._mosaic.launch import (
    BARRIER_BYTES,
    COMPUTE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    WalkTiles,
    check_fits,
    check_whole,
    launch_blocks,
    wait_for_last,
)

FLOAT32_BYTES = 4
# Barriers of a slot: one says that it is filled, one that it is emptied.
BARRIERS = 2


@dataclasses.dataclass(frozen=True)
class HeadTiles:
    """An array (heads, m, n) that is cut into tiles along `axis`, which is 1 or 2.

    part, parts: of the other axis a tile has all, or part number `part` of `parts`
        equal ones.
    """

    array: Any
    axis: int
    part: int = 0
    parts: int = 1

    @property
    def size(self) -> int:
        """The length of the axis that is cut."""
        return self.array.shape[self.axis]

    @property
    def across(self) -> int:
        """The length of a tile along the other axis."""
        return self.array.shape[3 - self.axis] // self.parts

    def tile(self, size: int) -> tuple[int, int]:
        """The shape of a tile with `size` along the axis that is cut."""
        return (size, self.across) if self.axis == 1 else (self.across, size)

    def cut(self, gmem, head, start, size: int):
        """The tile of `gmem` that starts at `start`; it may reach past the end."""
        along = pl.ds(start, size)
        across = pl.ds(self.part * self.across, self.across)
        if self.axis == 1:
            return gmem.at[head, along, across]
        return gmem.at[head, across, along]


@dataclasses.dataclass(frozen=True)
class WalkedSteps:
    """The walked tiles as one warpgroup sees them: `count` steps, from 0.

    smem, filled, emptied: the slots and barriers of each walked operand's ring.
    start, stride: step `i` of the warpgroup is step `start + i * stride` of the block.
    """

    smem: Sequence[Any]
    filled: Sequence[Any]
    emptied: Sequence[Any]
    start: Any
    stride: int
    count: Any

    def _slot(self, i):
        return slot(self.start + i * self.stride, self.smem[0].shape[0])

    def wait(self, n: int, i):
        """The tile of walked operand `n` at step `i`, once it is loaded."""
        s = self._slot(i)
        plgpu.barrier_wait(self.filled[n].at[s])
        return self.smem[n].at[s]

    def release(self, n: int, i) -> None:
        """Let the tile of walked operand `n` at step `i` be overwritten."""
        plgpu.barrier_arrive(self.emptied[n].at[self._slot(i)])


@dataclasses.dataclass(frozen=True)
class WalkPlan:
    """A launch, as the host plans it.

    held, walked: the operands. Results are cut as the last held operand is, since they
        leave through its slot.
    outs: how many results.
    """

    held: Sequence[HeadTiles]
    walked: Sequence[HeadTiles]
    outs: int
    tiles: WalkTiles

    @property
    def dtype(self) -> Any:
        return self.held[0].array.dtype

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of heads, and of tiles with the rows of a block."""
        result = self.held[-1]
        rows = self.tiles.parts * self.tiles.rows
        return result.array.shape[0], pl.cdiv(result.size, rows)

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """A result: (heads, m, across) of the last held operand, cut along axis 1."""
        result = self.held[-1]
        shape = self.grid[0], result.size, result.across
        return jax.ShapeDtypeStruct(shape, self.dtype)

    @property
    def stride(self) -> int:
        """Steps of the block from one step of a warpgroup to its next one."""
        return COMPUTE if self.tiles.split else 1

    @property
    def own_steps(self) -> int:
        """Steps of a warpgroup for a held tile.

        Both warpgroups take as many, even if the last one is on zeros past the end. So
        a slot is always read by the same warpgroup where they split the steps.
        """
        return pl.cdiv(self.walked[0].size, self.stride * self.tiles.columns)

    @property
    def all_steps(self) -> int:
        """Steps of a block for a held tile."""
        return self.own_steps * self.stride

    @property
    def held_shapes(self) -> list[tuple[int, int]]:
        return [o.tile(self.tiles.rows) for o in self.held]

    @property
    def walked_shapes(self) -> list[tuple[int, int]]:
        return [o.tile(self.tiles.columns) for o in self.walked]

    @property
    def sums_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the sums that warpgroup 1 hands to warpgroup 0, if they split."""
        return [self.held_shapes[-1]] * self.outs if self.tiles.split else []

    def smem_bytes(self) -> int:
        """Bytes of shared memory of a block, without what aligns the buffers."""
        tiles, itemsize = self.tiles, self.dtype.itemsize
        held = sum(map(math.prod, self.held_shapes)) * tiles.held * tiles.parts
        walked = sum(map(math.prod, self.walked_shapes)) * tiles.steps
        sums = sum(map(math.prod, self.sums_shapes))
        slots = tiles.held + tiles.steps * len(self.walked) + 1
        barriers = BARRIER_BYTES * BARRIERS * slots
        return (held + walked) * itemsize + sums * FLOAT32_BYTES + barriers

    def scratch(self) -> list[Any]:
        """Shared memory and barriers, in the order of `_WalkBlock`'s last fields."""
        config, itemsize = self.tiles, self.dtype.itemsize
        # All tiles have one swizzle, since both operands of a wgmma need the same one.
        # It must also divide the contracted axis, which can be the walked columns.
        minor = [shape[-1] for shape in (*self.held_shapes, *self.walked_shapes)]
        swizzle = swizzle_of(math.gcd(config.columns, *minor), itemsize)
        arrays = [operand.array for operand in (*self.held, *self.walked)]
        check_whole("walk", arrays, swizzle // itemsize)
        layout = base.tiled_layout(self.dtype, swizzle)

        def buffers(shapes, *slots):
            return [
                plgpu.SMEM((*slots, *shape), self.dtype, transforms=layout)
                for shape in shapes
            ]

        def barriers(slots, arrivals):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)

        readers = 1 if config.split else COMPUTE
        walked, copies = range(len(self.walked)), len(self.held) * config.parts
        return [
            buffers(self.held_shapes, config.held, config.parts),
            buffers(self.walked_shapes, config.steps),
            [plgpu.SMEM(shape, jnp.float32) for shape in self.sums_shapes],
            [barriers(config.held, copies), barriers(config.held, config.parts)],
            [barriers(config.steps, 1) for _ in walked],
            [barriers(config.steps, readers) for _ in walked],
            [plgpu.Barrier(), plgpu.Barrier()] if config.split else [],
        ]


@dataclasses.dataclass(frozen=True)
class _WalkBlock:
    """A launch as a block sees it, inside the kernel: what it does with one tile.

    gmem, out: operands and results in global memory.
    held, walked, sums: buffers in shared memory.
    held_barriers: barriers of the held slots, `filled` and `emptied`.
    filled, emptied: barriers of each walked operand's ring.
    sums_barriers: that warpgroup 1's sums are in shared memory, and that they are read.
    """

    plan: WalkPlan
    body: Callable[[Sequence[Any], WalkedSteps], Sequence[Any]]
    gmem: Sequence[Any]
    out: Sequence[Any]
    held: Sequence[Any]
    walked: Sequence[Any]
    sums: Sequence[Any]
    held_barriers: Sequence[Any]
    filled: Sequence[Any]
    emptied: Sequence[Any]
    sums_barriers: Sequence[Any]

    def compute(self, warpgroup, part, first, info) -> None:
        """Compute a held tile, in warpgroup 0 or 1.

        part: the part of the held slot that this warpgroup computes.
        first: the first step that it computes.
        """
        plan = self.plan
        filled, emptied = self.held_barriers
        here = slot(info.local_index, plan.tiles.held)
        held = [smem.at[here, part] for smem in self.held]
        start = info.local_index * plan.all_steps + first
        plgpu.barrier_wait(filled.at[here])
        steps = WalkedSteps(
            self.walked, self.filled, self.emptied, start, plan.stride, plan.own_steps
        )
        added = self.body(held, steps)

        def store(added):
            rows = plan.tiles.rows
            row = (info.index[1] * plan.tiles.parts + part) * rows
            for value, out in zip(added, self.out, strict=True):
                target = HeadTiles(out, 1).cut(out, info.index[0], row, rows)
                _store(value, held[-1], target)
            plgpu.barrier_arrive(emptied.at[here])

        if plan.tiles.split:
            _add_other(warpgroup, added, self.sums, self.sums_barriers, store)
        else:
            store(added)

    def load(self, info, carry):
        """Load a held tile and all tiles that it walks along, in warpgroup 2.

        carry: steps of the block before this tile. Returns those up to its end.
        """
        self._load_held(info)
        return lax.fori_loop(
            0, self.plan.all_steps, lambda i, at: self._load_step(info, i, at), carry
        )

    def _load_held(self, info) -> None:
        plan, (head, tile) = self.plan, info.index
        filled, emptied = self.held_barriers
        parts, rows = plan.tiles.parts, plan.tiles.rows
        here = slot(info.local_index, plan.tiles.held)

        @pl.when(info.local_index >= plan.tiles.held)
        def wait_until_empty():
            plgpu.barrier_wait(emptied.at[here])

        sources = self.gmem[: len(plan.held)]
        for tiles, source, smem in zip(plan.held, sources, self.held, strict=True):
            for part in range(parts):
                start = (tile * parts + part) * rows
                plgpu.copy_gmem_to_smem(
                    tiles.cut(source, head, start, rows),
                    smem.at[here, part],
                    filled.at[here],
                )

    def _load_step(self, info, i, at):
        """Load the walked tiles number `i` to the slots of the block's step `at`."""
        plan, columns = self.plan, self.plan.tiles.columns
        s = slot(at, plan.tiles.steps)
        sources = self.gmem[len(plan.held) :]
        for n, (tiles, source) in enumerate(zip(plan.walked, sources, strict=True)):

            @pl.when(at >= plan.tiles.steps)
            def wait_until_empty(n=n):
                plgpu.barrier_wait(self.emptied[n].at[s])

            plgpu.copy_gmem_to_smem(
                tiles.cut(source, info.index[0], i * columns, columns),
                self.walked[n].at[s],
                self.filled[n].at[s],
            )
        return at + 1

    def drain(self, steps_done) -> None:
        """Wait until all slots are released, after `steps_done` steps of the block."""
        plan = self.plan
        _, emptied = self.held_barriers
        wait_for_last(steps_done // plan.all_steps, plan.tiles.held, [emptied])
        wait_for_last(steps_done, plan.tiles.steps, self.emptied)


def walk(
    held: Sequence[HeadTiles],
    walked: Sequence[HeadTiles],
    body: Callable[[Sequence[Any], WalkedSteps], Sequence[Any]],
    *,
    outs: int,
    tiles: WalkTiles,
    name: str,
) -> Sequence[jax.Array]:
    """Launch `body` over all held tiles, and return `outs` results.

    A result is (heads, m, across), with `m` the axis along which the last held operand
    is cut, and is cut along axis 1.

    body: takes a warpgroup's held tiles and its steps; returns its sums in float32, one
        for each result.
    """
    plan = WalkPlan(held, walked, outs, tiles)
    check_fits(name, tiles, plan.smem_bytes())
    operands = [o.array for o in (*held, *walked)]

    def kernel(*refs):
        gmem, refs = refs[: len(operands)], refs[len(operands) :]
        block = _WalkBlock(plan, body, gmem, refs[:outs], *refs[outs:])
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def run():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            # These stand before the loop over tiles. Computed within it they take
            # registers of their own, and one kernel spills.
            part = slot(warpgroup, plan.tiles.parts)
            first = slot(warpgroup, plan.stride)
            compute = partial(block.compute, warpgroup, part, first)
            plgpu.nd_loop(plan.grid, collective_axes="block")(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def feed():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            loop = plgpu.nd_loop(
                plan.grid, collective_axes="block", init_carry=jnp.int32(0)
            )
            block.drain(loop(block.load))

    blocks = min(device.multiprocessors(), math.prod(plan.grid))
    scratch = plan.scratch()
    return launch_blocks(kernel, operands, [plan.out] * outs, scratch, blocks, name)


def _store(value, smem, gmem):
    """Round a value, and store it by way of `smem`, which is free again at the end."""
    smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _add_other(warpgroup, added, sums, barriers, store):
    """Hand warpgroup 1's sums to warpgroup 0, which adds its own and stores the total.

    barriers: `there`, on which warpgroup 0 waits, and `taken`, on which warpgroup 1
        waits. Without the second one, warpgroup 1 could overwrite sums by those of the
        next tile before they are read.
    """
    there, taken = barriers

    @pl.when(warpgroup == 0)
    def add():
        plgpu.barrier_wait(there)
        total = [
            a + plgpu.load(smem, layout=plgpu.Layout.WGMMA)
            for a, smem in zip(added, sums, strict=True)
        ]
        plgpu.barrier_arrive(taken)
        store(total)

    @pl.when(warpgroup == 1)
    def give():
        for a, smem in zip(added, sums, strict=True):
            smem[...] = a
        plgpu.barrier_arrive(there)
        plgpu.barrier_wait(taken)
