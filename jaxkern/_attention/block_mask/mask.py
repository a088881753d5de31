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

BLOCK_SIZE = 128


@register
@dataclass(frozen=True, eq=False, repr=False)
class BlockMask(FlexAttentionNames, ArrayTree):
    """A mask of attention, True = attend, as lists of the blocks that are not empty.

    Made by `causal`, `local_window`, `dilated`, `strided`, `global_local`, `document`,
    `from_blocks`, `from_dense` and `from_mask_fn`, and from two masks by `&` and `|`.
    Block (i, j) is of the `block_size` queries from `i * block_size` and as many keys
    from `j * block_size`. It is full if all its pairs attend, partial if some do; one
    that reaches past an end counts as partial.

    Attributes:
        kv, full_kv: the partial and the full blocks of each row, that is of queries.
        q, full_q: the same blocks of each column, for the backward.
        mask_fn: `mask_fn(b, h, q, k)` says of any pair of tokens whether it attends;
            only in partial blocks does one need to ask. It is a pytree: token data,
            such as the segment ids of `document` and the bits of `from_dense`, are its
            leaves, hence arguments of a compiled program and not constants in it.
        block_size, seq_q, seq_kv: static.

    The lists are `BlockLists`; `FlexAttentionNames` has them as the padded arrays that
    FlexAttention's `BlockMask` has, under its names. Every leaf begins with (batch or
    1, heads or 1), where 1 means: the same for all. `&` and `|` may call a block
    partial that turns out empty or full.

    The named patterns, `&` and `|` work on the host, in time and memory of the number
    of runs of neighbouring blocks. Where jit traces the arrays a mask is made from
    (`from_blocks`, `document`), its lists have room for every block.
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
        """`k <= q`."""
        op = "BlockMask.causal"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        return band_mask(None, 0, seq_q, seq_kv, block_size)

    @staticmethod
    def local_window(
        seq_q: int, seq_kv: int, *, window: int, block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        """`|q - k| <= window`, in tokens; one of at least the sequence is no limit."""
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
        """Block i sees block i and, of each rate r, the blocks i - r and i + r."""
        op = "BlockMask.dilated"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        rates = check_sizes(op, 1, **{f"rates[{i}]": r for i, r in enumerate(rates)})
        grid = blocks_of(seq_q, block_size), blocks_of(seq_kv, block_size)
        # Others see nothing, and would not fit in 32 bits.
        near = sorted({rate for rate in rates if rate < max(grid)})
        fn = predicates.Diagonals((0, *near), block_size)
        runs = patterns.diagonals(fn.distances, *grid)
        return _build(runs, fn, seq_q, seq_kv, block_size)

    @staticmethod
    def strided(
        seq_q: int, seq_kv: int, *, stride: int, block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        """Block i sees block j where i - j is a multiple of the stride."""
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
        """`|q - k| <= window`, and the first tokens see all and are seen by all."""
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
        """`segment_ids[q] == segment_ids[k]`: tokens attend inside their segment.

        The ids may come in any order, and may be traced by jit: then blocks whose
        ranges of ids overlap are listed, which is exact where ids ascend.

        Raises:
            TypeError: the ids are no integers.
            ValueError: they do not have shape (seq,) or (batch, seq).
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
        # Their numbers in ascending order, since JAX may keep 32 bits of an id.
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
        """The blocks that are True and, in them, the pairs for which `mask_fn` is.

        blocks: (q_blocks, kv_blocks), (heads, ...) or (batch, heads, ...); jit may
            trace them.
        seq_q, seq_kv: where the last block is not whole.
        mask_fn: as in `from_mask_fn`.

        Raises:
            TypeError: the blocks are not boolean, or `mask_fn` is no function of four
                arguments.
            ValueError: they have another shape, or the lengths do not fit their number.
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
        fn = predicates.Blocks(states, mask_fn, block_size)
        on = states if isinstance(states, Tracer) else runs_of_dense(np.asarray(states))
        return _build(on, fn, seq_q, seq_kv, block_size)

    @staticmethod
    def from_dense(
        mask: Bool[AnyArray, "*leading seq_q seq_kv"], *, block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        """The mask itself: (seq_q, seq_kv), (heads, ...) or (batch, heads, ...).

        A bit is kept for each pair of tokens, once for all blocks that are equal.

        Raises:
            TypeError: the mask is not boolean, or traced by jit.
            ValueError: it has another shape.
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
        """The pairs for which `mask_fn(b, h, q, k)` is True.

        `mask_fn` gets two integers and two arrays of positions, `q` of shape (rows, 1)
        and `k` of shape (1, columns), in a kernel both of (rows, columns), and computes
        in jnp. It is asked about every pair, a row of blocks at a time, in time
        quadratic in the length. If you know the blocks, give them to `from_blocks` with
        the same `mask_fn`, which is then asked nothing here. `mask_fn` is a static part
        of the mask: it must not hold traced arrays, and jit compiles again for each new
        function, so define it once. Segment ids that jit traces are for `document`.

        ```python
        >>> from jaxkern import BlockMask
        >>> def mask_fn(b, h, q, k):
        ...     return (k <= q) & (q - k < 4)
        >>> mask = BlockMask.from_mask_fn(mask_fn, 16, 16, block_size=4)
        >>> print(mask.to_string())
        +...
        ++..
        .++.
        ..++

        ```

        Raises:
            TypeError: `mask_fn` is no function of four arguments, does not give
                booleans, or holds traced arrays.
        """
        op = "BlockMask.from_mask_fn"
        seq_q, seq_kv, block_size = check_sizes(
            op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
        )
        batch, heads = check_sizes(op, 1, batch=batch, heads=heads)
        check_mask_fn(op, "mask_fn", mask_fn)
        fn = predicates.Function(mask_fn, batch, heads)
        q, k = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, 1), (1, 2)))
        given = jax.eval_shape(fn, 0, 0, q, k)
        dtype = getattr(given, "dtype", type(given).__name__)
        if dtype != jnp.bool_:
            raise TypeError(f"{op}: mask_fn must give booleans, got {dtype}")
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
        """The fraction of blocks that are not empty: what attention has to visit."""
        full, part = self.full_kv.num_blocks, self.kv.num_blocks
        total = float(part.size * self.grid[1])
        if self._is_concrete():
            return float(np.sum(full, dtype=int) + np.sum(part, dtype=int)) / total
        return (full.sum() + part.sum()).astype(float) / total

    def to_dense(self) -> Bool[Array, "batch heads seq_q seq_kv"]:
        """Every pair of tokens; (batch or 1, heads or 1, seq_q, seq_kv)."""
        return predicates.dense(self.mask_fn, self.shape)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """The pairs that are in both."""
        return _combine("&", self, other)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """The pairs that are in one or in both."""
        return _combine("|", self, other)

    def partition_specs(
        self, batch: str | None = None, heads: str | None = None
    ) -> "BlockMask":
        """For `in_specs` of `jax.shard_map`: the mesh axes that split batch and heads.

        An axis of 1 stays whole. Inside, `mask_fn` counts from the shard's first one.
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
        """A picture of one head: `#` full, `+` partial, `.` empty.

        Where there are more blocks than `width`, a character stands for several.
        """
        states = self._picture("BlockMask.to_string", batch, head)
        return picture.to_string(states, width)

    def plot(self, *, batch: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draw the blocks of one head with matplotlib; returns the axes.

        Raises:
            ImportError: matplotlib is not installed.
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
    """`lower <= k - q <= upper`, where None is no bound."""
    fn = _band(lower, upper, seq_q, seq_kv)
    runs = patterns.band(fn, seq_q, seq_kv, block_size)
    return _build(runs, fn, seq_q, seq_kv, block_size)


def _band(
    lower: int | None, upper: int | None, seq_q: int, seq_kv: int
) -> predicates.Band:
    """Without the bounds that hold for every pair, which may be beyond 32 bits."""
    if lower is not None and lower <= 1 - seq_q:
        lower = None
    if upper is not None and upper >= seq_kv - 1:
        upper = None
    return predicates.Band(lower, upper)


def with_keys(mask: BlockMask, seen: AnyArray) -> BlockMask:
    """Where the key is seen too, (batch or 1, heads or 1, seq_kv); no block is full."""
    runs = mask._runs()
    part = Runs(runs.shape, runs.at, np.minimum(runs.state, PARTIAL))
    fn = predicates.Both(mask.mask_fn, predicates.Keys(seen))
    return _build(part, fn, mask.seq_q, mask.seq_kv, mask.block_size)


def _build(
    on: Runs | jax.Array, mask_fn: MaskFn, seq_q: int, seq_kv: int, block_size: int
) -> BlockMask:
    """From the states of the blocks, as runs or, where they are traced, as an array."""
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


def _combine(symbol: str, a: BlockMask, b: BlockMask) -> BlockMask:
    if not isinstance(b, BlockMask):
        return NotImplemented
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
