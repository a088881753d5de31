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

Tiles are chosen by what a launch of them waits for: see `limits_us`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._core import device, h200
from .._core.sharding import vary_alike
from .base import SMEM_BYTES, buffer, pad_to, plgpu, round_up, slot
from .launch import (
    COLUMN_STEP,
    COMPUTE,
    ROW_STEP,
    Ring,
    Roles,
    Slots,
    check_whole,
    launch,
)

# Rows of a warpgroup's part of a tile, the fewest that a wgmma has.
ROWS = 64
# Columns of a result that an epilogue takes at once.
PIECE = 64
# Numbers of the contracted axis in a step: rows of 128 bytes, the widest swizzle.
DEPTH = 64
# Tiles of rows in a band.
BAND = 16
# Pieces of results that leave shared memory while the next ones are put there. All
# results share these slots: with slots for each of the gate's three, shared memory has
# room for two steps of its factors only.
OUT_SLOTS = 2
# Steps in flight at most. On an H200, 16384 x 1024 x 16512 took 1066 us with 2 of them,
# 771 with 3 and 784 with 4.
MAX_STEPS = 4
# Shared memory for barriers, and for what aligns the buffers.
SPARE_BYTES = 2048
# A piece of both warpgroups, in 16 bits.
PIECE_BYTES = COMPUTE * ROWS * PIECE * 2
# Columns of the tiles to choose from, the largest first. On an H200, 16384 x 1024 x
# 16512 took 784 us with 256, 814 with 128 and 1340 with 64 columns.
TILE_COLUMNS = (256, 128, 64)
# With two products a warpgroup has the sums of both in its registers.
GATED_COLUMNS = (128, 64)
# Share of the tensor cores' rate in the loop over the contracted axis, and clocks of a
# tile beside that loop: what single launches took on an H200.
LOOP_SHARE = 0.82
TILE_CLOCKS = 1800.0
# Clocks of a multiprocessor for each number of silu(gate) * up, from the same launches.
GATE_CLOCKS = 0.13


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

    def counts(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many tiles a result has, by row and by column."""
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
        """Rows and columns of the factor."""
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

    lefts: one for all, or one for each of `rights`; none is transposed.

    One wgmma is always in flight: a step's slots are released when the products of the
    next one have been issued.
    """

    lefts: Sequence[Factor]
    rights: Sequence[Factor]

    def __post_init__(self):
        if any(left.transposed for left in self.lefts):
            raise ValueError("Products: lefts must not be transposed, got one that is")

    @property
    def arrays(self) -> list[jax.Array]:
        return [o.array for o in (*self.lefts, *self.rights)]

    @property
    def shape(self) -> tuple[int, int]:
        return self.lefts[0].shape[0], self.rights[0].shape[1]

    @property
    def steps(self) -> int:
        """Steps along the contracted axis."""
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
                # Without this barrier the compiler keeps the slots' addresses in
                # registers, and the kernel spills.
                part = lax.optimization_barrier(warpgroup)
                for n, right in enumerate(self.rights):
                    m = min(n, len(self.lefts) - 1)
                    left = left_smem[m].at[s, part]
                    plgpu.wgmma(sums[n], left, right.view(right_smem[n].at[s]))
                plgpu.wgmma_wait(len(self.rights))

                @pl.when(i > 0)
                def release_last():
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
        def load_step(i):
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
        """Bytes of shared memory for the slots of the results.

        With `aux` there are slots for a whole tile, since the loads of the next one
        must not wait for the epilogue.
        """
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


@dataclasses.dataclass(frozen=True)
class _MatmulBlock:
    """A launch as a block sees it, inside the kernel: what it does with one tile.

    gmem, aux, out: the factors, further arrays and results in global memory.
    smem, staged: shared memory of the factors and of the epilogue.
    """

    products: Any
    epilogue: Any
    tiles: MatmulTiles
    gmem: Sequence[Any]
    aux: Sequence[Any]
    out: Sequence[Any]
    smem: Sequence[Any]
    staged: Sequence[Any]
    steps: Ring
    pieces: Ring

    def place(self, info) -> tuple[Any, Any]:
        """Row and column of a tile; columns are the minor axis within a band."""
        counts = self.tiles.counts(self.products.shape)
        row, column = plgpu.planar_snake(info.index[0], counts, 0, BAND)
        return row, column

    def compute(self, info) -> None:
        tile, start = info.local_index, info.local_index * self.products.steps
        place = self.place(info)
        sums = self.products.accumulate(self.tiles, self.smem, self.steps, start)
        self.epilogue.store(
            self.tiles, sums, self.out, self.staged, self.pieces, tile, *place
        )

    def load(self, info) -> None:
        tile, start = info.local_index, info.local_index * self.products.steps
        place = self.place(info)
        self.products.fill(self.tiles, self.gmem, self.smem, self.steps, start, *place)
        self.epilogue.fill(self.tiles, self.aux, self.staged, self.pieces, tile, *place)

    def drain(self, tiles_done) -> None:
        self.steps.drain(tiles_done * self.products.steps)
        self.epilogue.drain(self.tiles, self.pieces, tiles_done)


def multiply(
    name: str, products: Any, epilogue: Any, columns: int
) -> Sequence[jax.Array]:
    """The results of the epilogue, of all tiles of the products.

    columns: of a tile; there are as many steps in flight as fit beside it.
    """
    matrices = [a for a in (*products.arrays, *epilogue.aux) if a.ndim == 2]
    check_whole(name, matrices, COLUMN_STEP)
    free = SMEM_BYTES - SPARE_BYTES - epilogue.smem_bytes(columns)
    steps = min(MAX_STEPS, free // products.step_bytes(columns))
    tiles = MatmulTiles(columns, steps)
    shape, dtype = products.shape, products.arrays[0].dtype
    outs = epilogue.shapes(tiles, shape, dtype)
    buffers, staged = products.buffers(tiles), epilogue.buffers(tiles, dtype)
    parts = [products.arrays, epilogue.aux, outs, buffers, staged]

    def bind(*refs):
        *refs, step_ring, piece_ring = refs
        gmem, aux, out, smem, pieces = _split(refs, map(len, parts))
        block = _MatmulBlock(
            products=products,
            epilogue=epilogue,
            tiles=tiles,
            gmem=gmem,
            aux=aux,
            out=out,
            smem=smem,
            staged=pieces,
            steps=step_ring,
            pieces=piece_ring,
        )
        return Roles(block.compute, block.load, block.drain)

    down, across = tiles.counts(shape)
    return launch(
        name,
        bind,
        grid=(down * across,),
        outs=outs,
        buffers=[*buffers, *staged],
        rings=(Slots(tiles.steps, products.copies), epilogue.ring(tiles)),
        operands=(*products.arrays, *epilogue.aux),
    )


def _split(refs: Sequence[Any], sizes: Iterator[int]) -> Iterator[Sequence[Any]]:
    """The refs in runs of these sizes."""
    for size in sizes:
        yield refs[:size]
        refs = refs[size:]


@dataclasses.dataclass(frozen=True)
class Work:
    """A launch: (m, depth) by (depth, n), `products` times, and what it moves.

    lefts: how many of the left factors differ.
    moved: numbers read beside the factors and written, for each one of a result.
    clocks: of the epilogue, for each number of a result.
    density: share of a dense product's multiply-adds that is computed.
    """

    m: int
    depth: int
    n: int
    products: int = 1
    lefts: int = 1
    moved: float = 1.0
    clocks: float = 0.0
    density: float = 1.0


def choose_columns(work: Work, valid: Sequence[int] = TILE_COLUMNS) -> int:
    """The tiles whose launch waits least; of equal ones, the largest."""
    return min(valid, key=lambda columns: max(limits_us(work, columns).values()))


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
    turns = pl.cdiv(tiles, device.multiprocessors())
    macs = rows * columns * work.depth * work.products * work.density
    clocks = macs / h200.MACS_PER_CLOCK / LOOP_SHARE + TILE_CLOCKS
    clocks += rows * columns * work.clocks
    step_numbers = rows * work.density * work.lefts + columns * work.products
    from_l2 = tiles * 2 * work.depth * step_numbers
    beside = 2 * max(0.0, work.moved - 1) * work.m * work.n / h200.MEMORY_BYTES_PER_US
    factors = work.m * work.density * work.lefts + work.n * work.products
    numbers = work.depth * factors + work.moved * work.m * work.n
    memory = 2 * numbers / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE
    return {
        "arithmetic": turns * clocks / h200.CLOCKS_PER_US + beside,
        "L2": from_l2 / h200.L2_BYTES_PER_US + beside,
        "memory": memory,
    }


def pad_rows(a: jax.Array) -> jax.Array:
    """A matrix of tokens, in sizes that the kernels take."""
    rows, columns = a.shape
    return pad_to(a, round_up(rows, ROW_STEP), round_up(columns, COLUMN_STEP))


def pad_weight(w: jax.Array) -> jax.Array:
    """A weight either of whose axes is contracted, in sizes that the kernels take."""
    rows, columns = w.shape
    return pad_to(w, round_up(rows, COLUMN_STEP), round_up(columns, COLUMN_STEP))


def padded(core: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """In sizes that the kernels take, and all varying over the same mesh axes."""
    return vary_alike(pad_rows(core), *map(pad_weight, weights))
