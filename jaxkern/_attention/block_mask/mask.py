"""BlockMask: which blocks of queries attend to which blocks of keys."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Int8

from ..._core.checks import kind_of
from ..._core.trees import ArrayTree, register
from . import patterns, picture, predicates
from .checks import (
    check_alike,
    check_broadcast,
    check_concrete,
    check_index,
    check_mask_fn,
    check_segment_ids,
    check_sizes,
    fitting_length,
    four_axes,
    has_values,
    on_host,
)
from .flex_attention import FlexAttentionNames
from .patterns import blocks_of
from .predicates import MaskFn
from .runs import (
    EMPTY,
    FULL,
    PARTIAL,
    AnyArray,
    BlockLists,
    Runs,
    combine,
    lists_of_dense,
    runs_of_dense,
    runs_of_lists,
)

# The default number of tokens in a block, along both axes. The kernels' two warpgroups
# hold 64 queries each, so that both walk the same list if blocks have 128.
BLOCK_SIZE = 128


@register
@dataclass(frozen=True, eq=False, repr=False)
class BlockMask(FlexAttentionNames, ArrayTree):
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

    kv: BlockLists
    full_kv: BlockLists
    q: BlockLists
    full_q: BlockLists
    mask_fn: MaskFn
    block_size: int = field(metadata={"static": True})
    seq_q: int = field(metadata={"static": True})
    seq_kv: int = field(metadata={"static": True})

    @staticmethod
    def causal(seq_q: int, seq_kv: int, *, block_size: int = BLOCK_SIZE) -> "BlockMask":
        r"""Let each query see the keys up to its own position.

        $$m_{qk} = [k \le q]$$

        Args:
            seq_q: The number of queries.
            seq_kv: The number of keys. Both are counted from the start.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask, the same for all batches and heads.

        Raises:
            TypeError: A size is not an integer.
            ValueError: A size is less than 1, or does not fit into 32 bits.

        Examples:
            ```python
            from jaxkern import BlockMask

            print(BlockMask.causal(12, 12, block_size=4).to_string())
            ```
            ```text
            +..
            #+.
            ##+
            ```
        """
        op = "BlockMask.causal"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        return band_mask(None, 0, seq_q, seq_kv, block_size)

    @staticmethod
    def local_window(
        seq_q: int, seq_kv: int, *, window: int, block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        r"""Let each query see the keys at most `window` tokens away, on both sides.

        $$m_{qk} = [\,|q - k| \le \mathrm{window}\,]$$

        Args:
            seq_q: The number of queries.
            seq_kv: The number of keys.
            window: The largest distance, in tokens.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask, the same for all batches and heads.

        Raises:
            TypeError: A size is not an integer.
            ValueError: `window` is negative, another size is less than 1, or a size
                does not fit into 32 bits.

        Examples:
            ```python
            from jaxkern import BlockMask

            print(BlockMask.local_window(16, 16, window=2, block_size=4).to_string())
            ```
            ```text
            ++..
            +++.
            .+++
            ..++
            ```

        References:
            Longformer, section 3.1: https://arxiv.org/abs/2004.05150.
        """
        op = "BlockMask.local_window"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        (window,) = check_sizes(op, 0, window=window)
        return band_mask(-window, window, seq_q, seq_kv, block_size)

    @staticmethod
    def dilated(
        seq_q: int, seq_kv: int, *, rates: Sequence[int], block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        r"""Let block i see itself and, for each rate r, the blocks i - r and i + r.

        $$m_{qk} = [\,|i - j| \in \{0\} \cup \mathrm{rates}\,], \quad
        i = \lfloor q / \mathrm{block\_size} \rfloor,\
        j = \lfloor k / \mathrm{block\_size} \rfloor$$

        This is a sparse pattern of blocks. `dilated_attention` is another function: it
        dilates tokens.

        Args:
            seq_q: The number of queries.
            seq_kv: The number of keys.
            rates: The distances, in blocks.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask, the same for all batches and heads.

        Raises:
            TypeError: A size or a rate is not an integer.
            ValueError: One of them is less than 1, or a size does not fit into 32 bits.

        Examples:
            ```python
            from jaxkern import BlockMask

            print(BlockMask.dilated(16, 16, rates=(1, 3), block_size=4).to_string())
            ```
            ```text
            ##.#
            ###.
            .###
            #.##
            ```
        """
        op = "BlockMask.dilated"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        rates = check_sizes(op, 1, **{f"rates[{i}]": r for i, r in enumerate(rates)})
        grid = blocks_of(seq_q, block_size), blocks_of(seq_kv, block_size)
        # Larger rates reach no block, and might not fit into 32 bits.
        near = sorted({rate for rate in rates if rate < max(grid)})
        fn = predicates.Diagonals((0, *near), block_size)
        runs = patterns.diagonals(fn.distances, *grid)
        return _build(runs, fn, seq_q, seq_kv, block_size)

    @staticmethod
    def strided(
        seq_q: int, seq_kv: int, *, stride: int, block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        r"""Let block i see the blocks at multiples of the stride from it.

        $$m_{qk} = [\,i \equiv j \pmod{\mathrm{stride}}\,], \quad
        i = \lfloor q / \mathrm{block\_size} \rfloor,\
        j = \lfloor k / \mathrm{block\_size} \rfloor$$

        Args:
            seq_q: The number of queries.
            seq_kv: The number of keys.
            stride: The distance, in blocks.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask, the same for all batches and heads.

        Raises:
            TypeError: A size is not an integer.
            ValueError: A size is less than 1, or does not fit into 32 bits.

        Examples:
            ```python
            from jaxkern import BlockMask

            print(BlockMask.strided(16, 16, stride=2, block_size=4).to_string())
            ```
            ```text
            #.#.
            .#.#
            #.#.
            .#.#
            ```

        References:
            Sparse Transformers, section 4.2, whose strides are in tokens:
                https://arxiv.org/abs/1904.10509.
        """
        op = "BlockMask.strided"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        (stride,) = check_sizes(op, 1, stride=stride)
        grid = blocks_of(seq_q, block_size), blocks_of(seq_kv, block_size)
        stride = min(stride, max(grid))
        fn = predicates.Strided(stride, block_size)
        return _build(patterns.strided(stride, *grid), fn, seq_q, seq_kv, block_size)

    @staticmethod
    def global_local(
        seq_q: int,
        seq_kv: int,
        *,
        global_tokens: int,
        window: int,
        block_size: int = BLOCK_SIZE,
    ) -> "BlockMask":
        r"""Let the first tokens see all and be seen by all, the others a window.

        $$m_{qk} = [\,|q - k| \le \mathrm{window}\,] \lor [q < g] \lor [k < g], \quad
        g = \mathrm{global\_tokens}$$

        Args:
            seq_q: The number of queries.
            seq_kv: The number of keys.
            global_tokens: The number of first tokens that see all and are seen by all.
            window: The largest distance for the others, in tokens.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask, the same for all batches and heads.

        Raises:
            TypeError: A size is not an integer.
            ValueError: `global_tokens` or `window` is negative, another size is less
                than 1, or a size does not fit into 32 bits.

        Examples:
            ```python
            from jaxkern import BlockMask

            sizes = {"seq_q": 16, "seq_kv": 16, "block_size": 4}
            mask = BlockMask.global_local(**sizes, global_tokens=4, window=1)
            print(mask.to_string())
            ```
            ```text
            ####
            #++.
            #+++
            #.++
            ```

        References:
            Longformer, section 3.1: https://arxiv.org/abs/2004.05150.
        """
        op = "BlockMask.global_local"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        global_tokens, window = check_sizes(
            op, 0, global_tokens=global_tokens, window=window
        )
        sizes = seq_q, seq_kv, block_size
        near = _band(-window, window, seq_q, seq_kv)
        global_tokens = min(global_tokens, max(seq_q, seq_kv))
        first = predicates.Global(global_tokens)
        runs = combine(
            np.maximum,
            patterns.band(near, *sizes),
            patterns.first_tokens(global_tokens, *sizes),
        )
        return _build(runs, predicates.Either(near, first), *sizes)

    @staticmethod
    def document(
        segment_ids: Int[AnyArray, "seq"] | Int[AnyArray, "batch seq"],
        *,
        block_size: int = BLOCK_SIZE,
    ) -> "BlockMask":
        r"""Let tokens attend inside their own segment, such as a packed document.

        $$m_{bqk} = [\mathrm{ids}_{bq} = \mathrm{ids}_{bk}]$$

        Args:
            segment_ids: An integer for each token, in any order. `jax.jit` may trace
                the ids: then the mask lists the blocks whose ranges of ids overlap,
                which is exact if ids ascend, and else lists some empty blocks as
                partial.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask, the same for all heads.

        Raises:
            TypeError: The ids are not integers.
            ValueError: The ids do not have the shape (seq,) or (batch, seq).

        Examples:
            ```python
            import jax.numpy as jnp
            from jaxkern import BlockMask

            ids = jnp.array([0, 0, 0, 0, 0, 0, 1, 1])
            print(BlockMask.document(ids, block_size=2).to_string())
            ```
            ```text
            ###.
            ###.
            ###.
            ...#
            ```
        """
        op = "BlockMask.document"
        (block_size,) = check_sizes(op, 1, block_size=block_size)
        check_segment_ids(op, segment_ids)
        seq = segment_ids.shape[-1]
        ids = on_host(segment_ids).reshape(-1, seq)
        sizes = seq, seq, block_size
        if isinstance(ids, Tracer):
            states = patterns.segment_states(ids, block_size)
            return _build(states, predicates.Segments(ids[:, None]), *sizes)
        # Ids are numbered from 0 on, since JAX may keep only 32 bits of an id.
        numbers = np.unique(ids, return_inverse=True)[1].reshape(ids.shape)
        fn = predicates.Segments(numbers[:, None].astype(np.int32))
        return _build(patterns.segments(numbers, block_size), fn, *sizes)

    @staticmethod
    def from_blocks(
        blocks: Bool[AnyArray, "*leading q_blocks kv_blocks"],
        *,
        block_size: int = BLOCK_SIZE,
        seq_q: int | None = None,
        seq_kv: int | None = None,
        mask_fn: MaskFn | None = None,
    ) -> "BlockMask":
        r"""Keep the blocks that are True and, in them, the pairs that `mask_fn` keeps.

        $$m_{bhqk} = \mathrm{blocks}_{bhij} \land \mathrm{mask\_fn}(b, h, q, k), \quad
        i = \lfloor q / \mathrm{block\_size} \rfloor,\
        j = \lfloor k / \mathrm{block\_size} \rfloor$$

        Args:
            blocks: True for the blocks that attend, of shape (q_blocks, kv_blocks),
                (heads, ...) or (batch, heads, ...). `jax.jit` may trace them.
            block_size: The size of a block in tokens; kernels need multiples of 64.
            seq_q: The number of queries, if the last block of queries is not whole.
            seq_kv: The number of keys, if the last block of keys is not whole.
            mask_fn: As in `from_mask_fn`, but it is asked nothing here. None keeps
                whole blocks.

        Returns:
            The mask.

        Raises:
            TypeError: The blocks are not boolean, or `mask_fn` is not a function of
                four arguments.
            ValueError: The blocks have another shape, or the lengths do not fit their
                number.

        Examples:
            ```python
            import jax.numpy as jnp
            from jaxkern import BlockMask

            mask = BlockMask.from_blocks(jnp.eye(4, dtype=bool), block_size=4, seq_q=14)
            print(mask.to_string())
            ```
            ```text
            #...
            .#..
            ..#.
            ...+
            ```
        """
        op = "BlockMask.from_blocks"
        (block_size,) = check_sizes(op, 1, block_size=block_size)
        blocks = four_axes(op, "blocks", blocks)
        seq_q, seq_kv = (
            fitting_length(op, name, length, count, block_size)
            for name, length, count in zip(
                ("seq_q", "seq_kv"), (seq_q, seq_kv), blocks.shape[2:], strict=True
            )
        )
        state = FULL if mask_fn is None else PARTIAL
        states = state * blocks.astype(np.int8)
        if mask_fn is not None:
            check_mask_fn(op, "mask_fn", mask_fn)
            mask_fn = predicates.Function(mask_fn, *blocks.shape[:2])
            _check_booleans(op, mask_fn)
        fn = predicates.Blocks(states, mask_fn, block_size)
        on = states if isinstance(states, Tracer) else runs_of_dense(np.asarray(states))
        return _build(on, fn, seq_q, seq_kv, block_size)

    @staticmethod
    def from_dense(
        mask: Bool[AnyArray, "*leading seq_q seq_kv"], *, block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        r"""Make the block mask of a dense mask.

        $$m_{bhqk} = \mathrm{mask}_{bhqk}$$

        It keeps one bit for each pair of tokens, and blocks that are equal share their
        bits.

        Args:
            mask: True for the pairs that attend, of shape (seq_q, seq_kv), (heads, ...)
                or (batch, heads, ...). `jax.jit` may not trace it.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask.

        Raises:
            TypeError: The mask is not boolean, or `jax.jit` traces it.
            ValueError: The mask has another shape.

        Examples:
            ```python
            import jax.numpy as jnp
            from jaxkern import BlockMask

            dense = jnp.tri(6, dtype=bool)
            mask = BlockMask.from_dense(dense, block_size=2)
            print(mask.to_string())
            assert (mask.to_dense() == dense).all()
            ```
            ```text
            +..
            #+.
            ##+
            ```
        """
        op = "BlockMask.from_dense"
        (block_size,) = check_sizes(op, 1, block_size=block_size)
        mask = four_axes(op, "mask", mask)
        check_concrete(op, mask=mask)
        states, fn = patterns.tiles(np.asarray(mask), block_size)
        _, _, seq_q, seq_kv = mask.shape
        return _build(runs_of_dense(states), fn, seq_q, seq_kv, block_size)

    @staticmethod
    def from_mask_fn(
        mask_fn: MaskFn,
        seq_q: int,
        seq_kv: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block_size: int = BLOCK_SIZE,
    ) -> "BlockMask":
        r"""Keep the pairs for which `mask_fn(b, h, q, k)` is True.

        $$m_{bhqk} = \mathrm{mask\_fn}(b, h, q, k)$$

        This asks `mask_fn` about every pair, a row of blocks at a time, in time
        quadratic in the length. If you know the blocks, give them to `from_blocks` with
        the same `mask_fn`, which asks nothing when the mask is made.

        Args:
            mask_fn: A function of two integers, the batch and the head, and of two
                arrays of positions, `q` of shape (rows, 1) and `k` of shape (1,
                columns), or both of shape (rows, columns) in the kernel. It returns a
                boolean for every pair, by `jax.numpy`. It is a static part of the mask,
                so it must not hold traced arrays; `document` takes segment ids that
                `jax.jit` traces. Define it once: `jax.jit` compiles again for every new
                function.
            seq_q: The number of queries.
            seq_kv: The number of keys.
            batch: The number of batches to ask about; 1 if the mask is the same for
                all.
            heads: The number of heads to ask about; 1 if the mask is the same for all.
            block_size: The size of a block in tokens; kernels need multiples of 64.

        Returns:
            The mask.

        Raises:
            TypeError: A size is not an integer; or `mask_fn` is not a function of four
                arguments, does not return booleans, or holds traced arrays.
            ValueError: A size is less than 1, or does not fit into 32 bits.

        Examples:
            ```python
            from jaxkern import BlockMask


            def causal_window(b, h, q, k):
                return (k <= q) & (q - k < 4)


            mask = BlockMask.from_mask_fn(causal_window, 16, 16, block_size=4)
            print(mask.to_string())
            ```
            ```text
            +...
            ++..
            .++.
            ..++
            ```
        """
        op = "BlockMask.from_mask_fn"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        batch, heads = check_sizes(op, 1, batch=batch, heads=heads)
        check_mask_fn(op, "mask_fn", mask_fn)
        fn = predicates.Function(mask_fn, batch, heads)
        _check_booleans(op, fn)
        states = patterns.states_of_function(fn, seq_q, seq_kv, block_size)
        check_concrete(op, **{"the result of mask_fn": states})
        runs = runs_of_dense(np.asarray(states))
        return _build(runs, fn, seq_q, seq_kv, block_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the dense mask: (batch or 1, heads or 1, seq_q, seq_kv)."""
        batch, heads, _ = self.kv.num_blocks.shape
        return batch, heads, self.seq_q, self.seq_kv

    @property
    def grid(self) -> tuple[int, int]:
        """The number of blocks along each axis: (q_blocks, kv_blocks)."""
        size = self.block_size
        return blocks_of(self.seq_q, size), blocks_of(self.seq_kv, size)

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
    fn = _band(lower, upper, seq_q, seq_kv)
    runs = patterns.band(fn, seq_q, seq_kv, block_size)
    return _build(runs, fn, seq_q, seq_kv, block_size)


def _band(
    lower: int | None, upper: int | None, seq_q: int, seq_kv: int
) -> predicates.Band:
    """Return the predicate of a band, without the bounds that hold for every pair.

    Such bounds may not fit into 32 bits.
    """
    if lower is not None and lower <= 1 - seq_q:
        lower = None
    if upper is not None and upper >= seq_kv - 1:
        upper = None
    return predicates.Band(lower, upper)


def with_keys(mask: BlockMask, seen: AnyArray) -> BlockMask:
    """Return the pairs of the mask whose key is seen too; no block is full.

    `seen` has the shape (batch or 1, heads or 1, seq_kv).
    """
    runs = mask._runs()
    part = Runs(runs.shape, runs.at, np.minimum(runs.state, PARTIAL))
    fn = predicates.Both(mask.mask_fn, predicates.Keys(seen))
    return _build(part, fn, mask.seq_q, mask.seq_kv, mask.block_size)


def _build(
    on: Runs | jax.Array, mask_fn: MaskFn, seq_q: int, seq_kv: int, block_size: int
) -> BlockMask:
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
        q, full_q = lists_of_dense(across == PARTIAL), lists_of_dense(across == FULL)
    return BlockMask(kv, full_kv, q, full_q, mask_fn, block_size, seq_q, seq_kv)


def _check_booleans(op: str, fn: predicates.Function) -> None:
    """Check that the user's function computes booleans from arrays of positions."""
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    try:
        given = jax.eval_shape(fn, 0, 0, position, position)
    except jax.errors.TracerBoolConversionError as error:
        raise TypeError(
            f"{op}: mask_fn must compute with arrays, by &, |, ~ and jnp.where, "
            "got one that decides by if, and, or, not"
        ) from error
    dtype = getattr(given, "dtype", type(given).__name__)
    if dtype != jnp.bool_:
        raise TypeError(f"{op}: mask_fn must give booleans, got {dtype}")


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
        return _build(runs, fn, *sizes)
    states = (jnp.minimum if both else jnp.maximum)(a._states(), b._states())
    return _build(states, fn, *sizes)
