from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def float64(
    hidden, head, targets, g, d_lse=None, *, z_loss=0.0, label_smoothing=0.0, softcap=0
) -> Any:
    """Return losses and both gradients, token by token, in NumPy.

    With a cotangent `d_lse` of the log-sum-exps, these stand beside the losses.
    """
    hidden, head, g = to_float64((hidden, head, g))
    losses, lses = np.zeros(np.shape(targets)), np.zeros(np.shape(targets))
    d_hidden, d_head = np.zeros(hidden.shape), np.zeros(head.shape)
    words = head.shape[1]
    for at, target in np.ndenumerate(targets):
        logits, slope = hidden[at] @ head, 1.0
        if softcap:
            bent = np.tanh(logits / softcap)
            logits, slope = softcap * bent, 1 - bent**2
        weights = np.exp(logits - logits.max())
        p, lse = weights / weights.sum(), np.log(weights.sum()) + logits.max()
        wanted = (1 - label_smoothing) * np.eye(words)[target] + label_smoothing / words
        losses[at], lses[at] = lse - wanted @ logits + z_loss * lse**2, lse
        d_logits = g[at] * (p - wanted + 2 * z_loss * lse * p)
        d_logits += 0 if d_lse is None else np.asarray(d_lse)[at] * p
        d_hidden[at] = head @ (d_logits * slope)
        d_head += np.outer(hidden[at], d_logits * slope)
    return losses if d_lse is None else (losses, lses), (d_hidden, d_head)


def plain(hidden, head, targets, z_loss=0.0, label_smoothing=0.0, softcap=None):
    logits = (hidden @ head).astype(jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    wanted = (1 - label_smoothing) * target + label_smoothing * logits.mean(-1)
    return lse - wanted + z_loss * lse**2, lse


def plain_losses(*args, **options):
    return plain(*args, **options)[0]


def run(hidden, head, targets, g, **options):
    def losses(hidden, head):
        return cross_entropy(hidden, head, targets, **options)

    return value_and_vjp(losses, (hidden, head), g)


ALL: dict[str, Any] = {"z_loss": 0.1, "label_smoothing": 0.3, "softcap": 2.0}
NONE: dict[str, Any] = {}
SIZES: dict[str, Any] = {
    "one chunk": ((3, 5), 8, 40, 64, NONE),
    "even chunks": ((3, 5), 8, 40, 10, {"label_smoothing": 0.3}),
    "a ragged chunk": ((2, 7), 9, 43, 10, ALL),
    "a column a chunk": ((5,), 4, 7, 1, {"z_loss": 0.1}),
    "one token": ((1,), 3, 11, 4, {"softcap": 2.0}),
    "no batch": ((), 3, 11, 4, {"label_smoothing": 1.0}),
    "one word": ((4,), 3, 1, 4, ALL),
}


# Chunk length, options and dtype do not interact: all sizes in float32, each with other
# options, and one in bfloat16.
@pytest.mark.parametrize(
    "name, dtype",
    [*((name, jnp.float32) for name in SIZES), ("a ragged chunk", jnp.bfloat16)],
)
def test_values_and_gradients(name, dtype):
    batch, dim, vocab, chunk, options = SIZES[name]
    hidden, head, targets, g = make_arguments(batch, dim, vocab, dtype)
    both = g, normal(4, g.shape)
    got = run(hidden, head, targets, both, chunk=chunk, return_lse=True, **options)
    assert got[0][0].dtype == got[0][1].dtype == jnp.float32
    exact = float64(hidden, head, targets, *both, **options)
    if dtype == jnp.float32:
        assert_near(got, exact, 2e-6)
    else:
        losses = partial(plain, targets=targets, **options)
        assert_as_close(got, value_and_vjp(losses, (hidden, head), both), exact)


@pytest.mark.usefixtures("promoting")
def test_it_is_the_loss_of_optax():
    """In optax, labels are smoothed alike, and it has neither z-loss nor soft cap."""
    hidden, head, targets, g = make_arguments((2, 7), 8, 50)
    where = jnp.arange(7)[None] < jnp.array([[7], [4]])

    def theirs(hidden, head):
        labels = optax.smooth_labels(jax.nn.one_hot(targets, 50), 0.3)
        smoothed = optax.safe_softmax_cross_entropy(hidden @ head, labels)
        hard = optax.softmax_cross_entropy_with_integer_labels
        return smoothed, hard(hidden @ head, targets, where=where)

    def mine(hidden, head):
        loss = partial(cross_entropy, hidden, head, chunk=20)
        ignored = jnp.where(where, targets, -100)
        smoothed = loss(targets, label_smoothing=0.3)
        return smoothed, loss(ignored, ignore_index=-100)

    got, expected = (value_and_vjp(fn, (hidden, head), (g, g)) for fn in (mine, theirs))
    assert_near(got, expected, 2e-6)


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
    # `where` of the first options leaves out a token whose target is a word, and
    # `ignore_index` the others. `where` of the second options leaves out all of them.
    mixed = padded.at[1, 4].set(targets[1, 4])
    some: dict[str, Any] = {"where": where.at[1, 5:].set(True), "ignore_index": -100}
    for left_out in (some, {"where": where}):
        options = left_out | ALL | {"return_lse": True, "chunk": 20}
        got = run(hidden, head, mixed, (g, g), **options)
        values, gradients = float64(hidden, head, targets, counted, counted, **ALL)
        assert_near(got, (tuple(np.where(where, x, 0) for x in values), gradients))
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
    """8 bits cannot count the vocabulary, and 32 bits cannot hold all targets.

    In 8 bits without a sign, -100 would be 156, which is a word.
    """
    vocab = 256
    hidden, head = jnp.zeros((5, 4)), jnp.zeros((4, vocab))
    limits = np.iinfo(dtype)
    large = min(limits.max, vocab - 1), limits.max - 1, limits.max
    targets = np.array([0, *large, -100 if limits.min else 156], dtype)
    exact = targets.astype(object)
    inside = (exact >= 0) & (exact < vocab)
    for ignored in (None, -100, limits.max):
        losses = untyped.cross_entropy(hidden, head, targets, ignore_index=ignored)
        expected = np.where(inside, np.log(vocab), np.nan)
        np.testing.assert_allclose(losses, np.where(exact == ignored, 0, expected))
        if dtype().itemsize < 8:
            array = jnp.asarray(targets)
            again = cross_entropy(hidden, head, array, ignore_index=ignored)
            np.testing.assert_array_equal(again, losses)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_gradients_in_16_bits_with_small_cotangents(dtype, scale):
    """In a mean over many tokens of a large vocabulary, g p is less than 1e-7."""
    hidden, head, targets, g = make_arguments((64,), 16, 2000, dtype)
    head = head / 4
    args, g = (hidden, head), scale * jnp.abs(g)
    options = NONE if scale == 1 else ALL
    theirs = value_and_vjp(lambda *a: plain_losses(*a, targets, **options), args, g)
    exact = float64(*args, targets, g, **options)
    assert_as_close(run(*args, targets, g, **options), theirs, exact)


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
    mine = partial(cross_entropy, chunk=vocab // 10, ignore_index=-100, **ALL)
    assert temp_bytes(mine) < 0.5 * logits
    assert temp_bytes(plain_losses) > logits


def test_transformations():
    hidden, head, targets, g = make_arguments((4, 6), 8, 50)
    targets = targets.at[0, 0].set(-100)
    loss: Any = partial(cross_entropy, chunk=20, ignore_index=-100, **ALL)

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
        exact, _ = float64(hidden, head, jnp.maximum(targets, 0), g, **ALL)
        exact[0, 0] = 0
        np.testing.assert_allclose(losses, exact, rtol=1e-12)


def test_numbers_that_are_traced():
    """Their derivatives are exact too, and one program serves all numbers."""
    hidden, head, targets, g = make_arguments((3, 5), 8, 40)

    def total(z_loss, label_smoothing):
        options = {"z_loss": z_loss, "label_smoothing": label_smoothing}
        return (cross_entropy(hidden, head, targets, chunk=10, **options) * g).sum()

    numbers = jnp.array([0.0, 0.1]), jnp.array([0.3, 0.0])
    totals, (d_z_loss, d_smoothing) = jax.jit(
        jax.vmap(jax.value_and_grad(total, argnums=(0, 1)))
    )(*numbers)

    def exact(z_loss, label_smoothing):
        options = {"z_loss": z_loss, "label_smoothing": label_smoothing}
        losses, _ = float64(hidden, head, targets, g, **options)
        return (losses * to_float64(g)).sum()

    # The loss is linear in both.
    assert_near(totals, np.array([exact(0, 0.3), exact(0.1, 0)]))
    assert_near(d_z_loss, np.full(2, exact(1, 0) - exact(0, 0)))
    assert_near(d_smoothing, np.full(2, exact(0, 1) - exact(0, 0)))


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
        *(
            ((HIDDEN, HEAD, TARGETS), {name: value}, error, f"{name} must be {wanted}")
            for name, value, error, wanted in [
                ("ignore_index", -0.5, ValueError, "an integer, got -0.5"),
                ("ignore_index", TARGETS, ValueError, "an integer, got Array"),
                ("z_loss", -1, ValueError, "at least 0, got -1"),
                ("z_loss", None, TypeError, "one number, got None"),
                ("label_smoothing", 1.1, ValueError, "at most 1, got 1.1"),
                ("label_smoothing", HIDDEN, TypeError, "one number, got"),
                ("softcap", 0.0, ValueError, "positive, got 0.0"),
                (
                    "softcap",
                    jnp.ones(()),
                    TypeError,
                    "one number, known .* got float32",
                ),
                ("return_lse", 1, TypeError, "True or False, and known when"),
            ]
        ),
    ],
)
def test_refusals(args, options, error, message):
    with pytest.raises(error, match=message):
        untyped.cross_entropy(*args, **options)
