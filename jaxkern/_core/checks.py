"""Argument checks in one voice: `op: thing must ..., got ...`."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

# One number, which may be traced.
Number = Float[Array, ""] | float
DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtype(op: str, name: str, dtype: Any) -> None:
    """Check that `dtype` names one of `DTYPES`."""
    got = dtype
    # Without this test, NumPy would read None as float64.
    if dtype is not None:
        try:
            got = jnp.dtype(dtype).name
        except TypeError:
            pass
    if got not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be a floating-point dtype out of "
            f"{', '.join(DTYPES)}, got {got}"
        )


def check_floating(op: str, **arrays: object) -> tuple[jax.Array, ...]:
    """Check that the arrays share one dtype out of `DTYPES`.

    Returns:
        The arrays in order, as JAX arrays. NumPy arrays would compute in float64.
    """
    first, dtype, given = "", None, []
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            kind = kind_of(array)
            hint = (
                ", of which [...] is the array" if hasattr(array, "get_value") else ""
            )
            raise TypeError(f"{op}: {name} must be an array, got {kind}{hint}")
        # NumPy's float64 is JAX's float32, unless 64-bit types are on.
        got = jax.dtypes.canonicalize_dtype(array.dtype)
        if str(got) not in DTYPES:
            raise TypeError(
                f"{op}: {name} must have a floating-point dtype out of "
                f"{', '.join(DTYPES)}, got {got}"
            )
        if dtype is None:
            first, dtype = name, got
        if got != dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first}, {dtype}, got {got}"
            )
        given.append(jnp.asarray(array))
    return tuple(given)


def check_array(
    op: str, name: str, array: object, kind: Literal["boolean", "integer"]
) -> None:
    """Check that `array` is an array of booleans or of integers."""
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{op}: {name} must be an array, got {kind_of(array)}")
    if not jnp.issubdtype(array.dtype, np.bool_ if kind == "boolean" else np.integer):
        article = "a" if kind == "boolean" else "an"
        raise TypeError(
            f"{op}: {name} must be {article} {kind} array, got {array.dtype}"
        )


def check_flag(op: str, **flags: object) -> None:
    """Check that each flag is True or False, and not a traced array."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"{op}: {name} must be True or False, and known when traced, "
                f"got {flag!r}"
            )


def kind_of(value: object) -> str:
    """Describe a value in a message: an array by dtype and shape, others by type."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


def as_int32(array: jax.Array | np.ndarray) -> jax.Array:
    """Convert integers to int32, in which they are compared, added to and stored.

    An integer that does not fit becomes the nearest one that does, so that an index
    that was out of range stays out of range.
    """
    limits, given = jnp.iinfo(jnp.int32), jnp.iinfo(array.dtype)
    numpy: Any = np if isinstance(array, np.ndarray) else jnp
    if given.max > limits.max:
        array = numpy.minimum(array, limits.max)
    if given.min < limits.min:
        array = numpy.maximum(array, limits.min)
    return jnp.asarray(array, jnp.int32)


def check_integer(op: str, name: str, value: object, least: int | None = 1) -> int:
    """Check that `value` is an integer of at least `least`, and not a bool.

    With None for `least`, any integer passes.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        if least is None or int(value) >= least:
            return int(value)
    bound = "" if least is None else f" of at least {least}"
    raise ValueError(f"{op}: {name} must be an integer{bound}, got {value!r}")


def check_number(
    op: str,
    name: str,
    value: Any,
    *,
    positive: bool = False,
    least: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
    traced: bool = False,
) -> None:
    """Check that `value` is one number, and not a bool.

    Args:
        traced: allow an array of one real number too, whose value JAX may be tracing.
    """
    number = isinstance(value, int | float | np.integer | np.floating)
    if traced and isinstance(value, jax.Array | np.ndarray):
        kinds = np.integer, np.floating
        is_real = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        number = value.shape == () and is_real
    if not number or isinstance(value, bool):
        array = isinstance(value, jax.Array | np.ndarray)
        got = kind_of(value) if array else repr(value)
        known = ", known when JAX traces and no array" if array and not traced else ""
        raise TypeError(f"{op}: {name} must be one number{known}, got {got}")
    if isinstance(value, Tracer):
        return
    wanted = []
    if finite and not math.isfinite(value):
        wanted.append("finite")
    if positive and not value > 0:
        wanted.append("positive")
    if least > -math.inf and not value >= least:
        wanted.append(f"at least {least:g}")
    if most < math.inf and not value <= most:
        wanted.append(f"at most {most:g}")
    if wanted:
        raise ValueError(f"{op}: {name} must be {' and '.join(wanted)}, got {value}")


def check_pair(op: str, name: str, pair: object) -> None:
    """Check that a low-rank weight is a tuple or list of two arrays."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        size = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        kind = kind_of(pair)
        raise TypeError(f"{op}: {name} must be a pair (w_in, w_out), got {kind}{size}")


def check_shape(
    op: str,
    name: str,
    array: jax.Array,
    expected: tuple[str | int, ...],
    because: str = "",
) -> None:
    """Check that `array` has the expected shape.

    A name in `expected` stands for any size of at least 1. The name "batch" also stands
    for 0, since an empty batch is legal.
    """
    shape = array.shape
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or got == want
        for got, want in zip(shape, expected, strict=True)
    )
    named = {
        got
        for got, want in zip(shape, expected, strict=fits)
        if isinstance(want, str) and want != "batch"
    }
    if fits and 0 not in named:
        return
    sizes = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
    raise ValueError(
        f"{op}: {name} must have shape ({sizes}){because}"
        f"{' and no empty axis' if fits else ''}, got {shape}"
    )


def check_batched(op: str, name: str, array: jax.Array) -> None:
    """Check that `array` has a last axis, with at least one feature."""
    if array.ndim < 1 or array.shape[-1] < 1:
        raise ValueError(
            f"{op}: {name} must have shape (..., features) with features at least 1, "
            f"got {array.shape}"
        )


def check_key(op: str, key: object, because: str = "") -> None:
    """Check that `key` is one random key, from `jax.random.key` or `PRNGKey`."""
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return
        if key.dtype == np.uint32 and key.shape == (2,):
            return
    got = f"{key.dtype}{key.shape}" if isinstance(key, jax.Array) else repr(key)
    raise TypeError(
        f"{op}: key must be a key, as from jax.random.key{because}, got {got}"
    )


def raise_unknown(op: str, name: str, got: object, valid: Sequence[object]) -> NoReturn:
    raise ValueError(
        f"{op}: {name} must be one of {', '.join(map(repr, valid))}, got {got!r}"
    )


def given(x: jax.Array) -> str:
    """Return what a refused shape says about the input that it must fit."""
    return f" for x of shape {x.shape}"
