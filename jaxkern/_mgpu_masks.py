"""The kernels of products with masked weights.

`product` computes y_b = x_b (W * m_b), and dx_b = dy_b (W * m_b)^T from the same tiles,
transposed as views. A block makes 256 x 128 of a sample's result and walks the
contracted axis, so a masked tile serves 256 tokens. Each of its two warpgroups
multiplies half of a tile of W by its mask in registers and puts it, in 16 bits, into
shared memory while the wgmma of the step before runs. A thread has 128 sums, and 32
numbers each of W and of the mask. Two steps of 80 KB are in flight with float32 logits;
with two masked tiles and the results on their way out that is 224 of 227 KB.

`gradients` holds a tile of W, 128 x 128, and walks the samples: G_b = x_b^T dy_b, then
dm_b = W * G_b, written from where the mask was loaded to, and dW += m_b * G_b in
registers, 64 sums of G and of dW for a thread. Without dW it needs no masks, and
samples no order. Each result has one writer, so there are no atomics.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._mgpu import SMEM_BYTES, add_dots, plgpu, slot, tiles, zeros
from ._mgpu_tiles import Ring, launch
from ._mgpu_walk import COMPUTE

# What a mask is made of: logits, on where they are positive; numbers, by which W is
# multiplied; or bits, 32 rows of W to a word.
Kind = Literal["logits", "mask", "bits"]
WORD = 32
# Tiles in shared memory are made of 8 rows of 128 bytes, and JAX cuts the whole arrays
# into these.
ROW_STEP, FEATURE_STEP, SWIZZLE = 8, 64, 128
# What a wgmma has at least of rows: what a warpgroup masks, stores and holds at once.
PIECE = 64
# For gradients: steps and masks in flight, and tokens of a step.
SLOTS, TOKENS = 2, 64
LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of a product.

    rows: tokens of a warpgroup.
    columns: of the result. The tile of W that the two warpgroups share has 64 x 128 or
        128 x 64 numbers, so that each masks 64 x 64.
    """

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows not in (64, 128) or self.columns not in (64, 128):
            raise ValueError(
                "Config: rows and columns must be 64 or 128, "
                f"got {self.rows} and {self.columns}"
            )

    @property
    def depth(self) -> int:
        """Of the contracted axis, in one step."""
        return COMPUTE * PIECE * PIECE // self.columns

    @property
    def tokens(self) -> int:
        """Of a block."""
        return COMPUTE * self.rows

    def step_bytes(self, mask_bytes: float) -> float:
        """What a step loads; `mask_bytes` a number of W."""
        weights = self.columns * self.depth
        return 2 * self.tokens * self.depth + (2 + mask_bytes) * weights

    def steps(self, mask_bytes: float) -> int:
        """In flight: as many as fit, but no more than 4."""
        masked, out = self.columns * self.depth, COMPUTE * PIECE * self.columns
        # Some is for the barriers.
        free = SMEM_BYTES - 1024 - 2 * (2 * masked + out)
        return min(4, int(free // self.step_bytes(mask_bytes)))


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


def _read_mask(kind: Kind, smem, row, column, columns: int):
    """The numbers that 64 rows of a tile of W are multiplied by, in float32."""
    index = pl.ds(column, columns)
    if kind != "bits":
        x = plgpu.load(smem.at[pl.ds(row, PIECE), index], layout=LAYOUT)
        x = x.astype(jnp.float32)
        # A NaN stays one, as in `straight_through`.
        hard = jnp.where(x > 0, 1.0, jnp.where(x <= 0, 0.0, x))
        return hard if kind == "logits" else x
    shape = PIECE, columns
    upper, lower = (
        plgpu.load(smem.at[lax.div(row, WORD) + n, index], layout=LAYOUT.reduce(0))
        for n in range(PIECE // WORD)
    )
    upper, lower = (lax.broadcast_in_dim(w, shape, [1]) for w in (upper, lower))
    i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT)
    word = jnp.where(i < WORD, upper, lower)
    bit = lax.shift_right_logical(word, lax.bitwise_and(i, WORD - 1))
    return lax.bitwise_and(bit, 1).astype(jnp.float32)


def product(kind: Kind, transposed: bool, config: Config, x, w, mask):
    """x_b (W_b * m_b), or with W * m transposed.

    x: (samples, seq, contracted).
    w: (groups, rows, columns), each of as many samples.
    mask: (samples, rows, columns), or their bits.
    """
    samples, seq, contracted = x.shape
    features = w.shape[1 if transposed else 2]
    rows, columns, depth = config.rows, config.columns, config.depth
    steps, each = config.steps(bytes_of(kind, mask.dtype)), samples // w.shape[0]
    tile = (columns, depth) if transposed else (depth, columns)
    count = pl.cdiv(contracted, depth)

    def body(
        x_gmem, w_gmem, mask_gmem, y_gmem,
        x_smem, w_smem, mask_smem, masked_smem, y_smem, halves, x_ring, w_ring,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        def mask_tile(at):
            """This warpgroup's half of the weights of step `at`."""
            s = w_ring.wait(at)
            # Or the addresses would be kept in registers.
            first = lax.optimization_barrier(warpgroup) * PIECE
            row, column = (first, 0) if tile[0] > PIECE else (0, first)
            index = pl.ds(row, PIECE), pl.ds(column, PIECE)
            weights = plgpu.load(w_smem.at[(s, *index)], layout=LAYOUT)
            numbers = _read_mask(kind, mask_smem.at[s], row, column, PIECE)
            masked = weights.astype(jnp.float32) * numbers
            masked_smem.at[(slot(at, 2), *index)][...] = masked.astype(x.dtype)
            plgpu.commit_smem()
            w_ring.release(at)

        def meet():
            """Both halves are there, and nobody reads what the next ones replace."""
            plgpu.barrier_arrive(halves)
            plgpu.barrier_wait(halves)

        def multiply(acc, at, meanwhile=lambda: None):
            s = x_ring.wait(at)

            def run(ref):
                weights = masked_smem.at[slot(at, 2)]
                weights = weights.transpose((1, 0)) if transposed else weights
                part = lax.optimization_barrier(warpgroup)
                plgpu.wgmma(ref, x_smem.at[s, part], weights)
                meanwhile()

            acc = pl.run_state(run)(plgpu.ACC.init(acc))
            x_ring.release(at)
            return acc

        def compute(info):
            start = info.local_index * count

            def step(i, acc):
                acc = multiply(acc, start + i, lambda: mask_tile(start + i + 1))
                meet()
                return acc

            mask_tile(start)
            meet()
            acc = lax.fori_loop(0, count - 1, step, zeros(rows, columns))
            acc = multiply(acc, start + count - 1)
            sample, column, row = info.index
            out = y_smem.at[warpgroup]
            for n in range(0, rows, PIECE):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[...] = acc[n : n + PIECE].astype(x.dtype)
                plgpu.commit_smem()
                first = (row * COMPUTE + warpgroup) * rows + n
                target = (first, PIECE), (column * columns, columns)
                plgpu.copy_smem_to_gmem(out, _cut(y_gmem, sample, *target))

        def load(info):
            sample, column, row = info.index

            @pl.loop(0, count)
            def _(i):
                at = info.local_index * count + i
                along = i * depth, depth
                across = column * columns, columns
                where = (across, along) if transposed else (along, across)
                weights = _cut(w_gmem, lax.div(sample, each), *where)
                masks = _cut(mask_gmem, sample, *where, kind)
                w_ring.fill(at, (weights, w_smem), (masks, mask_smem))
                parts = []
                for part in range(COMPUTE):
                    tokens = (row * COMPUTE + part) * rows, rows
                    parts.append((_cut(x_gmem, sample, tokens, along), x_smem, part))
                x_ring.fill(at, *parts)

        def drain(tiles):
            x_ring.drain(tiles * count)
            w_ring.drain(tiles * count)

        return compute, load, drain

    buffers = [
        _buffer(x.dtype, steps, COMPUTE, rows, depth),
        _buffer(w.dtype, steps, *tile),
        _mask_buffer(kind, mask.dtype, steps, *tile),
        _buffer(x.dtype, 2, *tile),
        _buffer(x.dtype, COMPUTE, PIECE, columns),
        plgpu.Barrier(num_arrivals=COMPUTE),
    ]
    name = f"masked_product{'_transposed' * transposed}_{kind}"
    grid = samples, pl.cdiv(features, columns), pl.cdiv(seq, COMPUTE * rows)
    y = jax.ShapeDtypeStruct((samples, seq, features), x.dtype)
    rings = Ring(steps, COMPUTE), Ring(steps, 2)
    return launch(name, body, grid, [y], buffers, rings, (x, w, mask))[0]


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

            def step(i, acc):
                s = token_ring.wait(first + i)
                part = lax.optimization_barrier(warpgroup)
                tokens = x_smem.at[s, part].transpose((1, 0))
                acc = add_dots(acc, (tokens, dy_smem.at[s]))
                token_ring.release(first + i)
                return acc

            return lax.fori_loop(0, count, step, zeros(PIECE, columns))

        def compute(info):
            tile = w_ring.wait(info.local_index)

            def step(n, total):
                at = info.local_index * walked + n
                product = multiply(at * count)
                here = slot(at, SLOTS)
                first = lax.optimization_barrier(warpgroup) * PIECE
                if want_w:
                    mask_ring.wait(at)
                    numbers = _read_mask(kind, mask_smem.at[here], first, 0, columns)
                    total = total + product * numbers
                if want_mask:
                    weights = w_smem.at[tile, pl.ds(first, PIECE)]
                    weights = plgpu.load(weights, layout=LAYOUT)
                    product = product * weights.astype(jnp.float32)
                    # What was stored from this slot before has been read.
                    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                    sample = info.index[0] * walked + n
                    store(product, mask_smem.at[here], d_mask_gmem, sample, info)
                if want_w:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.commit_smem()
                    mask_ring.release(at)
                return total

            start = zeros(PIECE, columns) if want_w else jnp.int32(0)
            total = lax.fori_loop(0, walked, step, start)
            if want_w:
                store(total, w_smem.at[tile], dw_gmem, info.index[0], info)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            w_ring.release(info.local_index)

        def load(info):
            walk, row, column = info.index
            where = (row * rows, rows), (column * columns, columns)
            weights = _cut(w_gmem, lax.div(walk * walked, each), *where)
            w_ring.fill(info.local_index, (weights, w_smem))

            @pl.loop(0, walked)
            def _(n):
                sample, nth = walk * walked + n, info.local_index * walked + n
                if want_w:
                    masks = _cut(mask_gmem, sample, *where, kind)
                    mask_ring.fill(nth, (masks, mask_smem))

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

        def drain(tiles):
            token_ring.drain(tiles * walked * count)
            w_ring.drain(tiles)
            if want_w:
                mask_ring.drain(tiles * walked)

        return compute, load, drain

    buffers = [
        _buffer(x.dtype, SLOTS, COMPUTE, TOKENS, PIECE),
        _buffer(x.dtype, SLOTS, TOKENS, columns),
        _buffer(w.dtype, 1, rows, columns),
        _mask_buffer(kind, mask.dtype, SLOTS, rows, columns),
    ]
    name = f"masked_gradients{'_mask' * want_mask}{'_w' * want_w}_{kind}"
    grid = samples // walked, pl.cdiv(d_in, rows), pl.cdiv(d_out, columns)
    outs = [mask] * want_mask + [w] * want_w
    rings = Ring(SLOTS, COMPUTE + 1), Ring(1, 1), Ring(SLOTS, 1)
    return launch(name, body, grid, outs, buffers, rings, (x, dy, w, mask))
