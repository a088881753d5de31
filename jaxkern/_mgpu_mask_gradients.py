"""The kernel of gradients of products with masked weights.

A block holds a tile of W, 128 rows of it, and walks the samples: G_b = x_b^T dy_b, then
dm_b = W * G_b, times the estimator's slope at the logits, written from where these were
loaded to, and dW += m_b * G_b in registers. With 64 columns a thread has 32 sums of G
and of dW. One wgmma is always in flight, and W is awaited where it is used first.
Without dW samples have no order, and straight-through needs no masks. Each result has
one writer, so there are no atomics.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._mgpu import SMEM_BYTES, buffer, plgpu, slot, zeros
from ._mgpu_masks import (
    LAYOUT,
    PIECE,
    Kind,
    bytes_of,
    cut,
    mask_buffer,
    read_mask,
)
from ._mgpu_tiles import Ring, launch
from ._mgpu_walk import COMPUTE

# Masks in flight, tokens of a step, and steps in flight at most.
SLOTS, TOKENS, MAX_STEPS = 2, 64, 8
LOG2_E = math.log2(math.e)


def _rarer(x):
    """sigmoid(-|x|), the chance of the less likely value; not by a slow division."""
    e = jnp.exp2(jnp.abs(x) * -LOG2_E)
    root = lax.rsqrt(1 + e)
    return e * root * root


# Of the mask by the logits, of `_rarer`; where there is none it is 1.
SLOPES: dict[Kind, Callable[..., Any]] = {
    "seed_reinmax": lambda p: 1 + p - p * p,
    "reinmax": lambda p: 0.5 * p,
}


def _slots(columns: int, mask_bytes: float, made_bytes: float) -> tuple[int, int]:
    """Of what is stored, and steps of tokens: no more than `MAX_STEPS`, as many as fit.

    mask_bytes: of what is loaded, for each number of W.
    made_bytes: of what is stored from slots of its own.
    """
    rows = COMPUTE * PIECE
    for made in (SLOTS, 1):
        held = 2 + SLOTS * mask_bytes + made * made_bytes
        free = SMEM_BYTES - 1024 - rows * columns * held
        steps = min(MAX_STEPS, int(free // (2 * TOKENS * (rows + columns))))
        # With fewer, wgmma waits for loads.
        if steps > 2:
            break
    return made, steps


def gradients(
    kind: Kind, want_mask: bool, want_w: bool, dtype, columns: int, x, dy, w, mask
):
    """What is wanted of W * G and, summed over the samples of a group, m * G.

    G is x^T dy of a sample, x (samples, seq, d_in) and dy (samples, seq, d_out). The
    first result, in `dtype`, is the gradient of the mask, or of the logits that it is
    made of; the second one is like `w`.
    """
    (samples, seq, d_in), d_out = x.shape, dy.shape[2]
    rows, each = COMPUTE * PIECE, samples // w.shape[0]
    walked = each if want_w else 1
    count = pl.cdiv(seq, TOKENS)
    slope = SLOPES.get(kind) if want_mask else None
    reads = want_w or slope is not None
    # What is made of a mask is stored from where the mask was loaded to.
    shares = want_mask and reads and kind != "bits"
    mask_bytes = bytes_of(kind, mask.dtype) if reads else 0.0
    made_bytes = bytes_of("mask", dtype) if want_mask and not shares else 0.0
    made, steps = _slots(columns, mask_bytes, made_bytes)

    def body(x_gmem, dy_gmem, w_gmem, mask_gmem, *refs):
        d_mask_gmem = refs[0] if want_mask else None
        dw_gmem = refs[want_mask] if want_w else None
        x_smem, dy_smem, w_smem, mask_smem, *own, token_ring, w_ring, mask_ring = refs[
            want_mask + want_w :
        ]
        out_smem = own[0] if own else mask_smem
        warpgroup = lax.axis_index("warpgroup")

        def store(value, smem, gmem, sample, info):
            """This warpgroup's rows, by way of where their like was loaded to."""
            mine = smem.at[pl.ds(warpgroup * PIECE, PIECE)]
            mine[...] = value.astype(smem.dtype)
            plgpu.commit_smem()
            row = info.index[1] * rows + warpgroup * PIECE
            target = (row, PIECE), (info.index[2] * columns, columns)
            plgpu.copy_smem_to_gmem(mine, cut(gmem, sample, *target))

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
                factor = None
                if reads:
                    mask_ring.wait(at)
                if slope:
                    logits = mask_smem.at[here, pl.ds(first, PIECE)]
                    logits = plgpu.load(logits, layout=LAYOUT).astype(jnp.float32)
                    factor = slope(_rarer(logits))
                if want_w:
                    numbers = read_mask(kind, mask_smem.at[here], first, 0, columns)
                    total = total + product * numbers
                if reads and not shares:
                    plgpu.commit_smem()
                    mask_ring.release(at)

                @pl.when(n == 0)
                def _():
                    w_ring.wait(info.local_index)

                if want_mask:
                    weights = w_smem.at[0, pl.ds(first, PIECE)]
                    weights = plgpu.load(weights, layout=LAYOUT)
                    product = product * weights.astype(jnp.float32)
                    product = product if factor is None else product * factor
                    if not shares:
                        # What was stored from this slot before has been read.
                        plgpu.wait_smem_to_gmem(made - 1, wait_read_only=True)
                    sample = info.index[0] * walked + n
                    out = out_smem.at[here if shares else slot(at, made)]
                    store(product, out, d_mask_gmem, sample, info)
                if shares:
                    # What was stored from the slot before this one has been read.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    plgpu.commit_smem()

                    @pl.when(n > 0)
                    def _():
                        mask_ring.release(at - 1)

                return total

            start = zeros(PIECE, columns) if want_w else jnp.int32(0)
            total = lax.fori_loop(0, walked, step, start)
            if want_w:
                store(total, w_smem.at[0], dw_gmem, info.index[0], info)
            if want_w or shares:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if shares:
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
                        source = cut(x_gmem, sample, tokens, features)
                        parts.append((source, x_smem, part))
                    right = cut(dy_gmem, sample, tokens, where[1]), dy_smem
                    token_ring.fill(nth * count + i, right, *parts)

                if reads:
                    masks = cut(mask_gmem, sample, *where, kind)
                    mask_ring.fill(nth, (masks, mask_smem))

                @pl.when(n == 0)
                def _():
                    weights = cut(w_gmem, lax.div(walk * walked, each), *where)
                    w_ring.fill(info.local_index, (weights, w_smem))

        def drain(tiles):
            token_ring.drain(tiles * walked * count)
            w_ring.drain(tiles)
            if reads:
                mask_ring.drain(tiles * walked)

        return compute, load, drain

    buffers = [
        buffer(x.dtype, steps, COMPUTE, TOKENS, PIECE),
        buffer(x.dtype, steps, TOKENS, columns),
        buffer(w.dtype, 1, rows, columns),
    ]
    if reads:
        buffers.append(mask_buffer(kind, mask.dtype, SLOTS, rows, columns))
    if want_mask and not shares:
        buffers.append(buffer(dtype, made, rows, columns))
    name = f"masked_gradients{'_mask' * want_mask}{'_w' * want_w}_{kind}"
    grid = samples // walked, pl.cdiv(d_in, rows), pl.cdiv(d_out, columns)
    d_mask = jax.ShapeDtypeStruct((samples, d_in, d_out), dtype)
    outs = [d_mask] * want_mask + [w] * want_w
    rings = Ring(steps, COMPUTE + 1), Ring(1, 1), Ring(SLOTS, 1)
    return launch(name, body, grid, outs, buffers, rings, (x, dy, w, mask))
