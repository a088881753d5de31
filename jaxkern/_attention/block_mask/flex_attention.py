"""The arrays of FlexAttention's BlockMask, under the names that they have there."""

from jaxtyping import Int32

from .listed import ListedBlocks
from .runs import AnyArray


class FlexAttentionNames(ListedBlocks):
    """The lists of blocks of a `BlockMask`, as FlexAttention's padded arrays.

    Code that reads these arrays from a `torch.nn.attention.flex_attention.BlockMask`
    can read them here too. Our kernels do not: they read the lists `kv`, `full_kv`, `q`
    and `full_q`, which hold no more entries than there are blocks.

    Examples:
        ```python
        from jaxkern import BlockMask

        mask = BlockMask.causal(6, 6, block_size=2)
        print(mask.full_kv_num_blocks)
        print(mask.kv_indices[0, 0, :, 0])
        ```
        ```text
        [[[0 1 2]]]
        [0 1 2]
        ```

    References:
        FlexAttention, section 4: https://arxiv.org/abs/2412.05496.
    """

    @property
    def kv_num_blocks(self) -> Int32[AnyArray, "batch heads q_blocks"]:
        """The number of partial blocks in each row of blocks."""
        return self.kv.num_blocks

    @property
    def kv_indices(self) -> Int32[AnyArray, "batch heads q_blocks kv_blocks"]:
        """The columns of the partial blocks in each row, ascending, then zeros."""
        return self.kv.padded(self.grid[1])

    @property
    def full_kv_num_blocks(self) -> Int32[AnyArray, "batch heads q_blocks"]:
        """The number of full blocks in each row of blocks."""
        return self.full_kv.num_blocks

    @property
    def full_kv_indices(self) -> Int32[AnyArray, "batch heads q_blocks kv_blocks"]:
        """The columns of the full blocks in each row, ascending, then zeros."""
        return self.full_kv.padded(self.grid[1])

    @property
    def q_num_blocks(self) -> Int32[AnyArray, "batch heads kv_blocks"]:
        """The number of partial blocks in each column of blocks."""
        return self.q.num_blocks

    @property
    def q_indices(self) -> Int32[AnyArray, "batch heads kv_blocks q_blocks"]:
        """The rows of the partial blocks in each column, ascending, then zeros."""
        return self.q.padded(self.grid[0])

    @property
    def full_q_num_blocks(self) -> Int32[AnyArray, "batch heads kv_blocks"]:
        """The number of full blocks in each column of blocks."""
        return self.full_q.num_blocks

    @property
    def full_q_indices(self) -> Int32[AnyArray, "batch heads kv_blocks q_blocks"]:
        """The rows of the full blocks in each column, ascending, then zeros."""
        return self.full_q.padded(self.grid[0])
