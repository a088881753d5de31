"""The kernel of products with masked weights.

It computes y_b = x_b (W * m_b), and dx_b = dy_b (W * m_b)^T, transposed: a
block makes up to 256 tokens x 128 features of a sample's result, each of its two
warpgroups the 64 features whose weights it multiplies by their mask in registers. These
are the left factor of its wgmma, so nothing masked is stored, and the warpgroups do not
wait for each other; the next step's are made while that runs. A thread has 128 sums,
and 32 numbers each of W and of the mask. Of 210 KB, two steps of tokens and three of
weights with float32 logits are in flight. Where there are fewer tiles than
multiprocessors, the contracted axis is split among blocks, whose results XLA adds.

For a backward the forward writes the masks it has made, as bits, where a block has the
first tokens of a sample: a 32nd of the bytes of float32 logits for two reads of these.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._mosaic.base import SMEM_BYTES, buffer, plgpu
from ..._mosaic.launch import COMPUTE, Ring, Roles, Slots, launch

# What a mask is made of: logits, on where they are positive, by the estimators of which
# the gradients' kernel knows the slope; numbers, by which W is multiplied; or bits, 32
# rows of W to a word.
Kind = Literal["straight_through", "seed_reinmax", "reinmax", "mask", "bits"]
WORD = 32
# Tiles in shared memory are made of 8 rows of 128 bytes, and JAX cuts the whole arrays
# into these.
ROW_STEP, FEATURE_STEP = 8, 64
# What a wgmma has of rows: the features that a warpgroup masks and multiplies.
PIECE = 64
# Of a tile of a product: features of both warpgroups, and what is contracted in a step.
FEATURES, DEPTH = 128, 64
# Of shared memory: of barriers; and what JAX adds where there are sums over lanes.
RESERVED_BYTES, SUM_BYTES = 512, 2048
LAYOUT, TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED


@dataclasses.dataclass(frozen=True)
class MaskedTiles:
    """Tile sizes of a product.

    tokens: of a tile, which has 128 features.
    splits: parts of the contracted axis; with more than one, results are sums in
        float32.
    """

    tokens: int
    splits: int = 1

    def __post_init__(self):
        if self.tokens not in (64, 128, 256) or self.splits < 1:
            raise ValueError(
                "MaskedTiles: tokens must be 64, 128 or 256 and splits at least 1, "
                f"got {self.tokens} and {self.splits}"
            )

    def count(self, contracted: int) -> int:
        """Steps of a block."""
        return pl.cdiv(contracted, DEPTH * self.splits)

    def slots(self, mask_bytes: float, sums: bool) -> tuple[int, int]:
        """Steps in flight, of tokens and of weights: no more than 4, as many as fit."""
        out = COMPUTE * PIECE * PIECE * (2 if self.splits == 1 else 4)
        free = SMEM_BYTES - RESERVED_BYTES - SUM_BYTES * sums - out
        tokens, weights = (
            2 * DEPTH * self.tokens,
            int(FEATURES * DEPTH * (2 + mask_bytes)),
        )
        both = min(4, free // (tokens + weights))
        # Weights are read a step ahead.
        return both, min(4, (free - both * tokens) // weights)


def by_threshold(kind: Kind) -> bool:
    """Whether the mask is made of logits."""
    return kind not in ("mask", "bits")


def bytes_of(kind: Kind, dtype: Any) -> float:
    """Of a mask, for each number of W."""
    return 4 / WORD if kind == "bits" else float(jnp.dtype(dtype).itemsize)


def mask_buffer(kind: Kind, dtype, slots: int, rows: int, columns: int):
    if kind == "bits":
        return plgpu.SMEM((slots, rows // WORD, columns), jnp.int32)
    return buffer(dtype, slots, rows, columns)


def cut(gmem, sample, rows, columns, kind: Kind = "mask"):
    """A tile, by first and size along either axis; it may reach past the end."""
    if kind == "bits":
        rows = lax.div(rows[0], WORD), rows[1] // WORD
    return gmem.at[sample, pl.ds(rows[0], rows[1]), pl.ds(columns[0], columns[1])]


def numbers_of(kind: Kind, x):
    """What W is multiplied by, of logits or a mask, in float32."""
    x = x.astype(jnp.float32)
    if not by_threshold(kind):
        return x
    # A NaN stays one, as in `straight_through`.
    return jnp.where(x > 0, 1.0, jnp.where(x <= 0, 0.0, x))


def _unpack(words, i):
    """Bit i of 32 is that of the upper of two words, or of the lower, in float32."""
    word = jnp.where(i < WORD, *words)
    bit = lax.shift_right_logical(word, lax.bitwise_and(i, WORD - 1))
    return lax.bitwise_and(bit, 1).astype(jnp.float32)


def read_mask(kind: Kind, smem, row, column, columns: int):
    """The numbers that 64 rows of a tile of W are multiplied by, in float32."""
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
    return _unpack(words, plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT))


def _pack(numbers):
    """Words of 32 columns each, (rows,), in which a bit is on for a positive number.

    numbers: of the layout `TRANSPOSED`.
    """
    i = plgpu.broadcasted_iota(jnp.int32, numbers.shape, 1, layout=TRANSPOSED)
    places = lax.shift_left(jnp.int32(1), lax.bitwise_and(i, WORD - 1))
    bits = jnp.where(numbers > 0, places, 0)
    # Each bit has its own place, so that the sum is the word.
    return [
        bits[:, n : n + WORD].sum(1, dtype=jnp.int32)
        for n in range(0, numbers.shape[1], WORD)
    ]


def _masked(kind: Kind, transposed: bool, w_smem, mask_smem, first):
    """W * m of 64 features in registers, and m: float32 (features, DEPTH).

    transposed: features are the rows of W, else the columns, from `first` on.
    """
    if transposed:
        weights = plgpu.load(w_smem.at[pl.ds(first, PIECE)], layout=LAYOUT)
        numbers = read_mask(kind, mask_smem, first, 0, DEPTH)
        return weights.astype(jnp.float32) * numbers, numbers
    features = pl.ds(first, PIECE)

    def load(smem):
        view = smem.at[pl.ds(0, DEPTH), features].transpose((1, 0))
        return plgpu.load(view, layout=TRANSPOSED)

    weights = load(w_smem)
    if kind != "bits":
        numbers = numbers_of(kind, load(mask_smem))
        return weights.astype(jnp.float32) * numbers, numbers
    shape = PIECE, DEPTH
    words = [
        plgpu.load(mask_smem.at[n, features], layout=LAYOUT.reduce(1))
        for n in range(PIECE // WORD)
    ]
    words = [lax.broadcast_in_dim(w, shape, [0]) for w in words]
    i = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT)
    weights = plgpu.layout_cast(weights, LAYOUT).astype(jnp.float32)
    numbers = _unpack(words, i)
    return weights * numbers, numbers


def _keep(gmem, numbers, first, sample, row, column):
    """As bits, if `first`: what 64 rows of W, in columns, are multiplied by."""
    exists = (row < gmem.shape[1] * WORD) & (column < gmem.shape[2])

    @pl.when(first & exists)
    def _():
        for n, words in enumerate(_pack(numbers)):
            gmem[sample, lax.div(row, WORD) + n, pl.ds(column, PIECE)] = words


def _store(acc, smem, gmem, part, token, feature):
    """A warpgroup's features of a tile, transposed, 64 tokens after the others."""
    for n in range(0, acc.shape[1], PIECE):
        piece = acc[:, n : n + PIECE].astype(smem.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.transpose((1, 0))[...] = plgpu.layout_cast(piece, TRANSPOSED)
        plgpu.commit_smem()
        target = (token + n, PIECE), (feature, PIECE)
        plgpu.copy_smem_to_gmem(smem, cut(gmem, part, *target))


def product(kind: Kind, transposed: bool, config: MaskedTiles, pack: bool, x, w, mask):
    """x_b (W_b * m_b), or with W * m transposed.

    pack: return the mask too, as (samples, rows / 32, columns) words.
    x: (samples, seq, contracted).
    w: (groups, rows, columns), each of as many samples.
    mask: (samples, rows, columns), or their bits.

    Returns (samples * splits, seq, features), in a list.
    """
    if pack and (transposed or not by_threshold(kind)):
        raise ValueError(f"no bits of {kind}, transposed: {transposed}")
    samples, seq, contracted = x.shape
    features = w.shape[1 if transposed else 2]
    tokens, each = config.tokens, samples // w.shape[0]
    x_slots, w_slots = config.slots(bytes_of(kind, mask.dtype), sums=pack)
    tile = (FEATURES, DEPTH) if transposed else (DEPTH, FEATURES)
    count = config.count(contracted)
    dtype = x.dtype if config.splits == 1 else jnp.float32

    def body(x_gmem, w_gmem, mask_gmem, y_gmem, *refs):
        words_gmem = refs[0] if pack else None
        x_smem, w_smem, mask_smem, y_smem, x_ring, w_ring = refs[pack:]
        warpgroup = lax.axis_index("warpgroup")

        def where_of(i, info):
            """The sample, and what this warpgroup masks in step `i` is from where."""
            part, column, _ = info.index
            row = (lax.rem(part, config.splits) * count + i) * DEPTH
            sample = lax.div(part, config.splits)
            return sample, row, (column * COMPUTE + warpgroup) * PIECE

        def mask_tile(i, info):
            """The weights of this warpgroup's features, of step `i`."""
            at = info.local_index * count + i
            s = w_ring.wait(at)
            # Or the addresses would be kept in registers.
            first = lax.optimization_barrier(warpgroup) * PIECE
            smem = w_smem.at[s], mask_smem.at[s]
            tile, numbers = _masked(kind, transposed, *smem, first)
            if pack:
                # In the block of the first tokens.
                _keep(words_gmem, numbers, info.index[2] == 0, *where_of(i, info))
            # TMA may write what has been read here.
            plgpu.commit_smem()
            w_ring.release(at)
            return tile

        def factor(masked):
            """As wgmma takes it: not before the last one is done, or all would wait."""
            return plgpu.layout_cast(masked.astype(x.dtype), LAYOUT)

        def compute(info):
            start = info.local_index * count

            def run(acc):
                def multiply(at, weights, meanwhile=lambda: None):
                    s = x_ring.wait(at)
                    plgpu.wgmma(acc, weights, x_smem.at[s].transpose((1, 0)))
                    following = meanwhile()
                    plgpu.wgmma_wait(0)
                    x_ring.release(at)
                    return following

                def step(i, weights):
                    following = partial(mask_tile, i + 1, info)
                    return factor(multiply(start + i, weights, following))

                weights = factor(mask_tile(jnp.int32(0), info))
                weights = lax.fori_loop(0, count - 1, step, weights)
                multiply(start + count - 1, weights)
                return acc[...]

            acc = pl.run_scoped(run, plgpu.ACC((PIECE, tokens), jnp.float32))
            part, column, row = info.index
            first = row * tokens, (column * COMPUTE + warpgroup) * PIECE
            _store(acc, y_smem.at[warpgroup], y_gmem, part, *first)

        def load(info):
            part, column, row = info.index
            sample = lax.div(part, config.splits)
            begin = lax.rem(part, config.splits) * count

            @pl.loop(0, count)
            def _(i):
                at = info.local_index * count + i
                along = (begin + i) * DEPTH, DEPTH
                across = column * FEATURES, FEATURES
                where = (across, along) if transposed else (along, across)
                weights = cut(w_gmem, lax.div(sample, each), *where)
                masks = cut(mask_gmem, sample, *where, kind)
                w_ring.fill(at, (weights, w_smem), (masks, mask_smem))
                x_ring.fill(
                    at, (cut(x_gmem, sample, (row * tokens, tokens), along), x_smem)
                )

        def drain(tiles):
            x_ring.drain(tiles * count)
            w_ring.drain(tiles * count)

        return Roles(compute, load, drain)

    buffers = [
        buffer(x.dtype, x_slots, tokens, DEPTH),
        buffer(w.dtype, w_slots, *tile),
        mask_buffer(kind, mask.dtype, w_slots, *tile),
        buffer(dtype, COMPUTE, PIECE, PIECE),
    ]
    made_of = "logits" if by_threshold(kind) else kind
    name = f"masked_product{'_transposed' * transposed}_{made_of}"
    parts = samples * config.splits
    grid = parts, pl.cdiv(features, FEATURES), pl.cdiv(seq, tokens)
    outs = [jax.ShapeDtypeStruct((parts, seq, features), dtype)]
    if pack:
        name += "_and_bits"
        words = samples, contracted // WORD, features
        outs.append(jax.ShapeDtypeStruct(words, jnp.int32))
    rings = Slots(x_slots, 1), Slots(w_slots, 2)
    return launch(name, body, grid, outs, buffers, rings, (x, w, mask))
