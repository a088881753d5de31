"""Large matmuls with an epilogue in registers: a persistent, warp-specialized frame.

A block computes tiles of 128 rows by 64, 128 or 256 columns; warpgroups 0 and 1 have 64
rows each. For one product with 256 columns and no further arrays in the epilogue:

    warpgroup 2  --TMA-->  ring of 4 steps, 48 KiB each:    filled: 3 loads
                           left 2 x (64 x 64), right 64 x 256
    warpgroup w  wait filled[i], issue 4 wgmma m64n256k16 on left[w] and right,
      (0 or 1)   wgmma_wait(1): step i - 1 is done, arrive emptied[i - 1]
                 after the last step: wgmma_wait(0), arrive emptied[last]
                 epilogue, 64 columns at a time: sums -> 16 bits -> one of 2 slots
                 of 16 KiB  --TMA-->  result

    tensor cores  | tile t: wgmmas      | idle       | tile t + 1: wgmmas ...
    CUDA cores    |                     | epilogue t |
    TMA loads     | t ... | first 4 steps of t + 1   | t + 1 ...

The loop over the contracted axis always has a step's wgmmas in flight, but the epilogue
of a tile is not hidden behind matmuls: both warpgroups are in it at about the same
time. With further arrays (`aux`) a second ring brings a tile's pieces of these; the
epilogue overwrites a piece by its result, and releases the slot once TMA has read it.

Why these tiles: 64 x 256 sums, or twice 64 x 128 with two products, are 128 of the 240
registers of a thread. The larger the tile, the less is read from L2: 16384 x 1024 x
16512 in bfloat16 took 784 us on an H200 with 256 columns, 814 with 128 and 1340 with
64, where XLA's own matmul took 727 (`benchmarks/results/nvidia_h200/launches.json`,
rows `matmul NN` and `xla matmul NN`). In `work.py`, `limits_us` predicts what a launch
waits for, and `choose_columns` takes the tile that waits least.

Blocks take tiles down a band of 16 rows of tiles, then in the next column, so that the
tiles in work share their factors in L2. A result has one writer, so there are no
atomics. What lies past the end of an array is zero when TMA loads it and dropped when
TMA stores it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .base import SMEM_BYTES, buffer, plgpu, slot
from .launch import COLUMN_STEP, COMPUTE, Ring, Roles, Slots, check_whole, launch

# Rows of a warpgroup's part of a tile: wgmma has 64 rows.
ROWS = 64
# Columns of a result that an epilogue takes at once: rows of 128 bytes, the widest
# swizzle.
PIECE = 64
# Numbers of the contracted axis in a step: rows of 128 bytes again.
DEPTH = 64
# Rows of tiles in a band.
BAND = 16
# Slots of pieces of results: one leaves shared memory while the next one is written.
# All results share these slots. With slots for each of the gate's three results, shared
# memory would have room for only two steps of its factors.
OUT_SLOTS = 2
# Most steps in flight. 16384 x 1024 x 16512 took 1066 us with 2 of them, 771 with 3 and
# 784 with 4 (H200, `launches.json`: `matmul NN 256 steps 2`, `steps 3`, `matmul NN
# 256`).
MAX_STEPS = 4
# Bytes of shared memory kept for barriers and for the alignment of buffers.
SPARE_BYTES = 2048
# Bytes of a piece of both warpgroups, in 16 bits.
PIECE_BYTES = COMPUTE * ROWS * PIECE * 2


@dataclasses.dataclass(frozen=True)
class MatmulTiles:
    """Tile sizes of a matmul.

    columns: columns of a result's tile.
    steps: slots of the ring, each with `DEPTH` numbers of the contracted axis (or as
        many as `products` takes a step).
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
        """How many pieces of `PIECE` columns the epilogue takes."""
        return self.columns // PIECE

    def counts(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many rows and how many columns of tiles a result has."""
        return pl.cdiv(shape[0], COMPUTE * ROWS), pl.cdiv(shape[1], self.columns)


@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor of a product: a matrix in memory, or some of its columns.

    transposed: whether the factor is the transpose of what lies in memory. The tile is
        loaded as it lies, and wgmma reads it transposed.
    first, width: the columns in memory that make the factor; by default all.
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
        """The shape in memory of a tile with so many rows and columns of the factor."""
        return (columns, rows) if self.transposed else (rows, columns)

    def cut(self, gmem, rows, columns):
        """A tile of the factor as it lies in memory.

        rows, columns: the first one and how many, along either axis of the factor.
        """
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        start = columns[0] + self.first
        return gmem.at[pl.ds(rows[0], rows[1]), pl.ds(start, columns[1])]

    def view(self, smem):
        """A loaded tile as wgmma takes it, by rows and columns of the factor."""
        return smem.transpose((1, 0)) if self.transposed else smem


def row_of(row, warpgroup):
    """The first row of a warpgroup's part of the tile in row `row` of tiles."""
    return (row * COMPUTE + warpgroup) * ROWS


@dataclasses.dataclass(frozen=True)
class Products:
    """One or two dense products, of factors with the same shapes.

    lefts: one for all products, or one for each of `rights`; none is transposed.
    rights: one for each product.

    The wgmmas of one step are always in flight: a step's slot is released when those of
    the next step have been issued and its own are done.
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
        """TMA loads of a step."""
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
        """The sums of a warpgroup's part of a tile, one of each product.

        start: the ring's step that is this tile's first.
        """
        warpgroup = lax.axis_index("warpgroup")
        left_smem, right_smem = smem[: len(self.lefts)], smem[len(self.lefts) :]

        def run(*sums):
            def step(i, carry):
                s = ring.wait(start + i)
                # Without this barrier the compiler keeps the addresses of all slots in
                # registers, and the kernel spills.
                part = lax.optimization_barrier(warpgroup)
                for n, right in enumerate(self.rights):
                    m = min(n, len(self.lefts) - 1)
                    left = left_smem[m].at[s, part]
                    plgpu.wgmma(sums[n], left, right.view(right_smem[n].at[s]))
                # As many groups as this step issued may be in flight, so those of the
                # step before are done.
                plgpu.wgmma_wait(len(self.rights))

                @pl.when(i > 0)
                def release_last():
                    ring.release(start + i - 1)

                return carry

            lax.fori_loop(0, self.steps, step, jnp.int32(0))
            # Reading the sums awaits all of their wgmmas.
            values = [one[...] for one in sums]
            ring.release(start + self.steps - 1)
            return values

        shape = ROWS, config.columns
        return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for _ in self.rights])

    def fill(
        self, config: MatmulTiles, gmem, smem, ring: Ring, start, row, column
    ) -> None:
        """Load the steps of a tile, as slots become empty."""

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
    """The epilogue: what becomes of a tile's sums before they are stored.

    compute: takes the sums of each product and the tiles of `aux`, all in float32 and
        64 x 64 at a time; returns a tile of each result, which is rounded and stored.
    outs: how many results.
    aux: further arrays of the result's shape. With them there are as many results, and
        result n leaves from the slot that `aux[n]` was loaded to.
    """

    compute: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
    outs: int = 1
    aux: Sequence[jax.Array] = ()

    def smem_bytes(self, columns: int) -> int:
        """Bytes of shared memory beside the products' steps.

        With `aux` there are slots for a whole tile. Without this, the loads of the next
        tile's steps, which follow those of `aux`, would wait for the epilogue.
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
        """The ring of pieces of `aux`; nobody waits for it where there are none."""
        slots = config.pieces if self.aux else OUT_SLOTS
        return Slots(slots, max(1, len(self.aux) * COMPUTE))

    def store(
        self, config: MatmulTiles, sums, gmem, smem, ring: Ring, tile, row, column
    ):
        """Compute and store a warpgroup's part of a tile, one piece after the other."""
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
                    # All stores but the last one have been read, so this slot is free.
                    plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
                    staged = smem[0].at[slot(at * self.outs + n, OUT_SLOTS), part]
                staged[...] = value.astype(staged.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, out.at[rows, columns])
            if self.aux:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ring.release(at)

    def read(self, ring: Ring, at, smem, part) -> list[Any]:
        """The tiles of `aux` for piece `at` in float32, once they are loaded."""
        s = ring.wait(at)
        found = [plgpu.load(one.at[s, part], layout=plgpu.Layout.WGMMA) for one in smem]
        return [one.astype(jnp.float32) for one in found]

    def fill(
        self, config: MatmulTiles, gmem, smem, ring: Ring, tile, row, column
    ) -> None:
        """Load a tile's pieces of `aux`."""
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
    smem, staged: buffers of the factors and of the epilogue in shared memory.
    steps, pieces: the rings of the products and of the epilogue's `aux`.
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
        """Row and column of a tile.

        Tiles that follow each other go down the `BAND` rows of a band, then on to the
        next column; every other band is walked from right to left.
        """
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
    """Return the results of `epilogue` over all tiles of `products`.

    columns: columns of a tile. As many steps are in flight as fit into shared memory,
        up to `MAX_STEPS`.
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
    """Yield the refs in runs of these sizes."""
    for size in sizes:
        yield refs[:size]
        refs = refs[size:]
