from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import untyped

from jaxkern.nn import TransformerLM

VOCAB, CONTEXT = 50, 16
SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 40,
}


def lm(**options):
    return lambda: untyped.nn.TransformerLM(
        VOCAB, CONTEXT, **SIZES | options, rngs=nnx.Rngs(0)
    )


def call(*args, **options):
    return lambda: untyped.nn.TransformerLM(VOCAB, CONTEXT, **SIZES, rngs=nnx.Rngs(0))(
        *args, **options
    )


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lm(num_heads=5),
            ValueError,
            "num_heads must divide embed_dim=24 unless head_dim is given, got 5",
        ),
        (
            lm(embed_dim=20),
            ValueError,
            "embed_dim / num_heads or head_dim must be even, for rotary .*, got 5",
        ),
        (
            lm(num_layers=0),
            ValueError,
            "num_layers must be an integer of at least 1, got 0",
        ),
        (lm(mesh="fsdp=2"), TypeError, "mesh must be a jax.sharding.Mesh, got str"),
        (lm(num_kv_heads=3), ValueError, "num_kv_heads must divide num_heads=4, got 3"),
        (lm(rope_theta=-1.0), ValueError, "rope_theta must be positive, got -1.0"),
        (lm(rope_theta="1e4"), TypeError, "rope_theta must be one number, got '1e4'"),
        (lm(attention_fn="ring"), TypeError, "attention_fn must be callable, got str"),
        (lm(mlp=3), TypeError, "mlp must be callable, got int"),
        (
            call(jnp.zeros((2, CONTEXT + 1), int)),
            ValueError,
            "TransformerLM: tokens must be at most context_length=16 tokens, got 17",
        ),
        (
            call(jnp.full((2, 3), VOCAB)),
            ValueError,
            "TransformerLM: tokens must be from 0 to 49, got 50",
        ),
        (call(jnp.array([[0, -1]])), ValueError, "must be from 0 to 49, got -1"),
        (
            call(jnp.zeros(3, int)),
            ValueError,
            r"tokens must have shape \(batch, seq\), got \(3,\)",
        ),
        (
            call(jnp.zeros((2, 3))),
            TypeError,
            "tokens must be an integer array, got float32",
        ),
        (call([[0]]), TypeError, "tokens must be an array, got list"),
        (
            call(jnp.zeros((2, 3), int), jnp.arange(4)),
            ValueError,
            r"positions must have shape \(3,\) or \(2, 3\), got \(4,\)",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_tokens_out_of_range_show_under_jit():
    run = nnx.jit(lambda model, tokens: model(tokens))
    model = TransformerLM(VOCAB, CONTEXT, **SIZES, rngs=nnx.Rngs(0))
    for bad in (VOCAB, -1):
        logits = run(model, jnp.zeros((2, 4), int).at[0, 2].set(bad))
        assert np.isnan(logits[0, 2:]).all() and np.isfinite(logits[1]).all()
