"""BlockMask: which blocks of queries attend to which blocks of keys."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int8

from ..._core.checks import kind_of
from ..._core.trees import register
from . import picture, predicates
from .checks import (
    check_alike,
    check_broadcast,
    check_concrete,
    check_index,
    has_values,
)
from .flex_attention import FlexAttentionNames
from .given import GivenMasks
from .listed import BLOCK_SIZE, of_states
from .named import NamedMasks, band
from .runs import EMPTY, FULL, PARTIAL, AnyArray, Runs, combine, runs_of_lists


@register
class BlockMask(NamedMasks, GivenMasks, FlexAttentionNames):
    r"""A mask of attention, True = attend, as lists of its non-empty blocks.

    $$m_{bhqk} = \mathrm{mask\_fn}(b, h, q, k)$$

    Block $(i, j)$ holds the `block_size` queries from `i * block_size` on and as many
    keys from `j * block_size` on. It is full if all its pairs attend, partial if some
    do, and empty otherwise; a block that reaches past an end counts as partial.
    `mask_fn` needs to be asked only in partial blocks.

    `causal`, `local_window`, `dilated`, `strided`, `global_local`, `document`,
    `from_blocks`, `from_dense` and `from_mask_fn` make masks. `a & b` has the pairs
    that are in both masks, `a | b` the pairs that are in at least one; they may call a
    block partial that turns out empty or full. Under names that begin with `kv_`, `q_`
    and `full_` the lists are FlexAttention's padded arrays, see `FlexAttentionNames`.

    The named patterns, `&` and `|` work on the host, in time and memory of the number
    of runs of neighbouring blocks. If `jax.jit` traces the arrays from which a mask is
    made (`from_blocks`, `document`), its lists have room for every block. A mask is a
    pytree. Each leaf begins with the axes (batch or 1, heads or 1), where 1 means the
    same for all. Data of tokens, such as the ids of `document`, are leaves, so that
    they are arguments of a compiled program and not constants in it.

    Attributes:
        kv: The partial blocks of each row of blocks, as `BlockLists`.
        full_kv: The full blocks of each row.
        q: The partial blocks of each column, for the backward.
        full_q: The full blocks of each column.
        mask_fn: A function from (b, h, q, k) to whether a pair of tokens attends,
            correct for every pair.
        block_size: The number of tokens in a block, along both axes.
        seq_q: The number of queries.
        seq_kv: The number of keys.

    Examples:
        The causal part of a window, whose blocks are full (#), partial (+) or empty
        (.):

        ```python
        from jaxkern import BlockMask

        window = BlockMask.local_window(16, 16, window=6, block_size=4)
        print(window & BlockMask.causal(16, 16, block_size=4))
        ```
        ```text
        BlockMask(1, 1, 16, 16): block_size=4, 0 full and 9 partial blocks, density 0.56
        +...
        ++..
        +++.
        .+++
        ```

    References:
        FlexAttention, section 4: https://arxiv.org/abs/2412.05496.
    """

    @property
    def density(self) -> float | Array:
        """The fraction of blocks that are not empty, which attention has to visit.

        It is a Python number, or a traced array if `jax.jit` traces the mask.

        Examples:
            ```python
            from jaxkern import BlockMask

            mask = BlockMask.causal(8, 8, block_size=2)
            print(mask.shape, mask.grid, mask.density)
            ```
            ```text
            (1, 1, 8, 8) (4, 4) 0.625
            ```
        """
        full, part = self.full_kv.num_blocks, self.kv.num_blocks
        total = float(part.size * self.grid[1])
        if self._is_concrete():
            return float(np.sum(full, dtype=int) + np.sum(part, dtype=int)) / total
        return (full.sum() + part.sum()).astype(float) / total

    def to_dense(self) -> Bool[Array, "batch heads seq_q seq_kv"]:
        """Return a boolean for every pair of tokens.

        Returns:
            The dense mask, of the mask's `shape`.

        Examples:
            ```python
            from jaxkern import BlockMask

            print(BlockMask.causal(3, 4, block_size=2).to_dense()[0, 0].astype(int))
            ```
            ```text
            [[1 0 0 0]
             [1 1 0 0]
             [1 1 1 0]]
            ```
        """
        return predicates.dense(self.mask_fn, self.shape)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """Return the pairs that are in both masks."""
        return _combine("&", self, other)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """Return the pairs that are in at least one of the masks."""
        return _combine("|", self, other)

    def __bool__(self) -> bool:
        """Refuse a truth value. Without this, `a and b` would be `b`."""
        raise TypeError("BlockMask: masks must be combined by & and |, got `and`, `or`")

    def partition_specs(
        self, batch: str | None = None, heads: str | None = None
    ) -> "BlockMask":
        """Return the mask's partition specs, for `in_specs` of `jax.shard_map`.

        An axis of 1 stays whole. Inside of the `shard_map`, `mask_fn` counts batches
        and heads from the first ones of the device.

        Args:
            batch: The mesh axis that splits the batch, or None.
            heads: The mesh axis that splits the heads, or None.

        Returns:
            A mask with a `PartitionSpec` in the place of each array.

        Examples:
            ```python
            import jax.numpy as jnp
            from jax.sharding import PartitionSpec
            from jaxkern import BlockMask

            mask = BlockMask.from_blocks(jnp.ones((8, 1, 2, 2), bool), block_size=4)
            specs = mask.partition_specs(batch="data", heads="tensor")
            assert specs.kv.num_blocks == PartitionSpec("data", None)
            ```
        """

        def spec(leaf):
            axes = zip((batch, heads), leaf.shape, strict=False)
            return PartitionSpec(*(name if n > 1 else None for name, n in axes))

        return jax.tree.map(spec, self)

    def __repr__(self) -> str:
        name = f"block_size={self.block_size}"
        if not self._is_concrete():
            return f"BlockMask(seq_q={self.seq_q}, seq_kv={self.seq_kv}, {name})"
        full, part = (x.num_blocks.sum() for x in (self.full_kv, self.kv))
        blocks = f"{full} full and {part} partial blocks"
        return f"BlockMask{self.shape}: {name}, {blocks}, density {self.density:.2g}"

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_string()}" if self._is_concrete() else repr(self)

    def to_string(self, *, batch: int = 0, head: int = 0, width: int = 64) -> str:
        """Return a picture of one head: `#` full, `+` partial, `.` empty.

        `print(mask)` shows the first head below a summary.

        Args:
            batch: The index of the batch.
            head: The index of the head.
            width: The largest number of characters in a line. If there are more blocks,
                a character stands for several.

        Returns:
            The lines of the picture, one for each row of blocks.

        Raises:
            IndexError: `batch` or `head` is not below its number in the mask.
            TypeError: `jax.jit` traces the mask.

        Examples:
            ```python
            from jaxkern import BlockMask

            print(BlockMask.causal(512, 512, block_size=2).to_string(width=4))
            ```
            ```text
            +...
            #+..
            ##+.
            ###+
            ```
        """
        states = self._picture("BlockMask.to_string", batch, head)
        return picture.to_string(states, width)

    def plot(self, *, batch: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draw the blocks of one head with matplotlib.

        Args:
            batch: The index of the batch.
            head: The index of the head.
            ax: The axes to draw into; None creates a figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
            IndexError: `batch` or `head` is not below its number in the mask.
            TypeError: `jax.jit` traces the mask.

        Examples:
            ```python
            from jaxkern import BlockMask

            axes = BlockMask.causal(512, 512).plot()
            assert axes.get_xlabel() == "key block"
            ```
        """
        states = self._picture("BlockMask.plot", batch, head)
        return picture.plot(states, repr(self), ax)

    def _is_concrete(self) -> bool:
        lists = self.kv, self.full_kv, self.q, self.full_q
        return all(has_values(x) for y in lists for x in (y.num_blocks, y.indices))

    def _runs(self) -> Runs:
        columns = self.grid[1]
        return combine(
            np.maximum,
            runs_of_lists(self.kv, columns, PARTIAL),
            runs_of_lists(self.full_kv, columns, FULL),
        )

    def _states(self) -> Int8[Array, "batch heads q_blocks kv_blocks"]:
        columns = self.grid[1]
        part, full = self.kv.to_dense(columns), self.full_kv.to_dense(columns)
        states = jnp.where(full, FULL, jnp.where(part, PARTIAL, EMPTY))
        return states.astype(jnp.int8)

    def _picture(self, op: str, batch: int, head: int) -> np.ndarray:
        check_index(op, "batch", batch, self.shape[0])
        check_index(op, "head", head, self.shape[1])
        check_concrete(op, mask=self.kv.num_blocks)
        return self._runs().to_dense()[batch, head]


def band_mask(
    lower: int | None,
    upper: int | None,
    seq_q: int,
    seq_kv: int,
    block_size: int = BLOCK_SIZE,
) -> BlockMask:
    """Return the mask of `lower <= k - q <= upper`, where None is no bound."""
    sizes = seq_q, seq_kv, block_size
    return of_states(BlockMask, *band(lower, upper, *sizes), *sizes)


def with_keys(mask: BlockMask, seen: AnyArray) -> BlockMask:
    """Return the pairs of the mask whose key is seen too; no block is full.

    `seen` has the shape (batch or 1, heads or 1, seq_kv).
    """
    runs = mask._runs()
    part = Runs(runs.shape, runs.at, np.minimum(runs.state, PARTIAL))
    fn = predicates.Both(mask.mask_fn, predicates.Keys(seen))
    return of_states(BlockMask, part, fn, mask.seq_q, mask.seq_kv, mask.block_size)


def _combine(symbol: str, a: BlockMask, b: BlockMask) -> BlockMask:
    if not isinstance(b, BlockMask):
        raise TypeError(
            f"BlockMask {symbol}: both must be BlockMasks, got {kind_of(b)}; "
            "BlockMask.from_dense makes one of a boolean array"
        )
    sizes = a.seq_q, a.seq_kv, a.block_size
    check_alike(f"BlockMask {symbol}", sizes, (b.seq_q, b.seq_kv, b.block_size))
    check_broadcast(f"BlockMask {symbol}", a.shape[:2], b.shape[:2])
    both = symbol == "&"
    fn = (predicates.Both if both else predicates.Either)(a.mask_fn, b.mask_fn)
    if a._is_concrete() and b._is_concrete():
        runs = combine(np.minimum if both else np.maximum, a._runs(), b._runs())
        return of_states(BlockMask, runs, fn, *sizes)
    states = (jnp.minimum if both else jnp.maximum)(a._states(), b._states())
    return of_states(BlockMask, states, fn, *sizes)
