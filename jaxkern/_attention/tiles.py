"""Attention by tiles of its logits in XLA: the online softmax and its gradients.

A loop visits the tiles that a query sees, so memory is linear in the sequence. The
block-sparse op and the rings use the same steps on tiles of their own.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import and_
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .._core.precision import widen, widen_range
from .._core.sharding import vary_alike

# The largest number of queries and of keys in a tile. Milliseconds of both passes on
# two CPU cores at (1, 2048, 8, 64), with tiles of 128, 256, 512 and 1024: 548, 569, 772
# and 867; causal 302, 282, 567 and 701. Not measured on a GPU.
TILE = 256


def normalize(
    summed: Float[Array, "*rows dim"],
    top: Float[Array, "*rows"],
    total: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows dim"], Float[Array, "*rows"]]:
    """Return output and log-sum-exp, from sums that are weighted by exp(logit - top).

    Rows to which nothing was added give 0 and `nothing`, with gradient 0.
    """
    seen = total != 0
    divisor = jnp.where(seen, total, 1)
    lse = jnp.where(seen, jnp.log(divisor) + top, nothing(top.dtype))
    return jnp.where(seen[..., None], summed / divisor[..., None], 0), lse


def nothing(dtype: jnp.dtype) -> float:
    """Return what stands for -inf in logits and log-sum-exps, until a user gets them.

    It is finite, so that `jax.debug_infs` reports only infinities of the user's own
    numbers.
    """
    return float(jnp.finfo(dtype).min) / 2


def finite(top: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return `top`, or more where exp(nothing - top) would not be 0."""
    # XLA's CPU backend fuses a maximum into the product before it, but not a select.
    return jnp.maximum(top, _least(top.dtype))


def sees(lse: Float[Array, "*rows"]) -> Bool[Array, "*rows"]:
    """Return whether each row saw some key.

    A row that saw none has `nothing`, or -inf where a kernel wrote it.
    """
    return lse > _least(lse.dtype)


# Under jit, `jax.debug_infs` looks at the result only, which has no -inf where every
# row sees some key.
@jax.jit
def with_infinity(lse: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return the log-sum-exp as users get it: -inf without a key, and no gradient."""
    return jnp.where(sees(lse), lse, -jnp.inf)


def _least(dtype: jnp.dtype) -> float:
    return nothing(dtype) / 2


class Carry(NamedTuple):
    """The state of the online softmax: sums over the keys that queries met so far.

    Attributes:
        summed: values, weighted by exp(logit - top).
        top: the largest logit.
        total: the sum of the weights.
    """

    summed: Float[Array, "*batch groups rows dim_v"]
    top: Float[Array, "*batch groups rows"]
    total: Float[Array, "*batch groups rows"]


def empty_carry(query: Float[Array, "*tile dim"], dim_v: int) -> Carry:
    zero = zeros_of(query[..., :1])
    summed = jnp.broadcast_to(zero, (*query.shape[:-1], dim_v))
    return Carry(summed, zero[..., 0] + nothing(zero.dtype), zero[..., 0])


def zeros_of(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return zeros of the shape of `x`, in float32 or wider, on the same mesh axes."""
    # jnp.zeros_like forgets explicit mesh axes where no mesh is set.
    return jnp.where(False, widen(x), 0)


def _multiply(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Round `a` to the dtype of `b`, and multiply with sums in float32 or wider."""
    wide = b.dtype if b.dtype.itemsize > 4 else jnp.float32
    return jnp.einsum(pattern, a.astype(b.dtype), b, preferred_element_type=wide)


def tile_logits(
    query: Float[Array, "*batch groups rows dim"],
    key: Float[Array, "*batch columns dim"],
    visible: Bool[Array, "..."] | None,
    scale: float,
) -> Float[Array, "*batch groups rows columns"]:
    """Return the logits of one tile, `nothing` where a query does not see a key."""
    logits = _multiply("...gqd,...sd->...gqs", query, key) * scale
    if visible is None:
        return logits
    visible = jnp.expand_dims(visible, range(logits.ndim - visible.ndim))
    return jnp.where(visible, logits, nothing(logits.dtype))


def add_tile(
    carry: Carry,
    logits: Float[Array, "*batch groups rows columns"],
    value: Float[Array, "*batch columns dim_v"],
) -> Carry:
    """Return the carry after one more tile of keys: a step of the online softmax."""
    # The weights are relative to the tile's own maximum. With the running maximum they
    # would wait for the carry, which took up to 1.2 times as long on two CPU cores.
    own = logits.max(-1)
    weights = jnp.exp(logits - finite(own)[..., None])
    top = jnp.maximum(carry.top, own)
    before, now = (jnp.exp(x - finite(top)) for x in (carry.top, own))
    summed = _multiply("...gqs,...sd->...gqd", weights, value)
    return Carry(
        carry.summed * before[..., None] + summed * now[..., None],
        top,
        carry.total * before + weights.sum(-1) * now,
    )


def tile_gradients(
    logits: Float[Array, "*batch groups rows columns"],
    query: Float[Array, "*batch groups rows dim"],
    key: Float[Array, "*batch columns dim"],
    value: Float[Array, "*batch columns dim_v"],
    d_out: Float[Array, "*batch groups rows dim_v"],
    lse: Float[Array, "*batch groups rows"],
    delta: Float[Array, "*batch groups rows"],
    scale: float,
) -> tuple[
    Float[Array, "*batch groups rows dim"],
    Float[Array, "*batch columns dim"],
    Float[Array, "*batch columns dim_v"],
]:
    """Return what one tile adds to the gradients of query, key and value, in float32.

    Args:
        lse: over all keys.
        delta: sum(d_out * out) - d_lse of each row.
    """
    weights = jnp.exp(logits - finite(lse)[..., None])
    d_weights = _multiply("...gqd,...sd->...gqs", d_out, widen_range(value))
    d_logits = weights * (d_weights - delta[..., None]) * scale
    return (
        _multiply("...gqs,...sd->...gqd", d_logits, widen_range(key)),
        _multiply("...gqs,...gqd->...sd", d_logits, widen_range(query)),
        _multiply("...gqs,...gqd->...sd", weights, widen_range(d_out)),
    )


def cotangents_of(
    out: Float[Array, "*rows dim_v"],
    lse: Float[Array, "*rows"],
    d_out: Float[Array, "*rows dim_v"],
    d_lse: Float[Array, "*rows"],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "*rows dim_v"], Float[Array, "*rows"]]:
    """Return `d_out` and `delta` as `tile_gradients` takes them.

    Both are 0 in rows that see nothing. The weights are 0 there too, but 0 times a NaN
    or an infinity would be NaN.

    Args:
        out: not rounded to 16 bits. Most of a query's gradient cancels where it sees
            few keys, and the rounding error of `out` would be what is left.
        dtype: the dtype of the op's arguments, to which `d_out` is rounded. For float16
            it keeps its own range, since it may be too small. Kernels multiply a
            rounded `d_out`, and `delta` must be of the same one: in rows that see few
            keys the two cancel.
    """
    seen = sees(lse)
    if dtype == jnp.float16:
        # The digits of float16, and the range of float32.
        d_out = lax.reduce_precision(d_out, exponent_bits=8, mantissa_bits=10)
    else:
        d_out = d_out.astype(dtype)
    d_out = jnp.where(seen[..., None], d_out, 0)
    # Without this barrier XLA fuses the sum with the transposition and stacking that
    # the kernels need. That took 451 us on an H200 at (4, 4096, 16, 128), where reading
    # the arrays takes about 60.
    delta = lax.optimization_barrier((widen(d_out) * widen(out)).sum(-1))
    return d_out, delta - jnp.where(seen, d_lse, 0)


class Tiling(NamedTuple):
    """How the logits are cut into tiles.

    Attributes:
        rows: queries in a tile.
        columns: keys in a tile.
        diagonal: query i sees the keys up to i + diagonal. With None it sees all.
    """

    seq_q: int
    seq_kv: int
    rows: int
    columns: int
    diagonal: int | None

    def last_columns(self) -> Int[np.ndarray, " rows"]:
        """Return the last tile of each row of tiles in which some query sees some key.

        All tiles before it are seen too. It is -1 where no tile is seen.
        """
        first_row = np.arange(0, self.seq_q, self.rows)
        last_column = np.full(len(first_row), self.seq_kv - 1)
        if self.diagonal is not None:
            last_row = np.minimum(first_row + self.rows, self.seq_q) - 1
            last_column = np.clip(last_row + self.diagonal, -1, last_column)
        return (last_column // self.columns).astype(np.int32)

    def visit[Sums](
        self, add: Callable[[Sums, jax.Array, jax.Array], Sums], sums: Sums
    ) -> Sums:
        """Call `add(sums, i, j)` for every tile in which some query sees some key.

        The program counts the row and column of a tile on itself, so that it is no
        longer for a longer sequence.
        """
        last = self.last_columns()
        tiles = int((last + 1).sum(dtype=np.int64))

        def step(state, _):
            sums, i, j = state
            ends = j == jnp.asarray(last)[i]
            following = jnp.where(ends, i + 1, i), jnp.where(ends, 0, j + 1)
            return (add(sums, i, j), *following), None

        first = jnp.asarray(np.argmax(last >= 0), jnp.int32), jnp.zeros((), jnp.int32)
        return lax.scan(step, (sums, *first), None, length=tiles)[0][0]

    def visible(
        self, i: jax.Array, j: jax.Array, mask: Bool[Array, "..."] | None
    ) -> Bool[Array, "..."] | None:
        """Return where in tile (i, j) a query sees a key; None means everywhere."""
        column = j * self.columns + jnp.arange(self.columns, dtype=j.dtype)[None]
        parts = []
        if self.seq_kv % self.columns:
            parts.append(column < self.seq_kv)
        if self.diagonal is not None:
            row = i * self.rows + jnp.arange(self.rows, dtype=i.dtype)
            parts.append(column <= row[:, None] + self.diagonal)
        if mask is not None:
            parts = [part[None, None, None] for part in parts]
            for axis, start, size in [(3, i, self.rows), (4, j, self.columns)]:
                if mask.shape[axis] > 1:
                    mask = lax.dynamic_slice_in_dim(mask, start * size, size, axis)
            parts.append(mask)
        return reduce(and_, parts) if parts else None


def make_tiling(
    seq_q: int, seq_kv: int, diagonal: int | None = None, limit: int = TILE
) -> Tiling:
    """Cut the logits into equal tiles of at most `limit`, so that little is padded."""
    rows, columns = (-(-seq // -(-seq // limit)) for seq in (seq_q, seq_kv))
    return Tiling(seq_q, seq_kv, rows, columns, diagonal)


# Under jit, so that all calls outside of a user's jit share one compiled program. The
# gradient below has a jit for the same reason.
@partial(jax.jit, static_argnames=("scale", "tiling"))
def attend(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None,
    scale: float,
    tiling: Tiling,
) -> tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]:
    """Return attention and its log-sum-exp, both in float32, tile by tile."""
    kv_heads = key.shape[2]
    queries = _cut(query, tiling.rows, kv_heads)
    keys, values = (_cut(x, tiling.columns, kv_heads)[:, :, :, 0] for x in (key, value))
    mask = _cut_mask(mask, kv_heads, tiling)

    def add(carry, i, j):
        visible = tiling.visible(i, j, mask)
        logits = tile_logits(queries[i], keys[j], visible, scale)
        rows = add_tile(Carry(*(x[i] for x in carry)), logits, values[j])
        return Carry(*(_put(x, y, i) for x, y in zip(carry, rows, strict=True)))

    carry = tiling.visit(add, empty_carry(queries, value.shape[-1]))
    out, lse = normalize(*carry)
    return _join(out, tiling.seq_q), _join(lse, tiling.seq_q)


@partial(jax.jit, static_argnames=("scale", "tiling"))
def attend_gradients(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None,
    d_out: Float[Array, "batch seq_q heads dim_v"],
    lse: Float[Array, "batch seq_q heads"],
    delta: Float[Array, "batch seq_q heads"],
    scale: float,
    tiling: Tiling,
) -> tuple[
    Float[Array, "batch seq_q heads dim"],
    Float[Array, "batch seq_kv kv_heads dim"],
    Float[Array, "batch seq_kv kv_heads dim_v"],
]:
    """Return what these keys add to the gradients of query, key and value, in float32.

    See `tile_gradients` for `lse` and `delta`.
    """
    kv_heads = key.shape[2]
    queries, d_outs, lses, deltas = (
        _cut(x, tiling.rows, kv_heads) for x in (query, d_out, lse, delta)
    )
    keys, values = (_cut(x, tiling.columns, kv_heads)[:, :, :, 0] for x in (key, value))
    mask = _cut_mask(mask, kv_heads, tiling)

    def add(sums, i, j):
        visible = tiling.visible(i, j, mask)
        logits = tile_logits(queries[i], keys[j], visible, scale)
        added = tile_gradients(
            logits,
            queries[i],
            keys[j],
            values[j],
            d_outs[i],
            lses[i],
            deltas[i],
            scale,
        )
        return tuple(
            _put(x, x[n] + y, n) for x, y, n in zip(sums, added, (i, j, j), strict=True)
        )

    zeros = tuple(zeros_of(x) for x in (queries, keys, values))
    d_query, d_key, d_value = tiling.visit(add, zeros)
    return (
        _join(d_query, tiling.seq_q),
        _join(d_key[:, :, :, None], tiling.seq_kv),
        _join(d_value[:, :, :, None], tiling.seq_kv),
    )


def pad_axis(
    x: Shaped[Array, "..."], axis: int, before: int, after: int, fill: float = 0
) -> Shaped[Array, "..."]:
    """Return `x` with entries of `fill` added before and after an axis."""
    widths = [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _put(x, row, i):
    return lax.dynamic_update_index_in_dim(x, row, i, 0)


def _cut(
    x: Float[Array, "batch seq heads *rest"], size: int, kv_heads: int
) -> Float[Array, "tiles batch kv_heads groups size *rest"]:
    batch, seq, heads, *rest = x.shape
    missing = -seq % size
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    tiles = (seq + missing) // size
    # One axis at a time, since arrays on explicit mesh axes allow no more in a reshape.
    x = x.reshape(batch, tiles, size, heads, *rest)
    x = x.reshape(batch, tiles, size, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(x, (1, 2), (0, 4))


def _join(
    x: Float[Array, "tiles batch kv_heads groups size *rest"], seq: int
) -> Float[Array, "batch seq heads *rest"]:
    """Undo `_cut`."""
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    batch, tiles, size, kv_heads, groups, *rest = x.shape
    x = x.reshape(batch, tiles, size, kv_heads * groups, *rest)
    return x.reshape(batch, tiles * size, kv_heads * groups, *rest)[:, :seq]


def group_heads(
    mask: Bool[Array, "batch heads seq_q seq_kv"], kv_heads: int
) -> Bool[Array, "batch kv_heads_or_1 groups_or_1 seq_q seq_kv"]:
    batch, heads, *rest = mask.shape
    grouped = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return mask.reshape(batch, *grouped, *rest)


def _cut_mask(mask, kv_heads, tiling):
    if mask is None:
        return None
    missing = [(0, 0), (0, 0)] + [
        (0, -seq % size if n > 1 else 0)
        for n, seq, size in zip(mask.shape[2:], tiling[:2], tiling[2:4], strict=True)
    ]
    return group_heads(jnp.pad(mask, missing), kv_heads)


def attention_by_tiles(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None,
    scale: float,
    tiling: Tiling,
) -> tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]:
    """Return attention and its log-sum-exp, in memory that is linear in the sequence.

    Both are float32. The log-sum-exp of a query that sees no key is `nothing`. The
    gradient is a custom VJP that computes the weights again.
    """
    if mask is None:
        return _tiled(*vary_alike(query, key, value), None, scale, tiling)
    return _tiled(*vary_alike(query, key, value, mask), scale, tiling)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tiled(query, key, value, mask, scale, tiling):
    return _tiled_forward(query, key, value, mask, scale, tiling)[0]


def _tiled_forward(query, key, value, mask, scale, tiling):
    out, lse = attend(query, key, value, mask, scale, tiling)
    return (out, lse), (query, key, value, mask, out, lse)


def _tiled_backward(scale, tiling, saved, cotangents):
    query, key, value, mask, out, lse = saved
    d_out, d_lse = cotangents
    d_out, delta = cotangents_of(out, lse, d_out, d_lse, query.dtype)
    gradients = attend_gradients(
        query, key, value, mask, d_out, lse, delta, scale, tiling
    )
    return *(x.astype(query.dtype) for x in gradients), None


_tiled.defvjp(_tiled_forward, _tiled_backward)
