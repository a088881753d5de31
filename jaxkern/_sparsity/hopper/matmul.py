"""2:4 in the frame of `_mosaic.matmul`: a sparse left factor, and results made sparse.

`SparseProduct` replaces the frame's dense `Products`. With tiles of 128 x 256:

    warpgroup 2  --TMA-->  ring of 2 steps, 82 KiB each:    filled: 5 loads
                           2 x (values 64 x 64, words 2 x 128), right 128 x 256
    warpgroup w  wait filled[i], 2 words a thread to registers,
      (0 or 1)   4 wgmma.sp m64n256k32; await all of them, arrive emptied[i]

A dense product has a step's wgmmas in flight while it releases the one before, but this
one waits for its own in each step, since `sparse_dot` is one inline call that returns
its sums. 16384 x 16512 x 1024 took 512 us on an H200, against 720 with a dense left
factor (`launches.json`: `sparse matmul 256`, `matmul NN down 256`). The predictions of
`limits_us` do not model the wait.

`Selection` replaces the frame's `Epilogue`: for each 64 columns of a tile it packs the
sums and stores them, each warpgroup its own 64 rows, by way of 2 slots:

    sums (64 x 64) --select--> values (64 x 32), words (128) --TMA--> results

S-STE's sums are added up over a tile and stored at its end.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._mosaic.base import buffer, plgpu, slot, zeros
from ..._mosaic.launch import COMPUTE, Ring, Slots
from ..._mosaic.matmul import (
    OUT_SLOTS,
    PIECE,
    PIECE_BYTES,
    ROWS,
    Factor,
    MatmulTiles,
    row_of,
)
from .wgmma import STORED, THREADS, WORD_COLUMNS, select, sparse_dot

# Numbers of the contracted axis in a step. 64 values are stored of these, which are
# rows of 128 bytes, the widest swizzle.
SPARSE_STEP = 128
# Words of positions that a thread needs for a step.
STEP_WORDS = SPARSE_STEP // WORD_COLUMNS
# S-STE's sums of a row in each tile: <a, S> and <S, S> of each thread of a quad.
ROW_SUMS = 8
# Bytes of a value.
VALUE_BYTES = 2
# Bytes of a word of positions, and of a sum.
WORD_BYTES = 4


@dataclasses.dataclass(frozen=True)
class SparseProduct:
    """A 2:4-sparse matrix, as `wgmma.select` stores it, times a dense one.

    values: (m, depth / 2).
    words: int32 (m / 64, depth / 64, 128), with both quotients rounded up to an even
        number.
    right: the dense factor, (depth, n).
    """

    values: jax.Array
    words: jax.Array
    right: Factor

    @property
    def arrays(self) -> list[jax.Array]:
        return [self.values, self.words, self.right.array]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.right.shape[1]

    @property
    def steps(self) -> int:
        return pl.cdiv(self.right.shape[0], SPARSE_STEP)

    @property
    def copies(self) -> int:
        """TMA loads of a step: values and words of both warpgroups, and `right`."""
        return 2 * COMPUTE + 1

    def step_bytes(self, columns: int) -> int:
        words = COMPUTE * STEP_WORDS * THREADS * WORD_BYTES
        values = COMPUTE * ROWS * (SPARSE_STEP // 2) * VALUE_BYTES
        return words + values + SPARSE_STEP * columns * VALUE_BYTES

    def buffers(self, config: MatmulTiles) -> list[Any]:
        steps, dtype = config.steps, self.values.dtype
        return [
            buffer(dtype, steps, COMPUTE, ROWS, SPARSE_STEP // 2),
            plgpu.SMEM((steps, COMPUTE, STEP_WORDS, THREADS), jnp.int32),
            buffer(dtype, steps, *self.right.tile(SPARSE_STEP, config.columns)),
        ]

    def accumulate(self, config: MatmulTiles, smem, ring: Ring, start):
        warpgroup = lax.axis_index("warpgroup")
        values, words, right = smem

        def step(i, acc):
            s = ring.wait(start + i)
            part = lax.optimization_barrier(warpgroup)
            factors = values.at[s, part], words.at[s, part], right.at[s]
            acc = sparse_dot(acc, *factors, transposed=self.right.transposed)
            # Threads have read the words by ordinary loads. Without this fence, TMA may
            # overwrite them before.
            plgpu.commit_smem()
            ring.release(start + i)
            return acc

        return [lax.fori_loop(0, self.steps, step, zeros(ROWS, config.columns))]

    def fill(
        self, config: MatmulTiles, gmem, smem, ring: Ring, start, row, column
    ) -> None:
        values, words, right = gmem

        @pl.loop(0, self.steps)
        def load_step(i):
            copies = []
            for part in range(COMPUTE):
                rows = pl.ds(row_of(row, part), ROWS)
                stored = pl.ds(i * (SPARSE_STEP // 2), SPARSE_STEP // 2)
                copies.append((values.at[rows, stored], smem[0], part))
                block = row * COMPUTE + part, pl.ds(i * STEP_WORDS, STEP_WORDS)
                copies.append((words.at[block], smem[1], part))
            across = column * config.columns, config.columns
            source = self.right.cut(right, (i * SPARSE_STEP, SPARSE_STEP), across)
            ring.fill(start + i, *copies, (source, smem[2]))


@dataclasses.dataclass(frozen=True)
class Selection:
    """The epilogue that keeps two of each four columns of a result, and packs them.

    Past the last column the packed result has zeros.

    compute: takes the sums of the products; returns numbers >= 0.
    shrink: whether the second smallest number of each four is subtracted, as S-STE
        does. Then there is a result of sums, float32 (m, 8 x tiles across): its even
        columns add up to <a, S> of a row, its odd ones to <S, S>.
    dense: whether the numbers before the selection are a result too.
    """

    compute: Callable[[Sequence[Any]], Any]
    shrink: bool = False
    dense: bool = False

    @property
    def aux(self) -> Sequence[jax.Array]:
        return ()

    @property
    def stores(self) -> int:
        """TMA stores of a piece: values, words and, with `dense`, all numbers."""
        return 3 if self.dense else 2

    def smem_bytes(self, columns: int) -> int:
        piece = PIECE_BYTES // 2 + COMPUTE * THREADS * WORD_BYTES
        if self.dense:
            piece += PIECE_BYTES
        sums = COMPUTE * ROWS * ROW_SUMS * WORD_BYTES if self.shrink else 0
        return OUT_SLOTS * piece + sums

    def shapes(self, config: MatmulTiles, shape, dtype) -> list[jax.ShapeDtypeStruct]:
        m, (rows, columns) = shape[0], config.counts(shape)
        blocks = rows * COMPUTE, columns * config.pieces, THREADS
        shapes = [
            jax.ShapeDtypeStruct((m, blocks[1] * STORED), dtype),
            jax.ShapeDtypeStruct(blocks, jnp.int32),
        ]
        if self.dense:
            shapes.append(jax.ShapeDtypeStruct(shape, dtype))
        if self.shrink:
            shapes.append(jax.ShapeDtypeStruct((m, ROW_SUMS * columns), jnp.float32))
        return shapes

    def buffers(self, config: MatmulTiles, dtype) -> list[Any]:
        buffers = [
            buffer(dtype, OUT_SLOTS, COMPUTE, ROWS, STORED, swizzle=64),
            plgpu.SMEM((OUT_SLOTS, COMPUTE, THREADS), jnp.int32),
        ]
        if self.dense:
            buffers.append(buffer(dtype, OUT_SLOTS, COMPUTE, ROWS, PIECE))
        if self.shrink:
            buffers.append(plgpu.SMEM((COMPUTE, ROWS, ROW_SUMS), jnp.float32))
        return buffers

    def ring(self, config: MatmulTiles) -> Slots:
        """A ring for which nobody waits, since nothing is loaded."""
        return Slots(1, 1)

    def store(
        self, config: MatmulTiles, sums, gmem, smem, ring: Ring, tile, row, column
    ):
        """Compute, select and store a warpgroup's part of a tile, piece by piece."""
        total = None
        # This stands before the loop over pieces, which saves instructions.
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(row_of(row, warpgroup), ROWS)
        for piece in range(config.pieces):
            where = slice(piece * PIECE, (piece + 1) * PIECE)
            numbers = self.compute([one[:, where] for one in sums])
            numbers = numbers.astype(smem[0].dtype)
            values, words, *more = select(numbers, self.shrink)
            at, block = tile * config.pieces + piece, column * config.pieces + piece
            results = [values, words, numbers] if self.dense else [values, words]
            targets = [
                gmem[0].at[rows, pl.ds(block * STORED, STORED)],
                gmem[1].at[row * COMPUTE + warpgroup, block],
            ]
            if self.dense:
                targets.append(gmem[2].at[rows, pl.ds(block * PIECE, PIECE)])
            self._store_piece(results, targets, smem, at, warpgroup)
            if self.shrink:
                total = more[0] if total is None else total + more[0]
        if self.shrink:
            along = pl.ds(column * ROW_SUMS, ROW_SUMS)
            self._store_sums(total, gmem[-1].at[rows, along], smem[-1], warpgroup)

    def _store_piece(self, results, targets, smem, at, warpgroup) -> None:
        """Store a warpgroup's part of piece `at`."""
        part, s = lax.optimization_barrier(warpgroup), slot(at, OUT_SLOTS)
        # All stores but those of the last piece have been read, so this slot is free.
        plgpu.wait_smem_to_gmem(self.stores * (OUT_SLOTS - 1), wait_read_only=True)
        staged = [one.at[s, part] for one in smem[: self.stores]]
        for value, one in zip(results, staged, strict=True):
            one[...] = value
        plgpu.commit_smem()
        for one, target in zip(staged, targets, strict=True):
            plgpu.copy_smem_to_gmem(one, target)

    def _store_sums(self, total, target, smem, warpgroup) -> None:
        """Store S-STE's sums of a warpgroup's rows over a tile."""
        part = lax.optimization_barrier(warpgroup)
        # All stores but those of this tile's last piece have been read, so also the
        # last tile's sums, which leave from the same buffer.
        plgpu.wait_smem_to_gmem(self.stores, wait_read_only=True)
        smem.at[part][...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[part], target)

    def fill(
        self, config: MatmulTiles, gmem, smem, ring: Ring, tile, row, column
    ) -> None:
        """There is nothing to load."""

    def drain(self, config: MatmulTiles, ring: Ring, tiles_done) -> None:
        """There is nothing to wait for."""
