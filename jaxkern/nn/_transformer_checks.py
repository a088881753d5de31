"""What the language model refuses before anything is computed."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._core.checks import check_shape


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
    _check_integers(op, name, tokens)
    check_shape(op, name, tokens, ("batch", "seq"))
    check_length(op, name, tokens.shape[1], most)
    _check_range(op, name, tokens, 0, vocab_size - 1)


def check_prompt_lengths(op: str, lengths: Any, prompt: Any) -> None:
    _check_integers(op, "prompt_lengths", lengths)
    given = f" for prompt of shape {prompt.shape}"
    check_shape(op, "prompt_lengths", lengths, prompt.shape[:1], given)
    _check_range(op, "prompt_lengths", lengths, 1, prompt.shape[1])


def _check_integers(op: str, name: str, array: Any) -> None:
    dtype = getattr(array, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = dtype or type(array).__name__
        raise TypeError(f"{op}: {name} must be an integer array, got {got}")


def _check_range(op: str, name: str, array: Any, least: int, most: int) -> None:
    # What a program is traced with has no values yet, and other processes' are unknown.
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return
    values = np.asarray(array)
    for extreme in (values.min(), values.max()):
        if not least <= extreme <= most:
            raise ValueError(
                f"{op}: {name} must be from {least} to {most}, got {extreme}"
            )
