"""Blocks that take one tile after the other, and the rings that feed them.

Two warpgroups compute what a third one loads. There are no more blocks than
multiprocessors, and the loads of the next tile run while this one is computed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._core import device
from .._core.sharding import vary_alike
from .base import SMEM_BYTES, plgpu, slot

# Warpgroups that compute; one more loads.
COMPUTE = 2
# With 168 registers a thread at launch, 2 x 240 and 24 are what three warpgroups have.
COMPUTE_REGISTERS = 240
MEMORY_REGISTERS = 24

# Tiles in shared memory are made of 8 rows of up to 128 bytes, which are 64 columns of
# 16 bits, and JAX cuts whole arrays into these.
ROW_STEP = 8
COLUMN_STEP = 64
# wgmma contracts 16 numbers of 16 bits at once.
CONTRACTED_STEP = 16

BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class WalkTiles:
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
                    f"WalkTiles: {name} must be a multiple of {step}, got {size}"
                )
        if self.columns > 256 or self.steps < 1 or self.held < 1:
            raise ValueError(
                "WalkTiles: columns must be at most 256, steps and held at least 1, "
                f"got {self.columns}, {self.steps} and {self.held}"
            )
        if self.split and self.steps % COMPUTE:
            raise ValueError(
                f"WalkTiles: steps must be a multiple of {COMPUTE} to split, "
                f"got {self.steps}"
            )

    @property
    def parts(self) -> int:
        """Held tiles of a block."""
        return 1 if self.split else COMPUTE


def check_fits(name: str, tiles: object, needed_bytes: int) -> None:
    """Whether the shared memory of a multiprocessor holds what a block needs.

    Raises:
        ValueError: a block with these tiles needs more shared memory than there is.
    """
    if needed_bytes > SMEM_BYTES:
        raise ValueError(
            f"{name}: {tiles} must fit {SMEM_BYTES} bytes of shared memory, "
            f"got {needed_bytes}"
        )


def check_whole(name: str, arrays: Sequence[jax.Array], column_step: int) -> None:
    """Whether shared memory can hold the arrays in tiles, without a remainder.

    Only compiling for a GPU would ask for it: the emulator takes any size.

    Raises:
        ValueError: rows are no multiple of `ROW_STEP`, or columns none of the step.
    """
    for array in arrays:
        rows, columns = array.shape[-2:]
        if rows % ROW_STEP or not column_step or columns % column_step:
            raise ValueError(
                f"{name}: arrays must have multiples of {ROW_STEP} rows and "
                f"{column_step} columns, got {rows} and {columns}"
            )


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
    """Wait until the last of `done` steps have left a ring's slots, from `first` on."""

    @pl.loop(lax.max(done - slots, 0), done)
    def wait_until_empty(i):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[first + slot(i, slots)])


@dataclasses.dataclass(frozen=True)
class Slots:
    """A ring of slots in shared memory, as the host plans it.

    `copies` TMA loads fill a slot, and both computing warpgroups empty it.
    """

    slots: int
    copies: int

    def scratch(self) -> list[Any]:
        return [
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.slots)
            for arrivals in (self.copies, COMPUTE)
        ]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots inside the kernel, with their barriers; steps count from a block's first.

    filled, emptied: a barrier for each slot.
    """

    slots: int
    filled: Any
    emptied: Any

    def wait(self, at):
        """The slot of step `at`, once it is filled."""
        s = slot(at, self.slots)
        plgpu.barrier_wait(self.filled.at[s])
        return s

    def release(self, at) -> None:
        """Let the slot of step `at` be filled again."""
        plgpu.barrier_arrive(self.emptied.at[slot(at, self.slots)])

    def fill(self, at, *copies) -> None:
        """From each (source, buffer, index in a slot) to the slot, once it is empty."""
        s = slot(at, self.slots)

        @pl.when(at >= self.slots)
        def wait_until_empty():
            plgpu.barrier_wait(self.emptied.at[s])

        for source, smem, *index in copies:
            target = smem.at[(s, *index)]
            plgpu.copy_gmem_to_smem(source, target, self.filled.at[s])

    def drain(self, count) -> None:
        """See the barriers of `count` steps to the end of their last phase."""
        wait_for_last(count, self.slots, [self.emptied])


class Roles(NamedTuple):
    """What the warpgroups of a block do.

    compute, load: from a tile's `info`; two warpgroups compute, a third one loads.
    drain: from the number of tiles that this block took.
    """

    compute: Callable[[Any], None]
    load: Callable[[Any], None]
    drain: Callable[[Any], None]


def launch(
    name: str,
    bind: Callable[..., Roles],
    *,
    grid: tuple[int, ...],
    outs: Sequence[jax.Array | jax.ShapeDtypeStruct],
    buffers: Sequence[Any],
    rings: Sequence[Slots],
    operands: Sequence[jax.Array],
):
    """Blocks that each take one tile of the grid after the other.

    bind: from references to arrays, results and buffers, and from rings, to the roles
        of the warpgroups; called inside the kernel.
    """
    n_refs = len(operands) + len(outs) + len(buffers)

    def kernel(*refs):
        bound = [
            Ring(ring.slots, *barriers)
            for ring, barriers in zip(rings, refs[n_refs:], strict=True)
        ]
        roles = bind(*refs[:n_refs], *bound)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def run():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.nd_loop(grid, collective_axes="block")(roles.compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def feed():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def count(info, carry):
                roles.load(info)
                return carry + 1

            loop = plgpu.nd_loop(grid, collective_axes="block", init_carry=jnp.int32(0))
            roles.drain(loop(count))

    scratch = [*buffers, *(ring.scratch() for ring in rings)]
    blocks = min(device.multiprocessors(), math.prod(grid))
    shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs]
    return launch_blocks(kernel, operands, shapes, scratch, blocks, name)
