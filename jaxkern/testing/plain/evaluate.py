"""Values and gradients of plain forms, also in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def with_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function from a cotangent and arguments to result and all gradients.

    Args:
        fn: A function of trees of arrays. The cotangent is a tree like its result.
    """

    def forward_and_backward(cotangent, *args):
        value, vjp = jax.vjp(fn, *args)
        return value, vjp(cotangent)

    return forward_and_backward


def cast(tree: Any, dtype: Any) -> Any:
    """Return a tree of arrays, of which the floating-point ones have this dtype."""

    def convert(a):
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(convert, tree)


def in_float64(fn: Callable[..., Any], *args: Any) -> Any:
    """Return `fn(*args)` as NumPy arrays, computed in float64 whatever the dtypes are.

    Args:
        fn: A plain form, or one with its gradients.
        args: Trees of arrays.
    """
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(fn)(*cast(args, jnp.float64)))
