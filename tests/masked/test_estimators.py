import itertools
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DTYPES, assert_as_close, normal, sigmoid, to_float64

import jaxkern
from jaxkern import (
    binary_concrete,
    gumbel_softmax,
    reinmax,
    reinmax_categorical,
    straight_through,
)
from jaxkern._masked import bernoulli
from jaxkern._masked import estimators as _estimators

KEY = jax.random.key(0)
ST_SIGMOID = partial(straight_through, derivative="sigmoid")
ONE_PLUS_SIGMOID = partial(straight_through, derivative="one_plus_sigmoid")
DETERMINISTIC = {
    "straight_through": straight_through,
    "straight_through clip": partial(straight_through, clip=1.0),
    "straight_through sigmoid": ST_SIGMOID,
    "straight_through one plus sigmoid": ONE_PLUS_SIGMOID,
    "reinmax": reinmax,
    "reinmax temperature": partial(reinmax, temperature=1.7),
}
DRAWN = {
    "straight_through": straight_through,
    "straight_through sigmoid": ST_SIGMOID,
    "reinmax": reinmax,
    "binary_concrete": binary_concrete,
    "binary_concrete soft": partial(binary_concrete, hard=False),
    "gumbel_softmax": gumbel_softmax,
    "gumbel_softmax soft": partial(gumbel_softmax, hard=False),
    "reinmax_categorical": reinmax_categorical,
}
ALL = DETERMINISTIC | {
    f"{name} drawn": partial(estimator, key=KEY) for name, estimator in DRAWN.items()
}
each_of_all = pytest.mark.parametrize("estimator", ALL.values(), ids=ALL)


def slope_of(p):
    return p * (1 - p)


def reinmax_slope(x, b, temperature=1.0):
    q = (b + sigmoid(x / temperature)) / 2
    return 2 * slope_of(q) - slope_of(sigmoid(x)) / 2


SLOPES = {
    "straight_through": np.ones_like,
    "straight_through clip": lambda x: (abs(x) <= 1) * 1.0,
    "straight_through sigmoid": lambda x: slope_of(sigmoid(x)),
    "straight_through one plus sigmoid": lambda x: 1 + slope_of(sigmoid(x)),
    "reinmax": lambda x: sigmoid(-abs(x)) / 2,
    "reinmax temperature": lambda x: reinmax_slope(x, x > 0, 1.7),
}


def softmax(theta, axis=-1):
    e = np.exp(theta - theta.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def jacobian(p, g, axis=-1):
    return p * g - p * (p * g).sum(axis, keepdims=True)


def value_and_gradient(estimator, logits, g):
    """Return value and gradient as NumPy arrays, from one compiled program."""

    @jax.jit
    def run(logits, g):
        value, vjp = jax.vjp(estimator, logits)
        return value, vjp(g)[0]

    return jax.tree.map(np.asarray, run(logits, g))


def test_every_estimator_has_its_name():
    for name in get_args(_estimators.EstimatorName):
        assert _estimators.estimator_of("op", name) is getattr(jaxkern, name)
    assert _estimators.estimator_of("op", np.sign) is np.sign


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_threshold_is_strict(name):
    x = jnp.array([-2.0, -1e-30, -0.0, 0.0, 1e-30, 2.0])
    np.testing.assert_array_equal(DETERMINISTIC[name](x), [0, 0, 0, 0, 1, 1])


SHAPES = (), (0,), (1,), (2, 1, 7)


@pytest.mark.parametrize(
    "name, shape",
    [(name, (3, 5)) for name in DETERMINISTIC]
    + [("reinmax temperature", shape) for shape in SHAPES],
)
def test_closed_forms(name, shape):
    with jax.enable_x64(True):
        x = 3 * jax.random.normal(KEY, shape, jnp.float64)
        g = jax.random.normal(jax.random.key(1), shape, jnp.float64)
        value, gradient = value_and_gradient(DETERMINISTIC[name], x, g)
    x, g = np.asarray(x), np.asarray(g)
    np.testing.assert_array_equal(value, (x > 0) * 1.0)
    np.testing.assert_allclose(gradient, g * SLOPES[name](x), rtol=1e-12, atol=1e-15)


def test_published_factors_at_1():
    one = jnp.ones(())
    assert abs(jax.grad(ONE_PLUS_SIGMOID)(one) - 1.196612) < 1e-6
    assert abs(jax.grad(reinmax)(one) - 0.134471) < 1e-6
    clipped = jax.vmap(jax.grad(partial(straight_through, clip=1.0)))
    np.testing.assert_array_equal(
        clipped(jnp.array([-1.01, -1, 1, 1.01])), [0, 1, 1, 0]
    )


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_closed_forms_of_binary_draws(temperature):
    shape = (50, 7)
    with jax.enable_x64(True):
        x = 3 * jax.random.normal(KEY, shape, jnp.float64)
        g = jax.random.normal(jax.random.key(1), shape, jnp.float64)
        options = {"key": KEY, "temperature": temperature}
        b, got = value_and_gradient(partial(reinmax, **options), x, g)
        _, plain = value_and_gradient(partial(ST_SIGMOID, key=KEY), x, g)
        soft, got_soft = value_and_gradient(
            partial(binary_concrete, hard=False, **options), x, g
        )
        hard, got_hard = value_and_gradient(partial(binary_concrete, **options), x, g)
    x, g = np.asarray(x), np.asarray(g)
    assert set(np.unique(b)) == {0, 1}
    near = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-14)
    near(got, g * reinmax_slope(x, b, temperature))
    near(plain, g * slope_of(sigmoid(x)))
    near(got_soft, g * slope_of(soft) / temperature)
    near(got_hard, got_soft)
    np.testing.assert_array_equal(hard, (soft > 0.5) * 1.0)


@pytest.mark.parametrize(
    "shape, axis, temperature",
    [((9, 5), -1, 1.0), ((9, 5), -1, 1.7), ((3, 4, 5), 1, 1.7), ((1,), 0, 1.7)],
)
def test_closed_forms_of_categorical_draws(shape, axis, temperature):
    with jax.enable_x64(True):
        x = 2 * jax.random.normal(KEY, shape, jnp.float64)
        g = jax.random.normal(jax.random.key(1), shape, jnp.float64)
        options = {"key": KEY, "temperature": temperature, "axis": axis}
        soft, got_soft = value_and_gradient(
            partial(gumbel_softmax, hard=False, **options), x, g
        )
        hard, got_hard = value_and_gradient(partial(gumbel_softmax, **options), x, g)
        drawn, got = value_and_gradient(partial(reinmax_categorical, **options), x, g)
    x, g = np.asarray(x), np.asarray(g)
    near = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
    near(soft.sum(axis), 1)
    near(got_soft, jacobian(soft, g, axis) / temperature)
    near(got_hard, got_soft)
    np.testing.assert_array_equal(hard, soft == soft.max(axis, keepdims=True))
    assert set(np.unique(drawn)) <= {0, 1}
    np.testing.assert_array_equal(drawn.sum(axis), 1)
    q = (drawn + softmax(x / temperature, axis)) / 2
    near(got, 2 * jacobian(q, g, axis) - jacobian(softmax(x, axis), g, axis) / 2)


def test_categorical_reinmax_is_the_papers_algorithm():
    """The expected gradient is that of algorithm 2 by automatic differentiation."""
    tau = 1.3
    with jax.enable_x64(True):
        theta = 2 * jax.random.normal(KEY, (6, 5), jnp.float64)
        g = jax.random.normal(jax.random.key(1), (6, 5), jnp.float64)
        drawn, got = value_and_gradient(
            partial(reinmax_categorical, key=KEY, temperature=tau), theta, g
        )

        def published(theta):
            pi0 = jax.nn.softmax(theta)
            mean = (jax.nn.softmax(theta / tau) + drawn) / 2
            pi1 = jax.nn.softmax(jax.lax.stop_gradient(jnp.log(mean) - theta) + theta)
            return 2 * pi1 - pi0 / 2

        _, expected = value_and_gradient(published, theta, g)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_binary_reinmax_is_the_categorical_one_of_two_classes(temperature):
    with jax.enable_x64(True):
        x = 3 * jax.random.normal(KEY, (40,), jnp.float64)
        options = {"key": KEY, "temperature": temperature}
        b, got = value_and_gradient(partial(reinmax, **options), x, jnp.ones(40))
    theta = np.stack([np.zeros(40), np.asarray(x)], -1)
    q = (np.stack([1 - b, b], -1) + softmax(theta / temperature)) / 2
    g = np.array([[0.0, 1.0]])
    expected = 2 * jacobian(q, g) - jacobian(softmax(theta), g) / 2
    np.testing.assert_allclose(got, expected[:, 1], rtol=1e-11, atol=1e-14)


def mean_gradient(estimator, f, logits, probability):
    """Return the exact mean over all outcomes of the gradient of `f` by `estimator`."""

    @jax.jit
    @jax.vmap
    def run(key):
        sample, vjp = jax.vjp(partial(estimator, key=key), logits)
        return sample, vjp(jax.grad(f)(sample))[0]

    samples, gradients = map(np.asarray, run(jax.random.split(KEY, 2000)))
    outcomes, first = np.unique(
        samples.reshape(len(samples), -1), axis=0, return_index=True
    )
    chances = np.array([probability(outcome) for outcome in outcomes])
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-12)
    return np.tensordot(chances, gradients[first], axes=1)


def binary_error(estimator, f):
    """Return the relative error of the mean gradient of E f(b) for three logits."""
    logits = jnp.array([0.7, -1.1, 0.2], jnp.float64)
    p = sigmoid(np.asarray(logits))

    def probability(b):
        return np.prod(np.where(b == 1, p, 1 - p))

    exact = sum(
        probability(b) * float(f(jnp.asarray(b))) * (b - p)
        for b in map(np.array, itertools.product([0.0, 1.0], repeat=3))
    )
    got = mean_gradient(estimator, f, logits, probability)
    return np.abs(got - exact).max() / np.abs(exact).max()


def test_for_which_losses_binary_gradients_are_exact():
    with jax.enable_x64(True):
        a = jax.random.normal(jax.random.key(3), (3, 3), jnp.float64)
        c = jax.random.normal(jax.random.key(4), (3,), jnp.float64)
        off_diagonal = a - jnp.diag(jnp.diag(a))

        def multilinear(b):
            return b @ off_diagonal @ b + c @ b

        def quadratic(b):
            return b @ a @ b + c @ b

        def cubic(b):
            return quadratic(b) + (b**3).sum()

        st = partial(straight_through, derivative="sigmoid")
        assert binary_error(st, multilinear) < 1e-12
        assert binary_error(st, quadratic) > 1e-2
        assert binary_error(reinmax, multilinear) < 1e-12
        assert binary_error(reinmax, quadratic) < 1e-12
        assert binary_error(reinmax, cubic) > 1e-2
        assert binary_error(partial(reinmax, temperature=2.0), quadratic) > 1e-2
        assert binary_error(straight_through, multilinear) > 1e-2


def test_for_which_losses_categorical_gradients_are_exact():
    with jax.enable_x64(True):
        theta = jnp.array([0.4, -0.9, 1.1, 0.1], jnp.float64)
        pi = softmax(np.asarray(theta))
        a = jax.random.normal(jax.random.key(3), (4, 4), jnp.float64)
        c = jax.random.normal(jax.random.key(4), (4,), jnp.float64)

        def error(estimator, f):
            values = np.array([f(row) for row in jnp.eye(4)])
            exact = pi * (values - pi @ values)
            got = mean_gradient(estimator, f, theta, lambda d: pi @ d)
            return np.abs(got - exact).max() / np.abs(exact).max()

        def quadratic(d):
            return d @ a @ d + c @ d

        def cubic(d):
            return quadratic(d) + (jnp.array([1.0, -2.0, 3.0, 0.5]) @ d) ** 3

        assert error(reinmax_categorical, lambda d: c @ d) < 1e-12
        assert error(reinmax_categorical, quadratic) < 1e-12
        assert error(reinmax_categorical, cubic) > 1e-2
        assert error(partial(reinmax_categorical, temperature=2.0), quadratic) > 1e-2


def assert_mean(samples, expected):
    """Assert that the mean is within five standard errors of `expected`."""
    samples = np.asarray(samples, np.float64)
    allowed = 5 * samples.std(0) / np.sqrt(len(samples)) + 1e-9
    np.testing.assert_array_less(abs(samples.mean(0) - expected), allowed)


def draw_many(estimator, logits, count=20_000):
    """Return samples, each drawn with its own key, and the gradients of their sums."""

    @jax.jit
    @jax.vmap
    def run(key):
        sample, vjp = jax.vjp(partial(estimator, key=key), logits)
        return sample, vjp(jnp.ones_like(sample))[0]

    return run(jax.random.split(jax.random.key(5), count))


@pytest.mark.parametrize("estimator", [straight_through, reinmax, binary_concrete])
def test_binary_draws_have_the_right_chances(estimator):
    logits = jnp.array([-6.0, -2.0, 0.0, 0.3, 2.0, 6.0])
    masks, gradients = draw_many(estimator, logits)
    p = sigmoid(to_float64(logits))
    assert_mean(masks, p)
    if estimator is reinmax:
        assert_mean(gradients, slope_of(p))
    if estimator is binary_concrete:
        # u (1 - u) has the mean 1/6: the bias that the docstring states.
        assert_mean(np.asarray(gradients)[:, 2], 1 / 6)


@pytest.mark.parametrize("estimator", [gumbel_softmax, reinmax_categorical])
def test_categorical_draws_have_the_right_chances(estimator):
    logits = jnp.array([-6.0, -2.0, 0.0, 0.3, 2.0])
    drawn, _ = draw_many(estimator, logits)
    assert_mean(drawn, softmax(to_float64(logits)))


def test_both_tails_of_the_noise_reach_as_far(monkeypatch):
    bits = jnp.array([0, 1, 2**32 - 2, 2**32 - 1], jnp.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda *_: bits)
    noise = bernoulli._logistic(KEY, jnp.zeros(4))
    np.testing.assert_allclose(noise, [22.87, -22.87, 0, 0], atol=0.01)


@each_of_all
def test_jit_remat_and_jvp(estimator):
    x, g = normal(0, (3, 8), scale=2.0), normal(1, (3, 8))

    @jax.jit
    def run(x, g):
        value, vjp = jax.vjp(jax.checkpoint(estimator), x)
        return (value, vjp(g)[0]), jax.jvp(estimator, (x,), (g,))

    reverse, forward = run(x, g)
    # The derivatives are symmetric, so both modes give the same.
    for got, expected in zip(forward, reverse, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(estimator(x), reverse[0], rtol=1e-6)


@pytest.mark.parametrize("name", DRAWN)
def test_vmap_and_scan_over_keys_draw_what_single_calls_do(name):
    estimator, x = DRAWN[name], normal(0, (4, 5))
    keys = jax.random.split(KEY, 4)

    def loss(x, key):
        return (estimator(x, key=key) * jnp.arange(5.0)).sum()

    gradient = jax.grad(loss)
    expected = [gradient(row, key) for row, key in zip(x, keys, strict=True)]
    got = jax.jit(jax.vmap(gradient))(x, keys)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    _, scanned = jax.lax.scan(lambda _, part: (None, gradient(*part)), None, (x, keys))
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-7)
    masks = [estimator(x[0], key=key) for key in jax.random.split(KEY, 20)]
    assert len(np.unique(np.array(masks), axis=0)) > 1


@pytest.mark.parametrize(
    "name, dtype",
    [("straight_through sigmoid", jnp.bfloat16)]
    + [("straight_through one plus sigmoid", jnp.bfloat16)]
    + [("reinmax", dtype) for dtype in DTYPES],
)
def test_gradients_are_computed_in_float32_at_least(name, dtype):
    x, g = normal(0, (999,), dtype, 4.0), normal(1, (999,), dtype)
    p = jax.nn.sigmoid(x)
    plain = (
        g
        * {
            "straight_through sigmoid": p * (1 - p),
            "straight_through one plus sigmoid": 1 + p * (1 - p),
            "reinmax": jnp.where(x > 0, 1 - p, p) / 2,
        }[name]
    )
    value, got = value_and_gradient(DETERMINISTIC[name], x, g)
    assert value.dtype == dtype
    wide_x, wide_g = to_float64((x, g))
    exact = wide_g * SLOPES[name](wide_x)
    assert_as_close(jnp.asarray(got), plain, exact)
    # Each entry is held to a bound of its own, too.
    error = abs(got.astype(np.float64) - exact)
    eps = max(float(jnp.finfo(dtype).eps), 4e-7)
    tiny = float(jnp.finfo(dtype).smallest_normal)
    assert (error <= eps * abs(exact) + tiny).all()


@each_of_all
def test_extreme_logits(estimator):
    x = jnp.array([[jnp.inf, 1e30, 100.0, -100.0], [-1e30, -jnp.inf, 0.0, 88.0]])
    value, gradient = value_and_gradient(estimator, x[:, 1:], jnp.ones((2, 3)))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    nan = x.at[0, 1].set(jnp.nan)
    value = np.asarray(estimator(nan))
    assert np.isnan(value[0, 1]) and np.isfinite(value[1, [0, 2, 3]]).all()


def test_infinite_logits_are_always_and_never():
    x = jnp.array([jnp.inf, -jnp.inf])
    for name in ("straight_through", "reinmax", "binary_concrete"):
        estimator = partial(DRAWN[name], key=KEY)
        value, gradient = value_and_gradient(estimator, x, jnp.ones(2))
        np.testing.assert_array_equal(value, [1, 0])
        np.testing.assert_array_equal(gradient, float(name == "straight_through"))


@pytest.mark.parametrize("name", ["reinmax", "binary_concrete", "reinmax_categorical"])
def test_temperature_may_be_traced(name):
    x = normal(0, (2, 5))

    def gradient(t):
        return jax.grad(lambda x: (DRAWN[name](x, key=KEY, temperature=t) * x).sum())(x)

    got = jax.jit(gradient)(jnp.float32(1.5))
    np.testing.assert_allclose(got, gradient(1.5), rtol=1e-5, atol=1e-6)
