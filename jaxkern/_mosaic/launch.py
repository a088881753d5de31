"""The persistent launch of our kernels, and the rings of slots that feed it.

A block has three warpgroups of 128 threads. Warpgroup 2 loads, 0 and 1 compute:

    global memory              shared memory                   registers
                 TMA loads    ring of slots          wgmma
    operands ---------------> [ 0 | 1 | .. | n-1 ] ---------> sums of warpgroup 0
               warpgroup 2                         ---------> sums of warpgroup 1
                 TMA stores                                       |
    results  <--------------- staging buffers <-------------------+
               warpgroups 0, 1

    a slot's barrier   who arrives, in each phase          who waits
    filled             each TMA load of the step, once     warpgroups 0 and 1
    emptied            warpgroups 0 and 1, once each       warpgroup 2

The warpgroups meet at these barriers alone. Warpgroup 2 waits only for a slot that is
still full, so it loads the first steps of the next tile while the others finish this
one. Nothing keeps warpgroups 0 and 1 in step with each other but the slots that both
must empty: one can use the CUDA cores while the tensor cores work for the other.

There are at most as many blocks as multiprocessors. Of `blocks` blocks, block b takes
tiles b, b + blocks, b + 2 blocks, ... of the grid. `launch` serves the frames that
take a tile in steps (`_mosaic.matmul`, `_masked.hopper`); the walks of `flash_mlp` and
of attention have other barriers and use `launch_blocks`.
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
from .base import SMEM_BYTES, pad_to, plgpu, round_up, slot

# Warpgroups of a block that compute; one more loads.
COMPUTE = 2
# Registers of a thread. A multiprocessor has 65,536, so each of a block's 384 threads
# gets 168 at the launch (a multiple of 8). The warpgroup that loads gives most of its
# own to the other two: 2 x 240 + 24 = 3 x 168.
COMPUTE_REGISTERS = 240
MEMORY_REGISTERS = 24

# Rows and 16-bit columns of a tile that TMA writes to shared memory with the widest
# swizzle: 8 rows of 128 bytes. JAX cuts whole arrays into such tiles, so their sizes
# must be multiples of these.
ROW_STEP = 8
COLUMN_STEP = 64
# Numbers of 16 bits that one wgmma instruction contracts.
CONTRACTED_STEP = 16

# Bytes of a barrier in shared memory.
BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class WalkTiles:
    """Tile sizes of a kernel that holds a tile of some arrays and walks along others.

    rows: rows of a held tile that one warpgroup computes, a multiple of 64, since wgmma
        has 64 rows.
    columns: columns of a walked tile, a multiple of 8 up to 256, as wgmma allows.
    steps: slots of a walked operand's ring.
    split: whether both warpgroups compute on the same rows, each every other step, and
        add their sums at the end. A block then has half the rows, and there are twice
        as many blocks.
    held: slots for held tiles. With two, the next tile is loaded during this one.
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
        """How many tiles of `rows` rows a block holds at a time."""
        return 1 if self.split else COMPUTE


def check_fits(name: str, tiles: object, needed_bytes: int) -> None:
    """Check that a block's shared memory holds what it needs.

    Raises:
        ValueError: A block with these tiles needs more shared memory than there is.
    """
    if needed_bytes > SMEM_BYTES:
        raise ValueError(
            f"{name}: {tiles} must fit {SMEM_BYTES} bytes of shared memory, "
            f"got {needed_bytes}"
        )


def check_whole(name: str, arrays: Sequence[jax.Array], column_step: int) -> None:
    """Check that tiles of shared memory divide the arrays without a remainder.

    Without this, only compiling for a GPU would tell: the emulator takes any size.

    Raises:
        ValueError: The rows are not a multiple of `ROW_STEP`, or the columns not one of
            `column_step`.
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
    """Run the kernel in `blocks` blocks of `COMPUTE` + 1 warpgroups.

    Inside, `lax.axis_index("warpgroup")` and `lax.axis_index("block")` say who runs.
    Returns one array for each of `outs`.
    """
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
    # A kernel's indices have 32 bits, also where the program enables 64.
    with jax.enable_x64(False):
        results = run(*operands)
    return vary_alike(*results, like=operands)


def wait_for_last(done, slots: int, barriers, first=0) -> None:
    """Wait until the last of `done` steps are out of a ring's slots.

    The ring's barriers are those from number `first` on. Without this, the loading
    warpgroup would end with phases of its barriers that it never observed, which the
    interpreter of jax 0.11 refuses.
    """

    @pl.loop(lax.max(done - slots, 0), done)
    def wait_until_empty(i):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[first + slot(i, slots)])


@dataclasses.dataclass(frozen=True)
class Slots:
    """A ring of slots in shared memory, as the host plans it.

    slots: how many steps are in flight.
    copies: TMA loads that fill a slot, each of which arrives once at its barrier.
    """

    slots: int
    copies: int

    def scratch(self) -> list[Any]:
        """The barriers `filled` and `emptied`, one of each for a slot."""
        return [
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.slots)
            for arrivals in (self.copies, COMPUTE)
        ]


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring of slots inside the kernel, with its barriers.

    `at` counts the steps of a block over all of its tiles, and lies in slot
    `at % slots`. The computing warpgroups call `wait` and `release` for each step, the
    loading one calls `fill`, and `drain` at its end.

    filled, emptied: one barrier for each slot.
    """

    slots: int
    filled: Any
    emptied: Any

    def wait(self, at):
        """Wait until step `at` is loaded, and return its slot."""
        s = slot(at, self.slots)
        plgpu.barrier_wait(self.filled.at[s])
        return s

    def release(self, at) -> None:
        """Let the slot of step `at` be filled again; this warpgroup has read it."""
        plgpu.barrier_arrive(self.emptied.at[slot(at, self.slots)])

    def fill(self, at, *copies) -> None:
        """Load step `at` once both computing warpgroups have released its slot.

        copies: each is (source in global memory, buffer of the ring, *index in a slot).
        """
        s = slot(at, self.slots)

        @pl.when(at >= self.slots)
        def wait_until_empty():
            plgpu.barrier_wait(self.emptied.at[s])

        for source, smem, *index in copies:
            target = smem.at[(s, *index)]
            plgpu.copy_gmem_to_smem(source, target, self.filled.at[s])

    def drain(self, count) -> None:
        """Wait until the slots of all `count` steps are released."""
        wait_for_last(count, self.slots, [self.emptied])


class Roles(NamedTuple):
    """The functions that the warpgroups of a block run.

    compute: takes a tile's `info` (`plgpu.NDLoopInfo`), in warpgroups 0 and 1.
    load: takes the same in warpgroup 2.
    drain: takes the number of tiles of this block, in warpgroup 2 after the last one.
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
    """Run persistent blocks, each of which takes one tile of the grid after the other.

    bind: called inside the kernel with references to the operands, results and buffers,
        and with a `Ring` for each of `rings`; returns the roles of the warpgroups.
    grid: numbers of tiles along each axis.
    outs: arrays like the results.
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


def pad_rows(a: jax.Array) -> jax.Array:
    """Pad a matrix of tokens with zeros to sizes that the kernels take."""
    rows, columns = a.shape
    return pad_to(a, round_up(rows, ROW_STEP), round_up(columns, COLUMN_STEP))


def pad_weight(w: jax.Array) -> jax.Array:
    """Pad a weight with zeros, so that kernels can contract either axis."""
    rows, columns = w.shape
    return pad_to(w, round_up(rows, COLUMN_STEP), round_up(columns, COLUMN_STEP))


def padded(core: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """Pad a core and weights for the kernels; all vary over the same mesh axes then."""
    return vary_alike(pad_rows(core), *map(pad_weight, weights))
