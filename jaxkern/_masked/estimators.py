"""Hard masks with gradients: estimators for what a threshold or a draw has none of.

Each returns entries of 0 and 1 in the dtype of the logits, and computes in float32, or
float64 if the logits have it. A NaN stays one.
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
Number = Float[Array, ""] | float
# The estimators that are called with logits, or with logits and a key, alone.
EstimatorName = Literal[
    "straight_through",
    "reinmax",
    "binary_concrete",
    "gumbel_softmax",
    "reinmax_categorical",
]
Estimator = Callable[..., jax.Array] | EstimatorName
# The rules by which a kernel can make a mask of logits, and their gradient.
Rule = Literal["straight_through", "one_plus_sigmoid", "reinmax"]


def _attach(mask: Array, soft: Array, logits: Array) -> Array:
    """`mask` with the derivative of `soft`, in the dtype of `logits`."""
    return with_derivative_of(mask.astype(logits.dtype), soft.astype(logits.dtype))


def _threshold(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # No `where` of two numbers: each is an array in the jaxpr, which differentiation
    # takes out of a loop over samples, so that every step reads it from memory.
    return lax.stop_gradient(jnp.where(jnp.isnan(x), x, (x > 0).astype(x.dtype)))


def _logistic(key: PRNGKeyArray, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Noise with P(x + noise > 0) = sigmoid(x)."""
    bits = jax.random.bits(key, x.shape, jnp.uint32)
    # A bit for the side and 31 for how far out: both tails reach to 23, where those of
    # one uniform number end at 16 and hold 2^-23 too much.
    tail = ((bits >> 1).astype(x.dtype) + 0.5) * 2.0**-31
    distance = jnp.log((2 - tail) / tail)
    return jnp.where(bits % 2 == 0, distance, -distance)


def _draw(x: Float[Array, "*shape"], key: PRNGKeyArray | None) -> Array:
    return _threshold(x if key is None else x + _logistic(key, x))


def _sigmoid_slope(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # Not 1 - sigmoid(x), which is 0 from 17 on.
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def straight_through(
    logits: Float[Array, "*shape"],
    *,
    derivative: Derivative = "identity",
    clip: Number | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*shape"]:
    r"""A hard mask of 0 and 1 whose gradient is that of a smooth function.

    $$b = 1[\ell > 0], \qquad \frac{dL}{d\ell} = \frac{dL}{db}\, s(\ell)$$

    The name of the `derivative` says what $s$ is:

    - "identity": $s = 1$;
    - "sigmoid": $s = \sigma(\ell)(1 - \sigma(\ell))$;
    - "one_plus_sigmoid": $s = 1 + \sigma(\ell)(1 - \sigma(\ell))$, between 1 and
      1.25. Code that was published with bilinear masks calls this rule ReinMax. It is
      not `reinmax`: it does not vanish where $|\ell|$ is large.

    With `clip` the gradient is 0 where $|\ell|$ is above it. With a `key`, $b$ is drawn
    instead: it is 1 with probability $\sigma(\ell)$. Entries are computed in float32,
    or float64 if the logits have it, and returned in the dtype of the logits.

    Bias: with a key and "sigmoid", unclipped, the gradient's mean is exactly
    $d\,E[L]/d\ell$ if $L$ is linear in each entry of $b$ with the others fixed. For any
    other $L$, and in every other form, the gradient is biased. Without a key no
    gradient is exact, since the derivative of the threshold itself is 0.

    ```python
    >>> import jax, jax.numpy as jnp, jaxkern
    >>> logits = jnp.array([-2.0, 0.0, 1.0])
    >>> print(jaxkern.straight_through(logits))
    [0. 0. 1.]
    >>> def loss(logits):
    ...     masks = jaxkern.straight_through(logits, derivative="one_plus_sigmoid")
    ...     return masks.sum()
    >>> print(jax.grad(loss)(logits).round(3))
    [1.105 1.25  1.197]

    ```

    Raises:
        TypeError: `logits` is no floating-point array, `clip` no number, `key` no key.
        ValueError: `derivative` is unknown, or `clip` is not positive.

    References:
        https://arxiv.org/abs/1308.3432; `clip`: BinaryNet, eq. 4,
        https://arxiv.org/abs/1602.02830.
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
    r"""Bernoulli masks with ReinMax's second-order gradient.

    $b$ is 1 with probability $p = \sigma(\ell)$; with $q = (b + \sigma(\ell/\tau))/2$

    $$\frac{dL}{d\ell} = \frac{dL}{db} (2 q (1 - q) - \tfrac12 p (1 - p)),$$

    which for $\tau = 1$ is $(1 - p)/2$ where $b = 1$ and $p/2$ where $b = 0$.

    Bias: at $\tau = 1$ the gradient's mean is exactly $d\,E[L]/d\ell$ if $L$ is at most
    quadratic in each entry of $b$ with the others fixed; the mean is the trapezoidal
    rule for $L(1) - L(0)$. At other temperatures, or for other $L$, it is biased.
    Without a key $b = 1[\ell > 0]$, and the factor $\sigma(-|\ell|)/2$ at $\tau = 1$
    is a choice, with no mean that it would be exact for.

    Raises:
        TypeError: `logits` is no floating-point array, `key` no key, `temperature` no
            number.
        ValueError: `temperature` is below 1, where the factor can change its sign.

    References:
        ReinMax, algorithm 2, for two classes with the logits 0 and l:
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
    r"""Bernoulli masks with the gradient of their relaxation.

    With $u$ uniform and $y = \sigma((\ell + \ln\frac{u}{1 - u})/\tau)$ the result is
    $b = 1[y > 1/2]$, 1 with probability $\sigma(\ell)$, or $y$ if not `hard`, and

    $$\frac{dL}{d\ell} = \frac{dL}{db}\,\frac{y (1 - y)}{\tau}.$$

    Bias: if not `hard`, none, for the mean of $L(y)$, which is not that of $L(b)$. If
    `hard`, biased at every $\tau > 0$, for linear $L$ too: its gradient's mean is that
    of the mean of $y$, a third short at $\ell = 0$, $\tau = 1$. For linear $L$ the bias
    vanishes as $\tau \to 0$, while the variance grows.

    Raises:
        TypeError: `logits` is no floating-point array, `key` no key, `temperature` no
            number.
        ValueError: `temperature` is not positive.

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
    # The mode is for classes whose chance lies in the noise's far tail.
    return jax.random.gumbel(key, x.shape, x.dtype, mode="high")


def _one_hot_of_largest(x: Float[Array, "*shape"], axis: int) -> Float[Array, "*shape"]:
    index = jnp.argmax(x, axis)
    one_hot = jax.nn.one_hot(index, x.shape[axis], axis=axis, dtype=x.dtype)
    # argmax would take a NaN for a class.
    return jnp.where(jnp.isnan(x).any(axis, keepdims=True), jnp.nan, one_hot)


def gumbel_softmax(
    logits: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray,
    temperature: Number = 1.0,
    axis: int = -1,
    hard: bool = True,
) -> Float[Array, "*shape"]:
    r"""Draw a class on `axis`, one-hot, with the gradient of its relaxation.

    With $G$ Gumbel noise and $y = \mathrm{softmax}((\theta + G)/\tau)$ the result is
    the one-hot $D$ of the largest $\theta + G$, so drawn from
    $\mathrm{softmax}(\theta)$, or $y$ if not `hard`, and with $g = dL/dD$

    $$\frac{dL}{d\theta} = (y \odot g - y \langle y, g\rangle)/\tau.$$

    Bias: if not `hard`, none, for the mean of $L(y)$, which is not that of $L(D)$. If
    `hard`, biased at every $\tau > 0$, for linear $L$ too, where the bias vanishes as
    $\tau \to 0$, while the variance grows.

    Raises:
        TypeError: `logits` is no floating-point array, `key` no key, `temperature` no
            number.
        ValueError: `temperature` is not positive, or `logits` have no such axis.

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
    r"""Draw a class on `axis`, one-hot, with ReinMax's second-order gradient.

    $D$ is drawn from $\pi = \mathrm{softmax}(\theta)$. With $g = dL/dD$,
    $J(p) g = p \odot g - p \langle p, g\rangle$ and
    $q = (D + \mathrm{softmax}(\theta/\tau))/2$

    $$\frac{dL}{d\theta} = 2 J(q) g - \tfrac12 J(\pi) g.$$

    Bias: at $\tau = 1$ the gradient's mean is exactly $d\,E[L]/d\theta$ if $L$ is at
    most quadratic in each $D$ with the others fixed; else it is biased.

    Raises:
        TypeError: `logits` is no floating-point array, `key` no key, `temperature` no
            number.
        ValueError: `temperature` is below 1, or `logits` have no such axis.

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
    """The function that makes a mask of logits, which may be given by its name.

    Raises:
        TypeError: `estimator` is neither a function nor a string.
        ValueError: there is no estimator of that name.
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
    """The rule of `estimator` without a key, or None if the kernels do not know it.

    A `functools.partial` has its function's rule if each option that it binds is that
    function's default, but for the `derivative` of `straight_through`.
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
    """Whether `estimator` is known to do the same in every call.

    As those here do, and a `functools.partial` of one that binds values.
    """
    if isinstance(estimator, partial):
        bound = jax.tree.leaves((estimator.args, estimator.keywords))
        traced = any(isinstance(value, Tracer) for value in bound)
        return not traced and is_fixed(estimator.func)
    return any(estimator is estimator_of("", name) for name in get_args(EstimatorName))


def _are_defaults(fn: Callable[..., Any], options: dict[str, Any]) -> bool:
    parameters = inspect.signature(fn).parameters if options else {}
    return all(
        name in parameters
        # An array has no truth value, and a traced one no value at all.
        and isinstance(value, str | int | float | None)
        and value == parameters[name].default
        for name, value in options.items()
    )
