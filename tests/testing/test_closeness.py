"""Errors, and the bounds that `assert_as_close` sets."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern.testing import assert_as_close, closeness, relative_error


def test_the_worst_row_counts():
    worst = np.ones((3, 4)) + np.array([[0], [0.3], [0.1]])
    assert relative_error(worst, np.ones((3, 4))) == pytest.approx(0.3)


def test_a_row_of_almost_nothing_does_not_count():
    almost_zero = np.array([[1.0, 1.0], [1e-9, 0.0]])
    assert relative_error(almost_zero, np.array([[1.0, 1.0], [0.0, 0.0]])) < 1e-5


def test_the_worst_leaf_counts_and_a_nan_is_the_worst():
    exact = np.ones(4)
    tree = (exact, {"a": exact * 1.5})
    assert relative_error(tree, (exact, {"a": exact})) == pytest.approx(0.5)
    assert np.isnan(relative_error((exact * np.nan, exact), (exact, exact)))
    with pytest.raises(ValueError, match="zip"):
        relative_error((exact, exact), (exact,))


@pytest.mark.parametrize(
    "shape, dtype",
    [((), jnp.float32), ((5,), jnp.float32), ((7, 33), jnp.bfloat16)],
)
def test_errors_are_the_same_on_the_device(shape, dtype):
    rng = np.random.default_rng(0)
    exact = np.asarray(rng.standard_normal(shape))
    # Without a floor, the error of a row near 0 would be noise divided by noise.
    last = -1 if shape else ()
    exact[last] *= 1e-9
    got = jnp.asarray(exact + 1e-2 * rng.standard_normal(shape), dtype)
    on_device = closeness._error_on_device(got, exact)
    assert on_device == pytest.approx(closeness._error_on_host(got, exact), rel=1e-12)
    assert on_device > 1e-3
    assert np.isnan(closeness._error_on_device(got.at[last].set(jnp.nan), exact))


EXACT = np.linspace(1, 2, 4)


def test_as_close_allows_twice_the_plain_error_and_one_rounding():
    plain = EXACT * (1 + 1e-3)
    assert_as_close(EXACT * (1 + 1.99e-3), plain, EXACT)
    with pytest.raises(AssertionError, match="leaf 0: error 0.002.* above 0.002"):
        assert_as_close(EXACT * (1 + 2.01e-3), plain, EXACT)
    lucky = jnp.asarray(EXACT, jnp.bfloat16)
    assert_as_close(lucky * (1 + 2**-9), lucky, np.asarray(lucky, np.float64))


@pytest.mark.parametrize(
    "got, message",
    [
        (np.full(4, np.nan), "leaf 1: error nan"),
        (EXACT[:3], r"leaf 1: shape \(3,\), exact \(4,\)"),
        (EXACT.astype(np.float32), "leaf 1: dtype float32, plain float64"),
    ],
    ids=["nan", "shape", "dtype"],
)
def test_what_is_never_close(got, message):
    with pytest.raises(AssertionError, match=message):
        assert_as_close((EXACT, got), (EXACT, EXACT), (EXACT, EXACT))


def test_a_plain_form_of_another_shape_is_no_plain_form():
    """Without this, one wrong number of a broadcast form would bound all errors."""
    message = r"leaf 0: shape \(4,\), plain \(1,\)"
    with pytest.raises(AssertionError, match=message):
        assert_as_close(EXACT, EXACT[:1], EXACT)


def test_it_is_checked_under_python_o():
    """`python -O` removes `assert` statements."""
    check = (
        "import numpy as np; from jaxkern.testing import assert_as_close\n"
        "one = np.ones(4)\n"
        "assert_as_close(2 * one, one, one)"
    )
    command = [sys.executable, "-O", "-c", check]
    environment = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "AssertionError: leaf 0: error 1 above" in done.stderr
