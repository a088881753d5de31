from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_as_close,
    assert_near,
    to_float64,
    value_and_vjp,
    with_vjp,
)
from masked_definitions import (
    BF16,
    FLOAT64,
    KEY,
    METHODS,
    SIZES,
    SLOPES,
    apply_bilinear,
    apply_matmul,
    bilinear_args,
    each_method,
    each_method_once,
    matmul_args,
    plain_bilinear,
)

from jaxkern import (
    gumbel_softmax,
    masked_matmul,
    reinmax,
    straight_through,
)
from jaxkern.testing import plain as definitions

OPS: dict[str, Any] = {
    "matmul": (apply_matmul, matmul_args),
    "bilinear": (apply_bilinear, bilinear_args),
}
each_op = pytest.mark.parametrize("op, make", OPS.values(), ids=OPS)
# A method that loops over the samples, and one that takes all at once.
each_kind = pytest.mark.parametrize("method", ["fused", "bmm"])
each_kind_once = pytest.mark.parametrize(
    "op, make, method",
    [
        (apply_matmul, matmul_args, "fused"),
        (apply_matmul, matmul_args, "bmm"),
        (apply_bilinear, bilinear_args, "fused"),
    ],
    ids=["fused", "bmm", "bilinear"],
)


def check_values_and_gradients(op, make, method, size, estimator, rule):
    args, g = make(size)
    got = value_and_vjp(partial(op, estimator=estimator, method=method), args, g)
    assert_near(got, FLOAT64[op](*to_float64(args), to_float64(g), SLOPES[rule]))


@each_method_once
def test_values_and_gradients(op, make, method):
    check_values_and_gradients(op, make, method, SIZES[0], reinmax, reinmax)


@each_kind
@pytest.mark.parametrize(
    "size, estimator",
    list(zip(SIZES[1:], (straight_through, reinmax), strict=True)),
    ids=["one of each", "wide"],
)
def test_values_and_gradients_of_other_sizes(method, size, estimator):
    """The estimator is given by its name."""
    each = apply_matmul, matmul_args, method, size
    check_values_and_gradients(*each, estimator.__name__, estimator)


def plain(x, w, logits, *biases):
    if biases:
        return plain_bilinear(x, w, logits, *biases)
    return definitions.masked_matmul(x, w, straight_through(logits))


@cache
def run_plain(make, dtype):
    args, g = make((4, 6, 16, 12, 5), dtype)
    return value_and_vjp(plain, args, g)


@each_method_once
def test_16_bit_is_as_exact_as_the_plain_form(op, make, method):
    args, g = make((4, 6, 16, 12, 5), BF16)
    exact = FLOAT64[op](*to_float64(args), to_float64(g), np.ones_like)
    fn = partial(op, estimator=straight_through, method=method)
    assert_as_close(value_and_vjp(fn, args, g), run_plain(make, BF16), exact)


def test_logits_may_have_another_dtype():
    (x, w, logits), g = matmul_args(SIZES[0], jnp.bfloat16)
    logits = logits.astype(jnp.float32)
    fn = partial(masked_matmul, estimator=reinmax)
    y, (_, _, d_logits) = value_and_vjp(fn, (x, w, logits), g)
    assert y.dtype == jnp.bfloat16 and d_logits.dtype == jnp.float32


DRAWN: Any = {"estimator": partial(reinmax, temperature=1.5), "key": KEY}


@cache
def run_drawn(op, make, method):
    """Run an op with drawn masks on four equal samples."""
    args, g = make((4, 3, 6, 5, 2))
    x, logits = jax.tree.map(
        lambda a: jnp.broadcast_to(a[:1], a.shape), (args[0], args[2])
    )
    fn = partial(op, method=method, **DRAWN)
    return value_and_vjp(fn, (x, args[1], logits, *args[3:]), g)


@pytest.mark.parametrize(
    "op, make, method",
    [(*OPS["matmul"], method) for method in METHODS if method != "loop"]
    + [(*OPS["bilinear"], "fused")],
)
def test_draws_are_the_same_by_every_method_and_of_each_samples_own(op, make, method):
    got = run_drawn(op, make, method)
    assert_near(got, run_drawn(op, make, "loop"))
    assert len(np.unique(np.asarray(got[0]), axis=0)) == 4


@each_method
def test_an_estimator_that_holds_a_key_draws_one_noise_for_all(method):
    (x, w, logits), _ = matmul_args((4, 3, 6, 5, 2))
    equal = jnp.broadcast_to(logits[:1], logits.shape)
    estimator = partial(reinmax, key=KEY)
    got = masked_matmul(x, w, equal, estimator=estimator, method=method)
    assert_near(got, x @ (w * estimator(logits[0])))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "loop"])
def test_estimator_sees_one_sample(method):
    """So an estimator that is not elementwise means the same in every method."""
    (x, w, logits), g = matmul_args(SIZES[0])
    options: Any = {"estimator": partial(gumbel_softmax, axis=0), "key": KEY}
    got = value_and_vjp(
        partial(masked_matmul, method=method, **options), (x, w, logits), g
    )
    expected = partial(masked_matmul, method="loop", **options)
    assert_near(got, value_and_vjp(expected, (x, w, logits), g))


@each_kind_once
def test_one_sample_equals_shared_logits(op, make, method):
    size = 1, 5, 7, 6, 4
    args, g = make(size)
    unbatched, _ = make(size, shared=True)
    fn = partial(op, method=method, **DRAWN)
    got = value_and_vjp(fn, args, g)
    y, gradients = value_and_vjp(fn, unbatched, g)
    batched = jax.tree.map(lambda a, b: b.reshape(a.shape), got[1], gradients)
    assert_near(got, (y, batched))


@each_kind_once
def test_shared_logits_are_one_mask_for_all(op, make, method):
    args, g = make(SIZES[0], shared=True)
    fn = partial(op, estimator=reinmax, method=method)
    y, (d_x, d_w, d_logits, *rest) = value_and_vjp(fn, args, g)
    batch = len(args[0])
    each = jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), args[2])
    exact = FLOAT64[op](
        *to_float64((*args[:2], each, *args[3:])), to_float64(g), SLOPES[reinmax]
    )
    summed = jax.tree.map(lambda a: a.sum(0), exact[1][2])
    assert_near(
        (y, d_x, d_w, d_logits, rest),
        (exact[0], *exact[1][:2], summed, list(exact[1][3:])),
    )


@pytest.mark.parametrize(
    "op, make, method", [(*of, "fused") for of in OPS.values()], ids=OPS
)
def test_permuting_samples_permutes_results(op, make, method):
    args, g = make(SIZES[2])
    order = jnp.array([3, 0, 4, 2, 1])
    pull = with_vjp(partial(op, estimator=reinmax, method=method))
    y, gradients = pull(args, g)
    x, logits = jax.tree.map(lambda a: a[order], (args[0], args[2]))
    got, moved = pull((x, args[1], logits, *args[3:]), g[order])
    assert_near(got, y[order])
    for i in (0, 2):
        assert_near(moved[i], jax.tree.map(lambda a: a[order], gradients[i]))
    assert_near(moved[1], gradients[1])


@each_kind
def test_unused_logits_get_zero_gradients(method):
    (x, w, logits), g = matmul_args(SIZES[2])

    def fn(logits):
        y = masked_matmul(
            x[:2], w, logits[:2], estimator=straight_through, method=method
        )
        return (y * g[:2]).sum()

    gradient = jax.grad(fn)(logits)
    assert (gradient[:2] != 0).all() and (gradient[2:] == 0).all()


@each_kind
def test_dead_masks(method):
    args, g = bilinear_args(SIZES[0])
    options = {"estimator": straight_through, "method": method}
    pull = with_vjp(partial(apply_bilinear, **options))
    for value in (0.0, -1.0, -jnp.inf):
        logits = jax.tree.map(lambda a, v=value: jnp.full_like(a, v), args[2])
        y, gradients = pull((*args[:2], logits, args[3]), g)
        np.testing.assert_array_equal(y, jnp.broadcast_to(args[3][2], y.shape))
        for leaf in jax.tree.leaves(gradients):
            assert np.isfinite(leaf).all()
        first, second, third = gradients[2]
        assert (first == 0).all() and (second == 0).all() and (third != 0).all()


def gradient_program(op, args, g, method, trained):
    def run(args, g):
        def fn(*chosen):
            full = list(args)
            for i, value in zip(trained, chosen, strict=True):
                full[i] = value
            return op(*full, estimator=reinmax, method=method)

        value, vjp = jax.vjp(fn, *(args[i] for i in trained))
        return value, vjp(g)

    return jax.jit(run).lower(args, g).compile()


@each_op
@pytest.mark.parametrize("trained", ["all", "logits"])
def test_temporary_memory_of_fused_grows_by_its_products_alone(op, make, trained):
    def temporary(method, batch):
        args, g = make((batch, 64, 128, 512, 128))
        which = range(len(args)) if trained == "all" else (2,)
        program: Any = gradient_program(op, args, g, method, which)
        return program.memory_analysis().temp_size_in_bytes

    batch = 32
    fused = temporary("fused", batch)
    # A bilinear MLP keeps the masked products of its input for the backward.
    products = 2 * 64 * 512 * 4 * (op is apply_bilinear)
    assert fused == temporary("fused", 2) + (batch - 2) * products
    best = min(temporary(method, batch) for method in METHODS if method != "fused")
    # If only logits are trained, others compute in the memory of the logits' gradient.
    few = op is apply_bilinear and trained == "logits"
    assert fused <= best / (1 if few else 4)


@pytest.mark.parametrize("estimator", SLOPES)
def test_fused_keeps_no_array_but_the_arguments(estimator):
    """Not even constants are kept, which the loop would read for every sample."""
    (x, w, logits), _ = matmul_args((4, 8, 16, 32, 0))
    fn = partial(masked_matmul, estimator=estimator)
    _, pull = jax.vjp(lambda *args: fn(*args), x, w, logits)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull)}
    assert kept <= {x.shape, w.shape, logits.shape}
    forward: Any = jax.jit(lambda *args: jax.vjp(fn, *args)).lower(x, w, logits)
    masked, sample, y = w.nbytes, x[0].nbytes, 4 * 8 * 32
    temporary = forward.compile().memory_analysis().temp_size_in_bytes
    # The last 1024 bytes are for counters.
    assert temporary <= masked + sample + y + 1024


@each_kind_once
def test_transforms(op, make, method):
    args, g = make((2, 3, 4, 5, 6))
    fn = partial(op, estimator=reinmax, method=method, key=KEY)
    pull: Any = with_vjp(fn)
    y, gradients = pull(args, g)
    assert_near(with_vjp(jax.checkpoint(fn))(args, g), (y, gradients))
    two = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), (args, g))
    _, expected = jax.lax.scan(lambda _, part: (None, pull(*part)), None, two)
    assert_near(jax.tree.map(lambda a: a[0], expected), (y, gradients))
    assert_near(jax.jit(jax.vmap(pull))(*two), expected)
    # Forward mode: <g, J t> = <J' g, t>.
    tangents = jax.tree.map(lambda a: jnp.cos(3 * a), args)
    pushed = jax.jit(lambda a, t: jax.jvp(fn, a, t)[1])(args, tangents)
    pulled = jax.tree.map(lambda a, b: (a * b).sum(), gradients, tangents)
    total = sum(jax.tree.leaves(pulled))
    np.testing.assert_allclose((pushed * g).sum(), total, rtol=1e-4, atol=1e-4)
