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

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import chain
from typing import Any

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
    launch_blocks,
    wait_for_last,
)
from ..block_mask.runs import BlockLists
from .schedule import make_schedule
from .tokens import Groups, Tokens, check_fits, rings_of, scratch


@dataclasses.dataclass(frozen=True)
class Walk:
    """What is walked: lists of blocks, and which heads go with a held one.

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


@dataclasses.dataclass(frozen=True)
class Body:
    """What a warpgroup computes.

    start: from its held tiles to a carry.
    step: (carry, held tiles, ring, visible), where `visible` is None in full blocks
        and otherwise gives the pairs that attend, (rows, columns).
    finish: (carry, held tiles) to the results, one an entry of `outs`.
    outs: which held operand a result is like; None for a float32 number a row.
    takes_turns: whether `step` calls `ring.take_turns` twice, so that a warpgroup's
        first half of a step runs under the other one's second half.
    """

    start: Callable[..., Any]
    step: Callable[..., Any]
    finish: Callable[..., Any]
    outs: Sequence[int | None]
    takes_turns: bool = False


@dataclasses.dataclass(frozen=True)
class Ring:
    """The walked tiles of one step, as one warpgroup sees them."""

    smem: Sequence[Any]
    produced: Sequence[Any]
    consumed: Sequence[Any]
    turn: Sequence[Any]
    slot: Any

    def wait(self, n: int):
        """The tiles of the walked group `n`, once they are there."""
        plgpu.barrier_wait(self.produced[n].at[self.slot])
        return [smem.at[self.slot] for smem in self.smem[n]]

    def release(self, n: int) -> None:
        """Let those tiles be overwritten."""
        plgpu.barrier_arrive(self.consumed[n].at[self.slot])

    def take_turns(self) -> None:
        """Wait for the other warpgroup to be here too, if both walk together."""
        _take_turns(self.turn)


def _take_turns(turn) -> None:
    for barrier in turn:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A launch: what it computes, and inside the kernel its arrays."""

    body: Body
    config: WalkTiles
    held: Sequence[Tokens]
    walked: Groups
    walk: Walk
    schedule: Any = None
    data: Any = None
    gmem: Sequence[Any] = ()
    outs: Sequence[Any] = ()
    scratch: Sequence[Any] = ()

    @property
    def rings(self) -> int:
        return rings_of(self.config, self.walk.block_size)

    def over_tiles(self, step, carry):
        """`step(n, carry)` for every tile that this block takes."""
        block = self.schedule.blocks.at[lax.axis_index("block")]
        return lax.fori_loop(0, block[1], step, carry)

    def item(self, n):
        """The n-th tile that this block takes."""
        return self.schedule.blocks[lax.axis_index("block"), 0] + n

    def place(self, n):
        """Batch, head and number of a tile."""
        return [self.schedule.place[self.item(n), axis] for axis in range(3)]

    def first(self, tile, warpgroup):
        return (tile * COMPUTE + warpgroup) * self.config.rows

    def lists(self, n, ring, head):
        """Of the partial and the full blocks: steps, first entry and indices."""
        row = self.schedule.rows.at[self.item(n), ring, head]
        each = self.walk.block_size // self.config.columns
        return [
            (row[2 * n] * each, row[2 * n + 1], indices)
            for n, indices in enumerate(self.schedule.indices)
        ]

    def column(self, start, indices, n):
        """Where the tile of step `n` begins."""
        size, columns = self.walk.block_size, self.config.columns
        each = size // columns
        return indices[start + lax.div(n, each)] * size + lax.rem(n, each) * columns

    def over_heads(self, step, carry):
        if self.walk.heads == 1:
            return step(0, carry)
        return lax.fori_loop(0, self.walk.heads, step, carry)

    def compute(self, warpgroup, nth, carry):
        """A tile; the carry counts the steps of the ring."""
        config, body, walk = self.config, self.body, self.walk
        held_smem, walked_smem, numbers, held_barriers, barriers, turn = self.scratch
        produced, consumed = held_barriers
        filled, emptied = barriers
        here = slot(nth, config.held)
        mine = [smem.at[here, warpgroup] for smem in held_smem]
        mine_first = 0 if self.rings == 1 else warpgroup * config.steps
        lane = 0 if self.rings == 1 else warpgroup
        batch, head, tile = self.place(nth)
        first = self.first(tile, warpgroup)
        plgpu.barrier_wait(produced.at[here])
        pl.when(warpgroup == 1)(lambda: _take_turns(turn))

        def walk_head(g, state):
            query_head = head * walk.heads + g
            partial_first = self.lists(nth, lane, g)
            for (count, start, indices), ask in zip(
                partial_first, (True, False), strict=True
            ):

                def step(n, state, start=start, indices=indices, ask=ask):
                    at, sums = state
                    visible = None
                    if ask:
                        column = self.column(start, indices, n)
                        where = batch, query_head, first, column
                        visible = partial(walk.visible, self.data, *where)
                    s = mine_first + slot(at, config.steps)
                    ring = Ring(walked_smem, filled, emptied, turn, s)
                    # Or the addresses of its parts would be kept in registers.
                    part = lax.optimization_barrier(warpgroup)
                    mine = [smem.at[here, part] for smem in held_smem]
                    return at + 1, body.step(sums, mine, ring, visible)

                state = lax.fori_loop(0, count, step, state)
            return state

        carry, sums = self.over_heads(walk_head, (carry, body.start(mine)))
        pl.when(warpgroup == 0)(lambda: _take_turns(turn))
        # Read again, so that no register keeps it meanwhile.
        batch, head, tile = self.place(nth)
        first = self.first(tile, warpgroup)
        results = body.finish(sums, mine)
        for value, like, out in zip(results, body.outs, self.outs, strict=True):
            if like is None:
                smem = numbers.at[warpgroup]
                target = out.at[batch, head, 0, pl.ds(first, config.rows)]
            else:
                smem = mine[like]
                target = Tokens(out).cut(out, batch, head, first, config.rows)
            smem[...] = value.astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(consumed.at[here])
        return carry

    def load(self, nth, carry):
        """What a tile needs; the carry counts the steps of each ring."""
        config, walk = self.config, self.walk
        held_smem, walked_smem, _, held_barriers, barriers, _ = self.scratch
        held_produced, held_consumed = held_barriers
        produced, consumed = barriers
        held_gmem, walked_gmem = (
            self.gmem[: len(self.held)],
            self.gmem[len(self.held) :],
        )
        batch, head, tile = self.place(nth)
        here = slot(nth, config.held)

        @pl.when(nth >= config.held)
        def _():
            plgpu.barrier_wait(held_consumed.at[here])

        for part in range(COMPUTE):
            for operand, gmem, smem in zip(
                self.held, held_gmem, held_smem, strict=True
            ):
                at = batch, head, self.first(tile, part), config.rows
                target, barrier = smem.at[here, part], held_produced.at[here]
                plgpu.copy_gmem_to_smem(operand.cut(gmem, *at), target, barrier)

        def load_step(ring, at, head, column):
            s = ring * config.steps + slot(at, config.steps)
            gmem = iter(walked_gmem)
            for n, group in enumerate(self.walked):

                @pl.when(at >= config.steps)
                def _(n=n):
                    plgpu.barrier_wait(consumed[n].at[s])

                for operand, smem in zip(group, walked_smem[n], strict=True):
                    place = batch, head, column
                    source = operand.cut(next(gmem), *place, size=config.columns)
                    plgpu.copy_gmem_to_smem(source, smem.at[s], produced[n].at[s])

        def load_head(g, carry):
            walked_head = lax.div(head * walk.heads + g, walk.share)
            rings = [self.lists(nth, ring, g) for ring in range(self.rings)]
            for lists in zip(*rings, strict=True):

                def step(n, carry, lists=lists):
                    after = []
                    for ring, (count, start, indices) in enumerate(lists):
                        at = carry[ring]

                        @pl.when(n < count)
                        def _(ring=ring, at=at, start=start, indices=indices):
                            column = self.column(start, indices, n)
                            load_step(ring, at, walked_head, column)

                        after.append(at + (n < count).astype(at.dtype))
                    return after

                longest = reduce(lax.max, [count for count, *_ in lists])
                carry = lax.fori_loop(0, longest, step, carry)
            return carry

        return self.over_heads(load_head, carry)

    def wait_for_last(self, steps) -> None:
        """A barrier must be seen to the end of its last phase."""
        tiles = self.schedule.blocks[lax.axis_index("block"), 1]
        _, _, _, (_, held_consumed), (_, consumed), _ = self.scratch
        wait_for_last(tiles, self.config.held, [held_consumed])
        for ring, count in enumerate(steps):
            each = self.config.steps
            wait_for_last(count, each, consumed, first=ring * each)


def walk_lists(
    body: Body,
    config: WalkTiles,
    held: Sequence[Tokens],
    walked: Groups,
    walk: Walk,
    name: str,
) -> Sequence[jax.Array]:
    """The results of the body; numbers are (batch, heads, 1, seq).

    What is walked comes in groups, of which all tiles of a step arrive together and are
    released together.
    """
    frame = _Frame(body, config, held, walked, walk)
    batch, seq, heads, _ = held[0].result.shape
    check_fits(name, config, held, walked, frame.rings)
    schedule = make_schedule(
        walk.lists,
        (batch, heads, seq),
        walk.heads,
        (frame.rings, COMPUTE // frame.rings * config.rows),
        walk.block_size,
        sum(o.tile_bytes(o.seq) for o in chain(*walked)) * walk.heads / walk.share,
    )
    leaves, tree = jax.tree.flatten((schedule, list(walk.data)))
    arrays = [o.array for o in chain(held, *walked)]
    operands = vary_alike(*map(jnp.asarray, leaves), *arrays)

    def kernel(*refs):
        listed, refs = refs[: len(leaves)], refs[len(leaves) :]
        n_in, n_out = len(arrays), len(body.outs)
        schedule, data = jax.tree.unflatten(tree, listed)
        bound = dataclasses.replace(
            frame,
            schedule=schedule,
            data=data,
            gmem=refs[:n_in],
            outs=refs[n_in : n_in + n_out],
            scratch=refs[n_in + n_out :],
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
            start = [jnp.int32(0)] * frame.rings
            bound.wait_for_last(bound.over_tiles(bound.load, start))

    # What is contiguous is copied to its end, whatever follows it: so whole tiles.
    whole = pl.cdiv(seq, COMPUTE * config.rows) * COMPUTE * config.rows
    numbers = jax.ShapeDtypeStruct((batch, heads, 1, whole), jnp.float32)
    out_type = [numbers if n is None else held[n].result for n in body.outs]
    buffers = scratch(config, held, walked, frame.rings, body.takes_turns)
    blocks = len(schedule.blocks)
    results = launch_blocks(kernel, operands, out_type, buffers, blocks, name)
    return [
        x[..., :seq] if n is None else x
        for x, n in zip(results, body.outs, strict=True)
    ]
