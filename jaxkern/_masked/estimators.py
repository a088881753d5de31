"""Estimators: hard masks with a gradient, for thresholds and draws that have none.

Each estimator returns entries of 0 and 1 in the dtype of the logits, and computes in
float32, or float64 if the logits are. A NaN stays a NaN.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import (
    Number,
    check_batched,
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
# The estimators that are called with logits, or with logits and a key, alone.
EstimatorName = Literal[
    "straight_through",
    "reinmax",
    "binary_concrete",
    "gumbel_softmax",
    "reinmax_categorical",
]
Estimator = Callable[..., jax.Array] | EstimatorName
# The rules by which a kernel can make masks of logits, and gradients of the logits.
Rule = Literal["straight_through", "one_plus_sigmoid", "reinmax"]


def _attach(mask: Array, soft: Array, logits: Array) -> Array:
    """Return `mask` with the derivative of `soft`, both in the dtype of `logits`."""
    return with_derivative_of(mask.astype(logits.dtype), soft.astype(logits.dtype))


def _threshold(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # A comparison, not a `where` of two numbers: each number would be an array in the
    # jaxpr, which differentiation moves out of a loop over samples, and every step
    # would read it from memory.
    """Return 1 for positive entries and 0 for others; it has no gradient."""
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
    # sigmoid(-x) and not 1 - sigmoid(x), which is 0 in float32 from x = 17 on.
    """Return sigmoid'(x)."""
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
    return _attach(_draw(wide, key), soft, logits)


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
    return _attach(mask, slope * wide, logits)


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
    return _attach(_threshold(noisy) if hard else soft, soft, logits)


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
    # Without mode="high" the noise would end too early for classes whose chance lies in
    # its far tail.
    """Draw Gumbel noise in the shape and dtype of `x`."""
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
    return _attach(_one_hot_of_largest(noisy, axis) if hard else soft, soft, logits)


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
    return _attach(drawn, soft, logits)


def estimator_of(op: str, estimator: Any) -> Callable[..., jax.Array]:
    """Return the function that makes a mask of logits, which may be given by its name.

    Raises:
        TypeError: `estimator` is neither callable nor a string.
        ValueError: No estimator has that name.
    """
    match estimator:
        case "straight_through":
            return straight_through
        case "reinmax":
            return reinmax
        case "binary_concrete":
            return binary_concrete
        case "gumbel_softmax":
            return gumbel_softmax
        case "reinmax_categorical":
            return reinmax_categorical
        case str():
            raise_unknown(op, "estimator", estimator, get_args(EstimatorName))
    given: object = estimator
    if not callable(given):
        names = ", ".join(map(repr, get_args(EstimatorName)))
        raise TypeError(
            f"{op}: estimator must be callable or one of {names}, got {estimator!r}"
        )
    return estimator


def rule_of(estimator: Callable[..., jax.Array]) -> Rule | None:
    """Return the kernels' rule for `estimator` without a key; None if they have none.

    A `functools.partial` has the rule of its function if each option that it binds is a
    default of that function; `derivative="one_plus_sigmoid"` of `straight_through` is
    the one exception.
    """
    if isinstance(estimator, partial):
        options = {**estimator.keywords}
        derivative = options.get("derivative")
        sloped = (
            estimator.func is straight_through
            # An array has no truth value.
            and isinstance(derivative, str)
            and derivative == "one_plus_sigmoid"
        )
        if sloped:
            del options["derivative"]
        if estimator.args or not _are_defaults(estimator.func, options):
            return None
        return "one_plus_sigmoid" if sloped else rule_of(estimator.func)
    # By identity, since a callable need not have an equality or a hash.
    if estimator is straight_through:
        return "straight_through"
    if estimator is reinmax:
        return "reinmax"
    return None


def is_fixed(estimator: Callable[..., jax.Array]) -> bool:
    """Tell whether `estimator` is known to compute the same in every call.

    The estimators of this file are, and so is a `functools.partial` of one that binds
    values.
    """
    if isinstance(estimator, partial):
        bound = jax.tree.leaves((estimator.args, estimator.keywords))
        traced = any(isinstance(value, Tracer) for value in bound)
        return not traced and is_fixed(estimator.func)
    return any(estimator is estimator_of("", name) for name in get_args(EstimatorName))


def _are_defaults(fn: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Tell whether each option has the default value of that parameter of `fn`."""
    parameters = inspect.signature(fn).parameters if options else {}
    return all(
        name in parameters
        # An array has no truth value, and a traced one no value at all.
        and isinstance(value, str | int | float | None)
        and value == parameters[name].default
        for name, value in options.items()
    )
