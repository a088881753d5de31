"""Softmax attention in its plain form, with all weights in memory."""

from typing import Any

import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from .tiles import finite


@on_automatic_axes(
    lambda query: (P(*query[:3], None), P(query[0], query[2], query[1], None))
)
def attend_by_weights(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    bias: Float[Array, "#batch #heads #seq_q #seq_kv"] | None,
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None,
    kept: Float[Array, "#batch #heads seq_q seq_kv"] | None,
    is_causal: bool,
    scale: float,
    precision: PrecisionLike,
) -> tuple[
    Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch heads seq_q seq_kv"]
]:
    r"""Compute attention with a bias and with factors of the weights.

    $$o_i = \sum_j p_{ij} f_{ij} v_j, \qquad p_i = \mathrm{softmax}(s_i), \qquad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j + b_{ij}$$

    A query that sees no key has weights of 0.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        bias: The numbers $b$ that are added to the logits.
        mask: True where a query sees a key.
        kept: The factors $f$ of the weights, as dropout draws them.
        is_causal: As in `attention`.
        scale: The factor of the logits.
        precision: The precision of both products, as in `jax.numpy.einsum`.

    Returns:
        The results $o$ in the dtype of `value`, and the weights $p$ in the query's.
    """
    batch, seq_q, heads, dim = query.shape
    seq_kv, kv_heads = key.shape[1:3]
    sharing = heads // kv_heads
    options: Any = {"precision": precision}
    rows = widen(query).reshape(batch, seq_q, kv_heads, sharing, dim)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", rows, widen(key), **options) * scale
    logits = logits.reshape(batch, heads, seq_q, seq_kv)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    if is_causal:
        causal = jnp.tri(seq_q, seq_kv, dtype=bool)[None, None]
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    top = finite(lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    used = weights if kept is None else weights * kept.astype(weights.dtype)
    used = used.reshape(batch, kv_heads, sharing, seq_q, seq_kv)
    out = jnp.einsum("bkgqs,bskd->bqkgd", used, widen(value), **options)
    out = out.reshape(batch, seq_q, heads, value.shape[-1])
    return out.astype(value.dtype), weights.astype(query.dtype)
