"""The kernel of the gradients of products with masked weights.

With G_b = x_b^T dy_b, a sample's mask has the gradient dm_b = W * G_b, times the
estimator's slope at its logits, and W has dW = sum of m_b * G_b over the samples that
share it. A block holds a tile of W, 128 rows by 64 or 128 columns, and walks along
these samples. Warpgroup 2 loads, 0 and 1 have 64 rows each:

    warpgroup 2  each sample, 64 tokens a step:
                 --TMA-->  token ring, 2 to 8 slots:  filled: 3 loads (x twice, dy)
                 --TMA-->  mask ring, 2 slots:        filled: 1 load, if masks are read
                 --TMA-->  W, 1 slot, once a tile:    filled: 1 load
    warpgroup w  each step: wait token filled[i], issue 4 wgmma of k16; those of step
      (0 or 1)     i - 1 are done: arrive token emptied[i - 1]
                 after the last step, G in registers: wait mask filled, dW += m * G
                 wait W filled (first sample), dm = W * G [* slope], rounded
                   --> shared memory --TMA--> result
                 arrive mask emptied, once it is read and no store leaves from it
    end of tile  dW --> the slot of W --TMA--> result; once read, arrive W emptied

dm leaves from the mask's own slot, over what was read, if masks are read and are not
bits (`shares`); otherwise it has 2 slots of its own (`stages`). The straight-through
estimator needs masks for dW alone, as bits. If dW is not wanted, each sample is a tile
of its own, and samples have no order. A result has one writer, so there are no atomics.

Why these tiles: a thread has 32 sums of G and 32 of dW with 64 columns. With 128, both
gradients together spill registers. With 16 samples of 256 tokens and 512 x 2048 in
bfloat16, dm alone took 35.3 us on an H200, both 49.5
(`benchmarks/results/nvidia_h200/launches.json`, rows `gradients b16 64`).
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
from .masks import LAYOUT, PIECE, Kind, bytes_of, cut, mask_buffer, read_mask
from .product import RESERVED_BYTES

# Rows of W in a tile.
TILE_ROWS = COMPUTE * PIECE
# Slots of masks, and of dm where it has its own.
SLOTS = 2
# Tokens of a step.
STEP_TOKENS = 64
# The most steps of tokens in flight.
MOST_STEPS = 8


def _rarer(x):
    """Return sigmoid(-|x|), the probability of the less likely value of the mask."""
    e = jnp.exp2(jnp.abs(x) * -LOG2_E)
    # A reciprocal square root is one operation of the special function units, where a
    # division takes several instructions.
    root = lax.rsqrt(1 + e)
    return e * root * root


# The derivative of a mask with respect to its logit, by the kind of mask, as a function
# of p = sigmoid(-|logit|). None stands for the slope 1, and for masks that are not made
# of logits.
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
    """The gradients that are wanted.

    x, w, mask: whether the gradient of x, of W and of the mask is wanted.
    dtype: the dtype of the mask's gradient.
    """

    x: bool
    w: bool
    mask: bool
    dtype: Any

    @property
    def names(self) -> list[str]:
        """The results of the kernel of gradients, in their order."""
        return [name for name in ("mask", "w") if getattr(self, name)]

    @property
    def columns(self) -> int:
        """Columns of W in a tile.

        With 128, the gradients of masks and W together spill registers, and those of
        masks alone took 42.7 us on an H200, where they took 35.3 with 64
        (`launches.json`: `gradients b16 128 w=False` and `gradients b16 64 w=False`).
        """
        return 64 if self.mask else 128


@dataclasses.dataclass(frozen=True)
class _GradientsPlan:
    """A launch, as the host plans it.

    group: how many samples share a W.
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
        """Samples of a tile: all of a group if the block sums over them, else one."""
        return self.group if self.wanted.w else 1

    @property
    def slope(self) -> Callable[..., Any] | None:
        return SLOPES[self.kind] if self.wanted.mask else None

    @property
    def reads(self) -> bool:
        """Whether masks are read: the straight-through gradient dm alone needs none."""
        return self.wanted.w or self.slope is not None

    @property
    def shares(self) -> bool:
        """Whether dm overwrites the mask in its slot, and is stored from there."""
        return self.wanted.mask and self.reads and self.kind != "bits"

    @property
    def stages(self) -> bool:
        """Whether dm has slots of its own."""
        return self.wanted.mask and not self.shares

    @property
    def name(self) -> str:
        return "_".join(["masked_gradients", *self.wanted.names, self.kind])

    def held(self) -> list[Any]:
        """Buffers of the masks that are read, and of dm if it has slots of its own."""
        found = []
        if self.reads:
            size = SLOTS, TILE_ROWS, self.columns
            found.append(mask_buffer(self.kind, self.mask_dtype, *size))
        if self.stages:
            found.append(buffer(self.wanted.dtype, SLOTS, TILE_ROWS, self.columns))
        return found

    def steps(self) -> int:
        """Slots of the token ring: as many as fit, at most `MOST_STEPS`."""
        # Bytes for each number of a tile of W: W itself, masks and dm.
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
            # A step is released once the next one's wgmma has started.
            raise ValueError(
                "masked_gradients: two steps of tokens must fit shared memory with "
                f"{self.columns} columns, got {self}"
            )
        return steps

    def bind(self, x_gmem, dy_gmem, w_gmem, mask_gmem, *refs) -> Roles:
        """The functions of a block's warpgroups, inside the kernel."""
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
        """Store the mask's gradient of sample `n`; return `total` plus its dW."""
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
                # All stores but the last one have been read, so this slot is free.
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            walk, row, column = info.index
            tile = walk * plan.walked + n, row, column
            _store(product, self.d_mask_smem.at[here], self.d_mask_gmem, *tile)
        if plan.shares:
            # All stores but this sample's have been read, so the slot of the sample
            # before can be loaded again.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            plgpu.commit_smem()

            @pl.when(n > 0)
            def release_the_one_before():
                self.mask_ring.release(at - 1)

        return total

    def multiply_tokens(self, first):
        """Return this warpgroup's rows of x^T dy, for the sample from step `first` on.

        The wgmmas of one step are always in flight: a step is released when those of
        the next one have been issued and its own are done.
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

            # Tokens come first, since the slots of masks and of W become empty only
            # when earlier samples have been computed.
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
    """Round this warpgroup's rows of a tile, and store them by way of shared memory."""
    first = lax.axis_index("warpgroup") * PIECE
    mine = smem.at[pl.ds(first, PIECE)]
    mine[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    columns = value.shape[1]
    target = (row * TILE_ROWS + first, PIECE), (column * columns, columns)
    plgpu.copy_smem_to_gmem(mine, cut(gmem, sample, *target))


def gradients_kernel(kind: Kind, wanted: Wanted):
    """Return the kernel of gradients.

    It takes (x, dy, w, mask) and returns those of "mask" and "w" that are wanted.
    """
    return over_heads(partial(_differentiate, kind, wanted))


def _differentiate(kind: Kind, wanted: Wanted, x, dy, w, mask) -> dict[str, jax.Array]:
    """Return the gradients that are wanted, by their names.

    x: (samples, seq, d_in). dy: (samples, seq, d_out). w: (groups, d_in, d_out).
    mask: (samples, d_in, d_out), or bits, (samples, d_in / 32, d_out).

    "mask" is the gradient of the mask, or of the logits that it is made of. "w" is
    summed over the samples of a group.
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
