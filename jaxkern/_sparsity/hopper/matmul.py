"""2:4 in the frame of `_mgpu_matmul`: a sparse left factor, and results made sparse.

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
from .wgmma import COLUMNS, STORED, THREADS, select, sparse_dot

# Of the contracted axis, in a step: 64 values are stored, in rows of 128 bytes.
DEPTH = 128
WORDS = DEPTH // COLUMNS
SUMS = 8


@dataclasses.dataclass(frozen=True)
class SparseProduct:
    """A 2:4-sparse matrix, as `_mgpu_sparse.select` stores it, times a dense one.

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
        return pl.cdiv(self.right.shape[0], DEPTH)

    @property
    def copies(self) -> int:
        return 2 * COMPUTE + 1

    def step_bytes(self, columns: int) -> int:
        words = COMPUTE * WORDS * THREADS * 4
        return words + COMPUTE * ROWS * DEPTH + 2 * DEPTH * columns

    def buffers(self, config: MatmulTiles) -> list[Any]:
        steps, dtype = config.steps, self.values.dtype
        return [
            buffer(dtype, steps, COMPUTE, ROWS, DEPTH // 2),
            plgpu.SMEM((steps, COMPUTE, WORDS, THREADS), jnp.int32),
            buffer(dtype, steps, *self.right.tile(DEPTH, config.columns)),
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
        def _(i):
            copies = []
            for part in range(COMPUTE):
                rows = pl.ds(row_of(row, part), ROWS)
                stored = pl.ds(i * (DEPTH // 2), DEPTH // 2)
                copies.append((values.at[rows, stored], smem[0], part))
                block = words.at[row * COMPUTE + part, pl.ds(i * WORDS, WORDS)]
                copies.append((block, smem[1], part))
            across = column * config.columns, config.columns
            source = self.right.cut(right, (i * DEPTH, DEPTH), across)
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
    def copies(self) -> int:
        """Stores of a piece."""
        return 2 + self.dense

    def smem_bytes(self, columns: int) -> int:
        words, sums = COMPUTE * THREADS * 4, COMPUTE * ROWS * SUMS * 4
        piece = PIECE_BYTES // 2 + words + PIECE_BYTES * self.dense
        return OUT_SLOTS * piece + sums * self.shrink

    def shapes(self, config: MatmulTiles, shape, dtype) -> list[jax.ShapeDtypeStruct]:
        m, (rows, columns) = shape[0], config.tiles(shape)
        blocks = rows * COMPUTE, columns * config.pieces, THREADS
        shapes = [
            jax.ShapeDtypeStruct((m, blocks[1] * STORED), dtype),
            jax.ShapeDtypeStruct(blocks, jnp.int32),
        ]
        if self.dense:
            shapes.append(jax.ShapeDtypeStruct(shape, dtype))
        if self.shrink:
            shapes.append(jax.ShapeDtypeStruct((m, SUMS * columns), jnp.float32))
        return shapes

    def buffers(self, config: MatmulTiles, dtype) -> list[Any]:
        buffers = [
            buffer(dtype, OUT_SLOTS, COMPUTE, ROWS, STORED, swizzle=64),
            plgpu.SMEM((OUT_SLOTS, COMPUTE, THREADS), jnp.int32),
        ]
        if self.dense:
            buffers.append(buffer(dtype, OUT_SLOTS, COMPUTE, ROWS, PIECE))
        if self.shrink:
            buffers.append(plgpu.SMEM((COMPUTE, ROWS, SUMS), jnp.float32))
        return buffers

    def ring(self, config: MatmulTiles) -> Slots:
        return Slots(1, 1)

    def store(
        self, config: MatmulTiles, sums, gmem, smem, ring: Ring, tile, row, column
    ):
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(row_of(row, warpgroup), ROWS)
        total = None
        for piece in range(config.pieces):
            where = slice(piece * PIECE, (piece + 1) * PIECE)
            numbers = self.compute([one[:, where] for one in sums])
            numbers = numbers.astype(smem[0].dtype)
            values, words, *more = select(numbers, self.shrink)
            part = lax.optimization_barrier(warpgroup)
            s = slot(tile * config.pieces + piece, OUT_SLOTS)
            # What was stored from this slot before has been read.
            plgpu.wait_smem_to_gmem(self.copies * (OUT_SLOTS - 1), wait_read_only=True)
            staged = [values, words, numbers][: self.copies]
            for value, one in zip(staged, smem, strict=False):
                one.at[s, part][...] = value
            plgpu.commit_smem()
            block = column * config.pieces + piece
            targets = [
                gmem[0].at[rows, pl.ds(block * STORED, STORED)],
                gmem[1].at[row * COMPUTE + warpgroup, block],
            ]
            if self.dense:
                targets.append(gmem[2].at[rows, pl.ds(block * PIECE, PIECE)])
            for one, target in zip(smem, targets, strict=False):
                plgpu.copy_smem_to_gmem(one.at[s, part], target)
            if self.shrink:
                total = more[0] if total is None else total + more[0]
        if self.shrink:
            part = lax.optimization_barrier(warpgroup)
            plgpu.wait_smem_to_gmem(self.copies, wait_read_only=True)
            smem[-1].at[part][...] = total
            plgpu.commit_smem()
            target = gmem[-1].at[rows, pl.ds(column * SUMS, SUMS)]
            plgpu.copy_smem_to_gmem(smem[-1].at[part], target)

    def fill(
        self, config: MatmulTiles, gmem, smem, ring: Ring, tile, row, column
    ) -> None:
        """There is nothing to load."""

    def drain(self, config: MatmulTiles, ring: Ring, tiles_done) -> None:
        """There is nothing to wait for."""
