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
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._mosaic.base import LOG2_E, SMEM_BYTES, buffer, plgpu, slot, zeros
from ..._mosaic.batching import over_heads
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

# Rows of W in a tile.
TILE_ROWS = COMPUTE * PIECE
# Tiles of masks in flight.
SLOTS = 2
# Tokens of a step.
STEP_TOKENS = 64
# Steps in flight, at most.
MOST_STEPS = 8


def _rarer(x):
    """sigmoid(-|x|), the chance of the less likely value; not by a slow division."""
    e = jnp.exp2(jnp.abs(x) * -LOG2_E)
    root = lax.rsqrt(1 + e)
    return e * root * root


# The derivative of a mask by its logit, as a function of p = sigmoid(-|logit|); None
# where the gradient of the mask itself is what is wanted.
SLOPES: dict[Kind, Callable[..., Any] | None] = {
    "straight_through": None,
    "one_plus_sigmoid": lambda p: 1 + p - p * p,
    "reinmax": lambda p: 0.5 * p,
    "mask": None,
    "bits": None,
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

    @property
    def names(self) -> list[str]:
        """What the kernel of gradients makes, in the order of its results."""
        return [name for name in ("mask", "w") if getattr(self, name)]

    @property
    def columns(self) -> int:
        """Columns of W in a tile.

        With 128 the gradients of masks and W together spill registers, and those of
        masks alone took 43 us on an H200 where with 64 they take 35.
        """
        return 64 if self.mask else 128


@dataclasses.dataclass(frozen=True)
class _GradientsPlan:
    """What a launch computes and keeps in shared memory, as the host plans it.

    group: samples that share a W.
    count: steps of a sample.
    """

    kind: Kind
    wanted: Wanted
    mask_dtype: Any
    group: int
    count: int

    @property
    def columns(self) -> int:
        return self.wanted.columns

    @property
    def walked(self) -> int:
        """Samples that a block takes: all of a group where it sums over them."""
        return self.group if self.wanted.w else 1

    @property
    def slope(self) -> Callable[..., Any] | None:
        return SLOPES[self.kind] if self.wanted.mask else None

    @property
    def reads(self) -> bool:
        """Whether masks are read: straight-through's own gradient needs none."""
        return self.wanted.w or self.slope is not None

    @property
    def shares(self) -> bool:
        """Whether dm is stored from where the mask was loaded to."""
        return self.wanted.mask and self.reads and self.kind != "bits"

    @property
    def stages(self) -> bool:
        """Whether dm has slots of its own."""
        return self.wanted.mask and not self.shares

    @property
    def name(self) -> str:
        return "_".join(["masked_gradients", *self.wanted.names, self.kind])

    def held(self) -> list[Any]:
        """Slots of masks that are read, and those of dm where it has its own."""
        found = []
        if self.reads:
            size = SLOTS, TILE_ROWS, self.columns
            found.append(mask_buffer(self.kind, self.mask_dtype, *size))
        if self.stages:
            found.append(buffer(self.wanted.dtype, SLOTS, TILE_ROWS, self.columns))
        return found

    def steps(self) -> int:
        """Steps of tokens in flight: as many as fit, but no more than `MOST_STEPS`."""
        held = 2.0
        if self.reads:
            held += SLOTS * bytes_of(self.kind, self.mask_dtype)
        if self.stages:
            held += SLOTS * jnp.dtype(self.wanted.dtype).itemsize
        free = SMEM_BYTES - RESERVED_BYTES - TILE_ROWS * self.columns * held
        steps = min(
            MOST_STEPS, int(free // (2 * STEP_TOKENS * (TILE_ROWS + self.columns)))
        )
        if steps < 2:
            # A step is released when the next one's wgmma has started.
            raise ValueError(f"no two steps fit with {self.columns} columns: {self}")
        return steps

    def bind(self, x_gmem, dy_gmem, w_gmem, mask_gmem, *refs) -> Roles:
        """The roles of a block's warpgroups, inside the kernel."""
        rest = iter(refs)
        d_mask_gmem = next(rest) if self.wanted.mask else None
        d_w_gmem = next(rest) if self.wanted.w else None
        x_smem, dy_smem, w_smem = next(rest), next(rest), next(rest)
        mask_smem = next(rest) if self.reads else None
        d_mask_smem = next(rest) if self.stages else mask_smem
        gmem = x_gmem, dy_gmem, w_gmem, mask_gmem, d_mask_gmem, d_w_gmem
        smem = x_smem, dy_smem, w_smem, mask_smem, d_mask_smem
        block = _GradientsBlock(self, *gmem, *smem, *rest)
        return Roles(block.compute, block.load, block.drain)


@dataclasses.dataclass(frozen=True)
class _GradientsBlock:
    """A block of the plan inside the kernel, with its references.

    d_mask_gmem, d_w_gmem: None where they are not wanted.
    mask_smem: None where masks are not read.
    d_mask_smem: `mask_smem`, if the plan shares it.
    """

    plan: _GradientsPlan
    x_gmem: Any
    dy_gmem: Any
    w_gmem: Any
    mask_gmem: Any
    d_mask_gmem: Any
    d_w_gmem: Any
    x_smem: Any
    dy_smem: Any
    w_smem: Any
    mask_smem: Any
    d_mask_smem: Any
    token_ring: Ring
    w_ring: Ring
    mask_ring: Ring

    def compute(self, info) -> None:
        plan = self.plan
        step = partial(self.compute_sample, info)
        start = zeros(PIECE, plan.columns) if plan.wanted.w else jnp.int32(0)
        total = lax.fori_loop(0, plan.walked, step, start)
        if plan.wanted.w:
            _store(total, self.w_smem.at[0], self.d_w_gmem, *info.index)
        if plan.wanted.w or plan.shares:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if plan.shares:
            self.mask_ring.release((info.local_index + 1) * plan.walked - 1)
        plgpu.commit_smem()
        self.w_ring.release(info.local_index)

    def compute_sample(self, info, n, total):
        """Store the mask's gradient of sample `n`, and add that of W to `total`."""
        plan = self.plan
        at = info.local_index * plan.walked + n
        product = self.multiply_tokens(at * plan.count)
        here = slot(at, SLOTS)
        warpgroup = lax.optimization_barrier(lax.axis_index("warpgroup"))
        first, factor = warpgroup * PIECE, None
        if plan.reads:
            self.mask_ring.wait(at)
        if plan.slope:
            logits = self.mask_smem.at[here, pl.ds(first, PIECE)]
            logits = plgpu.load(logits, layout=LAYOUT).astype(jnp.float32)
            factor = plan.slope(_rarer(logits))
        if plan.wanted.w:
            mask = self.mask_smem.at[here]
            numbers = read_mask(plan.kind, mask, first, 0, plan.columns)
            total = total + product * numbers
        if plan.reads and not plan.shares:
            plgpu.commit_smem()
            self.mask_ring.release(at)

        @pl.when(n == 0)
        def wait_for_w():
            self.w_ring.wait(info.local_index)

        if plan.wanted.mask:
            weights = self.w_smem.at[0, pl.ds(first, PIECE)]
            weights = plgpu.load(weights, layout=LAYOUT)
            product = product * weights.astype(jnp.float32)
            product = product if factor is None else product * factor
            if plan.stages:
                # What was stored from this slot before has been read.
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            walk, row, column = info.index
            tile = walk * plan.walked + n, row, column
            _store(product, self.d_mask_smem.at[here], self.d_mask_gmem, *tile)
        if plan.shares:
            # What was stored from the slot before this one has been read.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            plgpu.commit_smem()

            @pl.when(n > 0)
            def release_the_one_before():
                self.mask_ring.release(at - 1)

        return total

    def multiply_tokens(self, first):
        """This warpgroup's rows of x^T dy, of the sample that starts at step `first`.

        One wgmma is always in flight: a step is released when the next one's started.
        """
        ring, count = self.token_ring, self.plan.count
        warpgroup = lax.axis_index("warpgroup")

        def run(acc):
            def step(i, carry):
                s = ring.wait(first + i)
                part = lax.optimization_barrier(warpgroup)
                x = self.x_smem.at[s, part].transpose((1, 0))
                plgpu.wgmma(acc, x, self.dy_smem.at[s])
                plgpu.wgmma_wait(1)

                @pl.when(i > 0)
                def release_the_one_before():
                    ring.release(first + i - 1)

                return carry

            lax.fori_loop(0, count, step, jnp.int32(0))
            product = acc[...]
            ring.release(first + count - 1)
            return product

        shape = plgpu.ACC((PIECE, self.plan.columns), jnp.float32)
        return pl.run_scoped(run, shape)

    def load(self, info) -> None:
        plan, (walk, row, column) = self.plan, info.index
        where = (row * TILE_ROWS, TILE_ROWS), (column * plan.columns, plan.columns)
        parts = [(row * TILE_ROWS + n * PIECE, PIECE) for n in range(COMPUTE)]

        @pl.loop(0, plan.walked)
        def load_sample(n):
            sample = walk * plan.walked + n
            nth = info.local_index * plan.walked + n

            # First, since the others wait for what is computed before.
            @pl.loop(0, plan.count)
            def load_tokens(i):
                tokens = sample, (i * STEP_TOKENS, STEP_TOKENS)
                left = [
                    (cut(self.x_gmem, *tokens, features), self.x_smem, part)
                    for part, features in enumerate(parts)
                ]
                right = cut(self.dy_gmem, *tokens, where[1]), self.dy_smem
                self.token_ring.fill(nth * plan.count + i, right, *left)

            if plan.reads:
                masks = cut(self.mask_gmem, sample, *where, plan.kind)
                self.mask_ring.fill(nth, (masks, self.mask_smem))

            @pl.when(n == 0)
            def load_w():
                group = lax.div(walk * plan.walked, plan.group)
                weights = cut(self.w_gmem, group, *where)
                self.w_ring.fill(info.local_index, (weights, self.w_smem))

    def drain(self, tiles) -> None:
        plan = self.plan
        self.token_ring.drain(tiles * plan.walked * plan.count)
        self.w_ring.drain(tiles)
        if plan.reads:
            self.mask_ring.drain(tiles * plan.walked)


def _store(value, smem, gmem, sample, row, column):
    """This warpgroup's rows of a tile, by way of shared memory."""
    first = lax.axis_index("warpgroup") * PIECE
    mine = smem.at[pl.ds(first, PIECE)]
    mine[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    columns = value.shape[1]
    target = (row * TILE_ROWS + first, PIECE), (column * columns, columns)
    plgpu.copy_smem_to_gmem(mine, cut(gmem, sample, *target))


def gradients_kernel(kind: Kind, wanted: Wanted):
    """The kernel of (x, dy, w, mask): the gradients that are wanted, by their names."""
    return over_heads(partial(_differentiate, kind, wanted))


def _differentiate(kind: Kind, wanted: Wanted, x, dy, w, mask) -> dict[str, jax.Array]:
    """What is wanted of W * G and, summed over the samples of a group, m * G.

    G is x^T dy of a sample, x (samples, seq, d_in) and dy (samples, seq, d_out).
    "mask" is the gradient of the mask, or of the logits that it is made of; "w" is
    like `w`.
    """
    (samples, seq, d_in), d_out = x.shape, dy.shape[2]
    group, count = samples // w.shape[0], pl.cdiv(seq, STEP_TOKENS)
    plan = _GradientsPlan(kind, wanted, mask.dtype, group, count)
    columns, steps = plan.columns, plan.steps()
    buffers = [
        buffer(x.dtype, steps, COMPUTE, STEP_TOKENS, PIECE),
        buffer(x.dtype, steps, STEP_TOKENS, columns),
        buffer(w.dtype, 1, TILE_ROWS, columns),
        *plan.held(),
    ]
    grid = samples // plan.walked, pl.cdiv(d_in, TILE_ROWS), pl.cdiv(d_out, columns)
    like = {
        "mask": jax.ShapeDtypeStruct((samples, d_in, d_out), wanted.dtype),
        "w": jax.ShapeDtypeStruct(w.shape, w.dtype),
    }
    outs = [like[name] for name in wanted.names]
    rings = Slots(steps, COMPUTE + 1), Slots(1, 1), Slots(SLOTS, 1)
    made = launch(
        plan.name,
        plan.bind,
        grid=grid,
        outs=outs,
        buffers=buffers,
        rings=rings,
        operands=(x, dy, w, mask),
    )
    return dict(zip(wanted.names, made, strict=True))
