from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_as_close, normal, to_float64, value_and_vjp

from jaxkern._attention.quadratic import quadratic_attention

SIZES = [(2, 7, 7, 3, 4), (1, 1, 1, 1, 1), (2, 5, 9, 2, 6)]
# Size, is_causal, masked, dtype: all sizes in 16 bits, all masks in 32.
CASES = [(size, True, True, jnp.bfloat16) for size in SIZES] + [
    (SIZES[2], is_causal, masked, jnp.float32)
    for is_causal in (False, True)
    for masked in (False, True)
]


def make(size, dtype=jnp.float32) -> tuple[Any, Any]:
    batch, seq_q, seq_kv, heads, dim = size
    shapes = [(batch, seq, heads, dim) for seq in (seq_q, seq_kv, seq_kv)]
    args = tuple(normal(i, shape, dtype) for i, shape in enumerate(shapes))
    return args, normal(3, shapes[0], dtype)


def visible(size, is_causal, key_mask):
    batch, seq_q, seq_kv, _, _ = size
    seen = np.tri(seq_q, seq_kv) if is_causal else np.ones((seq_q, seq_kv))
    return seen if key_mask is None else seen * np.asarray(key_mask)[:, None, None]


def float64(args, g, seen) -> Any:
    """Return values and gradients by hand, in NumPy."""
    q, k, v, g = to_float64((*args, g))
    dim = q.shape[-1]
    product = np.einsum("bqhd,bkhd->bhqk", q, k) / dim
    weights = product**2 * seen
    d_product = 2 * product * seen * np.einsum("bqhd,bkhd->bhqk", g, v) / dim
    d_q = np.einsum("bhqk,bkhd->bqhd", d_product, k)
    d_k = np.einsum("bhqk,bqhd->bkhd", d_product, q)
    d_v = np.einsum("bhqk,bqhd->bkhd", weights, g)
    return np.einsum("bhqk,bkhd->bqhd", weights, v), (d_q, d_k, d_v)


def plain(seen):
    def attend(q, k, v):
        product = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1]
        weights = (
            product
            * product
            * jnp.expand_dims(jnp.asarray(seen, q.dtype), range(4 - seen.ndim))
        )
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return attend


@pytest.mark.parametrize("size, is_causal, masked, dtype", CASES)
def test_values_and_gradients(size, is_causal, masked, dtype):
    args, g = make(size, dtype)
    key_mask = None
    if masked:
        key_mask = jax.random.bernoulli(jax.random.key(4), 0.6, (size[0], size[2]))
    seen = visible(size, is_causal, key_mask)

    def ours(*args):
        return quadratic_attention(*args, is_causal=is_causal, key_mask=key_mask)

    got = value_and_vjp(ours, args, g)
    plainly = value_and_vjp(plain(seen), args, g)
    assert_as_close(got, plainly, float64(args, g, seen))


def test_a_query_that_sees_no_key_has_no_result():
    args, g = make(SIZES[0])
    none = jnp.zeros((2, 7), bool)
    y, gradients = value_and_vjp(
        lambda *args: quadratic_attention(*args, key_mask=none), args, g
    )
    assert not any(np.asarray(a).any() for a in (y, *gradients))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": 3}, TypeError, "query must be an array, got int"),
        ({"key": jnp.ones((2, 7, 3, 5))}, ValueError, r"key must have shape \(2, seq"),
        ({"value": jnp.ones((2, 6, 3, 4))}, ValueError, r"value must have .*\(2, 7, 3"),
        ({"key_mask": jnp.ones((2, 7))}, TypeError, "a boolean array, got float32"),
        ({"key_mask": jnp.ones((7,), bool)}, ValueError, r"shape \(2, 7\), got \(7,"),
    ],
)
def test_refusals(changes, error, message):
    (query, key, value), _ = make(SIZES[0])
    call: Any = quadratic_attention
    with pytest.raises(error, match=f"quadratic_attention: .*{message}"):
        call(**{"query": query, "key": key, "value": value} | changes)
