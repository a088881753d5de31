"""A launch as the host plans it: the lists that it walks, and its operands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..._mosaic.launch import COMPUTE, WalkTiles
from ..block_mask.mask import BlockMask
from ..block_mask.runs import BlockLists
from .body import Body
from .predicates import make_predicate
from .schedule import Schedule, make_schedule
from .tokens import Groups, Tokens, rings_of


@dataclass(frozen=True)
class Walk:
    """The lists of blocks that a launch walks, and the heads that belong together.

    Attributes:
        lists: the partial and the full blocks of each row of held tokens.
        block_size: tokens of one of the mask's blocks.
        visible: returns which pairs attend, for the tile of a partial block, from (refs
            of `data`, batch, head, first row, first column).
        data: the arrays that the mask's predicate reads.
        heads: how many heads are walked for one held head, one after the other.
        share: how many held heads walk the same head.
    """

    lists: tuple[BlockLists, BlockLists]
    block_size: int
    visible: Callable[..., Any]
    data: Sequence[jax.Array]
    heads: int = 1
    share: int = 1


def walk_keys(mask: BlockMask, query: Tokens, key: Tokens, config: WalkTiles) -> Walk:
    """Let each query head walk the keys of its group's head."""
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
    """Let each key head walk the queries of all heads of its group."""
    predicate = make_predicate(mask, q_axis=1)
    return Walk(
        (mask.q, mask.full_q),
        mask.block_size,
        partial(predicate.visible, (config.rows, config.columns)),
        predicate.data,
        heads=query.heads // key.heads,
    )


@dataclass(frozen=True)
class Plan:
    """A launch, as the host plans it.

    Attributes:
        held: operands of which a block holds a tile.
        walked: groups of operands. A group has a ring of its own, and a step's tiles of
            one group arrive together and are released together.
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
        """Say which block takes which held tiles, and where their lists are."""
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
        """Return the shapes of the arrays that the kernel writes."""
        batch, seq, heads, _ = self.held[0].result.shape
        # TMA stores a contiguous row of numbers by a bulk copy, which does not stop at
        # the row's end. So a row has room for whole tiles.
        whole = pl.cdiv(seq, COMPUTE * self.config.rows) * COMPUTE * self.config.rows
        numbers = jax.ShapeDtypeStruct((batch, heads, 1, whole), jnp.float32)
        outs = self.body.outs
        return [numbers if n is None else self.held[n].result for n in outs]
