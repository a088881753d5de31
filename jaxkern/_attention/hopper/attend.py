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
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device
from ..._core.precision import widen
from ..._mosaic.base import SMEM_BYTES, add_dots, dots, plgpu, zeros
from ..._mosaic.launch import COMPUTE, ROW_STEP, WalkTiles
from ..block_mask.mask import BlockMask
from ..dilation import Dilation
from .batching import over_batch
from .operands import prepare, tokens_of, walk_of
from .predicates import unreadable
from .tokens import Tokens, rings_of, smem_bytes
from .walk import Body, walk_lists

DTYPES = ("bfloat16", "float16")
MAX_DIM = 256
# Up to here the sums of the gradients of both keys and values fit in registers.
MAX_DIM_TOGETHER = 128
BLOCK_STEP = 64
# Of a warpgroup; what one wgmma takes.
ROWS = 64
# Some of a block's shared memory goes to alignment.
MOST_BYTES = SMEM_BYTES - 4096
LOG2_E = math.log2(math.e)
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
    """What gradients the launches that walk queries make."""
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
    if str(query.dtype) not in DTYPES:
        return f"dtype must be {' or '.join(DTYPES)} for mosaic_gpu, got {query.dtype}"
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
    query,
    key,
    value,
    mask: BlockMask,
    scale: float,
    dilation: Dilation | None = None,
):
    """(out, lse), lse (batch, seq, heads); differentiable but for the mask.

    dilation: of the heads of `query`, whose arrays then are (batch, seq, rate * heads,
        dim): of each row a head has the part at its offset, and TMA loads just that.
    """
    seq_q, dim = query.shape[1], value.shape[3]
    query, scale = _positive(query, scale)
    arrays, mask = prepare(mask, query, key, value)
    out, lse = _attend(*arrays, mask, scale, dilation)
    return out[:, :seq_q, :, :dim], lse[:, :seq_q]


def _positive(query: jax.Array, scale: float) -> tuple[jax.Array, float]:
    """The same logits by a factor over 0: the kernels take their maximum before it."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (0 * query, 1.0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, scale, dilation):
    kernel = partial(forward, scale, False, dilation=dilation)
    out, lse2 = over_batch(kernel)(mask, query, key, value)
    return out, lse2[:, :, 0].mT / LOG2_E


def _attend_forward(query, key, value, mask, scale, dilation):
    kernel = partial(forward, scale, True, dilation=dilation)
    out, lse2, low = over_batch(kernel)(mask, query, key, value)
    lse2 = lse2[:, :, 0]
    return (out, lse2.mT / LOG2_E), (query, key, value, mask, (out, low), lse2)


def _attend_backward(scale, dilation, saved, cotangents):
    query, key, value, mask, outs, lse2 = saved
    d_out, d_lse = cotangents
    d_lse = jnp.where(jnp.isneginf(lse2), 0, d_lse.mT)
    # Or XLA sums inside of what transposes and stacks: 451 us on an H200 at
    # (4, 4096, 16, 128), where to read the arrays takes about 60.
    summed = lax.optimization_barrier((widen(d_out) * _sum(outs)).sum(-1))
    args = mask, query, key, value, d_out, lse2, summed.mT - d_lse
    gradients = _gradients(scale, *args, dilation=dilation)
    tokens = tokens_of(dilation, query, key, value)
    spread = [of.spread(x) for of, x in zip(tokens, gradients, strict=True)]
    return *spread, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_part(query, key, value, mask: BlockMask, scale: float):
    """(out, lse) over some of the keys, to be merged with others: both in float32."""
    seq_q, dim = query.shape[1], value.shape[3]
    query, scale = _positive(query, scale)
    arrays, mask = prepare(mask, query, key, value)
    out, lse2, low = over_batch(partial(forward, scale, True))(mask, *arrays)
    lse = lse2[:, :, 0].mT / LOG2_E
    return _sum([out, low])[:, :seq_q, :, :dim], lse[:, :seq_q]


def part_gradients(query, key, value, mask: BlockMask, scale, d_out, lse, delta):
    """What these keys add to the three gradients, rounded and then made float32.

    The roundings of all parts together are as large as that of the sum. Two parts of 16
    bits, as `out` has, would cost the kernel of keys and values a register too many.

    lse, delta: of all keys, (batch, seq, heads).
    """
    scaled, factor = _positive(query, scale)
    arrays, mask = prepare(mask, scaled, key, value, d_out)
    missing = -lse.shape[1] % ROW_STEP
    lse2, delta = (
        jnp.pad(x.mT, [(0, 0), (0, 0), (0, missing)]) for x in (lse * LOG2_E, delta)
    )
    gradients = _gradients(factor, mask, *arrays, lse2=lse2, delta=delta)
    d_query, d_key, d_value = (
        gradient[:, : x.shape[1], :, : x.shape[3]].astype(jnp.float32)
        for x, gradient in zip((query, key, value), gradients, strict=True)
    )
    # That of `scaled`, times what that is of `query`.
    return d_query * (scale / factor), d_key, d_value


def _sum(parts):
    return reduce(jnp.add, (x.astype(jnp.float32) for x in parts))


def _gradients(scale, mask, query, key, value, d_out, lse2, delta, dilation=None):
    """Of query, key and value, without what no head has.

    lse2, delta: (batch, heads, seq); lse2 is the log-sum-exp in base 2.
    """
    # exp2 of anything minus infinity is 0: unseen rows have no weights.
    lse2 = jnp.where(jnp.isneginf(lse2), jnp.inf, lse2)
    # Whole tiles, whose rows past the end have no weights whatever a copy brings there.
    end = [(0, 0), (0, 0), (0, -lse2.shape[2] % math.lcm(mask.block_size, 2 * ROWS))]
    lse2 = jnp.pad(lse2, end, constant_values=jnp.inf)
    numbers = jnp.stack([lse2, jnp.pad(delta, end)], 2)
    args = mask, query, key, value, d_out, numbers
    gradients = [*over_batch(partial(backward_q, scale, dilation=dilation))(*args)]
    for wanted in kv_launches(query.shape[3]):
        kernel = partial(backward_kv, scale, wanted, dilation=dilation)
        gradients += over_batch(kernel)(*args)
    return gradients


def forward(
    scale,
    exact,
    mask,
    query,
    key,
    value,
    config: WalkTiles | None = None,
    dilation: Dilation | None = None,
):
    """out, and the log-sum-exp in base 2, (batch, heads, 1, seq).

    exact: and then what rounding took from `out`, rounded itself. The gradient of a
        query is a difference, of which little may remain where it sees few keys.
    """
    config = config or config_of("forward", query.shape[-1], mask.block_size)
    factor = scale * LOG2_E
    shape = config.rows, config.columns

    def start(held):
        top = jnp.full((config.rows,), LOWEST, jnp.float32)
        total = jnp.zeros((config.rows,), jnp.float32)
        row = plgpu.Layout.WGMMA.reduce(1)
        top, total = (plgpu.layout_cast(x, row) for x in (top, total))
        return zeros(config.rows, held[0].shape[1]), top, total

    def step(carry, held, ring, visible):
        summed, top, total = carry
        (keys,) = ring.wait(0)

        def multiply(acc):
            plgpu.wgmma(acc, held[0], keys.transpose((1, 0)))
            ring.take_turns()
            return acc[...]

        logits = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
        ring.release(0)
        if visible:
            logits = jnp.where(visible(), logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(axis=1) * factor)
        weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(higher, shape, [0]))
        fade = jnp.exp2(top - higher)
        summed *= lax.broadcast_in_dim(fade, summed.shape, [0])
        total = total * fade + weights.sum(axis=1)
        rounded = weights.astype(query.dtype)
        ring.take_turns()
        (values,) = ring.wait(1)
        summed = add_dots(summed, (rounded, values))
        ring.release(1)
        return summed, higher, total

    def finish(carry, held):
        summed, top, total = carry
        seen = total > 0
        total = jnp.where(seen, total, 1)
        share = jnp.where(seen, 1 / total, 0)
        lse2 = jnp.where(seen, top + jnp.log2(total), -jnp.inf)
        out = summed * lax.broadcast_in_dim(share, summed.shape, [0])
        low = out - out.astype(query.dtype).astype(jnp.float32)
        return [out, lse2, low][: 2 + exact]

    queries, keys, values = tokens_of(dilation, query, key, value)
    held, walked = [queries], [[keys], [values]]
    walk = walk_of(mask, "kv", queries, keys, config)
    body = Body(start, step, finish, [0, None, 0][: 2 + exact], takes_turns=True)
    return walk_lists(body, config, held, walked, walk, "attention_forward")


def backward_q(
    scale,
    mask,
    query,
    key,
    value,
    d_out,
    numbers,
    config: WalkTiles | None = None,
    dilation: Dilation | None = None,
):
    """[d_query]; numbers (batch, heads, 2, seq) are `lse2` and `delta`."""
    config = config or config_of("backward_q", query.shape[-1], mask.block_size)
    factor = scale * LOG2_E
    shape = config.rows, config.columns

    def start(held):
        row = plgpu.Layout.WGMMA.reduce(1)
        lse, delta = (plgpu.load(held[2].at[n], layout=row) for n in range(2))
        return zeros(config.rows, held[0].shape[1]), lse, delta

    def step(carry, held, ring, visible):
        summed, lse, delta = carry
        keys, values = ring.wait(0)
        logits, d_weights = dots(
            (held[0], keys.transpose((1, 0))), (held[1], values.transpose((1, 0)))
        )
        weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(lse, shape, [0]))
        if visible:
            weights = jnp.where(visible(), weights, 0)
        d_logits = weights * (d_weights - lax.broadcast_in_dim(delta, shape, [0]))
        d_logits = d_logits.astype(query.dtype)
        summed = add_dots(summed, (d_logits, keys))
        ring.release(0)
        return summed, lse, delta

    def finish(carry, held):
        return [carry[0] * scale]

    queries, *pair = tokens_of(dilation, query, key, value)
    held = [queries, Tokens(d_out), Tokens(numbers, numbers=True)]
    walk = walk_of(mask, "kv", queries, pair[0], config)
    body = Body(start, step, finish, [0])
    return walk_lists(body, config, held, [pair], walk, "attention_backward_q")


def backward_kv(
    scale,
    wanted,
    mask,
    query,
    key,
    value,
    d_out,
    numbers,
    config: WalkTiles | None = None,
    dilation: Dilation | None = None,
):
    """The wanted gradients, of "key", "value" or both.

    Keys are the rows, so that only views of shared memory are transposed.
    """
    config = config or config_of("backward_kv", query.shape[-1], mask.block_size)
    factor = scale * LOG2_E
    shape = config.rows, config.columns

    def start(held):
        return [zeros(config.rows, held[0].shape[1]) for _ in wanted]

    def step(sums, held, ring, visible):
        queries, d_outs, numbers = ring.wait(0)

        def of_column(n):
            column = plgpu.load(numbers.at[n], layout=plgpu.Layout.WGMMA.reduce(0))
            return lax.broadcast_in_dim(column, shape, [1])

        (logits,) = dots((held[0], queries.transpose((1, 0))))
        weights = jnp.exp2(logits * factor - of_column(0))
        if visible:
            weights = jnp.where(visible(), weights, 0)
        added = {}
        if "value" in wanted:
            rounded = weights.astype(query.dtype)
            added["value"] = add_dots(sums[wanted.index("value")], (rounded, d_outs))
        if "key" in wanted:
            (d_weights,) = dots((held[1], d_outs.transpose((1, 0))))
            d_logits = (weights * (d_weights - of_column(1))).astype(query.dtype)
            added["key"] = add_dots(sums[wanted.index("key")], (d_logits, queries))
        # Read before TMA may write there again.
        plgpu.commit_smem()
        ring.release(0)
        return [added[name] for name in wanted]

    def finish(sums, held):
        factors = [scale if name == "key" else 1.0 for name in wanted]
        return [x * factor for x, factor in zip(sums, factors, strict=True)]

    queries, *pair = tokens_of(dilation, query, key, value)
    walked = [[queries, Tokens(d_out), Tokens(numbers, numbers=True)]]
    walk = walk_of(mask, "q", queries, pair[0], config)
    outs = [("key", "value").index(name) for name in wanted]
    body = Body(start, step, finish, outs)
    name = f"attention_backward_{'_'.join(wanted)}"
    return walk_lists(body, config, pair, walked, walk, name)
