"""The mask of a tile inside of a kernel: numbers, logits or bits."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._mosaic.base import buffer, plgpu
from ..estimators import Rule
from ..packed import WORD

# The source of a mask. A `Rule` names an estimator: the mask is made of logits, and is
# on where they are positive. "mask": numbers by which W is multiplied. "bits": words,
# each of which has 32 rows of W.
Kind = Rule | Literal["mask", "bits"]
# Features that a warpgroup masks and multiplies: wgmma has 64 rows.
PIECE = 64
LAYOUT = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def by_threshold(kind: Kind) -> bool:
    """Return whether the mask is made of logits."""
    return kind not in ("mask", "bits")


def bytes_of(kind: Kind, dtype: Any) -> float:
    """Return the bytes of a mask for each number of W."""
    return 4 / WORD if kind == "bits" else float(jnp.dtype(dtype).itemsize)


def mask_buffer(kind: Kind, dtype, slots: int, rows: int, columns: int):
    """Return a ring's buffer of masks for tiles of rows x columns of W."""
    if kind == "bits":
        return plgpu.SMEM((slots, rows // WORD, columns), jnp.int32)
    return buffer(dtype, slots, rows, columns)


def cut(gmem, sample, rows, columns, kind: Kind = "mask"):
    """Return a tile of an array in global memory; it may reach past the end.

    rows, columns: the first one and how many, along either axis of W.
    """
    if kind == "bits":
        rows = lax.div(rows[0], WORD), rows[1] // WORD
    return gmem.at[sample, pl.ds(rows[0], rows[1]), pl.ds(columns[0], columns[1])]


def numbers_of(kind: Kind, x):
    """Return the factors of W that logits or a mask stand for, in float32."""
    x = x.astype(jnp.float32)
    if not by_threshold(kind):
        return x
    # A NaN stays one, as in `straight_through`.
    return jnp.where(x > 0, 1.0, jnp.where(x <= 0, 0.0, x))


def unpack_bits(words, i):
    """Return bit `i` of two words as float32: 0 to 31 of the first, then the second."""
    word = jnp.where(i < WORD, *words)
    bit = lax.shift_right_logical(word, lax.bitwise_and(i, WORD - 1))
    return lax.bitwise_and(bit, 1).astype(jnp.float32)


def read_mask(kind: Kind, smem, row, column, columns: int):
    """Return the factors of 64 rows of a tile of W, in float32."""
    index = pl.ds(column, columns)
    if kind != "bits":
        return numbers_of(
            kind, plgpu.load(smem.at[pl.ds(row, PIECE), index], layout=LAYOUT)
        )
    shape = PIECE, columns
    words = [
        plgpu.load(smem.at[lax.div(row, WORD) + n, index], layout=LAYOUT.reduce(0))
        for n in range(PIECE // WORD)
    ]
    words = [lax.broadcast_in_dim(w, shape, [1]) for w in words]
    return unpack_bits(
        words, plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT)
    )


def pack_bits(numbers):
    """Return a word for each 32 columns, (rows,), with a bit for each positive number.

    numbers: in the layout `TRANSPOSED`.
    """
    i = plgpu.broadcasted_iota(jnp.int32, numbers.shape, 1, layout=TRANSPOSED)
    places = lax.shift_left(jnp.int32(1), lax.bitwise_and(i, WORD - 1))
    bits = jnp.where(numbers > 0, places, 0)
    # Each bit has its own place, so the sum over columns is the word.
    return [
        bits[:, n : n + WORD].sum(1, dtype=jnp.int32)
        for n in range(0, numbers.shape[1], WORD)
    ]
