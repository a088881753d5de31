from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_as_close,
    assert_near,
    normal,
    to_float64,
    untyped,
    value_and_vjp,
)

from jaxkern import cross_entropy


def make_arguments(batch, dim, vocab, dtype=jnp.float32) -> tuple[Any, Any, Any, Any]:
    targets = jax.random.randint(jax.random.key(2), batch, 0, vocab)
    hidden, head = normal(0, (*batch, dim), dtype), normal(1, (dim, vocab), dtype)
    return hidden, head, targets, normal(3, batch)


def float64(hidden, head, targets, g) -> Any:
    """Return losses and both gradients, token by token, in NumPy."""
    hidden, head, g = to_float64((hidden, head, g))
    losses = np.zeros(np.shape(targets))
    d_hidden, d_head = np.zeros(hidden.shape), np.zeros(head.shape)
    for at, target in np.ndenumerate(targets):
        logits = hidden[at] @ head
        weights = np.exp(logits - logits.max())
        p = weights / weights.sum()
        losses[at] = -np.log(p[target])
        d_logits = g[at] * (p - np.eye(head.shape[1])[target])
        d_hidden[at] = head @ d_logits
        d_head += np.outer(hidden[at], d_logits)
    return losses, (d_hidden, d_head)


def plain(hidden, head, targets):
    logits = jax.nn.log_softmax((hidden @ head).astype(jnp.float32))
    return -jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def run(hidden, head, targets, g, **options):
    def losses(hidden, head):
        return cross_entropy(hidden, head, targets, **options)

    return value_and_vjp(losses, (hidden, head), g)


SIZES: dict[str, Any] = {
    "one chunk": ((3, 5), 8, 40, 64),
    "even chunks": ((3, 5), 8, 40, 10),
    "a ragged chunk": ((2, 7), 9, 43, 10),
    "a column a chunk": ((5,), 4, 7, 1),
    "one token": ((1,), 3, 11, 4),
    "no batch": ((), 3, 11, 4),
    "one word": ((4,), 3, 1, 4),
}


# Chunk length and dtype do not interact: all sizes in float32, one in bfloat16.
@pytest.mark.parametrize(
    "name, dtype",
    [*((name, jnp.float32) for name in SIZES), ("a ragged chunk", jnp.bfloat16)],
)
def test_values_and_gradients(name, dtype):
    batch, dim, vocab, chunk = SIZES[name]
    hidden, head, targets, g = make_arguments(batch, dim, vocab, dtype)
    got = run(hidden, head, targets, g, chunk=chunk)
    assert got[0].dtype == jnp.float32
    exact = float64(hidden, head, targets, g)
    if dtype == jnp.float32:
        assert_near(got, exact, 2e-6)
    else:
        args = (hidden, head)
        theirs = value_and_vjp(lambda h, w: plain(h, w, targets), args, g)
        assert_as_close(got, theirs, exact)


def test_large_logits():
    """Exponentials overflow in the chunk of the target and in others."""
    hidden, head = jnp.array([[1e4], [-1e4], [0.0]]), jnp.linspace(-1, 1, 9)[None]
    targets = jnp.array([7, 0, 3])
    losses, gradients = run(hidden, head, targets, jnp.ones(3), chunk=2)
    np.testing.assert_allclose(losses, [2500, 0, np.log(9)], rtol=1e-6)
    assert_near(gradients[0], np.array([[0.25], [0.0], [0.25]]))


def test_no_token():
    hidden, head, targets, g = make_arguments((0,), 3, 11)
    losses, (d_hidden, d_head) = run(hidden, head, targets, g, chunk=4)
    assert losses.shape == (0,) and d_hidden.shape == (0, 3)
    assert not np.asarray(d_head).any()


def test_tokens_that_do_not_count():
    hidden, head, targets, g = make_arguments((2, 7), 8, 50)
    where = jnp.arange(7)[None] < jnp.array([[7], [4]])
    padded = jnp.where(where, targets, -100)

    counted = jnp.where(where, g, 0)
    got = run(hidden, head, padded, g, where=where, chunk=20)
    losses, gradients = float64(hidden, head, targets, counted)
    assert_near(got, (np.where(where, losses, 0), gradients))
    assert (np.asarray(got[1][0])[~np.asarray(where)] == 0).all()
    # Without `where`, the loss of a target that is no token is NaN.
    losses = cross_entropy(hidden, head, padded.at[0, 0].set(50), chunk=20)
    bad = ~np.asarray(where)
    bad[0, 0] = True
    np.testing.assert_array_equal(np.isnan(losses), bad)


def test_hidden_of_tokens_that_do_not_count_is_not_read():
    hidden, head, targets, g = make_arguments((5,), 3, 11)
    where = jnp.arange(5) < 3
    clean, broken = (
        run(jnp.where(where[:, None], hidden, fill), head, targets, g, where=where)
        for fill in (0, jnp.nan)
    )
    jax.tree.map(np.testing.assert_array_equal, broken, clean)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64]
)
def test_targets_of_any_integer(dtype):
    """8 bits cannot count the vocabulary, and 32 bits cannot hold all targets."""
    vocab = 256
    hidden, head = jnp.zeros((3, 4)), jnp.zeros((4, vocab))
    largest = np.iinfo(dtype).max
    targets = np.array([0, min(largest, vocab - 1), largest], dtype)
    losses = untyped.cross_entropy(hidden, head, targets)
    inside = targets.astype(object) < vocab
    np.testing.assert_allclose(losses, np.where(inside, np.log(vocab), np.nan))
    if dtype().itemsize < 8:
        np.testing.assert_array_equal(
            cross_entropy(hidden, head, jnp.asarray(targets)), losses
        )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_gradients_in_16_bits_with_small_cotangents(dtype, scale):
    """In a mean over many tokens of a large vocabulary, g p is less than 1e-7."""
    hidden, head, targets, g = make_arguments((64,), 16, 2000, dtype)
    head = head / 4
    args, g = (hidden, head), scale * jnp.abs(g)
    theirs = value_and_vjp(lambda h, w: plain(h, w, targets), args, g)
    assert_as_close(run(*args, targets, g), theirs, float64(*args, targets, g))


def test_memory():
    """Temporary memory holds a tenth of the logits, and the gradient of the head."""
    shape, vocab = (1024, 64), 20_000
    hidden = jax.ShapeDtypeStruct(shape, jnp.float32)
    head = jax.ShapeDtypeStruct((64, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct(shape[:1], jnp.int32)

    def temp_bytes(loss):
        def mean(hidden, head, targets):
            return loss(hidden, head, targets).mean()

        program = jax.jit(jax.grad(mean, argnums=(0, 1)))
        stats = program.lower(hidden, head, targets).compile().memory_analysis()
        assert stats is not None
        return stats.temp_size_in_bytes

    logits = 4 * shape[0] * vocab
    assert temp_bytes(partial(cross_entropy, chunk=vocab // 10)) < 0.5 * logits
    assert temp_bytes(plain) > logits


def test_transformations():
    hidden, head, targets, g = make_arguments((4, 6), 8, 50)
    loss = partial(cross_entropy, chunk=20)

    def gradients(fn):
        def mean(*args):
            return (fn(*args, targets) * g).sum()

        return jax.jit(jax.grad(mean, argnums=(0, 1)))(hidden, head)

    expected = gradients(loss)
    assert_near(gradients(jax.checkpoint(loss)), expected)
    assert_near(gradients(jax.vmap(loss, in_axes=(0, None, 0))), expected)

    def scanned(hidden, head, targets):
        return jax.lax.scan(
            lambda _, xs: (None, loss(xs[0], head, xs[1])), None, (hidden, targets)
        )[1]

    assert_near(gradients(scanned), expected)
    with jax.enable_x64(True):
        wide = to_float64((hidden, head))
        hidden, head = map(jnp.asarray, wide)
        losses = loss(hidden, head, targets)
        assert losses.dtype == jnp.float64
        exact, _ = float64(hidden, head, targets, g)
        np.testing.assert_allclose(losses, exact, rtol=1e-12)


HIDDEN, HEAD, TARGETS = jnp.ones((2, 5)), jnp.ones((5, 7)), jnp.zeros(2, int)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((HIDDEN, HEAD.astype(jnp.bfloat16), TARGETS), {}, TypeError, "the dtype of"),
        (
            (HIDDEN, HEAD[1:], TARGETS),
            {},
            ValueError,
            r"head must have shape \(5, vocab\) for hidden of shape \(2, 5\)",
        ),
        (
            (HIDDEN, HEAD, TARGETS[1:]),
            {},
            ValueError,
            r"cross_entropy: targets must have shape \(2,\) for hidden of",
        ),
        (
            (HIDDEN, HEAD, TARGETS.astype(float)),
            {},
            TypeError,
            "targets must be an integer array, got float32",
        ),
        ((HIDDEN, HEAD, [0, 1]), {}, TypeError, "targets must be an array, got list"),
        (
            (HIDDEN, HEAD, TARGETS),
            {"where": TARGETS},
            TypeError,
            "where must be a boolean array, got int32",
        ),
        (
            (HIDDEN, HEAD, TARGETS),
            {"where": jnp.ones(3, bool)},
            ValueError,
            r"where must have shape \(2,\)",
        ),
        (
            (HIDDEN, HEAD, TARGETS),
            {"chunk": 0},
            ValueError,
            "chunk must be an integer of at least 1, got 0",
        ),
    ],
)
def test_refusals(args, options, error, message):
    with pytest.raises(error, match=message):
        untyped.cross_entropy(*args, **options)
