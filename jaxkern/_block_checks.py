"""What the makers of block masks ask of their arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def has_values(leaf: object) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return is_array and not isinstance(leaf, Tracer)


def check_sizes(op: str, least: int, **sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < least:
            raise ValueError(
                f"{op}: {name} must be an integer of at least {least}, got {size!r}"
            )


def check_array(op: str, name: str, array: Any, kind: Any) -> None:
    wanted = "boolean" if kind is jnp.bool_ else "of integers"
    if not isinstance(array, jax.Array | np.ndarray):
        got = type(array).__name__
        raise TypeError(f"{op}: {name} must be an array, got {got}")
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{op}: {name} must be {wanted}, got {array.dtype}")


def check_concrete(op: str, **arrays: object) -> None:
    for name, array in arrays.items():
        if not has_values(array):
            raise TypeError(
                f"{op}: {name} must have values, got an array traced by jit; under jit "
                "there are BlockMask.document and BlockMask.from_blocks"
            )


def four_axes(op: str, name: str, mask: Any) -> Any:
    check_array(op, name, mask, jnp.bool_)
    if mask.ndim not in (2, 3, 4) or 0 in mask.shape:
        raise ValueError(
            f"{op}: {name} must have shape (q, kv), (heads, q, kv) or (batch, heads, "
            f"q, kv) and no empty axis, got {mask.shape}"
        )
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
