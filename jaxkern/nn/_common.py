"""How the modules check their arguments and initialize their parameters."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.core import Tracer
from jaxtyping import Array, Float

from .._core.checks import (
    as_int32,
    check_array,
    check_dtype,
    check_floating,
    check_integer,
    check_shape,
    kind_of,
)
from .._core.dispatch import Implementation, check_implementation
from .._core.precision import widen

# The variance of each factor is 1 / its fan-in. The product of two factors then has the
# variance of a full-rank kernel with the same initializer.
default_kernel_init = nnx.initializers.lecun_normal()
default_attention_kernel_init = nnx.initializers.xavier_normal()


def check_arguments(
    module: str, implementation: Implementation | None, **sizes: int
) -> tuple[int, ...]:
    """Check the implementation's name, and that every size is a positive integer.

    Returns:
        The sizes as Python integers, since products of NumPy's narrow integers may not
        fit in their dtype.
    """
    check_implementation(module, implementation)
    return tuple(check_integer(module, name, size) for name, size in sizes.items())


def check_dtypes(
    module: str, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs
) -> dict[str, Any]:
    """Return the dtypes and `rngs` as submodules take them, checked."""
    if dtype is not None:
        check_dtype(module, "dtype", dtype)
    check_dtype(module, "param_dtype", param_dtype)
    if not isinstance(rngs, nnx.Rngs):
        kind = kind_of(rngs)
        raise TypeError(f"{module}: rngs must be an nnx.Rngs, got {kind}")
    return {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}


def check_callable(module: str, name: str, function: object) -> None:
    """Check that `function` can be called."""
    if not callable(function):
        kind = kind_of(function)
        raise TypeError(f"{module}: {name} must be callable, got {kind}")


def takes_return_lse(function: Callable[..., Any]) -> bool:
    """Whether a function has an option `return_lse`, or any option."""
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return "return_lse" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


class Bound(partial[Any]):
    """A `functools.partial` that equals another of the same function and arguments.

    Without this, two models that are built alike would differ, and programs of one
    would be compiled anew for the other. Arrays are equal only if they are the same
    object.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and _identity(self) == _identity(other)

    def __hash__(self) -> int:
        return hash(_identity(self))


def bind(function: Any, **options: Any) -> Any:
    """Bind options to a function, for a module to keep."""
    if type(function) is partial:
        given = function.keywords | options
        return Bound(bind(function.func), *function.args, **given)
    return Bound(function, **options) if options else function


def _identity(value: Any) -> Any:
    """Return a value to hash and compare in place of `value`."""
    match value:
        case partial():
            options = _identity(value.keywords)
            return _identity(value.func), _identity(value.args), options
        case tuple() | list():
            return tuple(map(_identity, value))
        case dict():
            return frozenset((name, _identity(x)) for name, x in value.items())
    try:
        hash(value)
    except TypeError:
        return id, id(value)
    return type(value), value


def check_tokens(op: str, name: str, tokens: Any) -> None:
    """Check that `tokens` is an integer array of shape (batch, seq)."""
    check_array(op, name, tokens, "integer")
    check_shape(op, name, tokens, ("batch", "seq"))


def read_tokens(
    op: str, name: str, tokens: Any, vocab_size: int, lengths: Any = None
) -> jax.Array:
    """Return the tokens in int32, after a check that they are in the vocabulary.

    Only tokens before the `lengths` are checked, and only if their values are known.
    """
    values = known(tokens)
    if values is not None and lengths is not None:
        ends, places = known(lengths), np.arange(tokens.shape[1])
        values = None if ends is None else values[places < ends[:, None]]
    check_range(op, name, values, 0, vocab_size - 1)
    return as_int32(tokens)


def known(array: Any) -> np.ndarray | None:
    """Return an array's values; None if it is traced or partly on another process."""
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def check_range(
    op: str, name: str, values: np.ndarray | None, least: int, most: int
) -> None:
    """Check that known values are between `least` and `most`."""
    if values is None or values.size == 0:
        return
    for extreme in (values.min(), values.max()):
        if not least <= extreme <= most:
            raise ValueError(
                f"{op}: {name} must be from {least} to {most}, got {extreme}"
            )


def check_input(module: str, x: jax.Array, features: int) -> jax.Array:
    """Return `x` as a JAX array of shape (..., features)."""
    (x,) = check_floating(module, x=x)
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(
            f"{module}: x must have shape (..., {features}), got {x.shape}"
        )
    return x


def check_means(
    op: str, module: object, kind: type[nnx.Module], wanted: str, name: str = "module"
) -> None:
    """Check that `module` is a `kind` whose call is that of `kind`.

    A subclass may mean something else: `nnx.LoRALinear` is an `nnx.Linear` that adds a
    second product to the product with its kernel.
    """
    call: Any = kind.__call__
    if not isinstance(module, kind) or type(module).__call__ is not call:
        other = ", whose call is another" if isinstance(module, kind) else ""
        got = kind_of(module)
        raise TypeError(f"{op}: {name} must be {wanted}, got {got}{other}")


def relative_loss(
    w: Float[Array, "*shape"], approximation: Float[Array, "*shape"]
) -> float:
    r"""Return $\|W - A\|_F / \|W\|_F$, or 0 for $W = 0$, without over- or underflow."""
    return float(_relative_loss(w, approximation))


@jax.jit
def _relative_loss(w: jax.Array, approximation: jax.Array) -> jax.Array:
    w, approximation = widen(w), widen(approximation)
    largest = jnp.abs(w).max()
    largest = jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(w / largest)
    lost = jnp.linalg.norm((w - approximation) / largest)
    return lost / jnp.where(norm > 0, norm, 1)


def make_kernel(
    init: Initializer,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    dtype: Dtype,
    axis_names: tuple[str | None, ...],
) -> nnx.Param[jax.Array]:
    """Initialize a parameter that is annotated with its logical axes.

    The names of the axes are for the user's own mesh and rules, so building a module
    needs neither.
    """
    return nnx.Param(
        init(rngs.params(), shape, dtype),
        out_sharding=axis_names,
        eager_sharding=False,
    )


def axis_metadata(*axis_names: str | None) -> dict[str, Any]:
    """Return the annotation of `make_kernel`, for parameters of flax's own layers."""
    return {"out_sharding": axis_names, "eager_sharding": False}


def scale_init(init: Initializer, gain: float) -> Initializer:
    """Return the initializer `init` times `gain`."""
    return lambda *args, **kwargs: gain * init(*args, **kwargs)
