"""The frame of our large matmuls: persistent blocks, and what follows in registers.

A block computes 128 rows by up to 256 columns of a result, each of its two warpgroups
64 rows, while a third one loads what is contracted, some of it a step. Tiles are taken
in bands of `BAND` rows of tiles, whose columns the blocks walk together, so that both
factors are read from L2.

A `Products` says where the sums of a tile come from, an `Epilogue` what becomes of
them: it gets them in float32, 64 x 64 at a time, and tiles of further arrays at the
same place; what it returns is rounded and stored while the loads of the next tile run.
With two products, as gate and up have, it gets both sums. Results have one writer, so
there are no atomics. What lies past the end of an array is zero when TMA loads it and
dropped when TMA stores it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._core import device, h200
from .._core.sharding import vary_alike
from .base import SMEM_BYTES, buffer, plgpu, slot
from .launch import COMPUTE, ROW_STEP, Ring, Roles, Slots, launch

# Rows of a warpgroup, the least that wgmma has; also what an epilogue takes at once.
ROWS, PIECE = 64, 64
# Of the contracted axis, in a step: rows of 128 bytes, the widest swizzle.
DEPTH = 64
# Tiles of rows in a band.
BAND = 16
# Pieces of results that leave shared memory while the next ones are put there. All
# results take turns, or the gate's three would leave room for two steps of its factors.
OUT_SLOTS = 2
MAX_STEPS = 4
# For barriers, and for what aligns the buffers.
SPARE_BYTES = 2048
# Of both warpgroups, in 16 bits.
PIECE_BYTES = COMPUTE * ROWS * PIECE * 2


@dataclasses.dataclass(frozen=True)
class MatmulTiles:
    """Tile sizes.

    columns: of a result's tile.
    steps: of the contracted axis in flight.
    """

    columns: int
    steps: int

    def __post_init__(self):
        if self.columns not in (64, 128, 256) or self.steps < 2:
            raise ValueError(
                "MatmulTiles: columns must be 64, 128 or 256 and steps at least 2, "
                f"got {self.columns} and {self.steps}"
            )

    @property
    def pieces(self) -> int:
        return self.columns // PIECE

    def tiles(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many a result has, by row and by column."""
        return pl.cdiv(shape[0], COMPUTE * ROWS), pl.cdiv(shape[1], self.columns)


@dataclasses.dataclass(frozen=True)
class Factor:
    """A matrix, or some of its columns; `transposed` as a factor, not in memory.

    first, width: the columns that it is about, of those in memory.
    """

    array: Any
    transposed: bool = False
    first: int = 0
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the factor."""
        rows, columns = self.array.shape
        columns = columns if self.width is None else self.width
        return (columns, rows) if self.transposed else (rows, columns)

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape in memory of a tile of the factor."""
        return (columns, rows) if self.transposed else (rows, columns)

    def cut(self, gmem, rows, columns):
        """A tile of the factor as it lies in memory, by first and size either way."""
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        start = columns[0] + self.first
        return gmem.at[pl.ds(rows[0], rows[1]), pl.ds(start, columns[1])]

    def view(self, smem):
        """Such a tile as a factor."""
        return smem.transpose((1, 0)) if self.transposed else smem


def row_of(row, warpgroup):
    """The first one of a warpgroup, by the tile's index."""
    return (row * COMPUTE + warpgroup) * ROWS


@dataclasses.dataclass(frozen=True)
class Products:
    """One or two dense products, of factors with the same shapes.

    lefts: one for all, or one for each of `rights`.

    One wgmma is always in flight: a step's slots are released when the products of the
    next one have been issued.
    """

    lefts: Sequence[Factor]
    rights: Sequence[Factor]

    @property
    def arrays(self) -> list[jax.Array]:
        return [o.array for o in (*self.lefts, *self.rights)]

    @property
    def shape(self) -> tuple[int, int]:
        return self.lefts[0].shape[0], self.rights[0].shape[1]

    @property
    def steps(self) -> int:
        """To walk, of a tile."""
        return pl.cdiv(self.lefts[0].shape[1], DEPTH)

    @property
    def copies(self) -> int:
        """Loads of a step."""
        return len(self.lefts) * COMPUTE + len(self.rights)

    def step_bytes(self, columns: int) -> int:
        rows = len(self.lefts) * COMPUTE * ROWS
        return 2 * DEPTH * (rows + len(self.rights) * columns)

    def buffers(self, config: MatmulTiles) -> list[Any]:
        dtype, shape = self.arrays[0].dtype, (COMPUTE, ROWS, DEPTH)
        tiles = [shape] * len(self.lefts)
        tiles += [right.tile(DEPTH, config.columns) for right in self.rights]
        return [buffer(dtype, config.steps, *tile) for tile in tiles]

    def accumulate(self, config: MatmulTiles, smem, ring: Ring, start):
        """The sums of a warpgroup's tile, one of each product."""
        warpgroup = lax.axis_index("warpgroup")
        left_smem, right_smem = smem[: len(self.lefts)], smem[len(self.lefts) :]

        def run(*sums):
            def step(i, carry):
                s = ring.wait(start + i)
                # Or the addresses would be kept in registers.
                part = lax.optimization_barrier(warpgroup)
                for n, right in enumerate(self.rights):
                    m = min(n, len(self.lefts) - 1)
                    a = self.lefts[m].view(left_smem[m].at[s, part])
                    plgpu.wgmma(sums[n], a, right.view(right_smem[n].at[s]))
                plgpu.wgmma_wait(len(self.rights))

                @pl.when(i > 0)
                def _():
                    ring.release(start + i - 1)

                return carry

            lax.fori_loop(0, self.steps, step, jnp.int32(0))
            values = [one[...] for one in sums]
            ring.release(start + self.steps - 1)
            return values

        shape = ROWS, config.columns
        return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for _ in self.rights])

    def fill(
        self, config: MatmulTiles, gmem, smem, ring: Ring, start, row, column
    ) -> None:
        """The loads of a tile's steps."""

        @pl.loop(0, self.steps)
        def _(i):
            along, copies = (i * DEPTH, DEPTH), []
            across = column * config.columns, config.columns
            lefts = len(self.lefts)
            for left, source, one in zip(self.lefts, gmem, smem, strict=False):
                for part in range(COMPUTE):
                    rows = row_of(row, part), ROWS
                    copies.append((left.cut(source, rows, along), one, part))
            factors = zip(self.rights, gmem[lefts:], smem[lefts:], strict=True)
            for right, source, one in factors:
                copies.append((right.cut(source, along, across), one))
            ring.fill(start + i, *copies)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums.

    compute: from the sums of each product and the tiles of `aux`, all in float32, to a
        tile of each result. With `aux` there are as many results as those.
    """

    compute: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
    outs: int = 1
    aux: Sequence[jax.Array] = ()

    def smem_bytes(self, columns: int) -> int:
        """With `aux`, of a whole tile: its loads must not wait for the epilogue."""
        slots = self.outs * columns // PIECE if self.aux else OUT_SLOTS
        return slots * PIECE_BYTES

    def shapes(self, config: MatmulTiles, shape, dtype) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, dtype)] * self.outs

    def buffers(self, config: MatmulTiles, dtype) -> list[Any]:
        shape = COMPUTE, ROWS, PIECE
        if not self.aux:
            return [buffer(dtype, OUT_SLOTS, *shape)]
        return [buffer(dtype, config.pieces, *shape) for _ in range(self.outs)]

    def ring(self, config: MatmulTiles) -> Slots:
        slots = config.pieces if self.aux else OUT_SLOTS
        return Slots(slots, max(1, len(self.aux) * COMPUTE))

    def store(
        self, config: MatmulTiles, sums, gmem, smem, ring: Ring, tile, row, column
    ):
        warpgroup = lax.axis_index("warpgroup")
        for piece in range(config.pieces):
            at = tile * config.pieces + piece
            part = lax.optimization_barrier(warpgroup)
            aux = self.read(ring, at, smem, part) if self.aux else []
            where = slice(piece * PIECE, (piece + 1) * PIECE)
            values = self.compute([one[:, where] for one in sums], aux)
            rows = pl.ds(row_of(row, warpgroup), ROWS)
            columns = pl.ds(column * config.columns + piece * PIECE, PIECE)
            for n, (value, out) in enumerate(zip(values, gmem, strict=True)):
                if self.aux:
                    staged = smem[n].at[slot(at, config.pieces), part]
                else:
                    # What was stored from this slot before has been read.
                    plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
                    staged = smem[0].at[slot(at * self.outs + n, OUT_SLOTS), part]
                staged[...] = value.astype(staged.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, out.at[rows, columns])
            if self.aux:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ring.release(at)

    def read(self, ring: Ring, at, smem, part) -> list[Any]:
        """The tiles of `aux` for piece `at`, once they are there."""
        s = ring.wait(at)
        found = [plgpu.load(one.at[s, part], layout=plgpu.Layout.WGMMA) for one in smem]
        return [one.astype(jnp.float32) for one in found]

    def fill(
        self, config: MatmulTiles, gmem, smem, ring: Ring, tile, row, column
    ) -> None:
        """The loads of the tiles of `aux`."""
        for piece in range(config.pieces if self.aux else 0):
            columns = pl.ds(column * config.columns + piece * PIECE, PIECE)
            copies = []
            for source, one in zip(gmem, smem, strict=True):
                for part in range(COMPUTE):
                    rows = pl.ds(row_of(row, part), ROWS)
                    copies.append((source.at[rows, columns], one, part))
            ring.fill(tile * config.pieces + piece, *copies)

    def drain(self, config: MatmulTiles, ring: Ring, tiles_done) -> None:
        if self.aux:
            ring.drain(tiles_done * config.pieces)


def config_of(products: Any, epilogue: Any, columns: int) -> MatmulTiles:
    """With tiles of so many columns, the steps that fit."""
    free = SMEM_BYTES - SPARE_BYTES - epilogue.smem_bytes(columns)
    return MatmulTiles(columns, min(MAX_STEPS, free // products.step_bytes(columns)))


def multiply(
    name: str, products: Any, epilogue: Any, config: MatmulTiles
) -> Sequence[jax.Array]:
    """The results of the epilogue, of all tiles of the products."""
    _check(name, [*products.arrays, *epilogue.aux])
    shape, dtype = products.shape, products.arrays[0].dtype
    counts, steps = config.tiles(shape), products.steps
    buffers = products.buffers(config)
    outs = epilogue.shapes(config, shape, dtype)
    parts = [products.arrays, epilogue.aux, outs, buffers]

    def body(*refs):
        *refs, ring, epilogue_ring = refs
        gmem, aux_gmem, out_gmem, smem, staged = _split(refs, map(len, parts))

        def place(info):
            # Its columns are the minor axis within a band of rows.
            return plgpu.planar_snake(info.index[0], counts, 0, BAND)

        def compute(info):
            tile, at = info.local_index, place(info)
            sums = products.accumulate(config, smem, ring, tile * steps)
            epilogue.store(config, sums, out_gmem, staged, epilogue_ring, tile, *at)

        def load(info):
            tile, at = info.local_index, place(info)
            products.fill(config, gmem, smem, ring, tile * steps, *at)
            epilogue.fill(config, aux_gmem, staged, epilogue_ring, tile, *at)

        def drain(tiles_done):
            ring.drain(tiles_done * steps)
            epilogue.drain(config, epilogue_ring, tiles_done)

        return Roles(compute, load, drain)

    rings = Slots(config.steps, products.copies), epilogue.ring(config)
    operands = *products.arrays, *epilogue.aux
    buffers = [*buffers, *epilogue.buffers(config, dtype)]
    grid = (counts[0] * counts[1],)
    return launch(name, body, grid, outs, buffers, rings, operands)


def _split(refs, sizes):
    """The refs in runs of these sizes, and the rest."""
    for size in sizes:
        yield refs[:size]
        refs = refs[size:]
    yield refs


def _check(name: str, arrays: Sequence[jax.Array]) -> None:
    """Only compiling for a GPU asks for it; the emulator would take any size."""
    for array in arrays:
        if array.ndim == 2 and (array.shape[0] % 8 or array.shape[1] % PIECE):
            raise ValueError(
                f"{name}: arrays must have multiples of 8 rows and {PIECE} columns, "
                f"got {array.shape}"
            )


DTYPES = ("bfloat16", "float16")


FEATURE_STEP = PIECE


# Of the tensor cores' rate, in the loop; clocks of a tile beside it, and of silu and
# the gate for each number: what launches took on an H200.
RATE, TILE_CLOCKS, GATE_CLOCKS = 0.82, 1800.0, 0.13


# Of tiles; with two products a warpgroup has the sums of both.
COLUMNS, GATED_COLUMNS = (256, 128, 64), (128, 64)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of a launch: (m, depth) by (depth, n), `products` times, and what it moves.

    lefts: how many of the left factors differ.
    moved: numbers read beside the factors and written, for each one of a result.
    clocks: of the epilogue, for each number of a result.
    density: of the multiply-adds, what a dense product would take.
    """

    m: int
    depth: int
    n: int
    products: int = 1
    lefts: int = 1
    moved: float = 1.0
    clocks: float = 0.0
    density: float = 1.0


def limits_us(work: Work, columns: int) -> dict[str, float]:
    """What a launch with tiles of so many columns waits for on an H200.

    Tiles take turns on the multiprocessors. One takes as long as its matmuls, at the
    rate that they reach there, and then its epilogue, with what it moves beside one
    result; all together no less than the factors take to come from L2, and every array
    to and from memory. Within a tenth of what single launches took there; programs that
    keep the chip busy for long took up to a fifth more.
    """
    rows = COMPUTE * ROWS
    tiles = pl.cdiv(work.m, rows) * pl.cdiv(work.n, columns)
    macs = rows * columns * work.depth * work.products * work.density
    clocks = (
        macs / h200.MACS_PER_CLOCK / RATE + TILE_CLOCKS + rows * columns * work.clocks
    )
    factors = rows * work.density * work.lefts + columns * work.products
    loaded = 2 * work.depth * factors
    factors = work.m * work.density * work.lefts + work.n * work.products
    numbers = work.depth * factors + work.moved * work.m * work.n
    more = 2 * max(0.0, work.moved - 1) * work.m * work.n / h200.MEMORY_BYTES_PER_US
    return {
        "arithmetic": pl.cdiv(tiles, device.multiprocessors())
        * clocks
        / h200.CLOCKS_PER_US
        + more,
        "L2": tiles * loaded / h200.L2_BYTES_PER_US + more,
        "memory": 2 * numbers / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE,
    }


def predicted_us(work: Work, columns: int) -> float:
    """Time of a launch, by what it waits for longest."""
    return h200.LAUNCH_US + max(limits_us(work, columns).values())


def choose_columns(work: Work, valid: Sequence[int] = COLUMNS) -> int:
    """The tiles that are predicted to be fastest; of equal ones, the largest."""
    return min(valid, key=partial(predicted_us, work))


def unsupported(shape: Sequence[int], dtype: Any) -> str | None:
    """Why the kernels cannot run this, or None if they can; shape: of the core."""
    if str(dtype) not in DTYPES:
        return f"dtype must be {' or '.join(DTYPES)} for mosaic_gpu, got {dtype}"
    if 0 in shape:
        return f"no axis may be empty for mosaic_gpu, got {tuple(shape)}"
    return None


def pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """With zeros at the end up to multiples, which add nothing to any result."""
    missing = -a.shape[0] % rows, -a.shape[1] % columns
    return jnp.pad(a, [(0, n) for n in missing]) if any(missing) else a


def padded(core: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """Of sizes that the kernels take, and all varying over the same mesh axes."""
    whole = (pad(w, FEATURE_STEP, FEATURE_STEP) for w in weights)
    return vary_alike(pad(core, ROW_STEP, FEATURE_STEP), *whole)


def run(name: str, products: Any, epilogue: Any, columns: int) -> Sequence[jax.Array]:
    """A launch with tiles of so many columns."""
    return multiply(name, products, epilogue, config_of(products, epilogue, columns))


def product_in_xla(left: Factor, right: Factor) -> jax.Array:
    """The product of two factors, without an epilogue.

    On an H200 our kernel takes up to a tenth more than XLA's for these.
    """

    def columns(operand: Factor) -> jax.Array:
        first, width = operand.first, operand.width or operand.array.shape[1]
        return lax.slice_in_dim(operand.array, first, first + width, axis=1)

    contracted = (0 if left.transposed else 1,), (1 if right.transposed else 0,)
    return lax.dot_general(columns(left), columns(right), (contracted, ((), ())))
