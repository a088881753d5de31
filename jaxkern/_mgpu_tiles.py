"""Blocks that take one tile after the other, and the rings that feed them.

Two warpgroups compute what a third one loads. There are no more blocks than
multiprocessors, and the loads of the next tile run while this one is computed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._mgpu import multiprocessors, plgpu, slot
from ._mgpu_walk import (
    COMPUTE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    launch_blocks,
    wait_for_last,
)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots that `copies` TMA loads fill, and that both warpgroups empty.

    Steps are counted from a block's first one.
    """

    slots: int
    copies: int
    barriers: Any = None

    def scratch(self):
        return [
            plgpu.Barrier(num_arrivals=n, num_barriers=self.slots)
            for n in (self.copies, COMPUTE)
        ]

    def wait(self, at):
        """The slot of step `at`, once it is filled."""
        s = slot(at, self.slots)
        plgpu.barrier_wait(self.barriers[0].at[s])
        return s

    def release(self, at) -> None:
        plgpu.barrier_arrive(self.barriers[1].at[slot(at, self.slots)])

    def fill(self, at, *copies) -> None:
        """From each (source, buffer, index in a slot) to the slot, once it is empty."""
        s = slot(at, self.slots)

        @pl.when(at >= self.slots)
        def _():
            plgpu.barrier_wait(self.barriers[1].at[s])

        for source, smem, *index in copies:
            target = smem.at[(s, *index)]
            plgpu.copy_gmem_to_smem(source, target, self.barriers[0].at[s])

    def drain(self, count) -> None:
        """A barrier must be seen to the end of its last phase."""
        wait_for_last(count, self.slots, [self.barriers[1]])


def launch(
    name: str,
    body: Callable[..., tuple[Callable[..., Any], ...]],
    grid: tuple[int, ...],
    outs: Sequence[jax.Array | jax.ShapeDtypeStruct],
    buffers: Sequence[Any],
    rings: Sequence[Ring],
    operands: Sequence[jax.Array],
):
    """Blocks that each take one tile of the grid after the other.

    body: from references to arrays, results and buffers, and from bound rings, to
        `compute` and `load`, of a tile's `info`, and `drain`, of the number of tiles.
    """
    n_refs = len(operands) + len(outs) + len(buffers)

    def kernel(*refs):
        bound = [
            dataclasses.replace(ring, barriers=barriers)
            for ring, barriers in zip(rings, refs[n_refs:], strict=True)
        ]
        compute, load, drain = body(*refs[:n_refs], *bound)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def run():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.nd_loop(grid, collective_axes="block")(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def feed():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def count(info, carry):
                load(info)
                return carry + 1

            loop = plgpu.nd_loop(grid, collective_axes="block", init_carry=jnp.int32(0))
            drain(loop(count))

    scratch = [*buffers, *(ring.scratch() for ring in rings)]
    blocks = min(multiprocessors(), math.prod(grid))
    shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs]
    return launch_blocks(kernel, operands, shapes, scratch, blocks, name)
