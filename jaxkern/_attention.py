"""Softmax attention with its log-sum-exp, and the merge of two partial results."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._checks import (
    Implementation,
    check_floating,
    check_shape,
    check_xla_only,
)
from ._matmul import widen


def attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> (
    Float[Array, "batch seq_q heads dim_v"]
    | tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]
):
    """Softmax attention, and on request the log-sum-exp of its logits."""
    op = "attention"
    check_xla_only(op, implementation)
    check_query_key_value(op, query, key, value)
    seq_q, seq_kv = query.shape[1], key.shape[1]
    if is_causal:
        causal = jnp.tri(seq_q, seq_kv, dtype=bool)[None, None]
        mask = causal if mask is None else mask & causal
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _reference(query, key, value, mask, scale)
    return (out, lse) if return_lse else out


def check_query_key_value(op: str, query: object, key: object, value: object) -> None:
    """Shapes and dtypes fit, and the key's heads divide the query's."""
    check_floating(op, query=query, key=key, value=value)
    if query.ndim != 4:
        raise ValueError(
            f"{op}: query must have shape (batch, seq, heads, dim), got {query.shape}"
        )
    batch, _, heads, dim = query.shape
    check_shape(op, "key", key, (batch, "seq", "kv_heads", dim))
    check_shape(op, "value", value, (*key.shape[:3], "dim"))
    if heads % key.shape[2]:
        raise ValueError(
            f"{op}: heads of key must divide the {heads} of query, got {key.shape[2]}"
        )


def _reference(query, key, value, mask, scale):
    batch, seq_q, heads, dim = query.shape
    groups = heads // key.shape[2]
    key, value = (jnp.repeat(a, groups, axis=2) for a in (key, value))
    logits = jnp.einsum("bqhd,bkhd->bhqk", widen(query), widen(key)) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0, lse))
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, widen(value)).astype(value.dtype)
    return out, lse[..., 0].swapaxes(1, 2)


def merge_attention(out_a, lse_a, out_b, lse_b):
    """The attention over two disjoint sets of keys, from the attention over each."""
    lse = jnp.logaddexp(lse_a, lse_b)
    finite = jnp.where(jnp.isneginf(lse), 0, lse)
    weight_a, weight_b = (jnp.exp(x - finite)[..., None] for x in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).astype(out_a.dtype), lse
