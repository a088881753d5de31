"""Attention with the signature of flax's attention functions, and dropout."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, PrecisionLike
from jaxtyping import Array, Float, Shaped

from .._attention.checks import check_query_key_value, check_scale
from .._attention.dense import ImplementationOrCudnn, attention
from .._attention.weights import attend_by_weights
from .._core.checks import check_dtype, check_flag, check_number, kind_of
from .._core.dispatch import check_implementation


def attention_fn(
    query: Float[Array, "*batch seq_q heads dim"],
    key: Float[Array, "*batch seq_kv kv_heads dim"],
    value: Float[Array, "*batch seq_kv kv_heads dim_v"],
    bias: Float[Array, "..."] | None = None,
    mask: Shaped[Array | np.ndarray, "..."] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    implementation: ImplementationOrCudnn | None = None,
) -> Float[Array, "*batch seq_q heads dim_v"]:
    r"""Compute `jaxkern.attention` with the arguments of flax's attention functions.

    $$o_i = \sum_j \frac{m_{ij}}{1 - r}\, p_{ij} v_j, \qquad
    p_i = \mathrm{softmax}(s_i), \qquad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j + b_{ij}$$

    The $m_{ij}$ are 1 with probability $1 - r$ and 0 otherwise, where $r$ is
    `dropout_rate`. It takes the place of `flax.nnx.dot_product_attention`:

    - `nnx.MultiHeadAttention(4, 16, attention_fn=nn.attention_fn, ...)`,
    - `linen.MultiHeadDotProductAttention(4, attention_fn=nn.attention_fn)`,
    - in Equinox and elsewhere, by a call: it needs no batch axes.

    Without `bias`, dropout, `module` and `precision` it is `jaxkern.attention`, with
    its memory, its implementations and its gradients. With any of them it computes all
    weights at once, in memory quadratic in the sequence; softmax and sums are float32
    or wider. A query that sees no key gets 0, where flax's function gives the mean of
    the values.

    Args:
        query: The queries, with any number of batch axes.
        key: The keys. Their number of heads divides the number of query heads.
        value: The values, with as many heads as the keys.
        bias: Numbers that are added to the logits; they broadcast to
            (*batch, heads, seq_q, seq_kv).
        mask: True, or not 0, where a query sees a key; it broadcasts as `bias` does.
        broadcast_dropout: Drop the same weights in all sequences and heads.
        dropout_rng: The random key of the dropout.
        dropout_rate: The probability $r$ that a weight is dropped.
        deterministic: Drop no weight.
        dtype: The dtype of the computation; None promotes the dtypes of the arrays.
        precision: The precision of the products, as in `jax.numpy.einsum`.
        module: The module whose `sow` gets the weights before dropout, as
            "attention_weights".
        promote_dtype: Promotes the arrays, called as
            `promote_dtype((query, key, value), dtype=dtype)`.
        is_causal: As in `jaxkern.attention`.
        scale: As in `jaxkern.attention`. flax's functions have no such option.
        implementation: As in `jaxkern.attention`; only "xla" computes all weights.

    Returns:
        The results $o$.

    Raises:
        TypeError: An array has a wrong dtype, an option has a wrong type, or there is
            dropout without a `dropout_rng`.
        ValueError: The shapes do not fit, or `dropout_rate` is not in [0, 1).
        NotImplementedError: The named implementation cannot run these arguments here.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        layer = nnx.MultiHeadAttention(
            2, 8, attention_fn=nn.attention_fn, decode=False, rngs=nnx.Rngs(0)
        )
        print(layer(jnp.ones((1, 3, 8)), is_causal=True).shape)
        ```
        ```text
        (1, 3, 8)
        ```

    References:
        Attention Is All You Need, eq. 1: https://arxiv.org/abs/1706.03762.
        Dropout: https://jmlr.org/papers/v15/srivastava14a.html.
    """
    op = "attention_fn"
    check_implementation(op, implementation, ImplementationOrCudnn)
    check_flag(
        op,
        is_causal=is_causal,
        deterministic=deterministic,
        broadcast_dropout=broadcast_dropout,
    )
    drops = check_dropout_rate(op, dropout_rate) > 0 and not deterministic
    if drops and not isinstance(dropout_rng, jax.Array):
        raise TypeError(
            f"{op}: dropout_rng must be a key, as from jax.random.key, for "
            f"dropout_rate={dropout_rate} unless deterministic is True, "
            f"got {kind_of(dropout_rng)}"
        )
    if dtype is not None:
        check_dtype(op, "dtype", dtype)
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    *batch, seq_q, heads, dim = query.shape
    query, key, value = (
        _with_one_batch_axis(op, name, x, batch)
        for name, x in [("query", query), ("key", key), ("value", value)]
    )
    query, key, value = check_query_key_value(op, query, key, value)
    full = *batch, heads, seq_q, key.shape[1]
    bias, mask = (
        _broadcastable(op, name, x, full)
        for name, x in [("bias", bias), ("mask", mask)]
    )
    if mask is not None and mask.dtype != bool:
        mask = mask != 0
    if bias is None and not drops and module is None and precision is None:
        out = attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            implementation=implementation,
        )
        return out.reshape(*batch, *out.shape[1:])
    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"{op}: bias, dropout, module and precision need all weights, which "
            f"implementation {implementation!r} does not compute; None or 'xla' does"
        )
    kept = None
    if drops:
        some = (1, 1) if broadcast_dropout else (query.shape[0], heads)
        assert dropout_rng is not None
        drawn = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (*some, *full[-2:]))
        kept = drawn.astype(jnp.float32) / (1 - dropout_rate)
    out, weights = attend_by_weights(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        kept=kept,
        is_causal=is_causal,
        scale=check_scale(op, scale, dim),
        precision=precision,
    )
    if module is not None:
        is_linen = isinstance(module, linen.Module)
        kind = "intermediates" if is_linen else nnx.Intermediate
        module.sow(kind, "attention_weights", weights.reshape(full))
    return out.reshape(*batch, *out.shape[1:])


def check_dropout_rate(op: str, dropout_rate: Any) -> float:
    """Check that the rate is a number from 0 to less than 1, and return it."""
    check_number(op, "dropout_rate", dropout_rate, least=0.0)
    if dropout_rate >= 1:
        raise ValueError(f"{op}: dropout_rate must be less than 1, got {dropout_rate}")
    return float(dropout_rate)


def in_flax_form(
    op: str, function: Callable[..., Any], because: str
) -> Callable[..., Any]:
    """Return an attention function with flax's arguments that computes the same.

    That is `attention_fn` for `jaxkern.attention`, and the function itself if it has
    flax's arguments.

    Raises:
        ValueError: It is another function.
    """
    if function is attention:
        return attention_fn
    if isinstance(function, partial):
        inner = in_flax_form(op, function.func, because)
        return partial(inner, *function.args, **function.keywords)
    if {"dropout_rng", "module", "mask"} <= {*inspect.signature(function).parameters}:
        return function
    raise ValueError(
        f"{op}: attention_fn must be jaxkern.attention, or have the arguments of "
        f"flax's as nn.attention_fn has, {because}, "
        f"got {getattr(function, '__name__', kind_of(function))}"
    )


def check_heads_of(op: str, heads: Any, shape: tuple[int, ...]) -> None:
    """Check that an attention function has returned one array of this shape."""
    if not isinstance(heads, jax.Array):
        kind = kind_of(heads)
        raise TypeError(f"{op}: attention_fn must return one array, got {kind}")
    if heads.shape != shape:
        raise ValueError(
            f"{op}: attention_fn must return the query's shape {shape}, "
            f"got {heads.shape}"
        )


def _with_one_batch_axis(op, name, x, batch):
    if x.ndim < 3 or [*x.shape[:-3]] != batch:
        raise ValueError(
            f"{op}: {name} must have shape (*batch, seq, heads, dim) with the batch "
            f"{(*batch,)} of query, got {x.shape}"
        )
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-3:])


def _broadcastable(op, name, x, full):
    """Return the array with four axes, each of which is 1 or that of `full`."""
    if x is None:
        return None
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{op}: {name} must be an array, got {kind_of(x)}")
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{op}: bias must have a floating-point dtype, got {x.dtype}")
    missing = len(full) - x.ndim
    shape = (1,) * missing + x.shape
    pairs = zip(shape, full, strict=False)
    if missing < 0 or any(size not in (1, want) for size, want in pairs):
        raise ValueError(
            f"{op}: {name} must broadcast to (*batch, heads, seq_q, seq_kv) = {full}, "
            f"got {x.shape}"
        )
    x, batch = jnp.asarray(x).reshape(shape), full[:-3]
    if any(size > 1 for size in shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *shape[-3:])
