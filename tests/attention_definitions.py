"""Two definitions of attention: float64 NumPy by hand, and the plain form in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_as_close, to_float64, value_and_vjp

from jaxkern.testing import plain


def see(mask, is_causal, shape):
    """Return the boolean mask of full `shape`, (batch, heads, seq_q, seq_kv)."""
    full = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    return full & np.tri(*shape[2:], dtype=bool) if is_causal else full


def attention_float64(args, cotangents, visible, scale):
    """Return ((out, lse), gradients).

    A query that sees no key has an output of 0, an lse of -inf and a gradient of 0.
    """
    query, key, value = to_float64(args)
    d_out, d_lse = to_float64(cotangents)
    groups = query.shape[2] // key.shape[2]
    wide_key, wide_value = (np.repeat(x, groups, axis=2) for x in (key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, wide_key) * scale
    logits = np.where(visible, logits, -np.inf)
    top = np.where(visible.any(-1), logits.max(-1), 0)
    weights = np.exp(logits - top[..., None])
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    weights /= np.where(total > 0, total, 1)[..., None]
    out = np.einsum("bhqk,bkhd->bqhd", weights, wide_value)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, wide_value)
    mean = (weights * d_weights).sum(-1, keepdims=True)
    d_logits = weights * (d_weights - mean + d_lse.swapaxes(1, 2)[..., None]) * scale
    d_query = np.einsum("bhqk,bkhd->bqhd", d_logits, wide_key)
    d_key = np.einsum("bhqk,bqhd->bkhd", d_logits, query)
    d_value = np.einsum("bhqk,bqhd->bkhd", weights, d_out)
    d_key, d_value = (
        x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(3) for x in (d_key, d_value)
    )
    return (out, lse.swapaxes(1, 2)), (d_query, d_key, d_value)


def plain_attention(query, key, value, visible, scale):
    """Attention with logits and softmax in float32 and weights in `value`'s dtype."""
    bias = jnp.where(visible, 0.0, -jnp.inf)
    out, lse = plain.attention(query, key, value, bias, scale=scale)
    return out, lse.swapaxes(1, 2)


def attention_args(size, dtype=jnp.float32, spread=None):
    """Return query, key, value and the cotangents of output and log-sum-exp.

    With a `spread`, query and key are whole numbers, so that no logit is rounded.
    """
    batch, seq_q, seq_kv, heads, kv_heads, dim, dim_v = size
    # NumPy draws the numbers: JAX would compile a generator for each new shape.
    rng = np.random.default_rng(0)

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, key = draw(batch, seq_q, heads, dim), draw(batch, seq_kv, kv_heads, dim)
    if spread is not None:
        query, key = jnp.round(spread * query), jnp.round(spread * key)
    value = draw(batch, seq_kv, kv_heads, dim_v)
    d_out = draw(batch, seq_q, heads, dim_v)
    d_lse = draw(batch, seq_q, heads, dtype=np.promote_types(dtype, jnp.float32))
    return (query, key, value), (d_out, d_lse)


def random_mask(shape):
    """Return a mask with half of its entries on and one query that sees no key."""
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[0, -1, shape[2] // 2] = False
    return jnp.asarray(mask)


def _without_infinity(result):
    (out, lse), gradients = result
    return (out, np.where(np.isneginf(lse), 0, np.asarray(lse))), gradients


def assert_close(got, expected, bound=1e-5):
    """Assert that errors are at most `bound` times the largest entry of their array.

    Rows have no bounds of their own: the gradient of a row can cancel to rounding
    errors.
    """
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max())


def assert_largest_error(got, plain, exact, rounded_to=None):
    """Assert that largest errors are at most twice the plain form's and one rounding.

    This is for arrays whose rows cannot be held to bounds of their own.

    rounded_to: a dtype with fewer bits than the result's, to which a kernel rounds
        before it widens.
    """
    for a, b, c in zip(*map(jax.tree.leaves, (got, plain, exact)), strict=True):
        assert a.shape == b.shape == c.shape
        assert a.dtype == b.dtype
        eps = float(jnp.finfo(rounded_to or a.dtype).eps)
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        bound = 2 * np.abs(b - c).max() + eps / 2 * np.abs(c).max()
        assert np.abs(a - c).max() <= bound


def assert_attention(got, exact, plain=None):
    """Assert that the same queries see no key, and that all errors are in bounds.

    The bounds are those of float32, or twice the errors of the plain form.
    """
    empty = np.isneginf(exact[0][1])
    np.testing.assert_array_equal(np.isneginf(got[0][1]), empty)
    assert not np.asarray(got[0][0])[empty].any()
    assert not np.asarray(got[1][0])[empty].any()
    got, exact = _without_infinity(got), _without_infinity(exact)
    if plain is None:
        # The backward's weights are exp(logit - lse), with the error of a rounded lse.
        lse = np.abs(exact[0][1]).max()
        assert_close(got, exact, 1e-5 + lse * np.finfo(np.float32).eps / 2)
    else:
        assert_as_close(got, _without_infinity(plain), exact)


def check_attention(fn, size, mask, dtype, scale=None):
    """Assert that `fn` is as exact as the plain form; return values and gradients.

    fn: a function of query, key and value that gives (out, lse).
    """
    batch, seq_q, seq_kv, heads, _, dim, _ = size
    scale = dim**-0.5 if scale is None else scale
    visible = np.broadcast_to(mask, (batch, heads, seq_q, seq_kv))
    args, cotangents = seen_args(size, visible, dtype)

    def plain(query, key, value):
        return plain_attention(query, key, value, visible, scale)

    exact = attention_float64(args, cotangents, visible, scale)
    got = value_and_vjp(fn, args, cotangents)
    assert_attention(got, exact, value_and_vjp(plain, args, cotangents))
    return got


def seen_args(size, visible, dtype):
    """Return `attention_args`; the lse of a query that sees no key has cotangent 0."""
    args, (d_out, d_lse) = attention_args(size, dtype)
    seen = visible.any(-1).swapaxes(1, 2)
    return args, (d_out, jnp.asarray(np.where(seen, d_lse, 0), d_lse.dtype))
