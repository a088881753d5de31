"""Estimators of one-hot draws of a class."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import (
    Number,
    check_batched,
    check_flag,
    check_floating,
    check_key,
    check_number,
)
from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from .bernoulli import attach


def _check_categorical(op: str, logits: Any, axis: Any) -> jax.Array:
    """Return the logits as a JAX array, checked to have classes on the axis."""
    (logits,) = check_floating(op, logits=logits)
    check_batched(op, "logits", logits)
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"{op}: axis must be in [{-logits.ndim}, {logits.ndim}), got {axis}"
        )
    if logits.shape[axis] < 1:
        raise ValueError(
            f"{op}: logits must have a class on axis {axis}, got {logits.shape}"
        )
    return logits


def _gumbel(key: PRNGKeyArray, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Draw Gumbel noise in the shape and dtype of `x`."""
    # Without mode="high" the noise would end too early for classes whose chance lies in
    # its far tail.
    return jax.random.gumbel(key, x.shape, x.dtype, mode="high")


def _one_hot_of_largest(x: Float[Array, "*shape"], axis: int) -> Float[Array, "*shape"]:
    """Return the one-hot vector of the largest entry on the axis; NaN if one is NaN."""
    index = jnp.argmax(x, axis)
    one_hot = jax.nn.one_hot(index, x.shape[axis], axis=axis, dtype=x.dtype)
    # Without this, argmax would take a NaN for the largest class.
    return jnp.where(jnp.isnan(x).any(axis, keepdims=True), jnp.nan, one_hot)


def gumbel_softmax(
    logits: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray,
    temperature: Number = 1.0,
    axis: int = -1,
    hard: bool = True,
) -> Float[Array, "*shape"]:
    r"""Draw a class on an axis, one-hot, with the gradient of its relaxation.

    $$y = \mathrm{softmax}\!\left(\frac{\theta + G}{\tau}\right), \qquad
    \frac{dL}{d\theta} = \frac{y \odot g - y \langle y, g\rangle}{\tau}, \qquad
    g = \frac{dL}{dD}$$

    $G$ is Gumbel noise, $\tau$ the temperature, and $D$ the one-hot vector of the
    largest $\theta + G$, so it is drawn from $\mathrm{softmax}(\theta)$.

    Bias: if `hard` is False, the gradient is exact for the mean of $L(y)$, which
    differs from the mean of $L(D)$. If `hard` is True, it is biased at every
    $\tau > 0$. For linear $L$ the bias vanishes as $\tau \to 0$, while the variance
    grows.

    Args:
        logits: The logits $\theta$ of the classes.
        key: The random key of the draw.
        temperature: $\tau$, above 0.
        axis: The axis of the classes.
        hard: Return $D$; if False, return $y$.

    Returns:
        The one-hot draw, in the shape and dtype of the logits.

    Raises:
        TypeError: `logits` is not a floating-point array, `key` is not a random key,
            `temperature` is not a number, or `hard` is not a bool.
        ValueError: `temperature` is not positive, or the logits have no such axis or no
            class on it.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        logits = jnp.array([0.0, 50.0, 0.0])
        print(jaxkern.gumbel_softmax(logits, key=jax.random.key(0)))
        ```
        ```text
        [0. 1. 0.]
        ```

    References:
        Gumbel-Softmax, eq. 2 and section 2.2: https://arxiv.org/abs/1611.01144.
    """
    op = "gumbel_softmax"
    logits = _check_categorical(op, logits, axis)
    check_key(op, key)
    check_number(
        op, "temperature", temperature, positive=True, finite=False, traced=True
    )
    check_flag(op, hard=hard)
    return _gumbel_softmax(logits, key, temperature, axis, hard)


@on_automatic_axes(lambda logits: logits)
@partial(jax.jit, static_argnames=("axis", "hard"))
def _gumbel_softmax(
    logits: Array, key: PRNGKeyArray, temperature: Number, axis: int, hard: bool
) -> Array:
    wide = widen(logits)
    noisy = wide + _gumbel(key, wide)
    soft = jax.nn.softmax(noisy / temperature, axis)
    return attach(_one_hot_of_largest(noisy, axis) if hard else soft, soft, logits)


def reinmax_categorical(
    logits: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray,
    temperature: Number = 1.0,
    axis: int = -1,
) -> Float[Array, "*shape"]:
    r"""Draw a class on an axis, one-hot, with the second-order gradient of ReinMax.

    $$\frac{dL}{d\theta} = 2 J(q) g - \tfrac12 J(\pi) g, \qquad
    J(p) g = p \odot g - p \langle p, g\rangle, \qquad
    q = \frac{D + \mathrm{softmax}(\theta/\tau)}{2}$$

    $D$ is drawn from $\pi = \mathrm{softmax}(\theta)$, $g = dL/dD$, and $\tau$ is the
    temperature.

    Bias: at $\tau = 1$ the mean of the gradient is exactly $d\,E[L]/d\theta$ if $L$ is
    at most quadratic in each $D$ with the others fixed; otherwise it is biased.

    Args:
        logits: The logits $\theta$ of the classes.
        key: The random key of the draw.
        temperature: $\tau$, at least 1.
        axis: The axis of the classes.

    Returns:
        The one-hot draw, in the shape and dtype of the logits.

    Raises:
        TypeError: `logits` is not a floating-point array, `key` is not a random key, or
            `temperature` is not a number.
        ValueError: `temperature` is below 1, or the logits have no such axis or no
            class on it.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        logits = jnp.array([0.0, 50.0, 0.0])
        print(jaxkern.reinmax_categorical(logits, key=jax.random.key(0)))
        ```
        ```text
        [0. 1. 0.]
        ```

    References:
        ReinMax, algorithm 2: https://arxiv.org/abs/2304.08612.
    """
    op = "reinmax_categorical"
    logits = _check_categorical(op, logits, axis)
    check_key(op, key)
    check_number(op, "temperature", temperature, least=1.0, finite=False, traced=True)
    return _reinmax_categorical(logits, key, temperature, axis)


@on_automatic_axes(lambda logits: logits)
@partial(jax.jit, static_argnames="axis")
def _reinmax_categorical(
    logits: Array, key: PRNGKeyArray, temperature: Number, axis: int
) -> Array:
    wide = widen(logits)

    def jacobian(p):
        p = lax.stop_gradient(p)
        return p * wide - p * (p * wide).sum(axis, keepdims=True)

    drawn = _one_hot_of_largest(wide + _gumbel(key, wide), axis)
    q = (drawn + jax.nn.softmax(wide / temperature, axis)) / 2
    soft = 2 * jacobian(q) - jacobian(jax.nn.softmax(wide, axis)) / 2
    return attach(drawn, soft, logits)
