"""The named patterns of block masks: bands, strides, global tokens and documents."""

from collections.abc import Sequence

import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from . import patterns, predicates
from .checks import (
    check_lengths,
    check_segment_ids,
    check_sizes,
    on_host,
)
from .listed import BLOCK_SIZE, ListedBlocks, of_states
from .patterns import grid_of
from .runs import (
    AnyArray,
    Runs,
    combine,
)


class NamedMasks(ListedBlocks):
    """The makers of masks that follow a rule."""

    @classmethod
    def causal[Mask: ListedBlocks](
        cls: type[Mask], seq_q: int, seq_kv: int, *, block_size: int = BLOCK_SIZE
    ) -> Mask:
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
        sizes = check_lengths("BlockMask.causal", seq_q, seq_kv, block_size)
        return of_states(cls, *band(None, 0, *sizes), *sizes)

    @classmethod
    def local_window[Mask: ListedBlocks](
        cls: type[Mask],
        seq_q: int,
        seq_kv: int,
        *,
        window: int,
        block_size: int = BLOCK_SIZE,
    ) -> Mask:
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
        sizes = check_lengths(op, seq_q, seq_kv, block_size)
        (window,) = check_sizes(op, 0, window=window)
        return of_states(cls, *band(-window, window, *sizes), *sizes)

    @classmethod
    def dilated[Mask: ListedBlocks](
        cls: type[Mask],
        seq_q: int,
        seq_kv: int,
        *,
        rates: Sequence[int],
        block_size: int = BLOCK_SIZE,
    ) -> Mask:
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
        sizes = check_lengths(op, seq_q, seq_kv, block_size)
        rates = check_sizes(op, 1, **{f"rates[{i}]": r for i, r in enumerate(rates)})
        grid = grid_of(*sizes)
        # Larger rates reach no block, and might not fit into 32 bits.
        near = sorted({rate for rate in rates if rate < max(grid)})
        fn = predicates.Diagonals((0, *near), sizes[2])
        runs = patterns.diagonals(fn.distances, *grid)
        return of_states(cls, runs, fn, *sizes)

    @classmethod
    def strided[Mask: ListedBlocks](
        cls: type[Mask],
        seq_q: int,
        seq_kv: int,
        *,
        stride: int,
        block_size: int = BLOCK_SIZE,
    ) -> Mask:
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
        sizes = check_lengths(op, seq_q, seq_kv, block_size)
        (stride,) = check_sizes(op, 1, stride=stride)
        grid = grid_of(*sizes)
        stride = min(stride, max(grid))
        fn = predicates.Strided(stride, sizes[2])
        return of_states(cls, patterns.strided(stride, *grid), fn, *sizes)

    @classmethod
    def global_local[Mask: ListedBlocks](
        cls: type[Mask],
        seq_q: int,
        seq_kv: int,
        *,
        global_tokens: int,
        window: int,
        block_size: int = BLOCK_SIZE,
    ) -> Mask:
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
        sizes = check_lengths(op, seq_q, seq_kv, block_size)
        global_tokens, window = check_sizes(
            op, 0, global_tokens=global_tokens, window=window
        )
        on_band, near = band(-window, window, *sizes)
        global_tokens = min(global_tokens, max(sizes[:2]))
        first = predicates.Global(global_tokens)
        of_first = patterns.first_tokens(global_tokens, *sizes)
        runs = combine(np.maximum, on_band, of_first)
        return of_states(cls, runs, predicates.Either(near, first), *sizes)

    @classmethod
    def document[Mask: ListedBlocks](
        cls: type[Mask],
        segment_ids: Int[AnyArray, "seq"] | Int[AnyArray, "batch seq"],
        *,
        block_size: int = BLOCK_SIZE,
    ) -> Mask:
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
            return of_states(cls, states, predicates.Segments(ids[:, None]), *sizes)
        # Ids are numbered from 0 on, since JAX may keep only 32 bits of an id.
        numbers = np.unique(ids, return_inverse=True)[1].reshape(ids.shape)
        fn = predicates.Segments(numbers[:, None].astype(np.int32))
        return of_states(cls, patterns.segments(numbers, block_size), fn, *sizes)


def band(
    lower: int | None, upper: int | None, seq_q: int, seq_kv: int, block_size: int
) -> tuple[Runs, predicates.Band]:
    """Return the blocks and the predicate of `lower <= k - q <= upper`.

    None is no bound. The predicate leaves out the bounds that hold for every pair,
    since they may not fit into 32 bits.
    """
    if lower is not None and lower <= 1 - seq_q:
        lower = None
    if upper is not None and upper >= seq_kv - 1:
        upper = None
    fn = predicates.Band(lower, upper)
    return patterns.band(fn, seq_q, seq_kv, block_size), fn
