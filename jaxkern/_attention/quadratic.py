"""Attention by squared products: it has no softmax and no normalization."""

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
    r"""Sum the values, each weighted by the square of its key's product with the query.

    $$y_i = \sum_j a_{ij} v_j, \qquad a_{ij} = (q_i \cdot k_j / \mathrm{dim})^2$$

    The sum runs over the keys that query $i$ sees. A query that sees no key has the
    result 0. Products and squares are float32, or float64 if the arrays are; the
    weights are rounded to the dtype of `value` before the last product.

    Args:
        query: The queries.
        key: The keys, with as many heads as the query.
        value: The values.
        is_causal: Let query $i$ see only the keys $j \le i$.
        key_mask: True for the keys that all queries of a sample may see.

    Returns:
        The weighted sums, in the dtype of the arguments.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes differ, or
            `key_mask` is not boolean.
        ValueError: The shapes do not fit.
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
