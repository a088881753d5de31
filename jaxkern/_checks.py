"""Argument checks in one voice: `op: thing must ..., got ...`."""

from collections.abc import Sequence
from typing import Literal, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

Implementation = Literal["xla", "mosaic_gpu"]


def check_floating(op: str, **arrays: object) -> None:
    """Every array is a floating-point one, and all have the first one's dtype."""
    first, dtype = "", None
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(f"{op}: {name} must be an array, got {type(array)}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{op}: {name} must have a floating-point dtype, got {array.dtype}"
            )
        if dtype is None:
            first, dtype = name, array.dtype
        if array.dtype != dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first}, {dtype}, "
                f"got {array.dtype}"
            )


def check_pair(op: str, name: str, pair: object) -> None:
    """A low-rank weight is a pair of arrays."""
    if not isinstance(pair, Sequence) or len(pair) != 2:
        size = f" of {len(pair)}" if isinstance(pair, Sequence) else ""
        raise TypeError(
            f"{op}: {name} must be a pair (w_in, w_out), got {type(pair)}{size}"
        )


def check_shape(
    op: str, name: str, array: jax.Array, expected: tuple[str | int, ...]
) -> None:
    """`array` has the expected shape; a name stands for a size of at least 1."""
    shape = array.shape
    matches = len(shape) == len(expected) and all(
        got >= 1 if isinstance(want, str) else got == want
        for got, want in zip(shape, expected, strict=True)
    )
    if not matches:
        wanted = (
            "(" + ", ".join(map(str, expected)) + ("," * (len(expected) == 1)) + ")"
        )
        sizes = [want for want in expected if isinstance(want, str)]
        at_least = f" with {' and '.join(sizes)} at least 1" if sizes else ""
        raise ValueError(
            f"{op}: {name} must have shape {wanted}{at_least}, got {shape}"
        )


def check_batched(op: str, name: str, array: jax.Array) -> None:
    """The last axis of `array` holds the features; there is at least one."""
    if array.ndim < 1 or array.shape[-1] < 1:
        raise ValueError(
            f"{op}: {name} must have shape (..., features) with features at least 1, "
            f"got {array.shape}"
        )


def raise_unknown(op: str, name: str, got: object, valid: Sequence[object]) -> NoReturn:
    raise ValueError(
        f"{op}: {name} must be one of {', '.join(map(repr, valid))}, got {got!r}"
    )


def check_xla_only(op: str, implementation: Implementation | None) -> None:
    """For ops that have no kernel: None and "xla" are the same."""
    match implementation:
        case None | "xla":
            return
        case "mosaic_gpu":
            raise NotImplementedError(
                f"{op}: implementation must be 'xla', got 'mosaic_gpu', "
                "for which this op has no kernel"
            )
        case _:
            raise_unknown(
                op, "implementation", implementation, (None, *get_args(Implementation))
            )
