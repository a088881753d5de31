"""The fields of a `BlockMask`, and how the states of its blocks make them."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.trees import ArrayTree
from . import patterns
from .patterns import grid_of
from .predicates import MaskFn
from .runs import FULL, PARTIAL, BlockLists, Runs, combine, lists_of_dense

# The default number of tokens in a block, along both axes. The kernels' two warpgroups
# hold 64 queries each, so that both walk the same list if blocks have 128.
BLOCK_SIZE = 128


@dataclass(frozen=True, eq=False, repr=False)
class ListedBlocks(ArrayTree):
    """The lists of a mask's blocks; `BlockMask` says what they mean."""

    kv: BlockLists
    full_kv: BlockLists
    q: BlockLists
    full_q: BlockLists
    mask_fn: MaskFn
    block_size: int = field(metadata={"static": True})
    seq_q: int = field(metadata={"static": True})
    seq_kv: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the dense mask: (batch or 1, heads or 1, seq_q, seq_kv)."""
        batch, heads, _ = self.kv.num_blocks.shape
        return batch, heads, self.seq_q, self.seq_kv

    @property
    def grid(self) -> tuple[int, int]:
        """The number of blocks along each axis: (q_blocks, kv_blocks)."""
        return grid_of(self.seq_q, self.seq_kv, self.block_size)


def of_states[Mask: ListedBlocks](
    cls: type[Mask],
    on: Runs | jax.Array,
    mask_fn: MaskFn,
    seq_q: int,
    seq_kv: int,
    block_size: int,
) -> Mask:
    """Make a mask from the states of its blocks: runs or, if traced, an array."""
    inside = patterns.inside(seq_q, seq_kv, block_size)
    if isinstance(on, Runs):
        on = combine(np.minimum, on, inside)
        kv, full_kv = on.lists(PARTIAL), on.lists(FULL)
        across = on.transpose()
        q, full_q = across.lists(PARTIAL), across.lists(FULL)
    else:
        on = jnp.minimum(on, inside.to_dense())
        kv, full_kv = lists_of_dense(on == PARTIAL), lists_of_dense(on == FULL)
        across = on.swapaxes(2, 3)
        q, full_q = (
            lists_of_dense(across == PARTIAL),
            lists_of_dense(across == FULL),
        )
    return cls(kv, full_kv, q, full_q, mask_fn, block_size, seq_q, seq_kv)
