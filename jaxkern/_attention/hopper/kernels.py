"""The kernels of attention on Hopper: the forward and those of the backward.

`walk.py` is the frame: which warpgroup loads which tiles, and who waits for whom. Here
is the arithmetic of one warpgroup on its 64 rows, as many as one wgmma multiplies.

The forward holds queries Q and walks keys K and values V, which have rings of their
own. With m the largest logit so far and l the sum of the weights, and without the scale
and log2 e, one step is

    S = Q K^T                      wgmma; then the slot of K is released
    m' = max(m, max of S)          row by row in registers, as are the next two lines
    P = exp2(S - m')
    l = l exp2(m - m') + sum P
    O = O exp2(m - m') + P V       wgmma with P in registers; then V is released

Where both warpgroups walk the same keys they meet at a barrier twice a step, so that
the softmax of one runs while the tensor cores multiply for the other:

    meetings           1             2              3              4
    warpgroup 0   Q K  |  softmax    |  P V,  Q K   |  softmax     |  P V,  Q K
    warpgroup 1        |  Q K        |  softmax     |  P V,  Q K   |  softmax

Q K^T is issued before a meeting and awaited after it. Warpgroup 1 meets once more
before its first step, and warpgroup 0 once more after its last one.

The backward recomputes P from the log-sum-exp L, and takes two launches:

    attention_backward_q            attention_backward_key_value
    holds Q, dO, L, delta           holds K, V
    walks K, V                      walks Q, dO, L, delta by the transposed lists
    S = Q K^T, dP = dO V^T          S^T = K Q^T
    P = exp2(S - L)                 P^T = exp2(S^T - L)
    dS = P (dP - delta)             dV += P^T dO, then dP^T = V dO^T
    dQ += dS K                      dS^T = P^T (dP^T - delta), dK += dS^T Q

A step's tiles share one slot, which is released after the last product. Products are
awaited before what follows is computed, so the matmuls and exponentials of one
warpgroup do not overlap. The two warpgroups wait for each other only through the ring,
where they share one.

These are seven matmuls. One launch for all three gradients would need five, but would
hold keys and values, and the gradient of a query is a sum over all keys. Atomic adds
would make that sum depend on the order of arrival. Partial sums in float32 would write
and read 8 bytes x dim for each query and block of keys.

Above dim 128 keys and values have a launch each. One gradient's sums, 64 x dim in
float32, take dim / 2 registers of each thread. At dim 192 the two would take 192 of the
240 registers, and a 64 x 64 tile of logits with its gradient takes another 64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._mosaic.base import LOG2_E, SMEM_BYTES, add_dots, dots, plgpu, zeros
from ..._mosaic.launch import COMPUTE, WalkTiles
from ..block_mask.mask import BlockMask
from ..dilation import HeadStride
from .body import WalkedTiles
from .plan import walk_keys, walk_queries
from .tokens import Tokens, rings_of, smem_bytes, tokens_of
from .walk import walk_lists

# The largest dim at which registers hold the sums of both keys' and values' gradients.
MAX_DIM_TOGETHER = 128
# Rows of a warpgroup's held tile: the M of one wgmma.
ROWS = 64
# Bytes of shared memory that tiles may take; 4096 are left for alignment.
MOST_BYTES = SMEM_BYTES - 4096
# The running maximum starts here: below every logit, and finite, because -inf minus
# -inf would be NaN.
LOWEST = -1e30


def config_of(kernel: str, dim: int, block_size: int) -> WalkTiles:
    """Return the widest walked tiles that fit and spill no register, whatever the mask.

    `most` is the limit of registers; shared memory may allow fewer columns, or one slot
    of held tiles instead of two. Microseconds of the kernels on an H200 by columns, for
    causal (4, 4096, 32, 64) and (4, 4096, 16, 128); the rows "tiles" of
    benchmarks/results/nvidia_h200/launches.json:

        columns                     dim 64:  64   128     dim 128:  64   128
        forward, two held slots             843   670              572   477
        backward_q, two held slots          872   792              610
        backward_q, one held slot           888   820              615   594
        backward_kv                        1194  1076              910  1770

    Above dim 48 `backward_q`, and always `backward_kv`, take 64 columns even where 128
    were faster. With 128 both spill registers for some masks, such as documents, and at
    dim 128 `backward_kv` for all.
    """
    tokens, numbers = (
        Tokens(jax.ShapeDtypeStruct(shape, dtype), numbers=numbers)
        for shape, dtype, numbers in [
            ((1, 1, 1, dim), jnp.bfloat16, False),
            ((1, 1, 2, 1), jnp.float32, True),
        ]
    )
    pair = [tokens, tokens]
    # Warpgroups that walk a list each need some registers more for it.
    apart = block_size % (COMPUTE * ROWS) != 0
    held, walked, most = {
        "forward": ([tokens], [[tokens], [tokens]], 128 if dim <= 128 else 64),
        "backward_q": ([*pair, numbers], [pair], 128 if dim <= 48 else 64),
        "backward_kv": (pair, [[*pair, numbers]], 32 if apart and dim > 96 else 64),
    }[kernel]
    return next(
        config
        for columns in (128, 64, 32, 16)
        for slots in (2, 1)
        if columns <= most and block_size % columns == 0
        for config in [WalkTiles(ROWS, columns, held=slots)]
        if smem_bytes(config, held, walked, rings_of(config, block_size)) <= MOST_BYTES
    )


def kv_launches(dim: int) -> Sequence[tuple[str, ...]]:
    """Return the launches that walk queries, each as the gradients that it makes."""
    if dim <= MAX_DIM_TOGETHER:
        return [("key", "value")]
    return [("key",), ("value",)]


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
    exact: bool,
    config: WalkTiles | None = None,
    dilation: HeadStride | None = None,
) -> Sequence[jax.Array]:
    """Launch the forward.

    Args:
        exact: also return the rounding error of `out`, which the backward needs: a
            query's gradient is a difference, of which little remains where the query
            sees few keys.

    Returns:
        `out`, the log-sum-exp in base 2 (batch, heads, 1, seq), and with `exact` the
        rounding error of `out`, in the dtype of `out`.
    """
    config = config or config_of("forward", query.shape[-1], mask.block_size)
    queries, keys, values = tokens_of(dilation, query, key, value)
    body = Forward(config, scale, query.dtype, exact)
    walk = walk_keys(mask, queries, keys, config)
    walked = [[keys], [values]]
    return walk_lists(body, config, [queries], walked, walk, "attention_forward")


@dataclass(frozen=True)
class Forward:
    """The online softmax of 64 queries, as the body of a walk.

    The carry is (weighted sums of values, largest logit in base 2, sum of weights). For
    a thread of a 64 x 128 tile, the logits are 64 registers, the rounded weights 32,
    and the sums dim / 2.
    """

    config: WalkTiles
    scale: float
    dtype: Any
    exact: bool
    takes_turns = True

    @property
    def outs(self) -> Sequence[int | None]:
        return (0, None, 0) if self.exact else (0, None)

    def start(self, held):
        top = jnp.full((self.config.rows,), LOWEST, jnp.float32)
        total = jnp.zeros((self.config.rows,), jnp.float32)
        row = plgpu.Layout.WGMMA.reduce(1)
        top, total = (plgpu.layout_cast(x, row) for x in (top, total))
        return zeros(self.config.rows, held[0].shape[1]), top, total

    def step(self, carry, held, tiles: WalkedTiles, visible):
        summed, top, total = carry
        shape, factor = _shape(self.config), self.scale * LOG2_E
        (keys,) = tiles.wait(0)

        def multiply(acc):
            plgpu.wgmma(acc, held[0], keys.transpose((1, 0)))
            # Wait until the other warpgroup's softmax has ended. Reading `acc` then
            # awaits the wgmma.
            tiles.take_turns()
            return acc[...]

        logits = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
        tiles.release(0)
        if visible:
            logits = jnp.where(visible(), logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(axis=1) * factor)
        weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(higher, shape, [0]))
        fade = jnp.exp2(top - higher)
        summed *= lax.broadcast_in_dim(fade, summed.shape, [0])
        total = total * fade + weights.sum(axis=1)
        rounded = weights.astype(self.dtype)
        # Wait until the other warpgroup has issued its product of queries and keys.
        tiles.take_turns()
        (values,) = tiles.wait(1)
        summed = add_dots(summed, (rounded, values))
        tiles.release(1)
        return summed, higher, total

    def finish(self, carry):
        summed, top, total = carry
        seen = total > 0
        total = jnp.where(seen, total, 1)
        share = jnp.where(seen, 1 / total, 0)
        lse2 = jnp.where(seen, top + jnp.log2(total), -jnp.inf)
        out = summed * lax.broadcast_in_dim(share, summed.shape, [0])
        if not self.exact:
            return out, lse2
        return out, lse2, out - out.astype(self.dtype).astype(jnp.float32)


def _shape(config: WalkTiles) -> tuple[int, int]:
    """Return the shape of a warpgroup's tile of logits."""
    return config.rows, config.columns


def backward_q(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    numbers: jax.Array,
    *factors: jax.Array,
    mask: BlockMask,
    scale: float,
    config: WalkTiles | None = None,
    dilation: HeadStride | None = None,
) -> Sequence[jax.Array]:
    """Launch the kernel that holds queries.

    Args:
        numbers: `lse2` and `delta`, (batch, heads, 2, seq).
        factors: numbers (batch,) that multiply the gradient in float32.

    Returns:
        [d_query].
    """
    config = config or config_of("backward_q", query.shape[-1], mask.block_size)
    queries, keys, values = tokens_of(dilation, query, key, value)
    held = [queries, Tokens(d_out), Tokens(numbers, numbers=True)]
    body = BackwardQ(config, scale, query.dtype)
    walk = walk_keys(mask, queries, keys, config)
    walked = [[keys, values]]
    return walk_lists(body, config, held, walked, walk, "attention_backward_q", factors)


@dataclass(frozen=True)
class BackwardQ:
    """The gradient of 64 queries, a sum over the keys that they see.

    The carry is (sums, lse2, delta), of which `lse2` and `delta` do not change.
    """

    config: WalkTiles
    scale: float
    dtype: Any
    outs: Sequence[int | None] = (0,)
    takes_turns = False

    def start(self, held):
        row = plgpu.Layout.WGMMA.reduce(1)
        lse2, delta = (plgpu.load(held[2].at[n], layout=row) for n in range(2))
        return zeros(self.config.rows, held[0].shape[1]), lse2, delta

    def step(self, carry, held, tiles: WalkedTiles, visible):
        summed, lse2, delta = carry
        shape, factor = _shape(self.config), self.scale * LOG2_E
        keys, values = tiles.wait(0)
        logits, d_weights = dots(
            (held[0], keys.transpose((1, 0))), (held[1], values.transpose((1, 0)))
        )
        weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(lse2, shape, [0]))
        if visible:
            weights = jnp.where(visible(), weights, 0)
        d_logits = weights * (d_weights - lax.broadcast_in_dim(delta, shape, [0]))
        d_logits = d_logits.astype(self.dtype)
        summed = add_dots(summed, (d_logits, keys))
        tiles.release(0)
        return summed, lse2, delta

    def finish(self, carry):
        return [carry[0] * self.scale]


def backward_kv(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    numbers: jax.Array,
    *factors: jax.Array,
    wanted: Sequence[str],
    mask: BlockMask,
    scale: float,
    config: WalkTiles | None = None,
    dilation: HeadStride | None = None,
) -> Sequence[jax.Array]:
    """Launch the kernel that holds keys and values.

    Args:
        numbers: `lse2` and `delta`, (batch, heads, 2, seq).
        factors: numbers (batch,) that multiply the gradients in float32.
        wanted: "key", "value" or both.

    Returns:
        The wanted gradients, in that order.
    """
    config = config or config_of("backward_kv", query.shape[-1], mask.block_size)
    queries, keys, values = tokens_of(dilation, query, key, value)
    walked = [[queries, Tokens(d_out), Tokens(numbers, numbers=True)]]
    body = BackwardKV(config, scale, query.dtype, wanted)
    walk = walk_queries(mask, queries, keys, config)
    name = f"attention_backward_{'_'.join(wanted)}"
    return walk_lists(body, config, [keys, values], walked, walk, name, factors)


@dataclass(frozen=True)
class BackwardKV:
    """The gradients of 64 keys and values, sums over the queries that see them.

    Keys are the rows of the tile of logits. So P^T and dS^T are left factors of a wgmma
    straight from registers, and only views of shared memory are transposed. The carry
    is the sums by name.
    """

    config: WalkTiles
    scale: float
    dtype: Any
    wanted: Sequence[str]
    takes_turns = False

    @property
    def outs(self) -> Sequence[int | None]:
        return [{"key": 0, "value": 1}[name] for name in self.wanted]

    def start(self, held):
        return {name: zeros(self.config.rows, held[0].shape[1]) for name in self.wanted}

    def step(self, carry, held, tiles: WalkedTiles, visible):
        queries, d_outs, numbers = tiles.wait(0)
        (logits,) = dots((held[0], queries.transpose((1, 0))))
        factor = self.scale * LOG2_E
        weights = jnp.exp2(logits * factor - self._of_columns(numbers, 0))
        if visible:
            weights = jnp.where(visible(), weights, 0)
        added = {}
        if "value" in self.wanted:
            rounded = weights.astype(self.dtype)
            added["value"] = add_dots(carry["value"], (rounded, d_outs))
        if "key" in self.wanted:
            (d_weights,) = dots((held[1], d_outs.transpose((1, 0))))
            d_logits = weights * (d_weights - self._of_columns(numbers, 1))
            added["key"] = add_dots(
                carry["key"], (d_logits.astype(self.dtype), queries)
            )
        # Without this fence TMA might overwrite `numbers`, which threads read and not
        # the tensor cores, before the reads are done.
        plgpu.commit_smem()
        tiles.release(0)
        return added

    def _of_columns(self, numbers, n: int):
        """Return the n-th number of each column, repeated for all rows."""
        column = plgpu.load(numbers.at[n], layout=plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(column, _shape(self.config), [1])

    def finish(self, carry):
        scales = {"key": self.scale, "value": 1.0}
        return [carry[name] * scales[name] for name in self.wanted]
