"""Wrong options and inputs of `MultiHeadAttention` and of `attention_fn`."""

from functools import partial

import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import normal, untyped

import jaxkern

EMBED, HEADS, SEQ, RATE = 16, 4, 6, 0.4
X, Z = normal(0, (2, SEQ, EMBED)), normal(1, (2, 5, 12))


def build(**options):
    return lambda: untyped.nn.MultiHeadAttention(
        EMBED, HEADS, rngs=nnx.Rngs(0), **options
    )


def call(*args, built=None, cache=None, **options):
    def run():
        module = build(**built or {})()
        if cache:
            module.init_cache(cache)
        return module(*(args or (X,)), **options)

    return run


def function(*shapes, **options):
    arrays = [jnp.ones(shape) for shape in shapes or ((2, SEQ, HEADS, 8),) * 3]
    return lambda: untyped.nn.attention_fn(*arrays, **options)


DILATED = {
    "attention_fn": partial(
        jaxkern.dilated_attention, dilation=jaxkern.Dilation((4,), (1,))
    )
}
REFUSALS = [
    (
        build(dropout_rate=1.0),
        ValueError,
        "MultiHeadAttention: dropout_rate must be less than 1, got 1.0",
    ),
    (build(dropout_rate=-0.5), ValueError, "dropout_rate must be at least 0, got -0.5"),
    (
        build(dropout_rate=0.5, **DILATED),
        ValueError,
        "attention_fn must be jaxkern.attention, or have the arguments of flax's as "
        "nn.attention_fn has, for dropout_rate=0.5, got dilated_attention",
    ),
    (build(out_features=0), ValueError, "out_features must be an integer of at least"),
    (build(in_kv_features=1.5), ValueError, "in_kv_features must be an integer of at"),
    (build(keep_rngs=1), TypeError, "keep_rngs must be True or False"),
    (
        build(dropout_rate=0.5, attention_sinks=True),
        ValueError,
        "attention_sinks must be False for dropout_rate=0.5, got True",
    ),
    (
        call(built={"attention_sinks": True}, sow_weights=True),
        ValueError,
        "attention_sinks must be False for decode=False, sow_weights=True and dropout",
    ),
    (
        call(built={"dropout_rate": 0.5}),
        ValueError,
        "deterministic must be True or False for dropout_rate=0.5, got None in the",
    ),
    (
        call(built={"dropout_rate": 0.5, "keep_rngs": False}, deterministic=False),
        ValueError,
        "rngs must be an nnx.Rngs or an nnx.RngStream for dropout_rate=0.5 unless",
    ),
    (
        call(built={"dropout_rate": 0.5}, deterministic="no"),
        TypeError,
        "deterministic must be True or False, and known when traced, got 'no'",
    ),
    (
        call(built=DILATED, sow_weights=True),
        ValueError,
        "for decode=False, sow_weights=True and dropout, got dilated_attention",
    ),
    (
        call(X, normal(0, (2, 5, EMBED)), built={"in_kv_features": 12}),
        ValueError,
        r"key must have shape \(batch, seq, 12\), got \(2, 5, 16\)",
    ),
    (
        call(decode=True),
        ValueError,
        "MultiHeadAttention: init_cache must be called before decode=True",
    ),
    (
        call(cache=(2, SEQ - 1, EMBED), decode=True),
        ValueError,
        "query must fit into the cache of 5 tokens, of which 0 are taken, got 6 more",
    ),
    (
        call(cache=(3, SEQ, EMBED), decode=True),
        ValueError,
        r"query must have the batch of the cache, 3, got \(2, 6, 16\)",
    ),
    (
        call(X, X[:, 1:], cache=(2, SEQ, EMBED), decode=True),
        ValueError,
        r"key must have shape \(2, 6, 16\) for decode=True, got \(2, 5, 16\)",
    ),
    (
        call(cache=(2, SEQ)),
        ValueError,
        r"init_cache: input_shape must be \(batch, seq, embed\), got \(2, 6\)",
    ),
    (
        function(dropout_rate=0.5),
        TypeError,
        "attention_fn: dropout_rng must be a key, .* for dropout_rate=0.5 unless",
    ),
    (
        function((2, SEQ, HEADS, 8), (SEQ, HEADS, 8), (SEQ, HEADS, 8)),
        ValueError,
        r"attention_fn: key must have shape \(\*batch, seq, heads, dim\) with the ",
    ),
    (
        function((2, SEQ, HEADS, 8), (2, SEQ, 3, 8), (2, SEQ, 3, 8)),
        ValueError,
        "attention_fn: heads of query must be a multiple of those of key and value",
    ),
    (
        function(mask=jnp.ones((2, SEQ, SEQ), bool)),
        ValueError,
        r"mask must broadcast to \(\*batch, heads, seq_q, seq_kv\) = \(2, 4, 6, 6\), ",
    ),
    (
        function(bias=jnp.ones((1, 1, SEQ, SEQ), int)),
        TypeError,
        "attention_fn: bias must have a floating-point dtype, got int32",
    ),
    (function(bias=0.5), TypeError, "attention_fn: bias must be an array, got float"),
    (
        function(bias=jnp.ones((SEQ, SEQ)), implementation="mosaic_gpu"),
        NotImplementedError,
        "bias, dropout, module and precision need all weights, which implementation "
        "'mosaic_gpu' does not compute",
    ),
    (function(is_causal=1), TypeError, "attention_fn: is_causal must be True or False"),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("run, error, message", REFUSALS)
def test_refusals(run, error, message):
    with pytest.raises(error, match=message):
        run()
