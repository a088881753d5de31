"""The estimators by their names, and what products with masks ask about one.

An estimator is a hard mask with a gradient, for a threshold or a draw that has none. It
returns entries of 0 and 1 in the dtype of the logits, and computes in float32, or
float64 if the logits are. A NaN stays a NaN.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
from jax.core import Tracer

from .._core.checks import raise_unknown
from .bernoulli import binary_concrete, reinmax, straight_through
from .categorical import gumbel_softmax, reinmax_categorical

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


def needs_key(make: Callable[..., jax.Array]) -> bool:
    """Whether one of our estimators cannot be called without a key."""
    parameters = inspect.signature(make).parameters
    return "key" in parameters and parameters["key"].default is inspect.Parameter.empty


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

    Our estimators are, and so is a `functools.partial` of one that binds
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
