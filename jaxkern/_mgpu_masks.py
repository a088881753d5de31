"""The kernels of products with masked weights.

`product` computes y_b = x_b (W * m_b), and dx_b = dy_b (W * m_b)^T, transposed: a
block makes up to 256 tokens x 128 features of a sample's result, each of its two
warpgroups the 64 features whose weights it multiplies by their mask in registers. These
are the left factor of its wgmma, so nothing masked is stored, and the warpgroups do not
wait for each other; the next step's are made while that runs. A thread has 128 sums,
and 32 numbers each of W and of the mask. Of 210 KB, two steps of tokens and three of
weights with float32 logits are in flight. Where there are fewer tiles than
multiprocessors, the contracted axis is split among blocks, whose results XLA adds.

`gradients` holds a tile of W, 128 x 128, and walks the samples: G_b = x_b^T dy_b, then
dm_b = W * G_b, written from where the mask was loaded to, and dW += m_b * G_b in
registers, 64 sums of G and of dW for a thread. One wgmma is always in flight, and W is
awaited where it is used first. Without dW it needs no masks, and samples no order. Each
result has one writer, so there are no atomics.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._mgpu import SMEM_BYTES, plgpu, slot, tiles, zeros
from ._mgpu_tiles import Ring, launch
from ._mgpu_walk import COMPUTE

# What a mask is made of: logits, on where they are positive; numbers, by which W is
# multiplied; or bits, 32 rows of W to a word.
Kind = Literal["logits", "mask", "bits"]
WORD = 32
# Tiles in shared memory are made of 8 rows of 128 bytes, and JAX cuts the whole arrays
# into these.
ROW_STEP, FEATURE_STEP, SWIZZLE = 8, 64, 128
# What a wgmma has of rows: the features that a warpgroup masks and multiplies.
PIECE = 64
# For gradients: masks in flight, tokens of a step, and steps in flight at most.
SLOTS, TOKENS, MAX_STEPS = 2, 64, 8
# Of a tile of a product: features of both warpgroups, and what is contracted in a step.
FEATURES, DEPTH = 128, 64
LAYOUT, TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED


@dataclasses.dataclass(frozen=True)
class Config:
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
                "Config: tokens must be 64, 128 or 256 and splits at least 1, "
                f"got {self.tokens} and {self.splits}"
            )

    def count(self, contracted: int) -> int:
        """Steps of a block."""
        return pl.cdiv(contracted, DEPTH * self.splits)

    def slots(self, mask_bytes: float) -> tuple[int, int]:
        """Steps in flight, of tokens and of weights: no more than 4, as many as fit."""
        # Some is for the barriers.
        free = (
            SMEM_BYTES - 1024 - COMPUTE * PIECE * PIECE * (2 if self.splits == 1 else 4)
        )
        tokens, weights = (
            2 * DEPTH * self.tokens,
            int(FEATURES * DEPTH * (2 + mask_bytes)),
        )
        both = min(4, free // (tokens + weights))
        # Weights are read a step ahead.
        return both, min(4, (free - both * tokens) // weights)


def bytes_of(kind: Kind, dtype: Any) -> float:
    """Of a mask, for each number of W."""
    return 4 / WORD if kind == "bits" else float(jnp.dtype(dtype).itemsize)


def _buffer(dtype, *shape: int):
    return plgpu.SMEM(shape, dtype, transforms=tiles(jnp.dtype(dtype), SWIZZLE))


def _mask_buffer(kind: Kind, dtype, slots: int, rows: int, columns: int):
    if kind == "bits":
        return plgpu.SMEM((slots, rows // WORD, columns), jnp.int32)
    return _buffer(dtype, slots, rows, columns)


def _cut(gmem, sample, rows, columns, kind: Kind = "mask"):
    """A tile, by first and size along either axis; it may reach past the end."""
    if kind == "bits":
        rows = lax.div(rows[0], WORD), rows[1] // WORD
    return gmem.at[sample, pl.ds(rows[0], rows[1]), pl.ds(columns[0], columns[1])]


def _hard(kind: Kind, x):
    """What a mask's numbers are multiplied by, in float32."""
    x = x.astype(jnp.float32)
    if kind != "logits":
        return x
    # A NaN stays one, as in `straight_through`.
    return jnp.where(x > 0, 1.0, jnp.where(x <= 0, 0.0, x))


def _unpack(words, i):
    """Bit i of 32 is that of the upper of two words, or of the lower, in float32."""
    word = jnp.where(i < WORD, *words)
    bit = lax.shift_right_logical(word, lax.bitwise_and(i, WORD - 1))
    return lax.bitwise_and(bit, 1).astype(jnp.float32)


def _read_mask(kind: Kind, smem, row, column, columns: int):
    """The numbers that 64 rows of a tile of W are multiplied by, in float32."""
    index = pl.ds(column, columns)
    if kind != "bits":
        return _hard(kind, plgpu.load(smem.at[pl.ds(row, PIECE), index], layout=LAYOUT))
    shape = PIECE, columns
    words = [
        plgpu.load(smem.at[lax.div(row, WORD) + n, index], layout=LAYOUT.reduce(0))
        for n in range(PIECE // WORD)
    ]
    words = [lax.broadcast_in_dim(w, shape, [1]) for w in words]
    return _unpack(words, plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT))


def _masked(kind: Kind, transposed: bool, w_smem, mask_smem, first):
    """W * m of 64 features in registers, float32 (features, DEPTH).

    transposed: features are the rows of W, else the columns, from `first` on.
    """
    if transposed:
        weights = plgpu.load(w_smem.at[pl.ds(first, PIECE)], layout=LAYOUT)
        numbers = _read_mask(kind, mask_smem, first, 0, DEPTH)
        return weights.astype(jnp.float32) * numbers
    index = pl.ds(0, DEPTH), pl.ds(first, PIECE)

    def load(smem):
        return plgpu.load(smem.at[index].transpose((1, 0)), layout=TRANSPOSED)

    weights = load(w_smem)
    if kind == "bits":
        shape = PIECE, DEPTH
        words = [
            plgpu.load(mask_smem.at[n, index[1]], layout=TRANSPOSED.reduce(1))
            for n in range(PIECE // WORD)
        ]
        words = [lax.broadcast_in_dim(w, shape, [0]) for w in words]
        words = [plgpu.layout_cast(w, TRANSPOSED) for w in words]
        i = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TRANSPOSED)
        numbers = _unpack(words, i)
    else:
        numbers = _hard(kind, load(mask_smem))
    return weights.astype(jnp.float32) * numbers


def product(kind: Kind, transposed: bool, config: Config, x, w, mask):
    """x_b (W_b * m_b), or with W * m transposed.

    x: (samples, seq, contracted).
    w: (groups, rows, columns), each of as many samples.
    mask: (samples, rows, columns), or their bits.

    Returns (samples * splits, seq, features).
    """
    samples, seq, contracted = x.shape
    features = w.shape[1 if transposed else 2]
    tokens, each = config.tokens, samples // w.shape[0]
    x_slots, w_slots = config.slots(bytes_of(kind, mask.dtype))
    tile = (FEATURES, DEPTH) if transposed else (DEPTH, FEATURES)
    count = config.count(contracted)
    dtype = x.dtype if config.splits == 1 else jnp.float32

    def body(
        x_gmem, w_gmem, mask_gmem, y_gmem,
        x_smem, w_smem, mask_smem, y_smem, x_ring, w_ring,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        def mask_tile(at):
            """The weights of this warpgroup's features, of step `at`."""
            s = w_ring.wait(at)
            # Or the addresses would be kept in registers.
            first = lax.optimization_barrier(warpgroup) * PIECE
            tile = _masked(kind, transposed, w_smem.at[s], mask_smem.at[s], first)
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
                    at = start + i
                    return factor(multiply(at, weights, lambda: mask_tile(at + 1)))

                weights = factor(mask_tile(start))
                weights = lax.fori_loop(0, count - 1, step, weights)
                multiply(start + count - 1, weights)
                return acc[...]

            acc = pl.run_scoped(run, plgpu.ACC((PIECE, tokens), jnp.float32))
            part, column, row = info.index
            out = y_smem.at[warpgroup]
            for n in range(0, tokens, PIECE):
                piece = acc[:, n : n + PIECE].astype(dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out.transpose((1, 0))[...] = plgpu.layout_cast(piece, TRANSPOSED)
                plgpu.commit_smem()
                first = (column * COMPUTE + warpgroup) * PIECE
                target = (row * tokens + n, PIECE), (first, PIECE)
                plgpu.copy_smem_to_gmem(out, _cut(y_gmem, part, *target))

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
                weights = _cut(w_gmem, lax.div(sample, each), *where)
                masks = _cut(mask_gmem, sample, *where, kind)
                w_ring.fill(at, (weights, w_smem), (masks, mask_smem))
                x_ring.fill(
                    at, (_cut(x_gmem, sample, (row * tokens, tokens), along), x_smem)
                )

        def drain(tiles):
            x_ring.drain(tiles * count)
            w_ring.drain(tiles * count)

        return compute, load, drain

    buffers = [
        _buffer(x.dtype, x_slots, tokens, DEPTH),
        _buffer(w.dtype, w_slots, *tile),
        _mask_buffer(kind, mask.dtype, w_slots, *tile),
        _buffer(dtype, COMPUTE, PIECE, PIECE),
    ]
    name = f"masked_product{'_transposed' * transposed}_{kind}"
    parts = samples * config.splits
    grid = parts, pl.cdiv(features, FEATURES), pl.cdiv(seq, tokens)
    y = jax.ShapeDtypeStruct((parts, seq, features), dtype)
    rings = Ring(x_slots, 1), Ring(w_slots, 2)
    return launch(name, body, grid, [y], buffers, rings, (x, w, mask))[0]


def _token_steps(columns: int, mask_bytes: float) -> int:
    """In flight, for gradients: as many as fit, but no more than `MAX_STEPS`."""
    rows = COMPUTE * PIECE
    free = SMEM_BYTES - 1024 - rows * columns * (2 + SLOTS * mask_bytes)
    return min(MAX_STEPS, int(free // (2 * TOKENS * (rows + columns))))


def gradients(kind: Kind, want_mask: bool, want_w: bool, columns: int, x, dy, w, mask):
    """What is wanted of W * G and, summed over the samples of a group, m * G.

    G is x^T dy of a sample, x (samples, seq, d_in) and dy (samples, seq, d_out). The
    first result is like `mask`, which is not read without the second one, like `w`.
    """
    (samples, seq, d_in), d_out = x.shape, dy.shape[2]
    rows, each = COMPUTE * PIECE, samples // w.shape[0]
    walked = each if want_w else 1
    count = pl.cdiv(seq, TOKENS)

    def body(x_gmem, dy_gmem, w_gmem, mask_gmem, *refs):
        d_mask_gmem = refs[0] if want_mask else None
        dw_gmem = refs[want_mask] if want_w else None
        x_smem, dy_smem, w_smem, mask_smem, *rings = refs[want_mask + want_w :]
        token_ring, w_ring, mask_ring = rings
        warpgroup = lax.axis_index("warpgroup")

        def store(value, smem, gmem, sample, info):
            """This warpgroup's rows, by way of where their like was loaded to."""
            mine = smem.at[pl.ds(warpgroup * PIECE, PIECE)]
            mine[...] = value.astype(smem.dtype)
            plgpu.commit_smem()
            row = info.index[1] * rows + warpgroup * PIECE
            target = (row, PIECE), (info.index[2] * columns, columns)
            plgpu.copy_smem_to_gmem(mine, _cut(gmem, sample, *target))

        def multiply(first):
            """x^T dy of the sample that starts at step `first`."""

            def run(acc):
                def step(i, carry):
                    s = token_ring.wait(first + i)
                    part = lax.optimization_barrier(warpgroup)
                    tokens = x_smem.at[s, part].transpose((1, 0))
                    plgpu.wgmma(acc, tokens, dy_smem.at[s])
                    plgpu.wgmma_wait(1)

                    @pl.when(i > 0)
                    def _():
                        token_ring.release(first + i - 1)

                    return carry

                lax.fori_loop(0, count, step, jnp.int32(0))
                product = acc[...]
                token_ring.release(first + count - 1)
                return product

            return pl.run_scoped(run, plgpu.ACC((PIECE, columns), jnp.float32))

        def compute(info):
            def step(n, total):
                at = info.local_index * walked + n
                product = multiply(at * count)
                here = slot(at, SLOTS)
                first = lax.optimization_barrier(warpgroup) * PIECE
                if want_w:
                    mask_ring.wait(at)
                    numbers = _read_mask(kind, mask_smem.at[here], first, 0, columns)
                    total = total + product * numbers

                @pl.when(n == 0)
                def _():
                    w_ring.wait(info.local_index)

                if want_mask:
                    weights = w_smem.at[0, pl.ds(first, PIECE)]
                    weights = plgpu.load(weights, layout=LAYOUT)
                    product = product * weights.astype(jnp.float32)
                    if not want_w:
                        # What was stored from this slot before has been read.
                        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                    sample = info.index[0] * walked + n
                    store(product, mask_smem.at[here], d_mask_gmem, sample, info)
                if want_w:
                    # What was stored from the slot before this one has been read.
                    plgpu.wait_smem_to_gmem(want_mask, wait_read_only=True)
                    plgpu.commit_smem()

                    @pl.when(n > 0)
                    def _():
                        mask_ring.release(at - 1)

                return total

            start = zeros(PIECE, columns) if want_w else jnp.int32(0)
            total = lax.fori_loop(0, walked, step, start)
            if want_w:
                store(total, w_smem.at[0], dw_gmem, info.index[0], info)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                mask_ring.release((info.local_index + 1) * walked - 1)
            plgpu.commit_smem()
            w_ring.release(info.local_index)

        def load(info):
            walk, row, column = info.index
            where = (row * rows, rows), (column * columns, columns)

            @pl.loop(0, walked)
            def _(n):
                sample, nth = walk * walked + n, info.local_index * walked + n

                # First, since the others wait for what is computed before.
                @pl.loop(0, count)
                def _(i):
                    tokens = i * TOKENS, TOKENS
                    parts = []
                    for part in range(COMPUTE):
                        features = row * rows + part * PIECE, PIECE
                        source = _cut(x_gmem, sample, tokens, features)
                        parts.append((source, x_smem, part))
                    right = _cut(dy_gmem, sample, tokens, where[1]), dy_smem
                    token_ring.fill(nth * count + i, right, *parts)

                if want_w:
                    masks = _cut(mask_gmem, sample, *where, kind)
                    mask_ring.fill(nth, (masks, mask_smem))

                @pl.when(n == 0)
                def _():
                    weights = _cut(w_gmem, lax.div(walk * walked, each), *where)
                    w_ring.fill(info.local_index, (weights, w_smem))

        def drain(tiles):
            token_ring.drain(tiles * walked * count)
            w_ring.drain(tiles)
            if want_w:
                mask_ring.drain(tiles * walked)

        return compute, load, drain

    steps = _token_steps(columns, bytes_of(kind, mask.dtype))
    buffers = [
        _buffer(x.dtype, steps, COMPUTE, TOKENS, PIECE),
        _buffer(x.dtype, steps, TOKENS, columns),
        _buffer(w.dtype, 1, rows, columns),
        _mask_buffer(kind, mask.dtype, SLOTS, rows, columns),
    ]
    name = f"masked_gradients{'_mask' * want_mask}{'_w' * want_w}_{kind}"
    grid = samples // walked, pl.cdiv(d_in, rows), pl.cdiv(d_out, columns)
    outs = [mask] * want_mask + [w] * want_w
    rings = Ring(steps, COMPUTE + 1), Ring(1, 1), Ring(SLOTS, 1)
    return launch(name, body, grid, outs, buffers, rings, (x, dy, w, mask))
