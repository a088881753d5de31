"""All forms of attention: rows that see no key, errors in 16 bits, and debug flags."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import attention_float64, plain_attention, see
from helpers import assert_as_close, mesh, value_and_vjp

from jaxkern import (
    BlockMask,
    Dilation,
    attention,
    block_sparse_attention,
    context_parallel_attention,
    cross_entropy,
    dilated_attention,
    merge_attention,
)
from jaxkern._attention.tiles import with_infinity
from jaxkern._attention.tiling import attention_by_tiles, make_tiling

# Causal, without the first key: the first query sees no key.
SEQ = 17
SEEN = np.arange(SEQ) > 0
BLOCKS = BlockMask.from_dense(np.tri(SEQ, dtype=bool) & SEEN, block_size=8)


def by_tiles(query, key, value, return_lse=True):
    mask, tiling = jnp.asarray(SEEN)[None, None, None], make_tiling(SEQ, SEQ, 0, 8)
    out, lse = attention_by_tiles(query, key, value, mask, 0.5, tiling)
    return (out, with_infinity(lse)) if return_lse else out


UNSEEN = {
    "short": partial(
        attention,
        mask=jnp.asarray(SEEN)[None, None, None],
        is_causal=True,
        return_lse=True,
    ),
    "tiles": by_tiles,
    "block-sparse": partial(block_sparse_attention, mask=BLOCKS, return_lse=True),
    "dilated": partial(
        dilated_attention,
        dilation=Dilation([8, SEQ], [1, 1]),
        key_mask=jnp.asarray(SEEN)[None],
        is_causal=True,
        return_lse=True,
    ),
}
unseen = pytest.mark.parametrize("form", UNSEEN.values(), ids=UNSEEN)


@unseen
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_see_nothing_have_no_gradient_whatever_their_cotangent(form, bad):
    rng = np.random.default_rng(0)
    args = tuple(jnp.asarray(rng.standard_normal((3, 1, SEQ, 1, 4)), jnp.float32))
    cotangents = (
        jnp.asarray(rng.standard_normal((1, SEQ, 1, 4)), jnp.float32),
        jnp.asarray(rng.standard_normal((1, SEQ, 1)), jnp.float32),
    )
    got, expected = (
        value_and_vjp(form, args, tuple(x.at[:, 0].set(fill) for x in cotangents))
        for fill in (bad, 0)
    )
    assert np.isneginf(got[0][1][:, 0]).all() and not got[0][0][:, 0].any()
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(np.isfinite(x).all() for x in got[1])


def without_lse(form):
    return lambda x: form(x, x, x, return_lse=False)


def token_losses(hidden):
    return cross_entropy(
        hidden,
        jnp.ones((4, 10)),
        jnp.array([3, -100, 9]),
        where=jnp.array([True, True, False]),
        ignore_index=-100,
        z_loss=1e-4,
        label_smoothing=0.1,
        softcap=5.0,
        return_lse=True,
        chunk=4,
    )


X = jnp.asarray(np.random.default_rng(1).standard_normal((1, SEQ, 1, 4)), jnp.float32)


def around_a_ring(query, key, value):
    """Make the mesh in the call, because a machine may have one device only."""
    return context_parallel_attention(
        query, key, value, mesh=mesh(ring=2), axis_name="ring", is_causal=True
    )


NO_KEY = jnp.full((1, SEQ, 1), -jnp.inf)
DEBUGGED = {
    **{name: (without_lse(form), X) for name, form in UNSEEN.items()},
    "all rows see": (lambda x: attention(x, x, x, return_lse=True), X),
    "public tiles": (
        lambda x: attention(x, x, x, is_causal=True, return_lse=True),
        jnp.tile(X, (1, 16, 1, 1)),
    ),
    "merge": (lambda x: merge_attention(x, x[..., 0], x, NO_KEY), X),
    "ring": (
        lambda x: around_a_ring(x, x, x),
        X[:, 1:],
    ),
    "cross_entropy": (token_losses, X[0, :3, 0]),
}


@pytest.mark.parametrize("run, x", DEBUGGED.values(), ids=DEBUGGED)
def test_no_infinity_or_nan_within(run, x):
    """Ops are called without `jax.jit`, so that JAX checks each step."""
    with jax.debug_infs(True), jax.debug_nans(True):
        value, vjp = jax.vjp(run, x)
        vjp(value)


def by_block_mask(query, key, value):
    blocks = BlockMask.causal(query.shape[1], query.shape[1], block_size=64)
    return block_sparse_attention(query, key, value, mask=blocks)


def in_one_segment(query, key, value):
    dilation = Dilation([query.shape[1]], [1])
    return dilated_attention(query, key, value, is_causal=True, dilation=dilation)


FORMS = {
    "attention": partial(attention, is_causal=True),
    "block-sparse": by_block_mask,
    "dilated": in_one_segment,
    "ring": around_a_ring,
}
# Sequence length, factor of the queries (a large one makes the softmax peaked), and
# factor of the cotangents.
ROUNDED = {
    "peaked": (128, 30, 1),
    "peaked, tiles": (320, 30, 1),
    "small cotangents": (128, 1, 1e-3),
    "tiny cotangents": (320, 1, 1e-4),
    "long": (1024, 1, 1e-3),
}


# Gradients do not underflow in bfloat16, so two cases are enough.
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, jnp.float16) for name in ROUNDED),
        *((name, jnp.bfloat16) for name in ("peaked", "peaked, tiles")),
    ],
)
def test_error_in_16_bits_is_that_of_the_plain_form(name, dtype):
    check_error_in_16_bits(name, dtype, FORMS.values())


@pytest.mark.usefixtures("hopper")
def test_error_of_the_kernel_in_float16_is_that_of_the_plain_form():
    """Gradients of logits are about 1e-7 here; the smallest float16 number is 6e-8.

    The kernel enlarges the cotangents of each batch by a power of two of its own.
    """
    kernel = partial(attention, is_causal=True, implementation="mosaic_gpu")
    check_error_in_16_bits("tiny cotangents", jnp.float16, [kernel], batch=2)


def check_error_in_16_bits(name, dtype, forms, batch=1):
    seq, peak, cotangent = ROUNDED[name]
    rng, scales = np.random.default_rng(0), (peak, 1, 1, cotangent)
    *args, d_out = (
        jnp.asarray(scale * rng.standard_normal((batch, seq, 1, 16)), dtype)
        for scale in scales
    )
    d_out = d_out.at[1:].multiply(8)
    visible = see(None, True, (batch, 1, seq, seq))
    cotangents = d_out, jnp.zeros((batch, seq, 1))
    exact = attention_float64(args, cotangents, visible, 0.25)
    plain = partial(plain_attention, visible=visible, scale=0.25)
    plain = value_and_vjp(plain, args, cotangents)
    for form in forms:
        got = value_and_vjp(form, args, d_out)
        assert_as_close(got[0], plain[0][0], exact[0][0])
        for x, theirs, wanted in zip(got[1], plain[1], exact[1], strict=True):
            # All rows together: the gradient of one may cancel to rounding errors.
            flat = (np.ravel(np.asarray(a, np.float64)) for a in (x, theirs, wanted))
            x_error, plain_error, norm = _errors(*flat)
            eps = float(jnp.finfo(dtype).eps)
            assert x_error <= 2 * plain_error + eps / 2 * norm


def _errors(got, plain, exact):
    return (
        *(np.linalg.norm(x - exact) for x in (got, plain)),
        np.linalg.norm(exact),
    )
