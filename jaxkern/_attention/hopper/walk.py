"""The frame of the attention kernels: hold a tile of tokens, walk the tiles of a list.

A launch has at most one block for each multiprocessor, and a block takes one held tile
after the other, in the order of its `Schedule`. A held tile is two parts of 64 rows,
one for each warpgroup that computes. The warpgroup walks the blocks that the mask lists
for its rows, first the partial ones, then the full ones. Warpgroup 2 loads:

    global memory         shared memory                       registers
    held operands  --TMA-> held[slot][warpgroup] --+
    walked group 0 --TMA-> walked[0][slot]   ------+--wgmma-> sums of warpgroups 0, 1
    walked group 1 --TMA-> walked[1][slot]   ------+               |
    results        <-TMA-- held[slot][warpgroup] <-----------------+

A slot has two barriers. Its loads arrive at `filled`, where the computing warpgroups
wait. These arrive at `emptied` when they are done with the slot, and there warpgroup 2
waits before it fills the slot again. So the loads of the next tiles run while this one
is computed: a ring has `config.steps` slots, and held tiles have `config.held`. A
result leaves through the buffer of the held tile that it is like, so a held slot is
emptied once its results are read out.

Where both parts lie in one row of the mask's blocks, the warpgroups walk one list and
share a ring, whose slots are empty when both have released them. Otherwise each walks
its own list, with a ring of its own. Bodies that take turns (see `Body.takes_turns`)
also meet at a barrier, if they share a ring.

One block writes each result, so there are no atomics, and results do not depend on the
order in which blocks end. Past the end of an array TMA loads zeros and stores nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core.sharding import vary_alike
from ..._mosaic.base import plgpu, slot
from ..._mosaic.launch import (
    COMPUTE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    WalkTiles,
    check_fits,
    launch_blocks,
    wait_for_last,
)
from .body import Body, WalkedTiles, take_turns
from .plan import Plan, Walk
from .schedule import Schedule
from .tokens import Groups, Scratch, Tokens, make_scratch, smem_bytes


def walk_lists(
    body: Body,
    config: WalkTiles,
    held: Sequence[Tokens],
    walked: Groups,
    walk: Walk,
    name: str,
    factors: Sequence[jax.Array] = (),
) -> Sequence[jax.Array]:
    """Launch a body's walk, and return its results.

    Args:
        factors: numbers (batch,) that multiply the results like held operands, in
            float32 and before they are rounded.

    Returns:
        An array for each entry of `body.outs`; numbers are (batch, heads, 1, seq).
    """
    plan = Plan(body, config, held, walked, walk)
    check_fits(name, config, smem_bytes(config, held, walked, plan.rings))
    schedule = plan.schedule()
    inputs = (
        schedule,
        list(walk.data),
        [tokens.array for tokens in held],
        [[tokens.array for tokens in group] for group in walked],
        list(factors),
    )
    leaves, tree = jax.tree.flatten(inputs)
    n_in, n_out = len(leaves), len(body.outs)

    def kernel(*refs):
        bound_schedule, data, held_refs, walked_refs, factor_refs = jax.tree.unflatten(
            tree, refs[:n_in]
        )
        bound = Bound(
            plan,
            schedule=bound_schedule,
            data=data,
            held=held_refs,
            walked=walked_refs,
            factors=factor_refs,
            outs=refs[n_in : n_in + n_out],
            scratch=Scratch(*refs[n_in + n_out :]),
        )
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            bound.over_tiles(partial(bound.compute, warpgroup), jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            start = [jnp.int32(0)] * plan.rings
            bound.drain(bound.over_tiles(bound.load, start))

    scratch = make_scratch(config, held, walked, plan.rings, body.takes_turns)
    operands = vary_alike(*map(jnp.asarray, leaves))
    blocks, seq = len(schedule.blocks), held[0].result.shape[1]
    results = launch_blocks(kernel, operands, plan.results(), scratch, blocks, name)
    return [
        x[..., :seq] if n is None else x
        for x, n in zip(results, body.outs, strict=True)
    ]


class Steps(NamedTuple):
    """The steps through one list of blocks, a walked tile each.

    Attributes:
        count: how many steps there are; a block has one or more.
        first: where in `indices` the list begins.
        indices: the columns of blocks, of all lists.
    """

    count: Any
    first: Any
    indices: Any


@dataclass(frozen=True)
class Bound:
    """A launch inside its kernel: the plan, and references to arrays and scratch."""

    plan: Plan
    schedule: Schedule
    data: Any
    held: Sequence[Any]
    walked: Sequence[Sequence[Any]]
    factors: Sequence[Any]
    outs: Sequence[Any]
    scratch: Scratch

    def over_tiles(self, step, carry):
        """Call `step(n, carry)` for every held tile that this block takes."""
        block = self.schedule.blocks.at[lax.axis_index("block")]
        return lax.fori_loop(0, block[1], step, carry)

    def over_heads(self, step, carry):
        """Call `step(n, carry)` for every head that is walked for a held one."""
        if self.plan.walk.heads == 1:
            return step(0, carry)
        return lax.fori_loop(0, self.plan.walk.heads, step, carry)

    def item(self, nth):
        """Return the index in the schedule of the nth tile that this block takes."""
        return self.schedule.blocks[lax.axis_index("block"), 0] + nth

    def place(self, nth):
        """Return batch, head and number of the nth tile."""
        return [self.schedule.place[self.item(nth), axis] for axis in range(3)]

    def first_row(self, tile, warpgroup):
        return (tile * COMPUTE + warpgroup) * self.plan.config.rows

    def lists(self, nth, ring, head) -> list[Steps]:
        """Return the steps through the partial blocks and through the full ones."""
        row = self.schedule.rows.at[self.item(nth), ring, head]
        each = self.plan.walk.block_size // self.plan.config.columns
        return [
            Steps(row[2 * n] * each, row[2 * n + 1], indices)
            for n, indices in enumerate(self.schedule.indices)
        ]

    def column(self, steps: Steps, n):
        """Return the first token of the walked tile of step `n`."""
        size, columns = self.plan.walk.block_size, self.plan.config.columns
        each = size // columns
        block = steps.indices[steps.first + lax.div(n, each)]
        return block * size + lax.rem(n, each) * columns

    def compute(self, warpgroup, nth, carry):
        """Compute one warpgroup's part of a held tile.

        The carry counts the steps of its ring, over all tiles.
        """
        config, scratch = self.plan.config, self.scratch
        together = self.plan.rings == 1
        here = slot(nth, config.held)
        part = HeldPart(
            self,
            warpgroup,
            here,
            lane=0 if together else warpgroup,
            first_slot=0 if together else warpgroup * config.steps,
        )
        batch, head, tile = self.place(nth)
        first_row = self.first_row(tile, warpgroup)
        plgpu.barrier_wait(scratch.held_filled.at[here])
        pl.when(warpgroup == 1)(lambda: take_turns(scratch.turn))
        walk_head = partial(part.walk_head, nth, batch, head, first_row)
        start = self.plan.body.start(part.tiles(warpgroup))
        carry, sums = self.over_heads(walk_head, (carry, start))
        pl.when(warpgroup == 0)(lambda: take_turns(scratch.turn))
        # Without reading these numbers again, registers would hold them all the while.
        batch, head, tile = self.place(nth)
        first_row = self.first_row(tile, warpgroup)
        part.store(self.plan.body.finish(sums), batch, head, first_row)
        plgpu.barrier_arrive(scratch.held_emptied.at[here])
        return carry

    def load(self, nth, carry):
        """Load what a held tile needs, and all tiles that it walks.

        The carry counts the steps of each ring, over all tiles.
        """
        batch, head, tile = self.place(nth)
        self._load_held(nth, batch, head, tile)

        def load_head(g, carry):
            walk = self.plan.walk
            walked_head = lax.div(head * walk.heads + g, walk.share)
            rings = [self.lists(nth, ring, g) for ring in range(self.plan.rings)]
            for lists in zip(*rings, strict=True):
                carry = self._load_lists(lists, batch, walked_head, carry)
            return carry

        return self.over_heads(load_head, carry)

    def _load_held(self, nth, batch, head, tile) -> None:
        config, scratch = self.plan.config, self.scratch
        here = slot(nth, config.held)

        @pl.when(nth >= config.held)
        def wait_until_empty():
            plgpu.barrier_wait(scratch.held_emptied.at[here])

        for part in range(COMPUTE):
            for tokens, gmem, smem in zip(
                self.plan.held, self.held, scratch.held, strict=True
            ):
                row = self.first_row(tile, part)
                source = tokens.cut(gmem, batch, head, row, config.rows)
                filled = scratch.held_filled.at[here]
                plgpu.copy_gmem_to_smem(source, smem.at[here, part], filled)

    def _load_lists(self, lists: Sequence[Steps], batch, head, carry):
        """Load a list for each ring, a step of each ring in turn."""

        def load_each(n, carry):
            after = []
            for ring, (steps, at) in enumerate(zip(lists, carry, strict=True)):
                load = partial(self._load_step, ring, at, batch, head, steps, n)
                pl.when(n < steps.count)(load)
                after.append(at + (n < steps.count).astype(at.dtype))
            return after

        longest = reduce(lax.max, [steps.count for steps in lists])
        return lax.fori_loop(0, longest, load_each, carry)

    def _load_step(self, ring, at, batch, head, steps: Steps, n) -> None:
        """Load the tiles of step `n` of a list, which is step `at` of its ring."""
        config, scratch = self.plan.config, self.scratch
        column = self.column(steps, n)
        s = ring * config.steps + slot(at, config.steps)
        groups = zip(
            self.plan.walked,
            self.walked,
            scratch.walked,
            scratch.filled,
            scratch.emptied,
            strict=True,
        )
        for operands, sources, buffers, filled, emptied in groups:
            wait_until_empty = partial(plgpu.barrier_wait, emptied.at[s])
            pl.when(at >= config.steps)(wait_until_empty)
            for tokens, gmem, smem in zip(operands, sources, buffers, strict=True):
                source = tokens.cut(gmem, batch, head, column, config.columns)
                plgpu.copy_gmem_to_smem(source, smem.at[s], filled.at[s])

    def drain(self, steps) -> None:
        """Wait until all slots are emptied, which ends every barrier's last phase.

        Args:
            steps: how many steps were loaded into each ring.
        """
        config, scratch = self.plan.config, self.scratch
        tiles = self.schedule.blocks[lax.axis_index("block"), 1]
        wait_for_last(tiles, config.held, [scratch.held_emptied])
        for ring, count in enumerate(steps):
            first = ring * config.steps
            wait_for_last(count, config.steps, scratch.emptied, first)


@dataclass(frozen=True)
class HeldPart:
    """The part of a held tile that one warpgroup computes.

    Attributes:
        here: the slot of the held tile.
        lane: which of the tile's lists in the schedule it walks.
        first_slot: the first slot of its ring.
    """

    bound: Bound
    warpgroup: Any
    here: Any
    lane: Any
    first_slot: Any

    def tiles(self, part):
        """Return the held tiles of a part."""
        return [smem.at[self.here, part] for smem in self.bound.scratch.held]

    def walk_head(self, nth, batch, head, first_row, g, state):
        """Walk the lists of the g-th walked head.

        The state, before and after, is (steps of the ring so far, carry of the body).
        """
        walk = self.bound.plan.walk
        query_head = head * walk.heads + g
        partial_blocks, full_blocks = self.bound.lists(nth, self.lane, g)

        def step_of_partial(n, state):
            column = self.bound.column(partial_blocks, n)
            where = batch, query_head, first_row, column
            return self._step(state, partial(walk.visible, self.bound.data, *where))

        def step_of_full(n, state):
            del n
            return self._step(state, None)

        state = lax.fori_loop(0, partial_blocks.count, step_of_partial, state)
        return lax.fori_loop(0, full_blocks.count, step_of_full, state)

    def _step(self, state, visible: Callable[[], Any] | None):
        at, carry = state
        plan, scratch = self.bound.plan, self.bound.scratch
        tiles = WalkedTiles(
            scratch.walked,
            scratch.filled,
            scratch.emptied,
            scratch.turn,
            self.first_slot + slot(at, plan.config.steps),
        )
        # Without this barrier the compiler keeps the addresses of the held tiles live
        # in registers.
        held = self.tiles(lax.optimization_barrier(self.warpgroup))
        return at + 1, plan.body.step(carry, held, tiles, visible)

    def store(self, results, batch, head, first_row) -> None:
        """Store each result through the buffer of the held tile that it is like."""
        rows = self.bound.plan.config.rows
        outs = self.bound.plan.body.outs
        for value, like, out in zip(results, outs, self.bound.outs, strict=True):
            if like is None:
                smem = self.bound.scratch.numbers.at[self.warpgroup]
                target = out.at[batch, head, 0, pl.ds(first_row, rows)]
            else:
                smem = self.tiles(self.warpgroup)[like]
                target = Tokens(out).cut(out, batch, head, first_row, rows)
                for factors in self.bound.factors:
                    value *= factors[batch]
            smem[...] = value.astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
