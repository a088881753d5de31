"""Attention with all logits in memory, its patterns and modules, and rotary pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The epsilon of LayerNorm.
EPSILON = 1e-5


def attention(query, key, value, bias: Any = None, *, scale: float | None = None):
    r"""Compute softmax attention and its log-sum-exp.

    $$o_i = \sum_j e^{s_{ij} - L_i} v_j, \quad L_i = \log \sum_j e^{s_{ij}}, \quad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j + b_{ij}$$

    Logits and softmax are in float32 or wider, weights in the dtype of `value`. A query
    that sees no key has $o_i = 0$, $L_i = -\infty$ and no gradient. With fewer key
    heads than query heads, consecutive query heads share a key head.

    Args:
        query: (batch, seq_q, heads, dim).
        key: (batch, seq_kv, kv_heads, dim).
        value: (batch, seq_kv, kv_heads, dim_v).
        bias: Numbers added to the logits, -inf where a query does not see a key. Their
            shape broadcasts to (batch, heads, seq_q, seq_kv).
        scale: The factor of the logits; None stands for dim ** -0.5.

    Returns:
        $o$, (batch, seq_q, heads, dim_v), and $L$, (batch, heads, seq_q).

    References:
        https://arxiv.org/abs/1706.03762, eq. 1.
    """
    wide = np.promote_types(query.dtype, jnp.float32)
    if query.shape[2] > key.shape[2]:
        group = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        bias = jnp.expand_dims(bias.astype(wide), range(logits.ndim - bias.ndim))
        logits += bias
    top = logits.max(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.maximum(top, jnp.finfo(wide).min))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    some = jnp.where(total, total, 1)
    lse = jnp.where(total, jnp.log(some) + top, -jnp.inf)[..., 0]
    weights = (weights / some).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value), lse


def causal_bias(seq: int):
    """Return the bias (seq, seq) of `attention` that hides later keys from a query."""
    return jnp.where(jnp.tri(seq, dtype=bool), 0.0, -jnp.inf)


def dilated_attention(
    query,
    key,
    value,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    is_causal: bool = False,
):
    """Compute dilated attention by gathering the rows of each pattern.

    All logits of a segment are in memory at once. Patterns are mixed by the softmax of
    their log-sum-exps.

    Args:
        query: (batch, seq, heads, dim).
        key: (batch, seq, heads, dim).
        value: (batch, seq, heads, dim).
        segment_lengths: A length for each pattern. It divides seq, or is seq if longer.
        dilation_rates: A rate for each pattern, which divides the pattern's length.
        is_causal: Whether later keys are hidden from a query.

    References:
        https://arxiv.org/abs/2307.02486.
    """
    batch, seq, heads, dim = query.shape
    head, outs, lses = jnp.arange(heads), [], []
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        w = min(w, seq)
        first = w * jnp.arange(seq // w)[:, None, None] + (head % r)[None, None]
        rows = first + r * jnp.arange(w // r)[None, :, None]  # (segments, rows, heads)
        q, k, v = (
            x[:, rows, head].reshape(-1, w // r, heads, dim)
            for x in (query, key, value)
        )
        out, lse = attention(q, k, v, causal_bias(w // r) if is_causal else None)
        out = out.reshape(batch, *rows.shape, dim)
        lse = lse.swapaxes(1, 2).reshape(batch, *rows.shape)
        outs.append(jnp.zeros_like(query).at[:, rows, head].set(out))
        empty = jnp.full(query.shape[:3], -jnp.inf, lse.dtype)
        lses.append(empty.at[:, rows, head].set(lse))
    shares = jax.nn.softmax(jnp.stack(lses), axis=0)[..., None]
    return (shares * jnp.stack(outs)).sum(0).astype(value.dtype)


def _project(x, layer):
    y = jnp.einsum("bse,ehd->bshd", x, layer["kernel"][...])
    return y + layer["bias"][...][None, None]


def _layer_norm(x, layer):
    """Normalize over all heads together."""
    flat = x.reshape(*x.shape[:2], -1)
    wide = flat.astype(np.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    scale, bias = (layer[name][...][None, None] for name in ("scale", "bias"))
    return (scaled.astype(x.dtype) * scale + bias).reshape(x.shape)


def multihead(attention_fn: Callable[..., Any], query, key, value, state: Any):
    """Compute projections, an attention function, and the projection back.

    Args:
        attention_fn: A function of query, key and value, (batch, seq, heads, dim).
        query: (batch, seq_q, embed).
        key: (batch, seq_kv, embed).
        value: (batch, seq_kv, embed).
        state: The state of a `MultiHeadAttention`. Norms that it has are LayerNorms
            over all heads together.
    """
    inputs = {"query": query, "key": key, "value": value}
    q, k, v = (_project(x, state[name]) for name, x in inputs.items())
    if "query_norm" in state:
        q = _layer_norm(q, state["query_norm"])
        k = _layer_norm(k, state["key_norm"])
    heads = attention_fn(q, k, v)
    if "sub_norm" in state:
        heads = _layer_norm(heads, state["sub_norm"])
    kernel, bias = (state["out"][x][...] for x in ("kernel", "bias"))
    return jnp.einsum("bshd,hde->bse", heads, kernel) + bias[None, None]


def rotary(x, theta: float = 1e4):
    r"""Rotate pairs of neighbouring features by angles in proportion to the position.

    $$y_{2i} + \mathrm{i}\, y_{2i+1} = (x_{2i} + \mathrm{i}\, x_{2i+1})\,
    e^{\mathrm{i}\, p\, \omega_i}, \quad \omega_i = \theta^{-2i / \mathrm{dim}}$$

    Here $p$ is the position. Angles are computed in float64, products in float32 or
    wider.

    Args:
        x: (batch, seq, heads, dim), with an even dim.
        theta: The base $\theta$ of the frequencies.

    References:
        https://arxiv.org/abs/2104.09864, eq. 34.
    """
    seq, dim = x.shape[1], x.shape[-1]
    wide = np.promote_types(x.dtype, jnp.float32)
    angles = np.arange(seq)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    cos, sin = (jnp.asarray(f(angles)[:, None], wide) for f in (np.cos, np.sin))
    a, b = x[..., ::2].astype(wide), x[..., 1::2].astype(wide)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
