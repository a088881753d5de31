"""The checks of the options of multi-head attention."""

from typing import Any, Literal, get_args

from .._core.checks import check_integer, check_number, raise_unknown
from ._common import check_arguments, check_callable

QKNorm = Literal["head", "embed"]


def check_heads(
    op: str,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
) -> tuple[int, int, int, int]:
    """Return the sizes as Python integers, and the last two also where they are None.

    Returns:
        `embed_dim`, `num_heads`, `num_kv_heads` and `head_dim`.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    embed_dim, num_heads, kv_heads = check_arguments(
        op, None, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=kv_heads
    )
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"{op}: num_heads must divide embed_dim={embed_dim} unless head_dim is "
            f"given, got {num_heads}"
        )
    if num_heads % kv_heads:
        raise ValueError(
            f"{op}: num_kv_heads must divide num_heads={num_heads}, got {kv_heads}"
        )
    dim = embed_dim // num_heads if head_dim is None else head_dim
    return embed_dim, num_heads, kv_heads, check_integer(op, "head_dim", dim)


def check_options(attention_fn: Any, norm: Any, qk_norm: Any, gain: Any) -> None:
    """Check what `MultiHeadAttention` is made of."""
    op = "MultiHeadAttention"
    for name, function in [("attention_fn", attention_fn), ("norm", norm)]:
        check_callable(op, name, function)
    if qk_norm not in (None, *get_args(QKNorm)):
        raise_unknown(op, "qk_norm", qk_norm, (None, *get_args(QKNorm)))
    check_number(op, "gain", gain, positive=True)
