"""The check of the rows of `benchmarks.mlp`: every token, against float64."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxkern.testing.plain import in_float64, with_gradients

from ._harness import Check, check_against

# Tokens whose float64 definition is computed at a time.
CHUNK = 2048


def _in_float64(
    fn: Callable[..., Any], rows: tuple[Any, ...], weights: Any
) -> list[Any]:
    """`fn` on some tokens after the others, since float64 takes room."""
    chunks = ([r[i : i + CHUNK] for r in rows] for i in range(0, len(rows[0]), CHUNK))
    return [in_float64(fn, *chunk, *weights) for chunk in chunks]


def check_forward(
    plain: Callable[..., Any], args: Any, fn: Callable[..., Any]
) -> Check:
    """Every token of the result."""
    x, *weights = args
    exact = np.concatenate(_in_float64(plain, (x,), weights))
    return check_against(fn(*args), jax.jit(plain)(*args), exact, x.dtype)


def check_backward(
    plain: Callable[..., Any], args: Any, fn: Callable[..., Any]
) -> Check:
    """Every token of the result and of its gradient, and all weight gradients."""
    cotangent, x, *weights = args
    both = with_gradients(plain)
    parts = _in_float64(both, (cotangent, x), weights)
    value = np.concatenate([value for value, _ in parts])
    d_x = np.concatenate([d_x for _, (d_x, *_) in parts])
    d_weights = jax.tree.map(lambda *d: sum(d), *[d[1:] for _, d in parts])
    exact = value, (d_x, *d_weights)
    return check_against(fn(*args), jax.jit(both)(*args), exact, x.dtype)
