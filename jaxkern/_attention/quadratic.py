"""Attention whose weights are squared products: no softmax, and no normalization."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._core.checks import check_flag, check_floating, check_shape
from .checks import check_key_mask


def quadratic_attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv heads dim"],
    value: Float[Array, "batch seq_kv heads dim_v"],
    *,
    is_causal: bool = False,
    key_mask: Bool[Array, "batch seq_kv"] | None = None,
) -> Float[Array, "batch seq_q heads dim_v"]:
    r"""Sum the values, each by the square of its key's product with the query.

    $$y_i = \sum_j a_{ij} v_j, \qquad a_{ij} = (q_i \cdot k_j / \mathrm{dim})^2$$

    over the keys that the query sees: with `is_causal` $j \le i$, with a `key_mask`
    those where it is True. A query that sees none has 0 for its result.

    The products and their squares are float32, float64 if the arrays are.

    Raises:
        TypeError: an array is no floating-point one, dtypes differ, or the mask is not
            boolean.
        ValueError: the shapes do not fit.
    """
    op = "quadratic_attention"
    query, key, value = check_floating(op, query=query, key=key, value=value)
    check_flag(op, is_causal=is_causal)
    check_shape(op, "query", query, ("batch", "seq_q", "heads", "dim"))
    batch, seq_q, heads, dim = query.shape
    check_shape(op, "key", key, (batch, "seq_kv", heads, dim))
    seq_kv = key.shape[1]
    check_shape(op, "value", value, (batch, seq_kv, heads, "dim_v"))
    check_key_mask(op, key_mask, (batch, seq_kv))
    wide = np.promote_types(query.dtype, jnp.float32)
    product = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
    weights = jnp.square(product / dim)
    if is_causal:
        weights = jnp.where(jnp.tri(seq_q, seq_kv, dtype=bool), weights, 0)
    if key_mask is not None:
        weights = jnp.where(key_mask[:, None, None, :], weights, 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
