"""Causal attention with the options of decoder-only models: windows and softcaps."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._core.precision import widen
from .block_mask.mask import band_mask
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
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "batch seq_q heads dim"]:
    """Compute softmax attention in a window, with capped logits.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        mask: As in `attention`.
        is_causal: As in `attention`.
        window: Each query sees the keys of the last `window` tokens, its own included,
            and no later ones; None for no window.
        scale: As in `attention`.
        softcap: Replace each logit s by c tanh(s / c) of this c; None for no cap. The
            logits of 256 queries are then in memory at a time.

    Returns:
        The results.
    """
    seq_q, seq_kv = query.shape[1], key.shape[1]
    if window is not None and window >= seq_kv:
        window, is_causal = None, True
    if softcap is not None:
        options = {"window": window, "scale": scale, "softcap": softcap}
        is_causal = is_causal or window is not None
        return _capped(query, key, value, mask, is_causal=is_causal, **options)
    if window is None:
        options: Any = {"mask": mask, "is_causal": is_causal, "scale": scale}
        return attention(query, key, value, **options)
    if mask is None and seq_q * seq_kv > TILE**2:
        blocks = band_mask(1 - window, 0, seq_q, seq_kv)
        return block_sparse_attention(query, key, value, mask=blocks, scale=scale)
    seen = _sees(jnp.arange(seq_q), seq_kv, True, window)
    mask = seen if mask is None else mask & seen
    return attention(query, key, value, mask=mask, scale=scale)


def _sees(rows, seq_kv, is_causal, window):
    """Return where the queries of these indices see keys, (1, 1, rows, seq_kv)."""
    behind = rows[:, None] - jnp.arange(seq_kv, dtype=rows.dtype)[None]
    seen = behind >= 0 if is_causal else jnp.ones_like(behind, bool)
    if window is not None:
        seen &= behind < window
    return seen[None, None]


def _capped(query, key, value, mask, *, is_causal, window, scale, softcap):
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
        seen = group_heads(seen, kv_heads)
        wide = widen(queries)
        logits = jnp.einsum("bqkgd,bskd->bkgqs", wide, widen(key)) * scale
        logits = softcap * jnp.tanh(logits / softcap)
        logits = jnp.where(seen, logits, -softcap)
        top = lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - top), 0)
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
        out = jnp.einsum("bkgqs,bskd->bqkgd", weights, widen(value))
        return out.astype(value.dtype)

    if parts == 1:
        out = attend(jnp.zeros((), jnp.int32), queries[:, 0])[:, None]
    else:
        order = jnp.arange(parts, dtype=jnp.int32)
        out = lax.map(lambda each: attend(*each), (order, jnp.moveaxis(queries, 1, 0)))
        out = jnp.moveaxis(out, 0, 1)
    return out.reshape(batch, parts * size, heads, -1)[:, :seq_q]
