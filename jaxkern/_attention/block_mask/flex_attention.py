"""The arrays of FlexAttention's BlockMask, under their names."""

from typing import TYPE_CHECKING

from jaxtyping import Int32

from .runs import AnyArray, BlockLists


class FlexAttentionNames:
    """The lists of blocks of a `BlockMask`, as the padded arrays of FlexAttention's.

    Code that reads these arrays of a `torch.nn.attention.flex_attention.BlockMask` can
    read them of ours. The kernels here do not: they read the lists `kv`, `full_kv`, `q`
    and `full_q`, which hold no more than the blocks there are.

    ```python
    >>> from jaxkern import BlockMask
    >>> mask = BlockMask.causal(6, 6, block_size=2)
    >>> print(mask.full_kv_num_blocks)
    [[[0 1 2]]]
    >>> print(mask.kv_indices[0, 0, :, 0])
    [0 1 2]

    ```

    References:
        FlexAttention, section 4: https://arxiv.org/abs/2412.05496.
    """

    if TYPE_CHECKING:
        kv: BlockLists
        full_kv: BlockLists
        q: BlockLists
        full_q: BlockLists

        @property
        def grid(self) -> tuple[int, int]: ...

    @property
    def kv_num_blocks(self) -> Int32[AnyArray, "batch heads q_blocks"]:
        """How many partial blocks each row of queries has."""
        return self.kv.num_blocks

    @property
    def kv_indices(self) -> Int32[AnyArray, "batch heads q_blocks kv_blocks"]:
        """Their columns, ascending, then zeros."""
        return self.kv.padded(self.grid[1])

    @property
    def full_kv_num_blocks(self) -> Int32[AnyArray, "batch heads q_blocks"]:
        """How many full blocks each row of queries has."""
        return self.full_kv.num_blocks

    @property
    def full_kv_indices(self) -> Int32[AnyArray, "batch heads q_blocks kv_blocks"]:
        """Their columns, ascending, then zeros."""
        return self.full_kv.padded(self.grid[1])

    @property
    def q_num_blocks(self) -> Int32[AnyArray, "batch heads kv_blocks"]:
        """How many partial blocks each column of keys has."""
        return self.q.num_blocks

    @property
    def q_indices(self) -> Int32[AnyArray, "batch heads kv_blocks q_blocks"]:
        """Their rows, ascending, then zeros."""
        return self.q.padded(self.grid[0])

    @property
    def full_q_num_blocks(self) -> Int32[AnyArray, "batch heads kv_blocks"]:
        """How many full blocks each column of keys has."""
        return self.full_q.num_blocks

    @property
    def full_q_indices(self) -> Int32[AnyArray, "batch heads kv_blocks q_blocks"]:
        """Their rows, ascending, then zeros."""
        return self.full_q.padded(self.grid[0])
