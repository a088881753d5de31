from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DTYPES

from jaxkern._core.activations import ACTIVATIONS, ActivationName, get_activation

POINTS = np.array([-30.0, -3.0, -1e-3, 0.0, 1e-3, 0.7, 3.0, 30.0])

# The textbook formulas, in float64.
EXACT = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: (
        0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    ),
    "relu": lambda z: np.maximum(z, 0),
    "relu2": lambda z: np.maximum(z, 0) ** 2,
    "leaky_relu": lambda z: np.where(z >= 0, z, 0.01 * z),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "identity": lambda z: z,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value(name):
    got = ACTIVATIONS[name].value(jnp.asarray(POINTS, jnp.float32))
    np.testing.assert_allclose(got, EXACT[name](POINTS), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_that_of_the_value(name):
    z = jnp.asarray(POINTS, jnp.float32)
    value, derivative = ACTIVATIONS[name]
    expected = jax.vmap(jax.grad(value))(z)
    np.testing.assert_allclose(derivative(z), expected, rtol=2e-6, atol=1e-6)
    step = 1e-6
    smooth = POINTS[POINTS != 0]
    numeric = (EXACT[name](smooth + step) - EXACT[name](smooth - step)) / (2 * step)
    got = derivative(jnp.asarray(smooth, jnp.float32))
    np.testing.assert_allclose(got, numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_kept(dtype):
    z = jax.ShapeDtypeStruct((2,), dtype)
    kept = {
        name: [jax.eval_shape(f, z).dtype for f in both]
        for name, both in ACTIVATIONS.items()
    }
    assert kept == dict.fromkeys(ACTIVATIONS, [dtype, dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivative_is_finite_wherever_the_input_is(dtype):
    largest = float(jnp.finfo(dtype).max) / 4
    z = jnp.array([-largest, -300, -20, 20, 300, largest], dtype)

    @jax.jit
    def slopes(z):
        return {name: f.derivative(z) for name, f in ACTIVATIONS.items()}

    finite = {
        name: np.isfinite(slope.astype(jnp.float32)).all()
        for name, slope in slopes(z).items()
    }
    assert finite == dict.fromkeys(ACTIVATIONS, True)


def test_derivatives_at_zero():
    at_zero = {
        name: float(f.derivative(jnp.zeros(()))) for name, f in ACTIVATIONS.items()
    }
    assert at_zero == {
        "silu": 0.5,
        "gelu": 0.5,
        "relu": 0.0,
        "relu2": 0.0,
        "leaky_relu": 1.0,
        "sigmoid": 0.25,
        "identity": 1.0,
    }


def test_the_names_are_those_of_the_table():
    assert get_args(ActivationName) == tuple(ACTIVATIONS)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match="flash_mlp: activation must be one of 'silu', .*'swish'"
    ):
        get_activation("flash_mlp", "swish")
    assert get_activation("flash_mlp", "relu") is ACTIVATIONS["relu"]
