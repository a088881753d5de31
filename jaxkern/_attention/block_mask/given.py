"""Block masks of what the user has: blocks, a dense mask or a function."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool

from . import patterns, predicates
from .checks import (
    check_concrete,
    check_lengths,
    check_mask_fn,
    check_sizes,
    fitting_length,
    four_axes,
)
from .listed import BLOCK_SIZE, ListedBlocks, of_states
from .predicates import MaskFn
from .runs import FULL, PARTIAL, AnyArray, runs_of_dense


class GivenMasks(ListedBlocks):
    """The makers of masks of blocks, of a dense mask and of a function."""

    @classmethod
    def from_blocks[Mask: ListedBlocks](
        cls: type[Mask],
        blocks: Bool[AnyArray, "*leading q_blocks kv_blocks"],
        *,
        block_size: int = BLOCK_SIZE,
        seq_q: int | None = None,
        seq_kv: int | None = None,
        mask_fn: MaskFn | None = None,
    ) -> Mask:
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
        return of_states(cls, on, fn, seq_q, seq_kv, block_size)

    @classmethod
    def from_dense[Mask: ListedBlocks](
        cls: type[Mask],
        mask: Bool[AnyArray, "*leading seq_q seq_kv"],
        *,
        block_size: int = BLOCK_SIZE,
    ) -> Mask:
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
        return of_states(cls, runs_of_dense(states), fn, seq_q, seq_kv, block_size)

    @classmethod
    def from_mask_fn[Mask: ListedBlocks](
        cls: type[Mask],
        mask_fn: MaskFn,
        seq_q: int,
        seq_kv: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block_size: int = BLOCK_SIZE,
    ) -> Mask:
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
        sizes = check_lengths(op, seq_q, seq_kv, block_size)
        batch, heads = check_sizes(op, 1, batch=batch, heads=heads)
        check_mask_fn(op, "mask_fn", mask_fn)
        fn = predicates.Function(mask_fn, batch, heads)
        _check_booleans(op, fn)
        states = patterns.states_of_function(fn, *sizes)
        check_concrete(op, **{"the result of mask_fn": states})
        runs = runs_of_dense(np.asarray(states))
        return of_states(cls, runs, fn, *sizes)


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
