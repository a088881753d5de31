import jax
import jax.numpy as jnp
import numpy as np
from helpers import with_vjp

from jaxkern._core.gradients import with_derivative_of

X, G = jnp.array([-1.5, 0.5, 2.0]), jnp.array([1.0, -2.0, 3.0])


def hard_sine(x):
    return with_derivative_of(jnp.sign(x) * x**2, jnp.sin(x))


def test_value_and_derivative_are_of_two_functions():
    value, (d_x,) = with_vjp(hard_sine)((X,), G)
    np.testing.assert_array_equal(value, np.sign(X) * np.square(X))
    np.testing.assert_allclose(d_x, G * np.cos(X), rtol=1e-6)
    _, tangent = jax.jvp(hard_sine, (X,), (G,))
    np.testing.assert_allclose(tangent, G * np.cos(X), rtol=1e-6)


def test_second_derivative_is_that_of_the_derivative():
    second = jax.vmap(jax.grad(jax.grad(hard_sine)))(X)
    np.testing.assert_allclose(second, -np.sin(X), rtol=1e-6)


def test_nothing_reaches_what_gives_the_value_alone():
    d_value, d_soft = jax.grad(
        lambda value, soft: (G * with_derivative_of(value, soft)).sum(), argnums=(0, 1)
    )(X, X)
    np.testing.assert_array_equal(d_value, 0)
    np.testing.assert_array_equal(d_soft, G)
