"""2:4 in the frame of `_mosaic.matmul`: a sparse left factor, results made sparse.

`sparse_dot` waits for its instructions in each step, where a dense product has one step
in flight: predictions do not model that.
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

# Of the contracted axis, in a step: 64 values are stored, in rows of 128 bytes.
SPARSE_STEP = 128
# Words of positions that a thread has of a step.
STEP_WORDS = SPARSE_STEP // WORD_COLUMNS
# S-STE's sums of a row, for each tile: <a, S> and <S, S> of each thread of a quad.
ROW_SUMS = 8
# Stored in 16 bits; words and sums have 32.
VALUE_BYTES = 2
WORD_BYTES = 4


@dataclasses.dataclass(frozen=True)
class SparseProduct:
    """A 2:4-sparse matrix, as `wgmma.select` stores it, times a dense one.

    values: (m, depth / 2).
    words: int32 (m / 64, depth / 64, 128), both rounded up to what is even.
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
            # The words were read as ordinary memory is.
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
    """Two of each four of a result's columns, packed; zeros past the last one.

    compute: from the sums of the products to numbers >= 0.
    shrink: as S-STE does, by the second smallest; there are sums then, float32
        (m, 8 x tiles), whose even columns add up to <a, S> and whose odd ones to
        <S, S>.
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
        """Stores of a piece: values, words and, if they are a result, all numbers."""
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
        return Slots(1, 1)

    def store(
        self, config: MatmulTiles, sums, gmem, smem, ring: Ring, tile, row, column
    ):
        total = None
        # Once for all pieces, which saves instructions.
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
        """A warpgroup's part of piece `at`."""
        part, s = lax.optimization_barrier(warpgroup), slot(at, OUT_SLOTS)
        # What was stored from this slot before has been read.
        plgpu.wait_smem_to_gmem(self.stores * (OUT_SLOTS - 1), wait_read_only=True)
        staged = [one.at[s, part] for one in smem[: self.stores]]
        for value, one in zip(results, staged, strict=True):
            one[...] = value
        plgpu.commit_smem()
        for one, target in zip(staged, targets, strict=True):
            plgpu.copy_smem_to_gmem(one, target)

    def _store_sums(self, total, target, smem, warpgroup) -> None:
        """S-STE's sums of a warpgroup's rows, over a tile."""
        part = lax.optimization_barrier(warpgroup)
        # The last tile's sums have been read: only the stores of this tile's last
        # piece came after them.
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
