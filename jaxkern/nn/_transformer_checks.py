"""What the language model refuses before anything is computed."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._checks import check_shape


def causal(attention_fn: Callable[..., Any]) -> Callable[..., Any]:
    """With `is_causal=True` where there is such an option."""
    check_callable("attention_fn", attention_fn)
    has_option = "is_causal" in inspect.signature(attention_fn).parameters
    return partial(attention_fn, is_causal=True) if has_option else attention_fn


def check_callable(name: str, function: object) -> None:
    if not callable(function):
        kind = type(function).__name__
        raise TypeError(f"TransformerLM: {name} must be callable, got {kind}")


def check_heads(d_model: int, num_heads: int, kv_heads: int) -> None:
    op = "TransformerLM"
    if d_model % num_heads:
        raise ValueError(
            f"{op}: num_heads must divide d_model={d_model}, got {num_heads}"
        )
    if d_model // num_heads % 2:
        raise ValueError(
            f"{op}: d_model / num_heads must be even, for rotary positions, "
            f"got {d_model} / {num_heads} = {d_model // num_heads}"
        )
    if num_heads % kv_heads:
        raise ValueError(
            f"{op}: num_kv_heads must divide num_heads={num_heads}, got {kv_heads}"
        )


def check_length(op: str, name: str, length: int, most: int) -> None:
    if length > most:
        raise ValueError(f"{op}: {name} must be at most {most} tokens, got {length}")


def check_tokens(op: str, name: str, tokens: Any, vocab_size: int, most: int) -> None:
    dtype = getattr(tokens, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = dtype or type(tokens).__name__
        raise TypeError(f"{op}: {name} must be an integer array, got {got}")
    check_shape(op, name, tokens, ("batch", "seq"))
    check_length(op, name, tokens.shape[1], most)
    # What a program is traced with has no values yet, and other processes' are unknown.
    if isinstance(tokens, Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    values = np.asarray(tokens)
    for extreme in (values.min(), values.max()):
        if not 0 <= extreme < vocab_size:
            raise ValueError(
                f"{op}: {name} must be from 0 to {vocab_size - 1}, got {extreme}"
            )
