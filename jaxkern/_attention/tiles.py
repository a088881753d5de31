"""Attention by tiles of its logits: the online softmax, its gradients, the loop."""

from functools import partial, reduce
from operator import and_
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .._core.precision import widen
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

    Rows that nothing was added to give 0 and -inf, with gradient 0.
    """
    seen = total != 0
    divisor = jnp.where(seen, total, 1)
    lse = jnp.where(seen, jnp.log(divisor) + top, -jnp.inf)
    return summed / divisor[..., None], lse


def finite(top: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """What to subtract: -inf - -inf would be NaN; -inf less a number stays."""
    # XLA's CPU backend fuses a maximum into the product before it, but no select.
    return jnp.maximum(top, jnp.finfo(top.dtype).min)


class Carry(NamedTuple):
    """What rows of queries have summed over the keys they have met so far."""

    summed: Float[Array, "*batch groups rows dim_v"]
    top: Float[Array, "*batch groups rows"]
    total: Float[Array, "*batch groups rows"]


def empty_carry(query: Float[Array, "*tile dim"], dim_v: int) -> Carry:
    zero = zeros_of(query[..., :1])
    summed = jnp.broadcast_to(zero, (*query.shape[:-1], dim_v))
    return Carry(summed, zero[..., 0] - jnp.inf, zero[..., 0])


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
    """The logits of one tile, -inf where a query does not see a key."""
    logits = _multiply("...gqd,...sd->...gqs", query, key) * scale
    if visible is None:
        return logits
    visible = jnp.expand_dims(visible, range(logits.ndim - visible.ndim))
    return jnp.where(visible, logits, -jnp.inf)


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
    d_weights = _multiply("...gqd,...sd->...gqs", d_out, value)
    d_logits = weights * (d_weights - delta[..., None]) * scale
    return (
        _multiply("...gqs,...sd->...gqd", d_logits, key),
        _multiply("...gqs,...gqd->...sd", d_logits, query),
        _multiply("...gqs,...gqd->...sd", weights, d_out),
    )


class Tiling(NamedTuple):
    """How the logits are cut; query i sees the keys up to i + diagonal, None all."""

    seq_q: int
    seq_kv: int
    rows: int
    columns: int
    diagonal: int | None

    def visited(self) -> Int[np.ndarray, "tiles 2"]:
        """Row and column of every tile in which some query sees some key."""
        first_row = np.arange(0, self.seq_q, self.rows)
        first_column = np.arange(0, self.seq_kv, self.columns)
        seen = np.ones((len(first_row), len(first_column)), bool)
        if self.diagonal is not None:
            last_row = np.minimum(first_row + self.rows, self.seq_q) - 1
            seen = first_column <= last_row[:, None] + self.diagonal
        return np.argwhere(seen).astype(np.int32)

    def visible(
        self, i: jax.Array, j: jax.Array, mask: Bool[Array, "..."] | None
    ) -> Bool[Array, "..."] | None:
        """Where in tile (i, j) a query sees a key; None is everywhere."""
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
    """Equal tiles of at most `limit`, so that little is padded."""
    rows, columns = (-(-seq // -(-seq // limit)) for seq in (seq_q, seq_kv))
    return Tiling(seq_q, seq_kv, rows, columns, diagonal)


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

    def step(carry, tile):
        i, j = tile
        visible = tiling.visible(i, j, mask)
        logits = tile_logits(queries[i], keys[j], visible, scale)
        rows = add_tile(Carry(*(x[i] for x in carry)), logits, values[j])
        return Carry(*(_put(x, y, i) for x, y in zip(carry, rows, strict=True))), None

    carry = empty_carry(queries, value.shape[-1])
    carry, _ = lax.scan(step, carry, tiling.visited())
    out, lse = normalize(*carry)
    return _join(out, tiling.seq_q), _join(lse, tiling.seq_q)


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

    def step(sums, tile):
        i, j = tile
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
        ), None

    zeros = tuple(zeros_of(x) for x in (queries, keys, values))
    (d_query, d_key, d_value), _ = lax.scan(step, zeros, tiling.visited())
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
    """Attention with its log-sum-exp, in memory linear in the sequence."""
    if mask is None:
        return _tiled(*vary_alike(query, key, value), None, scale, tiling)
    return _tiled(*vary_alike(query, key, value, mask), scale, tiling)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tiled(query, key, value, mask, scale, tiling):
    return _tiled_forward(query, key, value, mask, scale, tiling)[0]


def _tiled_forward(query, key, value, mask, scale, tiling):
    out, lse = attend(query, key, value, mask, scale, tiling)
    # Saved before it is rounded: of queries that see few keys, most of the gradient
    # cancels, and the rounding of `out` would be what is left.
    return (out.astype(value.dtype), lse), (query, key, value, mask, out, lse)


def _tiled_backward(scale, tiling, saved, cotangents):
    query, key, value, mask, out, lse = saved
    d_out, d_lse = cotangents
    delta = (widen(d_out) * out).sum(-1) - d_lse
    gradients = attend_gradients(
        query, key, value, mask, d_out, lse, delta, scale, tiling
    )
    return *(x.astype(query.dtype) for x in gradients), None


_tiled.defvjp(_tiled_forward, _tiled_backward)
