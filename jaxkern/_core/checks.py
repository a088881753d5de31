"""Argument checks in one voice: `op: thing must ..., got ...`."""

from collections.abc import Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_floating(op: str, **arrays: object) -> None:
    """Every array has one of our dtypes, and all have the first one's."""
    first, dtype = "", None
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            kind = type(array).__name__
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


def check_pair(op: str, name: str, pair: object) -> None:
    """A low-rank weight is a tuple or list of two arrays."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        size = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        kind = type(pair).__name__
        raise TypeError(f"{op}: {name} must be a pair (w_in, w_out), got {kind}{size}")


def check_shape(
    op: str,
    name: str,
    array: jax.Array,
    expected: tuple[str | int, ...],
    because: str = "",
) -> None:
    """`array` has the expected shape; a name stands for a size of at least 1."""
    shape = array.shape
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or got == want
        for got, want in zip(shape, expected, strict=True)
    )
    named = {
        got for got, want in zip(shape, expected, strict=fits) if isinstance(want, str)
    }
    if fits and 0 not in named:
        return
    sizes = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
    raise ValueError(
        f"{op}: {name} must have shape ({sizes}){because}"
        f"{' and no empty axis' if fits else ''}, got {shape}"
    )


def check_batched(op: str, name: str, array: jax.Array) -> None:
    """The last axis of `array` holds the features; there is at least one."""
    if array.ndim < 1 or array.shape[-1] < 1:
        raise ValueError(
            f"{op}: {name} must have shape (..., features) with features at least 1, "
            f"got {array.shape}"
        )


def check_key(op: str, key: object, because: str = "") -> None:
    """`key` is one random key, typed or as `jax.random.PRNGKey` makes it."""
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
