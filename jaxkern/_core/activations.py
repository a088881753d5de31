"""The activations, each with its derivative, for references and kernels alike."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .checks import raise_unknown

ActivationName = Literal[
    "silu", "gelu", "relu", "relu2", "leaky_relu", "sigmoid", "identity"
]

SQRT_2_OVER_PI = 0.7978845608028654
GELU_CUBIC = 0.044715
LEAKY_SLOPE = 0.01


class Activation(NamedTuple):
    """An elementwise function and its derivative, both of the pre-activation."""

    value: Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]
    derivative: Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


def _silu_derivative(z):
    gate = jax.nn.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _gelu_derivative(z):
    # Beyond 10 the derivative is 0 or 1 in every dtype, and powers would overflow.
    z = jnp.clip(z, -10, 10)
    tanh = jnp.tanh(SQRT_2_OVER_PI * (z + GELU_CUBIC * z**3))
    inner = SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * z**2)
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * inner


ACTIVATIONS = {
    "silu": Activation(jax.nn.silu, _silu_derivative),
    "gelu": Activation(
        lambda z: jax.nn.gelu(z, approximate=True),
        _gelu_derivative,
    ),
    "relu": Activation(
        jax.nn.relu,
        lambda z: jnp.where(z > 0, 1, 0).astype(z.dtype),
    ),
    "relu2": Activation(
        lambda z: jnp.square(jax.nn.relu(z)),
        lambda z: 2 * jax.nn.relu(z),
    ),
    "leaky_relu": Activation(
        lambda z: jax.nn.leaky_relu(z, LEAKY_SLOPE),
        lambda z: jnp.where(z >= 0, 1, LEAKY_SLOPE).astype(z.dtype),
    ),
    "sigmoid": Activation(
        jax.nn.sigmoid,
        lambda z: jax.nn.sigmoid(z) * (1 - jax.nn.sigmoid(z)),
    ),
    "identity": Activation(lambda z: z, jnp.ones_like),
}


def get_activation(op: str, name: str) -> Activation:
    """Return the activation called `name`.

    Raises:
        ValueError: no activation has this name; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise_unknown(op, "activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]
