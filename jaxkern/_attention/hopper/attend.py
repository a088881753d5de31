"""Block-sparse attention on Hopper: rows of blocks walk their lists, in both passes.

The forward holds queries and walks keys and values, with a running maximum and sum. The
two warpgroups take turns: one's softmax runs under the other one's matmuls. Partial
blocks ask the mask's predicate, traced into the kernel, of every pair of tokens.

The backward has two launches: one holds queries for their gradient, one holds keys and
values and walks the transposed lists. That is seven matmuls where five would do, if one
launch made all three gradients. It would hold keys and values and could not keep the
queries' gradient, which is a sum over all of them: through atomics it depends on the
order of arrival, and as partial sums in float32 it takes 8 bytes x dim for each query
and block. Over dim 128 the sums of both, float32 of 64 x dim for a warpgroup, are more
than its registers (at 192: 192 of 240, and 64 for a tile of logits and their gradient),
so that keys and values have a launch each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device
from ..._core.precision import widen
from ..._core.sharding import vary_alike
from ..._mosaic.base import LOG2_E, SMEM_BYTES, add_dots, dots, plgpu, round_up, zeros
from ..._mosaic.launch import COMPUTE, CONTRACTED_STEP, ROW_STEP, WalkTiles
from ..block_mask.checks import has_values
from ..block_mask.mask import BlockMask
from ..block_mask.runs import BlockLists, KnownLists
from ..dilation import HeadStride
from ..tiles import cotangents_of, sees
from .batching import over_batch
from .predicates import unreadable
from .tokens import Tokens, rings_of, smem_bytes, tokens_of
from .walk import WalkedTiles, walk_keys, walk_lists, walk_queries

MAX_DIM = 256
# Up to here the sums of the gradients of both keys and values fit in registers.
MAX_DIM_TOGETHER = 128
BLOCK_STEP = 64
# Of a warpgroup; what one wgmma takes.
ROWS = 64
# Some of a block's shared memory goes to alignment.
MOST_BYTES = SMEM_BYTES - 4096
# Below every logit, and finite: its difference to itself is 0.
LOWEST = -1e30


def config_of(kernel: str, dim: int, block_size: int) -> WalkTiles:
    """The largest tiles that fit, or nearly.

    On an H200 twice the columns took 3 to 10 % less for the gradients of keys and
    values at dim 64 and of queries to 128; but with some masks they spill registers.
    """
    tokens, numbers = (
        Tokens(jax.ShapeDtypeStruct(shape, dtype), numbers=numbers)
        for shape, dtype, numbers in [
            ((1, 1, 1, dim), jnp.bfloat16, False),
            ((1, 1, 2, 1), jnp.float32, True),
        ]
    )
    pair = [tokens, tokens]
    # Each warpgroup's own list takes some registers.
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
    """The gradients that each launch that walks queries makes."""
    if dim <= MAX_DIM_TOGETHER:
        return [("key", "value")]
    return [("key",), ("value",)]


def unsupported(
    query: jax.Array | jax.ShapeDtypeStruct,
    value: jax.Array | jax.ShapeDtypeStruct,
    mask: BlockMask | None,
) -> str | None:
    """Why the kernel cannot run this, or None if it can; a mask of None is dense."""
    dim = query.shape[-1]
    if reason := device.unsupported_dtype(query.dtype):
        return reason
    if not query.shape[0]:
        return f"batch must not be empty for mosaic_gpu, got {query.shape}"
    if max(dim, value.shape[-1]) > MAX_DIM:
        return (
            f"dim and dim_v must be at most {MAX_DIM} for mosaic_gpu, "
            f"got {dim} and {value.shape[-1]}"
        )
    if mask is not None and mask.block_size % BLOCK_STEP:
        return (
            f"block_size must be a multiple of {BLOCK_STEP} for mosaic_gpu, "
            f"got {mask.block_size}"
        )
    if mask is not None and (reason := unreadable(mask.mask_fn)):
        return reason
    return device.miscompiled()


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
    dilation: HeadStride | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse), lse (batch, seq, heads); differentiable but for the mask.

    dilation: of the heads of `query`, whose arrays then are (batch, seq, rate * heads,
        dim): of each row a head has the part at its offset, and TMA loads just that.
    """
    seq_q, dim = query.shape[1], value.shape[3]
    query, scale = _positive(query, scale)
    (query, key, value), mask = _prepare(mask, query, key, value)
    out, lse = _attend(query, key, value, mask, scale, dilation)
    return out[:, :seq_q, :, :dim], lse[:, :seq_q]


def _positive(query: jax.Array, scale: float) -> tuple[jax.Array, float]:
    """The same logits by a factor over 0: the kernels take their maximum before it."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (0 * query, 1.0)


def _prepare(
    mask: BlockMask, *arrays: jax.Array
) -> tuple[Sequence[jax.Array], BlockMask]:
    """The arrays padded with zeros at the end, to what tiles are made of, and the mask.

    Its lists stay on the host if they have values, so that their schedule is constant.
    """
    dim = round_up(max(x.shape[3] for x in arrays), CONTRACTED_STEP)

    def pad(x):
        missing = -x.shape[1] % ROW_STEP, dim - x.shape[3]
        return jnp.pad(x, [(0, 0), (0, missing[0]), (0, 0), (0, missing[1])])

    names = "kv", "full_kv", "q", "full_q"
    lists = {name: _known(getattr(mask, name)) for name in names}
    leaves, tree = jax.tree.flatten(replace(mask, **lists))
    alike = vary_alike(*map(pad, arrays), *map(jnp.asarray, leaves))
    n = len(arrays)
    return alike[:n], jax.tree.unflatten(tree, alike[n:])


def _known(lists: BlockLists) -> BlockLists:
    if all(map(has_values, lists.arrays)):
        return KnownLists(*map(np.asarray, lists.arrays))
    return lists


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, scale, dilation):
    kernel = partial(forward, scale=scale, exact=False, dilation=dilation)
    out, lse2 = over_batch(kernel)(mask, query, key, value)
    return out, lse2[:, :, 0].mT / LOG2_E


def _attend_forward(query, key, value, mask, scale, dilation):
    kernel = partial(forward, scale=scale, exact=True, dilation=dilation)
    out, lse2, low = over_batch(kernel)(mask, query, key, value)
    lse2 = lse2[:, :, 0]
    return (out, lse2.mT / LOG2_E), (query, key, value, mask, (out, low), lse2)


def _attend_backward(scale, dilation, saved, cotangents):
    query, key, value, mask, outs, lse2 = saved
    d_out, d_lse = cotangents
    d_out, delta = cotangents_of(_sum(outs), lse2.mT, d_out, d_lse, query.dtype)
    gradients = _gradients(
        *(query, key, value, d_out, lse2, delta.mT),
        mask=mask,
        scale=scale,
        dilation=dilation,
    )
    tokens = tokens_of(dilation, query, key, value)
    spread = [of.spread(x) for of, x in zip(tokens, gradients, strict=True)]
    return *spread, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_part(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) over some of the keys, to be merged with others: both in float32."""
    seq_q, dim = query.shape[1], value.shape[3]
    query, scale = _positive(query, scale)
    arrays, mask = _prepare(mask, query, key, value)
    kernel = partial(forward, scale=scale, exact=True)
    out, lse2, low = over_batch(kernel)(mask, *arrays)
    lse = lse2[:, :, 0].mT / LOG2_E
    return _sum([out, low])[:, :seq_q, :, :dim], lse[:, :seq_q]


def part_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The share of these keys in the three gradients, rounded and then made float32.

    The roundings of all parts together are as large as that of the sum. Two parts of 16
    bits, as `out` has, would cost the kernel of keys and values a register too many.

    lse, delta: of all keys, (batch, seq, heads).
    """
    scaled, factor = _positive(query, scale)
    arrays, mask = _prepare(mask, scaled, key, value, d_out)
    missing = -lse.shape[1] % ROW_STEP
    lse2, delta = (
        jnp.pad(x.mT, [(0, 0), (0, 0), (0, missing)]) for x in (lse * LOG2_E, delta)
    )
    scaled, keys, values, d_out = arrays
    gradients = _gradients(
        scaled, keys, values, d_out, lse2, delta, mask=mask, scale=factor
    )
    d_query, d_key, d_value = (
        gradient[:, : x.shape[1], :, : x.shape[3]].astype(jnp.float32)
        for x, gradient in zip((query, key, value), gradients, strict=True)
    )
    # That of `scaled`, times what that is of `query`.
    return d_query * (scale / factor), d_key, d_value


def _sum(parts):
    return reduce(jnp.add, (x.astype(jnp.float32) for x in parts))


def _gradients(query, key, value, d_out, lse2, delta, *, mask, scale, dilation=None):
    """Those of query, key and value, without what no head has.

    lse2, delta: (batch, heads, seq); lse2 is the log-sum-exp in base 2.
    """
    factors = ()
    if query.dtype == jnp.float16:
        d_out, delta, *factors = _enlarged(value, d_out, delta)
    # exp2 of anything minus infinity is 0: unseen rows have no weights.
    lse2 = jnp.where(sees(lse2), lse2, jnp.inf)
    # Whole tiles, whose rows past the end have no weights whatever a copy brings there.
    end = [(0, 0), (0, 0), (0, -lse2.shape[2] % math.lcm(mask.block_size, 2 * ROWS))]
    lse2 = jnp.pad(lse2, end, constant_values=jnp.inf)
    numbers = jnp.stack([lse2, jnp.pad(delta, end)], 2)
    arrays = query, key, value, d_out, numbers, *factors
    kernel = partial(backward_q, scale=scale, dilation=dilation)
    gradients = [*over_batch(kernel)(mask, *arrays)]
    for wanted in kv_launches(query.shape[3]):
        kernel = partial(backward_kv, wanted=wanted, scale=scale, dilation=dilation)
        gradients += over_batch(kernel)(mask, *arrays)
    return gradients


def _enlarged(
    value: jax.Array, d_out: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`d_out` and `delta` times a power of two, and (batch,) what undoes it.

    The kernels round gradients of logits, which float16 does not hold where cotangents
    are small or sequences long. The power of two is the largest of which they cannot
    overflow: a gradient of a logit is at most the norms of its rows of `d_out` and
    `value`, multiplied, and `delta`.
    """

    def largest(x: jax.Array) -> jax.Array:
        return jnp.abs(x).max(tuple(range(1, x.ndim)), initial=0)

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(widen(x)).sum(-1))

    rows = largest(norm(d_out))
    bound = jnp.maximum(rows, rows * largest(norm(value)) + largest(delta))
    # Half of the largest float16, as its own rounding may be upwards.
    usable = (bound > 0) & jnp.isfinite(bound)
    bits = jnp.floor(jnp.log2(2**15 / jnp.where(usable, bound, 2**15)))
    power = jnp.exp2(jnp.minimum(bits, 64))
    d_out = widen(d_out) * power[:, None, None, None]
    return d_out.astype(value.dtype), delta * power[:, None, None], 1 / power


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
    """`out`, and the log-sum-exp in base 2, (batch, heads, 1, seq).

    exact: and then what rounding took from `out`, rounded itself. The gradient of a
        query is a difference, of which little may remain where it sees few keys.
    """
    config = config or config_of("forward", query.shape[-1], mask.block_size)
    queries, keys, values = tokens_of(dilation, query, key, value)
    body = Forward(config, scale, query.dtype, exact)
    walk = walk_keys(mask, queries, keys, config)
    walked = [[keys], [values]]
    return walk_lists(body, config, [queries], walked, walk, "attention_forward")


@dataclass(frozen=True)
class Forward:
    """A tile of queries, its weighted sum of values, and their maximum and sum.

    The carry is (sums of values, largest logit in base 2, sum of weights).
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
    """That of a warpgroup's tile of logits."""
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
    """[d_query], times `factors` of each batch.

    numbers: `lse2` and `delta`, (batch, heads, 2, seq).
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
    """A tile of queries and their gradient, a sum over the keys that they see.

    The carry is (sums, lse2, delta).
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
    """The wanted ones of the gradients of "key" and "value", times `factors`."""
    config = config or config_of("backward_kv", query.shape[-1], mask.block_size)
    queries, keys, values = tokens_of(dilation, query, key, value)
    walked = [[queries, Tokens(d_out), Tokens(numbers, numbers=True)]]
    body = BackwardKV(config, scale, query.dtype, wanted)
    walk = walk_queries(mask, queries, keys, config)
    name = f"attention_backward_{'_'.join(wanted)}"
    return walk_lists(body, config, [keys, values], walked, walk, name, factors)


@dataclass(frozen=True)
class BackwardKV:
    """A tile of keys and values and their gradients, sums over queries that see them.

    Keys are the rows, so that only views of shared memory are transposed. The carry is
    the sums by name.
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
        # Read before TMA may write there again.
        plgpu.commit_smem()
        tiles.release(0)
        return added

    def _of_columns(self, numbers, n: int):
        """The n-th number of each column, for all rows."""
        column = plgpu.load(numbers.at[n], layout=plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(column, _shape(self.config), [1])

    def finish(self, carry):
        scales = {"key": self.scale, "value": 1.0}
        return [carry[name] * scales[name] for name in self.wanted]
