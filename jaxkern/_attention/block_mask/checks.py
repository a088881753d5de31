"""Checks of the arguments from which block masks are made."""

import inspect
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ..._core.checks import check_array, check_integer, kind_of
from .patterns import blocks_of


def has_values(leaf: object) -> bool:
    """Say whether the leaf is an array that no transformation traces."""
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return is_array and not isinstance(leaf, Tracer)


def on_host(array: Any) -> Any:
    """Return the array in NumPy if it has values; `jit` would trace jnp's results."""
    return np.asarray(array) if has_values(array) else array


def check_sizes(op: str, least: int, **sizes: object) -> tuple[int, ...]:
    """Check that all are integers of at least `least`, and that lengths fit in 32 bits.

    Returns:
        Python's integers, since NumPy's may be too narrow to be negated or multiplied.
    """
    values = [check_integer(op, name, size, least) for name, size in sizes.items()]
    for name, value in zip(sizes, values, strict=True):
        if name in ("seq_q", "seq_kv", "block_size") and value >= 2**31:
            raise ValueError(f"{op}: {name} must be less than 2**31, got {value}")
    return tuple(values)


def check_lengths(
    op: str, seq_q: object, seq_kv: object, block_size: object
) -> tuple[int, int, int]:
    """Check the sizes of a mask, and return them as Python's integers."""
    seq_q, seq_kv, block_size = check_sizes(
        op, 1, seq_q=seq_q, seq_kv=seq_kv, block_size=block_size
    )
    return seq_q, seq_kv, block_size


def check_mask_fn(op: str, name: str, fn: object) -> None:
    """Check that it is a function of (b, h, q, k), as far as its signature tells."""
    if not callable(fn):
        raise TypeError(f"{op}: {name} must be a function, got {kind_of(fn)}")
    try:
        signature = inspect.signature(fn)
    except ValueError:
        # Some functions that are written in C have no signature.
        return
    try:
        signature.bind(0, 0, 0, 0)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must take four arguments, (b, h, q, k), got one of "
            f"{signature}"
        ) from None


def check_concrete(op: str, **arrays: object) -> None:
    for name, array in arrays.items():
        if not has_values(array):
            raise TypeError(
                f"{op}: {name} must have values, got an array traced by jit; under jit "
                "there are BlockMask.document, of segment ids, and "
                "BlockMask.from_blocks, of blocks"
            )


def four_axes(op: str, name: str, mask: Any) -> Any:
    """Check the kind and shape of a mask, and return it with all four axes."""
    check_array(op, name, mask, "boolean")
    if mask.ndim not in (2, 3, 4) or 0 in mask.shape:
        raise ValueError(
            f"{op}: {name} must have shape (q, kv), (heads, q, kv) or (batch, heads, "
            f"q, kv) and no empty axis, got {mask.shape}"
        )
    return on_host(mask).reshape((1,) * (4 - mask.ndim) + mask.shape)


def check_segment_ids(op: str, ids: Any) -> None:
    check_array(op, "segment_ids", ids, "integer")
    if ids.ndim not in (1, 2) or 0 in ids.shape:
        raise ValueError(
            f"{op}: segment_ids must have shape (seq,) or (batch, seq) and no empty "
            f"axis, got {ids.shape}"
        )


def fitting_length(
    op: str, name: str, length: int | None, blocks: int, block_size: int
) -> int:
    """Return the length, by default of whole blocks, and check that it fills them."""
    (length,) = check_sizes(
        op, 1, **{name: blocks * block_size if length is None else length}
    )
    if blocks_of(length, block_size) != blocks:
        raise ValueError(
            f"{op}: {name} must fill {blocks} blocks of {block_size}, got {length}"
        )
    return length


def check_alike(op: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    if first != second:
        raise ValueError(
            f"{op}: (seq_q, seq_kv, block_size) of both must be equal, "
            f"got {first} and {second}"
        )


def check_broadcast(op: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    if any(m != n and 1 not in (m, n) for m, n in zip(first, second, strict=True)):
        raise ValueError(
            f"{op}: batch and heads of both must be equal or 1, "
            f"got {first} and {second}"
        )


def check_index(op: str, name: str, index: int, count: int) -> None:
    if index not in range(count):
        raise IndexError(f"{op}: {name} must be below {count}, got {index}")
