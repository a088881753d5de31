"""Attention by tiles of its logits: the online softmax, its gradients, the loop."""

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

# On two CPU cores at (1, 2048, 8, 64): tiles of 128 to 1024 took 548, 569, 772, 867 ms
# for both passes, causal 302, 282, 567, 701; a GPU has not been asked.
TILE = 256


def normalize(
    summed: Float[Array, "*rows dim"],
    top: Float[Array, "*rows"],
    total: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows dim"], Float[Array, "*rows"]]:
    """Output and log-sum-exp of sums that were weighted by exp(logit - top).

    Rows that nothing was added to give 0 and `nothing`, with gradient 0.
    """
    seen = total != 0
    divisor = jnp.where(seen, total, 1)
    lse = jnp.where(seen, jnp.log(divisor) + top, nothing(top.dtype))
    return jnp.where(seen[..., None], summed / divisor[..., None], 0), lse


def nothing(dtype: jnp.dtype) -> float:
    """What stands for -inf, as a logit and as a log-sum-exp, until a user gets it.

    It is finite, so that `jax.debug_infs` finds only what a user's numbers made.
    """
    return float(jnp.finfo(dtype).min) / 2


def finite(top: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """What to subtract, so far above `nothing` that exp of the difference is 0."""
    # XLA's CPU backend fuses a maximum into the product before it, but no select.
    return jnp.maximum(top, _least(top.dtype))


def sees(lse: Float[Array, "*rows"]) -> Bool[Array, "*rows"]:
    """Whether the row saw some key; the kernels' rows that saw none have -inf."""
    return lse > _least(lse.dtype)


# Compiled, so that `jax.debug_infs` sees no -inf where every row sees some key.
@jax.jit
def with_infinity(lse: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The log-sum-exp as users get it: -inf of no key, and no gradient there."""
    return jnp.where(sees(lse), lse, -jnp.inf)


def _least(dtype: jnp.dtype) -> float:
    return nothing(dtype) / 2


class Carry(NamedTuple):
    """What rows of queries have summed over the keys they have met so far."""

    summed: Float[Array, "*batch groups rows dim_v"]
    top: Float[Array, "*batch groups rows"]
    total: Float[Array, "*batch groups rows"]


def empty_carry(query: Float[Array, "*tile dim"], dim_v: int) -> Carry:
    zero = zeros_of(query[..., :1])
    summed = jnp.broadcast_to(zero, (*query.shape[:-1], dim_v))
    return Carry(summed, zero[..., 0] + nothing(zero.dtype), zero[..., 0])


def zeros_of(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Where sums of its like begin, in float32, with its place on any mesh."""
    # zeros_like forgets explicit mesh axes where no mesh is set.
    return jnp.where(False, widen(x), 0)


def _multiply(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Accumulated in float32 or wider; `a` is rounded to the dtype of `b` before."""
    wide = b.dtype if b.dtype.itemsize > 4 else jnp.float32
    return jnp.einsum(pattern, a.astype(b.dtype), b, preferred_element_type=wide)


def tile_logits(
    query: Float[Array, "*batch groups rows dim"],
    key: Float[Array, "*batch columns dim"],
    visible: Bool[Array, "..."] | None,
    scale: float,
) -> Float[Array, "*batch groups rows columns"]:
    """The logits of one tile, `nothing` where a query does not see a key."""
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
    """The carry after one more tile of keys: the step of the online softmax."""
    # Weighted by the tile's own maximum: waiting for that of the carry took up to 1.2
    # times as long on two CPU cores.
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
    """What one tile adds to the gradients of query, key and value, in float32.

    `lse` is over all keys, and `delta` is sum(d_out * out) - d_lse of each row.
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
    """`d_out` and `delta`, as `tile_gradients` takes them, 0 in rows that see nothing.

    Their weights are 0, but 0 times a NaN or an infinity is NaN. `out` is not rounded:
    of queries that see few keys, most of the gradient cancels, and its rounding would
    be what is left.

    dtype: of the arguments. In it `d_out` is multiplied, unless it is float16.
    """
    seen = sees(lse)
    if dtype != jnp.float16:
        d_out = d_out.astype(dtype)
    d_out = jnp.where(seen[..., None], d_out, 0)
    # Without this barrier XLA sums inside of what transposes and stacks it for the
    # kernels: 451 us on an H200 at (4, 4096, 16, 128), where to read the arrays takes
    # about 60.
    delta = lax.optimization_barrier((widen(d_out) * widen(out)).sum(-1))
    return d_out, delta - jnp.where(seen, d_lse, 0)


class Tiling(NamedTuple):
    """How the logits are cut; query i sees the keys up to i + diagonal, None all."""

    seq_q: int
    seq_kv: int
    rows: int
    columns: int
    diagonal: int | None

    def last_columns(self) -> Int[np.ndarray, " rows"]:
        """Of each row of tiles the last in which some query sees some key, -1 for none.

        All before it are such tiles too.
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
        """`add(sums, i, j)` for every tile in which some query sees some key.

        Its row and column are counted on in the program, which so is no longer for a
        longer sequence.
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
        """Where in tile (i, j) a query sees a key; None is everywhere."""
        column = j * self.columns + jnp.arange(self.columns)[None]
        parts = []
        if self.seq_kv % self.columns:
            parts.append(column < self.seq_kv)
        if self.diagonal is not None:
            row = i * self.rows + jnp.arange(self.rows)
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
    """Equal tiles of at most `limit`, so that little is padded."""
    rows, columns = (-(-seq // -(-seq // limit)) for seq in (seq_q, seq_kv))
    return Tiling(seq_q, seq_kv, rows, columns, diagonal)


# Compiled once for all calls that are not within jit, as is its gradient.
@partial(jax.jit, static_argnames=("scale", "tiling"))
def attend(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None,
    scale: float,
    tiling: Tiling,
) -> tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]:
    """Attention and its log-sum-exp, both in float32, tile by tile."""
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
    """What these keys add to the three gradients, in float32; see `tile_gradients`."""
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
    """`x` with so many more entries before and after those of an axis."""
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
    # One axis at a time: on explicit mesh axes no more may be reshaped at once.
    x = x.reshape(batch, tiles, size, heads, *rest)
    x = x.reshape(batch, tiles, size, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(x, (1, 2), (0, 4))


def _join(
    x: Float[Array, "tiles batch kv_heads groups size *rest"], seq: int
) -> Float[Array, "batch seq heads *rest"]:
    """The inverse of `_cut`."""
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
    """Attention and its log-sum-exp, both in float32, in memory linear in the sequence.

    The log-sum-exp of no key is `nothing`.
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
