"""Attention with all logits in memory, and rotary embedding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
