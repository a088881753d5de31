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

from .._core.device import multiprocessors
from .._core.sharding import vary_alike
from .base import plgpu, slot

# Warpgroups that compute; one more loads.
COMPUTE = 2


# With 168 registers a thread at launch, 2 x 240 and 24 are what three warpgroups have.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


# Tiles in shared memory are made of 8 rows of up to 128 bytes, and JAX cuts the whole
# arrays into these; wgmma contracts 16 elements at once.
ROW_STEP, COLUMN_STEP, CONTRACTED_STEP = 8, 64, 16


BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    rows: of a held tile, for one warpgroup.
    columns: of a walked tile.
    steps: walked tiles in flight.
    split: both warpgroups compute on the same rows, each every other step, and their
        sums are added at the end: half the rows a block, for twice as many blocks.
    held: held tiles in flight.
    """

    rows: int
    columns: int
    steps: int = 2
    split: bool = False
    held: int = 2

    def __post_init__(self):
        for name, size, step in [("rows", self.rows, 64), ("columns", self.columns, 8)]:
            if size < step or size % step:
                raise ValueError(
                    f"Config: {name} must be a multiple of {step}, got {size}"
                )
        if self.columns > 256 or self.steps < 1 or self.held < 1:
            raise ValueError(
                "Config: columns must be at most 256, steps and held at least 1, "
                f"got {self.columns}, {self.steps} and {self.held}"
            )
        if self.split and self.steps % COMPUTE:
            raise ValueError(
                f"Config: steps must be a multiple of {COMPUTE} to split, "
                f"got {self.steps}"
            )

    @property
    def parts(self) -> int:
        """Held tiles of a block."""
        return 1 if self.split else COMPUTE


def launch_blocks(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    blocks: int,
    name: str,
) -> Sequence[jax.Array]:
    """The kernel in so many blocks of warpgroups that compute and one that loads."""
    run = plgpu.kernel(
        kernel,
        out_type=tuple(outs),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    # Its indices have 32 bits, whatever those of the program have.
    with jax.enable_x64(False):
        results = run(*operands)
    return vary_alike(*results, like=operands)


def wait_for_last(done, slots: int, barriers, first=0) -> None:
    """Of a ring of slots from the first on, `done` of which were filled."""

    @pl.loop(lax.max(done - slots, 0), done)
    def _(i):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[first + slot(i, slots)])


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
