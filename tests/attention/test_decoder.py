"""Windows, softcaps, documents and attention sinks, against jnp in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_as_close, normal, value_and_vjp

from jaxkern._attention.decoder import (
    decoder_attention,
    number_documents,
    with_sinks,
)
from jaxkern.testing.plain import in_float64, with_gradients

LENGTHS = [[0.3, 0.45, 0.25], [0.6, 0.4]]


def documents(seq):
    """Return ids that grow in the first row and fall in the second."""
    rows = [
        np.repeat(np.arange(len(parts)) * sign, np.diff(ends, prepend=0))
        for parts, sign in zip(LENGTHS, (1, -1), strict=True)
        for ends in [np.round(seq * np.cumsum(parts)).astype(int)]
    ]
    return np.stack(rows)


def plain_attention(query, key, value, sinks, *, ids, window, softcap, as_keys):
    """Sinks are the logits of a last key, whose value is left out.

    Otherwise they are what weakens the attention without them. In float32 this is less
    precise where a query sees one key.
    """
    key, value = (
        jnp.repeat(x, query.shape[2] // key.shape[2], 2) for x in (key, value)
    )
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    behind = np.arange(query.shape[1])[:, None] - np.arange(query.shape[1])[None]
    seen = (behind >= 0)[None] & (ids[:, :, None] == ids[:, None])
    if window is not None:
        seen &= (behind < window)[None]
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    if not as_keys:
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
        lse = jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2)
        return out * jax.nn.sigmoid(lse - sinks[None, None])[..., None]
    sink = jnp.broadcast_to(sinks[None, :, None, None], (*logits.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([logits, sink], -1))[..., :-1]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize(
    "seq, options",
    [
        (20, {"window": 4, "softcap": None}),
        (300, {"window": 40, "softcap": None}),
        (300, {"window": None, "softcap": 1.0}),
    ],
    ids=["mask", "blocks", "capped"],
)
def test_values_and_gradients(seq, options):
    ids = documents(seq)
    shapes = [(2, seq, 2, 4), (2, seq, 1, 4), (2, seq, 1, 4), (2,), (2, seq, 2, 4)]
    *args, cotangent = (normal(i, shape) for i, shape in enumerate(shapes))

    def run(query, key, value, sinks):
        given: Any = options | {"segment_ids": jnp.asarray(ids), "return_lse": True}
        out, lse = decoder_attention(query, key, value, is_causal=True, **given)
        return with_sinks(out, lse, sinks)

    plain = partial(plain_attention, ids=ids, **options)
    exact = in_float64(with_gradients(partial(plain, as_keys=True)), cotangent, *args)
    got, rounded = (
        value_and_vjp(fn, args, cotangent)
        for fn in (run, partial(plain, as_keys=False))
    )
    # Each leaf is one row: the gradient of a query that sees one key is all rounding.
    got, rounded, exact = (
        jax.tree.map(np.ravel, tree) for tree in (got, rounded, exact)
    )
    assert_as_close(got, rounded, exact)


def test_documents_are_numbered_and_their_tokens_too():
    """An id that comes again begins another document."""
    ids = jnp.array([[7, 7, 7, 2, 2, 7], [-1, 0, 0, 0, 0, 0]])
    numbers, places = number_documents(ids)
    np.testing.assert_array_equal(numbers, [[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(places, [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
