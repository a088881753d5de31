"""Tokens, targets, lengths and positions may have any integer dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near

from jaxkern import cross_entropy
from jaxkern.nn import QuadraticTransformer, TransformerLM

# Vocabularies with more tokens than 8 bits can number, and with just as many.
VOCAB, BYTES = 300, 256
SIZES: dict[str, Any] = {
    "embed_dim": 8,
    "num_layers": 1,
    "num_heads": 1,
    "hidden_dim": 8,
}
DTYPES = ["int8", "uint8", "uint32", "int64", "uint64"]
TOKENS = np.array([[1, 127, 3, 90], [5, 6, 7, 8]])
LENGTHS = np.array([4, 2])


def model() -> Any:
    return TransformerLM(VOCAB, 200, **SIZES, rngs=nnx.Rngs(1))


@jax.jit
def run(tokens, lengths):
    """Run everything that takes integers, with one dtype for all of them."""
    lm = model()
    quadratic = QuadraticTransformer(
        VOCAB, 8, num_heads=1, num_layers=1, rngs=nnx.Rngs(0)
    )
    # The length says where the next tokens go; what the cache keeps is no matter here.
    cache = lm.make_cache(2, 150)._replace(length=lengths)
    features, cache = lm.extend(tokens, cache)
    hidden, head = jnp.cos(jnp.arange(16.0)).reshape(2, 8), jnp.eye(8, BYTES)
    return {
        "loss": lm.loss(tokens, tokens, positions=tokens),
        "logits": quadratic(tokens),
        "features": features,
        "length": cache.length,
        "cross_entropy": cross_entropy(hidden, head, tokens[:, 1]),
    }


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_of_integers(dtype):
    lm, prompt = model(), jnp.asarray(TOKENS, jnp.int32)
    expected = run(prompt, jnp.asarray(LENGTHS, jnp.int32))
    options: Any = {"max_new_tokens": 20}
    written = lm.generate(prompt, prompt_lengths=jnp.asarray(LENGTHS), **options)
    assert written.max() > 255, "a new token that 8 bits do not hold"
    with jax.enable_x64(dtype.endswith("64")):
        tokens, lengths = (jnp.asarray(x, dtype) for x in (TOKENS, LENGTHS))
        assert tokens.dtype == dtype
        got = run(tokens, lengths)
        options = {"max_new_tokens": np.uint8(20)}
        new = lm.generate(tokens, prompt_lengths=lengths, **options)
    assert new.dtype == jnp.int32
    np.testing.assert_array_equal(new, written)
    np.testing.assert_array_equal(got.pop("length"), expected.pop("length"))
    assert_near(got, expected)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_token_of_any_dtype_is_none(dtype):
    """A wrong target is not cut to 32 bits, where it could equal a right one."""
    limits = np.iinfo(dtype)
    hidden, head = jnp.ones((1, 4)), jnp.zeros((4, 200))
    wrong = [x for x in (limits.min, limits.max, 2**32 + 1) if not 0 <= x < 200]
    for target in wrong:
        if limits.min <= target <= limits.max:
            array: Any = np.array([target], dtype)
            assert np.isnan(cross_entropy(hidden, head, array))
    right = cross_entropy(hidden, head, jnp.array([7], jnp.dtype("uint8")))
    np.testing.assert_allclose(right, np.log(200), rtol=1e-6)
