"""The kernel of gradients of products with masked weights.

A block holds a tile of W, 128 rows of it, and walks the samples: G_b = x_b^T dy_b, then
dm_b = W * G_b, times the estimator's slope at the logits, and dW += m_b * G_b in
registers. Straight-through needs masks for dW alone, as bits; what has been read to
make dm is overwritten by it, to be stored, and else dm has slots of its own. With 64
columns a thread has 32 sums of G and of dW. One wgmma is always in flight, and W is
awaited where it is used first. Without dW samples have no order. Each result has one
writer, so there are no atomics.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._mosaic.base import SMEM_BYTES, buffer, plgpu, slot, zeros
from ..._mosaic.launch import COMPUTE, Ring, Roles, Slots, launch
from .product import (
    LAYOUT,
    PIECE,
    RESERVED_BYTES,
    Kind,
    bytes_of,
    cut,
    mask_buffer,
    read_mask,
)

# Of a tile. Masks in flight, tokens of a step, and steps in flight at most.
ROWS = COMPUTE * PIECE
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients are: training masks alone needs fewer bytes and products.

    dtype: of the mask's.
    """

    x: bool
    w: bool
    mask: bool
    dtype: Any


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a launch reads and keeps in shared memory."""

    kind: Kind
    wanted: Wanted
    columns: int
    mask_dtype: Any

    @property
    def slope(self) -> Callable[..., Any] | None:
        return SLOPES.get(self.kind) if self.wanted.mask else None

    @property
    def reads(self) -> bool:
        """Masks, which straight-through's own gradient does not need."""
        return self.wanted.w or self.slope is not None

    @property
    def shares(self) -> bool:
        """Whether dm is stored from where the mask was loaded to."""
        return self.wanted.mask and self.reads and self.kind != "bits"

    def held(self) -> list[Any]:
        """Slots of masks that are read, and those of dm where it has its own."""
        found = []
        if self.reads:
            size = SLOTS, ROWS, self.columns
            found.append(mask_buffer(self.kind, self.mask_dtype, *size))
        if self.wanted.mask and not self.shares:
            found.append(buffer(self.wanted.dtype, SLOTS, ROWS, self.columns))
        return found

    def steps(self) -> int:
        """Of tokens in flight: as many as fit, but no more than `MAX_STEPS`."""
        held = 2.0
        if self.reads:
            held += SLOTS * bytes_of(self.kind, self.mask_dtype)
        if self.wanted.mask and not self.shares:
            held += SLOTS * jnp.dtype(self.wanted.dtype).itemsize
        free = SMEM_BYTES - RESERVED_BYTES - ROWS * self.columns * held
        steps = min(MAX_STEPS, int(free // (2 * TOKENS * (ROWS + self.columns))))
        if steps < 2:
            # A step is released when the next one's wgmma has started.
            raise ValueError(f"no two steps fit with {self.columns} columns: {self}")
        return steps


def _product(ring, x_smem, dy_smem, first, count, columns: int):
    """This warpgroup's rows of x^T dy, of the sample that starts at step `first`."""
    warpgroup = lax.axis_index("warpgroup")

    def run(acc):
        def step(i, carry):
            s = ring.wait(first + i)
            part = lax.optimization_barrier(warpgroup)
            plgpu.wgmma(acc, x_smem.at[s, part].transpose((1, 0)), dy_smem.at[s])
            plgpu.wgmma_wait(1)

            @pl.when(i > 0)
            def _():
                ring.release(first + i - 1)

            return carry

        lax.fori_loop(0, count, step, jnp.int32(0))
        product = acc[...]
        ring.release(first + count - 1)
        return product

    return pl.run_scoped(run, plgpu.ACC((PIECE, columns), jnp.float32))


def _store(value, smem, gmem, sample, row, column):
    """This warpgroup's rows of a tile, by way of shared memory."""
    first = lax.axis_index("warpgroup") * PIECE
    mine = smem.at[pl.ds(first, PIECE)]
    mine[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    columns = value.shape[1]
    target = (row * ROWS + first, PIECE), (column * columns, columns)
    plgpu.copy_smem_to_gmem(mine, cut(gmem, sample, *target))


def gradients(kind: Kind, wanted: Wanted, columns: int, x, dy, w, mask):
    """What is wanted of W * G and, summed over the samples of a group, m * G.

    G is x^T dy of a sample, x (samples, seq, d_in) and dy (samples, seq, d_out). The
    first result is the gradient of the mask, or of the logits that it is made of; the
    second one is like `w`.
    """
    (samples, seq, d_in), d_out = x.shape, dy.shape[2]
    each = samples // w.shape[0]
    walked = each if wanted.w else 1
    count = pl.cdiv(seq, TOKENS)
    plan = _Plan(kind, wanted, columns, mask.dtype)
    reads, shares, slope, steps = plan.reads, plan.shares, plan.slope, plan.steps()

    def body(x_gmem, dy_gmem, w_gmem, mask_gmem, *refs):
        outs, refs = refs[: wanted.mask + wanted.w], refs[wanted.mask + wanted.w :]
        x_smem, dy_smem, w_smem, *held, token_ring, w_ring, mask_ring = refs
        mask_smem, out_smem = held[0], held[-1]

        def compute(info):
            walk, row, column = info.index

            def step(n, total):
                at = info.local_index * walked + n
                sizes = at * count, count, columns
                product = _product(token_ring, x_smem, dy_smem, *sizes)
                here = slot(at, SLOTS)
                warpgroup = lax.optimization_barrier(lax.axis_index("warpgroup"))
                first, factor = warpgroup * PIECE, None
                if reads:
                    mask_ring.wait(at)
                if slope:
                    logits = mask_smem.at[here, pl.ds(first, PIECE)]
                    logits = plgpu.load(logits, layout=LAYOUT).astype(jnp.float32)
                    factor = slope(_rarer(logits))
                if wanted.w:
                    numbers = read_mask(kind, mask_smem.at[here], first, 0, columns)
                    total = total + product * numbers
                if reads and not shares:
                    plgpu.commit_smem()
                    mask_ring.release(at)

                @pl.when(n == 0)
                def _():
                    w_ring.wait(info.local_index)

                if wanted.mask:
                    weights = w_smem.at[0, pl.ds(first, PIECE)]
                    weights = plgpu.load(weights, layout=LAYOUT)
                    product = product * weights.astype(jnp.float32)
                    product = product if factor is None else product * factor
                    if not shares:
                        # What was stored from this slot before has been read.
                        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                    tile = walk * walked + n, row, column
                    _store(product, out_smem.at[here], outs[0], *tile)
                if shares:
                    # What was stored from the slot before this one has been read.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    plgpu.commit_smem()

                    @pl.when(n > 0)
                    def _():
                        mask_ring.release(at - 1)

                return total

            start = zeros(PIECE, columns) if wanted.w else jnp.int32(0)
            total = lax.fori_loop(0, walked, step, start)
            if wanted.w:
                _store(total, w_smem.at[0], outs[-1], walk, row, column)
            if wanted.w or shares:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if shares:
                mask_ring.release((info.local_index + 1) * walked - 1)
            plgpu.commit_smem()
            w_ring.release(info.local_index)

        def load(info):
            walk, row, column = info.index
            where = (row * ROWS, ROWS), (column * columns, columns)
            parts = [(row * ROWS + n * PIECE, PIECE) for n in range(COMPUTE)]

            @pl.loop(0, walked)
            def _(n):
                sample, nth = walk * walked + n, info.local_index * walked + n

                # First, since the others wait for what is computed before.
                @pl.loop(0, count)
                def _(i):
                    tokens = sample, (i * TOKENS, TOKENS)
                    left = [
                        (cut(x_gmem, *tokens, features), x_smem, part)
                        for part, features in enumerate(parts)
                    ]
                    right = cut(dy_gmem, *tokens, where[1]), dy_smem
                    token_ring.fill(nth * count + i, right, *left)

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

        return Roles(compute, load, drain)

    buffers = [
        buffer(x.dtype, steps, COMPUTE, TOKENS, PIECE),
        buffer(x.dtype, steps, TOKENS, columns),
        buffer(w.dtype, 1, ROWS, columns),
        *plan.held(),
    ]
    name = f"masked_gradients{'_mask' * wanted.mask}{'_w' * wanted.w}_{kind}"
    grid = samples // walked, pl.cdiv(d_in, ROWS), pl.cdiv(d_out, columns)
    d_mask = jax.ShapeDtypeStruct((samples, d_in, d_out), wanted.dtype)
    shapes = [d_mask] * wanted.mask + [w] * wanted.w
    rings = Slots(steps, COMPUTE + 1), Slots(1, 1), Slots(SLOTS, 1)
    return launch(name, body, grid, shapes, buffers, rings, (x, dy, w, mask))
