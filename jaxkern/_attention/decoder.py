"""Causal attention with the options of decoder-only models.

They are windows, softcaps, packed documents and attention sinks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Integer

from .._core.precision import widen
from .block_mask.mask import BlockMask, band_mask
from .block_sparse import block_sparse_attention
from .dense import attention
from .tiling import TILE, group_heads

# Queries whose capped logits are in memory together.
ROWS = 256


def decoder_attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim"],
    *,
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None = None,
    segment_ids: Integer[Array, "batch seq"] | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Compute softmax attention in a window, with capped logits.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        mask: As in `attention`.
        segment_ids: Each query sees the keys that have its own id; None for all keys.
            There are then as many queries as keys.
        is_causal: As in `attention`.
        window: Each query sees the keys of the last `window` tokens, its own included,
            and no later ones; None for no window.
        scale: As in `attention`.
        softcap: Replace each logit s by c tanh(s / c) of this c; None for no cap. The
            logits of 256 queries are then in memory at a time.
        return_lse: As in `attention`.

    Returns:
        The results (batch, seq_q, heads, dim), or a pair of them and the log-sum-exp.
    """
    seq_q, seq_kv = query.shape[1], key.shape[1]
    if window is not None:
        is_causal, window = True, None if window >= seq_kv else window
    options: Any = {"scale": scale, "return_lse": return_lse}
    seen_by = {"is_causal": is_causal, "window": window}
    if softcap is not None:
        options |= {"softcap": softcap, "segment_ids": segment_ids}
        return _capped(query, key, value, mask, **seen_by, **options)
    by_blocks = mask is None and seq_q * seq_kv > TILE**2
    if by_blocks and segment_ids is not None:
        return _attend_to_documents(
            query, key, value, segment_ids, **seen_by, **options
        )
    if by_blocks and window is not None:
        blocks = band_mask(1 - window, 0, seq_q, seq_kv)
        return block_sparse_attention(query, key, value, mask=blocks, **options)
    if segment_ids is not None:
        own = same_document(segment_ids)
        mask = own if mask is None else mask & own
    if window is not None:
        seen = _sees(jnp.arange(seq_q), seq_kv, True, window)
        mask = seen if mask is None else mask & seen
    return attention(query, key, value, mask=mask, is_causal=is_causal, **options)


# Inside `jit` the ids are traced, also for a caller that computes eagerly. Without
# this, each batch of documents would have a program of its own.
@partial(jax.jit, static_argnames=("is_causal", "window", "scale", "return_lse"))
def _attend_to_documents(
    query, key, value, segment_ids, *, is_causal, window, **options
):
    mask = BlockMask.document(segment_ids)
    if is_causal:
        lower = None if window is None else 1 - window
        mask &= band_mask(lower, 0, query.shape[1], key.shape[1])
    return block_sparse_attention(query, key, value, mask=mask, **options)


def number_documents(
    segment_ids: Integer[Array, "batch seq"],
) -> tuple[Int32[Array, "batch seq"], Int32[Array, "batch seq"]]:
    """Return the number of each token's document, and the token's place in it.

    Neighbours with equal ids are of one document. Both count from 0 on.
    """
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(begins, ((0, 0), (1, 0)))
    numbers = begins.cumsum(1, dtype=jnp.int32)
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    first = lax.cummax(jnp.where(begins, places, 0), axis=1)
    return numbers, places - first


def same_document(
    segment_ids: Integer[Array, "batch seq"],
) -> Bool[Array, "batch 1 seq seq"]:
    """Return which pairs of tokens have the same id."""
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def with_sinks(
    out: Float[Array, "batch seq heads dim"],
    lse: Float[Array, "batch seq heads"],
    sinks: Float[Array, " heads"],
) -> Float[Array, "batch seq heads dim"]:
    r"""Return the attention whose softmax has one more logit, which has no value.

    $$\sum_j \frac{e^{s_{ij}}}{e^{\mathrm{sink}} + e^{L_i}}\, v_j
    = \sigma(L_i - \mathrm{sink})\; o_i$$

    Args:
        out: The attention o without it.
        lse: Its log-sum-exp L.
        sinks: The logit of each head.

    Returns:
        The results.
    """
    share = jax.nn.sigmoid(lse - sinks.astype(lse.dtype)[None, None])
    return (widen(out) * share[..., None].astype(widen(out).dtype)).astype(out.dtype)


def _sees(rows, seq_kv, is_causal, window):
    """Return where the queries of these indices see keys, (1, 1, rows, seq_kv)."""
    behind = rows[:, None] - jnp.arange(seq_kv, dtype=rows.dtype)[None]
    seen = behind >= 0 if is_causal else jnp.ones_like(behind, bool)
    if window is not None:
        seen &= behind < window
    return seen[None, None]


def _capped(
    query,
    key,
    value,
    mask,
    *,
    segment_ids,
    is_causal,
    window,
    scale,
    softcap,
    return_lse,
):
    """Compute attention with capped logits, a few queries at a time."""
    batch, seq_q, heads, dim = query.shape
    kv_heads = key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    size = min(ROWS, seq_q)
    parts = -(-seq_q // size)
    padding = [(0, 0), (0, parts * size - seq_q), (0, 0), (0, 0)]
    queries = jnp.pad(query, padding)
    queries = queries.reshape(batch, parts, size, kv_heads, heads // kv_heads, dim)
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.pad(mask, [(0, 0), (0, 0), padding[1], (0, 0)])
    padded_ids = segment_ids
    if padded_ids is not None:
        padded_ids = jnp.pad(padded_ids, padding[:2])

    # The backward computes the logits again: without this, all would be kept.
    @partial(jax.checkpoint, prevent_cse=False)
    def attend(part, queries):
        rows = part * size + jnp.arange(size, dtype=part.dtype)
        seen = _sees(rows, key.shape[1], is_causal, window)
        if mask is not None:
            own = mask
            if mask.shape[2] > 1:
                own = lax.dynamic_slice_in_dim(mask, part * size, size, 2)
            seen = seen & own
        if padded_ids is not None:
            own = lax.dynamic_slice_in_dim(padded_ids, part * size, size, 1)
            seen = seen & (own[:, None, :, None] == segment_ids[:, None, None])
        seen = group_heads(seen, kv_heads)
        wide = widen(queries)
        logits = jnp.einsum("bqkgd,bskd->bkgqs", wide, widen(key)) * scale
        logits = softcap * jnp.tanh(logits / softcap)
        logits = jnp.where(seen, logits, -softcap)
        top = lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - top), 0)
        total = weights.sum(-1, keepdims=True)
        divisor = jnp.where(total > 0, total, 1)
        out = jnp.einsum("bkgqs,bskd->bqkgd", weights / divisor, widen(value))
        lse = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)
        # (batch, queries, kv_heads, groups, 1)
        return out.astype(value.dtype), jnp.moveaxis(lse, 3, 1)

    if parts == 1:
        results = attend(jnp.zeros((), jnp.int32), queries[:, 0])
    else:
        order = jnp.arange(parts, dtype=jnp.int32)
        results = lax.map(
            lambda each: attend(*each), (order, jnp.moveaxis(queries, 1, 0))
        )
        results = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), results)
    out, lse = (x.reshape(batch, parts * size, heads, -1)[:, :seq_q] for x in results)
    return (out, lse[..., 0]) if return_lse else out
