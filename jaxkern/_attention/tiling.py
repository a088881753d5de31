"""Attention tile by tile in XLA, in memory that is linear in the sequence.

A loop visits the tiles that a query sees.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import and_
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._core.sharding import vary_alike
from .tiles import (
    Carry,
    add_tile,
    cotangents_of,
    empty_carry,
    normalize,
    tile_gradients,
    tile_logits,
    zeros_of,
)

# The largest number of queries and of keys in a tile. Milliseconds of both passes on
# two CPU cores at (1, 2048, 8, 64), with tiles of 128, 256, 512 and 1024: 548, 569, 772
# and 867; causal 302, 282, 567 and 701. Not measured on a GPU.
TILE = 256


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
