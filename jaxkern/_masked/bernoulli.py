"""Estimators of masks whose entries are thresholded or drawn one by one."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import (
    Number,
    check_flag,
    check_floating,
    check_key,
    check_number,
    raise_unknown,
)
from .._core.gradients import with_derivative_of
from .._core.precision import widen
from .._core.sharding import on_automatic_axes

Derivative = Literal["identity", "sigmoid", "one_plus_sigmoid"]


def attach(mask: Array, soft: Array, logits: Array) -> Array:
    """Return `mask` with the derivative of `soft`, both in the dtype of `logits`."""
    return with_derivative_of(mask.astype(logits.dtype), soft.astype(logits.dtype))


def _threshold(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return 1 for positive entries and 0 for others; it has no gradient."""
    # A comparison, not a `where` of two numbers: each number would be an array in the
    # jaxpr, which differentiation moves out of a loop over samples, and every step
    # would read it from memory.
    return lax.stop_gradient(jnp.where(jnp.isnan(x), x, (x > 0).astype(x.dtype)))


def _logistic(key: PRNGKeyArray, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Draw noise with P(x + noise > 0) = sigmoid(x)."""
    bits = jax.random.bits(key, x.shape, jnp.uint32)
    # One bit is the sign and 31 are the distance, so both tails reach to 23. The tails
    # of one uniform float32 number would end at 16 and hold 2^-23 too much.
    tail = ((bits >> 1).astype(x.dtype) + 0.5) * 2.0**-31
    distance = jnp.log((2 - tail) / tail)
    return jnp.where(bits % 2 == 0, distance, -distance)


def _draw(x: Float[Array, "*shape"], key: PRNGKeyArray | None) -> Array:
    """Draw a mask with probability sigmoid(x), or threshold at 0 without a key."""
    return _threshold(x if key is None else x + _logistic(key, x))


def _sigmoid_slope(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return sigmoid'(x)."""
    # sigmoid(-x) and not 1 - sigmoid(x), which is 0 in float32 from x = 17 on.
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def straight_through(
    logits: Float[Array, "*shape"],
    *,
    derivative: Derivative = "identity",
    clip: Number | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*shape"]:
    r"""Return a hard mask of 0 and 1 that has the gradient of a smooth function.

    $$b = 1[\ell > 0], \qquad \frac{dL}{d\ell} = \frac{dL}{db}\, s(\ell)$$

    The name of the `derivative` says what $s$ is:

    - "identity": $s = 1$.
    - "sigmoid": $s = \sigma(\ell)(1 - \sigma(\ell))$.
    - "one_plus_sigmoid": $s = 1 + \sigma(\ell)(1 - \sigma(\ell))$, between 1 and 1.25.
      The code published with bilinear masks calls this rule ReinMax. It differs from
      `reinmax`: it does not vanish where $|\ell|$ is large.

    Bias: with a key and "sigmoid", unclipped, the mean of the gradient is exactly
    $d\,E[L]/d\ell$ if $L$ is linear in each entry of $b$ with the others fixed. For any
    other $L$, and in every other form, the gradient is biased. Without a key no
    gradient is exact, since the derivative of the threshold itself is 0.

    Args:
        logits: The logits of the mask, of any shape.
        derivative: The function $s$ of the backward pass, see above.
        clip: The gradient is 0 where $|\ell|$ is above it. None does not clip.
        key: With a random key, $b$ is drawn instead: it is 1 with probability
            $\sigma(\ell)$.

    Returns:
        The mask, in the shape and dtype of the logits.

    Raises:
        TypeError: `logits` is not a floating-point array, `clip` is not a number, or
            `key` is not a random key.
        ValueError: `derivative` is unknown, or `clip` is not positive.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        def loss(logits):
            masks = jaxkern.straight_through(logits, derivative="one_plus_sigmoid")
            return masks.sum()

        logits = jnp.array([-2.0, 0.0, 1.0])
        print(jaxkern.straight_through(logits))
        print(jax.grad(loss)(logits).round(3))
        ```
        ```text
        [0. 0. 1.]
        [1.105 1.25  1.197]
        ```

    References:
        The estimator: https://arxiv.org/abs/1308.3432.
        `clip`: BinaryNet, eq. 4, https://arxiv.org/abs/1602.02830.
    """
    op = "straight_through"
    (logits,) = check_floating(op, logits=logits)
    if derivative not in get_args(Derivative):
        raise_unknown(op, "derivative", derivative, get_args(Derivative))
    if clip is not None:
        check_number(op, "clip", clip, positive=True, finite=False, traced=True)
    if key is not None:
        check_key(op, key)
    return _straight_through(logits, derivative, clip, key)


@on_automatic_axes(lambda logits: logits)
@partial(jax.jit, static_argnames="derivative")
def _straight_through(
    logits: Array, derivative: Derivative, clip: Number | None, key: PRNGKeyArray | None
) -> Array:
    wide = widen(logits)
    match derivative:
        case "identity":
            soft = wide
        case "sigmoid":
            soft = lax.stop_gradient(_sigmoid_slope(wide)) * wide
        case "one_plus_sigmoid":
            soft = lax.stop_gradient(1 + _sigmoid_slope(wide)) * wide
    if clip is not None:
        soft = jnp.where(jnp.abs(wide) > clip, 0, soft)
    return attach(_draw(wide, key), soft, logits)


def reinmax(
    logits: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray | None = None,
    temperature: Number = 1.0,
) -> Float[Array, "*shape"]:
    r"""Draw Bernoulli masks with the second-order gradient of ReinMax.

    $$\frac{dL}{d\ell} = \frac{dL}{db} \left(2 q (1 - q) - \tfrac12 p (1 - p)\right),
    \qquad q = \frac{b + \sigma(\ell/\tau)}{2}$$

    The mask $b$ is 1 with probability $p = \sigma(\ell)$, and $\tau$ is the
    temperature. For $\tau = 1$ the factor is $(1 - p)/2$ where $b = 1$ and $p/2$ where
    $b = 0$.

    Bias: at $\tau = 1$ the mean of the gradient is exactly $d\,E[L]/d\ell$ if $L$ is at
    most quadratic in each entry of $b$ with the others fixed; it is the trapezoidal
    rule for $L(1) - L(0)$. At other temperatures, or for other $L$, it is biased.
    Without a key $b = 1[\ell > 0]$. The factor, $\sigma(-|\ell|)/2$ at $\tau = 1$, is
    then a choice: there is no mean for which it would be exact.

    Args:
        logits: The logits of the mask, of any shape.
        key: The random key of the draw. None thresholds at 0 instead.
        temperature: $\tau$, at least 1.

    Returns:
        The mask, in the shape and dtype of the logits.

    Raises:
        TypeError: `logits` is not a floating-point array, `key` is not a random key, or
            `temperature` is not a number.
        ValueError: `temperature` is below 1, where the factor can change its sign.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        logits = jnp.array([-2.0, 0.0, 1.0])
        print(jaxkern.reinmax(logits))
        print(jax.grad(lambda x: jaxkern.reinmax(x).sum())(logits).round(3))
        ```
        ```text
        [0. 0. 1.]
        [0.06  0.25  0.134]
        ```

    References:
        ReinMax, algorithm 2, for two classes with the logits 0 and $\ell$:
            https://arxiv.org/abs/2304.08612.
    """
    op = "reinmax"
    (logits,) = check_floating(op, logits=logits)
    if key is not None:
        check_key(op, key)
    check_number(op, "temperature", temperature, least=1.0, finite=False, traced=True)
    return _reinmax(logits, key, temperature)


@on_automatic_axes(lambda logits: logits)
@jax.jit
def _reinmax(logits: Array, key: PRNGKeyArray | None, temperature: Number) -> Array:
    wide = widen(logits)
    mask = _draw(wide, key)
    q = (mask + jax.nn.sigmoid(wide / temperature)) / 2
    not_q = (1 - mask + jax.nn.sigmoid(-wide / temperature)) / 2
    slope = lax.stop_gradient(2 * q * not_q - _sigmoid_slope(wide) / 2)
    return attach(mask, slope * wide, logits)


def binary_concrete(
    logits: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray,
    temperature: Number = 1.0,
    hard: bool = True,
) -> Float[Array, "*shape"]:
    r"""Draw Bernoulli masks with the gradient of their relaxation.

    $$y = \sigma\!\left(\frac{\ell + \ln\frac{u}{1 - u}}{\tau}\right), \qquad
    b = 1[y > \tfrac12], \qquad
    \frac{dL}{d\ell} = \frac{dL}{db}\,\frac{y (1 - y)}{\tau}$$

    $u$ is uniform in (0, 1), so $b$ is 1 with probability $\sigma(\ell)$, and $\tau$ is
    the temperature.

    Bias: if `hard` is False, the gradient is exact for the mean of $L(y)$, which
    differs from the mean of $L(b)$. If `hard` is True, it is biased at every
    $\tau > 0$, also for linear $L$: its mean is the gradient of the mean of $y$, a
    third too small at $\ell = 0$ and $\tau = 1$. For linear $L$ the bias vanishes as
    $\tau \to 0$, while the variance grows.

    Args:
        logits: The logits of the mask, of any shape.
        key: The random key of the draw.
        temperature: $\tau$, above 0.
        hard: Return $b$; if False, return $y$.

    Returns:
        The mask, in the shape and dtype of the logits.

    Raises:
        TypeError: `logits` is not a floating-point array, `key` is not a random key,
            `temperature` is not a number, or `hard` is not a bool.
        ValueError: `temperature` is not positive.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        mask = jaxkern.binary_concrete(jnp.array([-30.0, 30.0]), key=jax.random.key(0))
        print(mask)
        ```
        ```text
        [0. 1.]
        ```

    References:
        The Concrete Distribution, appendix B: https://arxiv.org/abs/1611.00712.
    """
    op = "binary_concrete"
    (logits,) = check_floating(op, logits=logits)
    check_key(op, key)
    check_number(
        op, "temperature", temperature, positive=True, finite=False, traced=True
    )
    check_flag(op, hard=hard)
    return _binary_concrete(logits, key, temperature, hard)


@on_automatic_axes(lambda logits: logits)
@partial(jax.jit, static_argnames="hard")
def _binary_concrete(
    logits: Array, key: PRNGKeyArray, temperature: Number, hard: bool
) -> Array:
    wide = widen(logits)
    noisy = wide + _logistic(key, wide)
    soft = jax.nn.sigmoid(noisy / temperature)
    return attach(_threshold(noisy) if hard else soft, soft, logits)
