"""Hold a tile of tokens, walk the tiles that a list names: the frame of attention.

A block holds a tile of each `held` operand in shared memory, a part for each of the two
warpgroups that compute, and walks the tiles of the `walked` ones that the lists of its
row name, partial blocks first. A third warpgroup loads them into a ring of slots. Where
both parts lie in one row of blocks they walk together; otherwise each walks its own
row, with a ring of its own. There are no more blocks than multiprocessors, each with
about as much to do, and the loads of the next tile run while this one is computed.
Results are written by one block each, so there are no atomics and no order of arrival.
What lies past the end of an array is zero when TMA loads it and dropped when TMA stores
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
from ..block_mask.mask import BlockMask
from ..block_mask.runs import BlockLists
from .predicates import make_predicate
from .schedule import Schedule, make_schedule
from .tokens import Groups, Scratch, Tokens, make_scratch, rings_of, smem_bytes


@dataclass(frozen=True)
class Walk:
    """The lists of blocks that are walked, and which heads go with a held one.

    lists: the partial and the full blocks of the rows of held tokens.
    visible: (refs, batch, head, row, column) to the pairs that attend, of the tile of a
        partial block from there; `refs` are those of `data`.
    heads: walked for one held head, one after the other.
    share: held heads that walk the same head.
    """

    lists: tuple[BlockLists, BlockLists]
    block_size: int
    visible: Callable[..., Any]
    data: Sequence[jax.Array]
    heads: int = 1
    share: int = 1


def walk_keys(mask: BlockMask, query: Tokens, key: Tokens, config: WalkTiles) -> Walk:
    """Each query head walks the keys of its group's head."""
    predicate = make_predicate(mask, q_axis=0)
    return Walk(
        (mask.kv, mask.full_kv),
        mask.block_size,
        partial(predicate.visible, (config.rows, config.columns)),
        predicate.data,
        share=query.heads // key.heads,
    )


def walk_queries(
    mask: BlockMask, query: Tokens, key: Tokens, config: WalkTiles
) -> Walk:
    """Each key head walks the queries of all heads of its group."""
    predicate = make_predicate(mask, q_axis=1)
    return Walk(
        (mask.q, mask.full_q),
        mask.block_size,
        partial(predicate.visible, (config.rows, config.columns)),
        predicate.data,
        heads=query.heads // key.heads,
    )


@dataclass(frozen=True)
class WalkedTiles:
    """The walked tiles of one step, as one warpgroup sees them.

    smem: of each group the buffers of its operands.
    filled, emptied: a barrier for each group.
    turn: the barrier at which both warpgroups meet, if they take turns.
    """

    smem: Sequence[Sequence[Any]]
    filled: Sequence[Any]
    emptied: Sequence[Any]
    turn: Sequence[Any]
    slot: Any

    def wait(self, n: int):
        """The tiles of the walked group `n`, once they are there."""
        plgpu.barrier_wait(self.filled[n].at[self.slot])
        return [smem.at[self.slot] for smem in self.smem[n]]

    def release(self, n: int) -> None:
        """Let those tiles be overwritten."""
        plgpu.barrier_arrive(self.emptied[n].at[self.slot])

    def take_turns(self) -> None:
        """Wait for the other warpgroup to be here too, if both walk together."""
        _take_turns(self.turn)


def _take_turns(turn) -> None:
    for barrier in turn:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


@runtime_checkable
class Body(Protocol):
    """The arithmetic of a warpgroup: it starts, takes steps and finishes."""

    @property
    def outs(self) -> Sequence[int | None]:
        """Which held operand a result is like; None for a float32 number a row."""
        ...

    @property
    def takes_turns(self) -> bool:
        """Whether `step` calls `tiles.take_turns` twice.

        Then a warpgroup's first half of a step runs under the other one's second half.
        """
        ...

    def start(self, held: Sequence[Any]) -> Any:
        """The carry before the first step, from the held tiles."""
        ...

    def step(
        self,
        carry: Any,
        held: Sequence[Any],
        tiles: WalkedTiles,
        visible: Callable[[], Any] | None,
    ) -> Any:
        """The carry after the walked tiles of one step.

        visible: gives the pairs of a partial block that attend, (rows, columns); None
            in full blocks.
        """
        ...

    def finish(self, carry: Any) -> Sequence[Any]:
        """The results, one an entry of `outs`."""
        ...


@dataclass(frozen=True)
class Plan:
    """A launch, as the host plans it.

    walked: groups of operands, of which all tiles of a step arrive together and are
        released together.
    """

    body: Body
    config: WalkTiles
    held: Sequence[Tokens]
    walked: Groups
    walk: Walk

    @property
    def rings(self) -> int:
        return rings_of(self.config, self.walk.block_size)

    def schedule(self) -> Schedule:
        """Which block takes which held tiles, and where their lists are."""
        batch, seq, heads, _ = self.held[0].result.shape
        walked = sum(tokens.tile_bytes(tokens.seq) for tokens in chain(*self.walked))
        return make_schedule(
            self.walk.lists,
            (batch, heads, seq),
            self.walk.heads,
            (self.rings, COMPUTE // self.rings * self.config.rows),
            self.walk.block_size,
            walked * self.walk.heads / self.walk.share,
        )

    def results(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays that the kernel writes."""
        batch, seq, heads, _ = self.held[0].result.shape
        # What is contiguous is copied to its end, whatever follows it: so whole tiles.
        whole = pl.cdiv(seq, COMPUTE * self.config.rows) * COMPUTE * self.config.rows
        numbers = jax.ShapeDtypeStruct((batch, heads, 1, whole), jnp.float32)
        outs = self.body.outs
        return [numbers if n is None else self.held[n].result for n in outs]


def walk_lists(
    body: Body,
    config: WalkTiles,
    held: Sequence[Tokens],
    walked: Groups,
    walk: Walk,
    name: str,
    factors: Sequence[jax.Array] = (),
) -> Sequence[jax.Array]:
    """The results of the body; numbers are (batch, heads, 1, seq).

    The results like held operands are multiplied by `factors` of their batch, if there
    are any, in float32 and before they are rounded.
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
    """The steps through one list of blocks.

    first: of the list's entries in `indices`.
    """

    count: Any
    first: Any
    indices: Any


@dataclass(frozen=True)
class Bound:
    """A launch inside its kernel: the plan, and references to its arrays."""

    plan: Plan
    schedule: Schedule
    data: Any
    held: Sequence[Any]
    walked: Sequence[Sequence[Any]]
    factors: Sequence[Any]
    outs: Sequence[Any]
    scratch: Scratch

    def over_tiles(self, step, carry):
        """`step(n, carry)` for every tile that this block takes."""
        block = self.schedule.blocks.at[lax.axis_index("block")]
        return lax.fori_loop(0, block[1], step, carry)

    def over_heads(self, step, carry):
        """`step(n, carry)` for every head that is walked for a held one."""
        if self.plan.walk.heads == 1:
            return step(0, carry)
        return lax.fori_loop(0, self.plan.walk.heads, step, carry)

    def item(self, nth):
        """Where the schedule has the nth tile that this block takes."""
        return self.schedule.blocks[lax.axis_index("block"), 0] + nth

    def place(self, nth):
        """Batch, head and number of a tile."""
        return [self.schedule.place[self.item(nth), axis] for axis in range(3)]

    def first_row(self, tile, warpgroup):
        return (tile * COMPUTE + warpgroup) * self.plan.config.rows

    def lists(self, nth, ring, head) -> list[Steps]:
        """Those of the partial and of the full blocks."""
        row = self.schedule.rows.at[self.item(nth), ring, head]
        each = self.plan.walk.block_size // self.plan.config.columns
        return [
            Steps(row[2 * n] * each, row[2 * n + 1], indices)
            for n, indices in enumerate(self.schedule.indices)
        ]

    def column(self, steps: Steps, n):
        """Where the tile of step `n` begins."""
        size, columns = self.plan.walk.block_size, self.plan.config.columns
        each = size // columns
        block = steps.indices[steps.first + lax.div(n, each)]
        return block * size + lax.rem(n, each) * columns

    def compute(self, warpgroup, nth, carry):
        """One warpgroup's part of a tile; the carry counts the steps of its ring."""
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
        pl.when(warpgroup == 1)(lambda: _take_turns(scratch.turn))
        walk_head = partial(part.walk_head, nth, batch, head, first_row)
        start = self.plan.body.start(part.tiles(warpgroup))
        carry, sums = self.over_heads(walk_head, (carry, start))
        pl.when(warpgroup == 0)(lambda: _take_turns(scratch.turn))
        # Read again, so that no register keeps it meanwhile.
        batch, head, tile = self.place(nth)
        first_row = self.first_row(tile, warpgroup)
        part.store(self.plan.body.finish(sums), batch, head, first_row)
        plgpu.barrier_arrive(scratch.held_emptied.at[here])
        return carry

    def load(self, nth, carry):
        """Load what a tile needs; the carry counts the steps of each ring."""
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
        """A list for each ring, step by step; the rings take turns."""

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
        """The tiles of step `n` of a list, which is step `at` of its ring."""
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
        """See every barrier to the end of its last phase, after `steps` of a ring."""
        config, scratch = self.plan.config, self.scratch
        tiles = self.schedule.blocks[lax.axis_index("block"), 1]
        wait_for_last(tiles, config.held, [scratch.held_emptied])
        for ring, count in enumerate(steps):
            first = ring * config.steps
            wait_for_last(count, config.steps, scratch.emptied, first)


@dataclass(frozen=True)
class HeldPart:
    """The part of a held tile that one warpgroup computes.

    here: the slot of the held tile.
    lane: whose row of the schedule it walks.
    first_slot: of its ring.
    """

    bound: Bound
    warpgroup: Any
    here: Any
    lane: Any
    first_slot: Any

    def tiles(self, part):
        """The held tiles of that part."""
        return [smem.at[self.here, part] for smem in self.bound.scratch.held]

    def walk_head(self, nth, batch, head, first_row, g, state):
        """The state after the lists of the g-th walked head: (steps so far, carry)."""
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
        # Without this barrier the addresses of its tiles would be kept in registers.
        held = self.tiles(lax.optimization_barrier(self.warpgroup))
        return at + 1, plan.body.step(carry, held, tiles, visible)

    def store(self, results, batch, head, first_row) -> None:
        """The results, each through the buffer of the held tile that it is like."""
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
