"""Softmax attention with its log-sum-exp, and the merge of two partial results."""

import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from . import _block_sparse_mgpu as kernel
from ._attention_tiles import (
    TILE,
    attention_by_tiles,
    finite,
    group_heads,
    make_tiling,
    normalize,
)
from ._block_mask import band_mask, with_keys
from ._checks import (
    check_floating,
    check_implementation,
    check_shape,
)
from ._dilated_patterns import Dilation
from ._matmul import widen
from ._mesh import runs_locally
from ._mgpu import on_hopper

Implementation = Literal["xla", "cudnn", "mosaic_gpu"]


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Array: ...


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Array, Array]: ...


def attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> (
    Float[Array, "batch seq_q heads dim_v"]
    | tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]
):
    r"""Softmax attention, and on request the log-sum-exp of its logits.

    $$o_i = \sum_j e^{s_{ij} - L_i} v_j, \quad L_i = \log \sum_j e^{s_{ij}}, \quad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j$$

    The sums run over the keys that query $i$ sees: those where `mask` is True, and with
    `is_causal` of them $j \le i$, aligned at the start as in `jax.nn`, also where the
    lengths differ. A query that sees none has $o_i = 0$, $L_i = -\infty$ and no
    gradient. Query head $h$ reads key head $\lfloor h\,$kv_heads / heads$\rfloor$.

    Logits, softmax and sums are float32, float64 if the arguments are; 16-bit arguments
    are multiplied as they are, and so are the weights, rounded to 16 bits, in long
    sequences. $L$ is not rounded, and its gradient is exact.

    Implementations:

    - "xla": all logits at once up to 256 x 256 a head; beyond that by tiles, in memory
      linear in the sequence. Then saved for the backward are the arguments, $L$ and, in
      float32, $o$; tiles above the causal diagonal are skipped, and there is no
      forward-mode derivative.
    - "mosaic_gpu": the kernel of `block_sparse_attention`; `mask` must be one of keys,
      the same for all queries.
    - "cudnn": the kernel behind `jax.nn.dot_product_attention`, for 16-bit dtypes on
      NVIDIA GPUs, without `mask` and `return_lse`: it gives masked rows the mean of
      the values, and rounds $L$ and drops its gradient.

    None picks "mosaic_gpu" where it can run and the logits are more than 256 x 256, and
    "xla" otherwise. On an H200 "cudnn" takes as long forward and 3 to 20 % less forward
    and backward; only who names it gets it, since its results are other ones.

    Args:
        scale: a number known when traced; None stands for dim ** -0.5.

    Raises:
        TypeError: an argument is no floating-point array, the dtypes differ, or `mask`
            is not boolean.
        ValueError: the shapes do not fit, `scale` is not finite, or `implementation` is
            unknown.
        NotImplementedError: the named implementation cannot run this; it says why.

    References:
        The tiles and their gradients: FlashAttention-2, algorithms 1 and 2,
        https://arxiv.org/abs/2307.08691.
    """
    op = "attention"
    check_implementation(op, implementation, Implementation)
    check_query_key_value(op, query, key, value)
    scale = check_scale(op, scale, query.shape[-1])
    if mask is not None:
        _check_mask(op, mask, query, key)
    if implementation != "cudnn":
        refused = None if mask is None else _mask_of_queries(mask)
        implementation = select_kernel(op, implementation, query, value, refused)
    seq_q, seq_kv = query.shape[1], key.shape[1]
    match implementation:
        case "mosaic_gpu":
            out, lse = attend_in_kernel(query, key, value, mask, is_causal, scale)
            return (out, lse) if return_lse else out
        case "cudnn":
            if return_lse:
                reason = "return_lse must be False for cudnn, got True"
            else:
                reason = _unsupported_by_cudnn(query, key, value, mask, is_causal)
            if reason:
                raise NotImplementedError(f"{op}: {reason}")
            return jax.nn.dot_product_attention(
                *(query, key, value),
                scale=scale,
                is_causal=is_causal,
                implementation="cudnn",
            )
    # Up to here this one is no slower, and has all derivatives; for a single query over
    # many keys it is faster: 3.5 ms against 5.4 over 4096, on two cores. There it still
    # is at 512 x 512, 7.5 against 9.4 (causal: slower), but saves that many weights.
    if seq_q * seq_kv <= TILE**2:
        if is_causal:
            causal = jnp.tri(seq_q, seq_kv, dtype=bool)[None, None]
            mask = causal if mask is None else mask & causal
        out, lse = _reference(query, key, value, mask, scale)
    else:
        tiling = make_tiling(seq_q, seq_kv, 0 if is_causal else None)
        out, lse = attention_by_tiles(query, key, value, mask, scale, tiling)
    return (out, lse) if return_lse else out


def select_kernel(
    op: str,
    implementation: Literal["xla", "mosaic_gpu"] | None,
    query: jax.Array | jax.ShapeDtypeStruct,
    value: jax.Array | jax.ShapeDtypeStruct,
    reason: str | None = None,
) -> Literal["xla", "mosaic_gpu"]:
    """Where attention without a mask runs; a `reason` is one more against the kernel.

    Raises:
        NotImplementedError: the kernel is named and cannot run this.
    """
    named, hopper = implementation is not None, on_hopper()
    large = query.shape[1] * value.shape[1] > TILE**2
    if implementation == "xla" or not (named or (hopper and large and runs_locally())):
        return "xla"
    reason = reason or kernel.unsupported(query, value, None, on_hopper=hopper)
    if reason and named:
        raise NotImplementedError(f"{op}: {reason}")
    return "xla" if reason else "mosaic_gpu"


def attend_in_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    is_causal: bool,
    scale: float,
    dilation: Dilation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse), for a mask of keys; a dilation is that of the kernel's `attend`."""
    upper = 0 if is_causal else None
    blocks = band_mask(None, upper, query.shape[1], key.shape[1])
    if mask is not None:
        blocks = with_keys(blocks, mask[:, :, 0])
    return kernel.attend(query, key, value, blocks, scale, dilation)


def _mask_of_queries(mask: jax.Array) -> str | None:
    if mask.shape[2] == 1:
        return None
    return (
        "mask must be the same for all queries, (batch, heads, 1, seq_kv), for "
        f"mosaic_gpu, got {mask.shape}; block_sparse_attention takes a BlockMask"
    )


def _reference(query, key, value, mask, scale):
    batch, seq_q, heads, dim = query.shape
    kv_heads = key.shape[2]
    # Query heads that share a key head are more rows of it. Of products with one such
    # axis XLA's CPU backend fuses the softmax, with two it took up to 3 times as long.
    rows = query.reshape(batch, seq_q, kv_heads, heads // kv_heads, dim)
    rows = jnp.moveaxis(rows, 1, 3).reshape(batch, kv_heads, -1, dim)
    logits = jnp.einsum("bkqd,bskd->bkqs", widen(rows), widen(key)) * scale
    if mask is not None:
        seen = group_heads(mask, kv_heads)
        seen = jnp.broadcast_to(
            seen, (*seen.shape[:2], heads // kv_heads, seq_q, seen.shape[4])
        )
        seen = seen.reshape(*seen.shape[:2], -1, seen.shape[4])
        logits = jnp.where(seen, logits, -jnp.inf)
    top = finite(lax.stop_gradient(logits.max(-1)))
    weights = jnp.exp(logits - top[..., None])
    summed = jnp.einsum("bkqs,bskd->bkqd", weights, widen(value))
    out, lse = normalize(summed, top, weights.sum(-1))

    def in_order(x):
        x = x.reshape(batch, kv_heads, heads // kv_heads, seq_q, *x.shape[3:])
        return jnp.moveaxis(x, 3, 1).reshape(batch, seq_q, heads, *x.shape[4:])

    return in_order(out).astype(value.dtype), in_order(lse)


def merge_attention(
    out_a: Float[Array, "batch seq heads dim"],
    lse_a: Float[Array, "batch seq heads"],
    out_b: Float[Array, "batch seq heads dim"],
    lse_b: Float[Array, "batch seq heads"],
) -> tuple[Float[Array, "batch seq heads dim"], Float[Array, "batch seq heads"]]:
    r"""The attention over two disjoint sets of keys, from the attention over each.

    $$L = \log(e^{L_a} + e^{L_b}), \quad o = e^{L_a - L} o_a + e^{L_b - L} o_b$$

    Exact in value and gradient. A side with $L = -\infty$ adds nothing, and two of them
    give $o = 0$. Computed in float32, or float64 if the log-sum-exps are; `out` is
    rounded once, to the dtype of the parts.

    Raises:
        TypeError: an argument is no floating-point array, the dtypes of the two sides
            differ, or the log-sum-exps are neither float32 nor float64.
        ValueError: the shapes do not fit.
    """
    op = "merge_attention"
    check_floating(op, out_a=out_a, out_b=out_b)
    check_floating(op, lse_a=lse_a, lse_b=lse_b)
    if lse_a.dtype.itemsize < 4:
        raise TypeError(f"{op}: lse_a must be float32 or float64, got {lse_a.dtype}")
    check_shape(op, "out_a", out_a, ("batch", "seq", "heads", "dim"))
    check_shape(op, "out_b", out_b, out_a.shape)
    for name, lse in [("lse_a", lse_a), ("lse_b", lse_b)]:
        check_shape(op, name, lse, out_a.shape[:3])
    top = finite(lax.stop_gradient(jnp.maximum(lse_a, lse_b)))
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    summed = weight_a[..., None] * out_a + weight_b[..., None] * out_b
    out, lse = normalize(summed, top, weight_a + weight_b)
    return out.astype(out_a.dtype), lse


def check_query_key_value(
    op: str, query: jax.Array, key: jax.Array, value: jax.Array
) -> None:
    """Shapes and dtypes fit, and the heads of key and value divide the query's."""
    check_floating(op, query=query, key=key, value=value)
    check_shape(op, "query", query, ("batch", "seq_q", "heads", "dim"))
    batch, _, heads, dim = query.shape
    given = f" for query of shape {query.shape}"
    check_shape(op, "key", key, (batch, "seq_kv", "kv_heads", dim), given)
    given = f" for key of shape {key.shape}"
    check_shape(op, "value", value, (*key.shape[:3], "dim_v"), given)
    if heads % key.shape[2]:
        raise ValueError(
            f"{op}: heads of query must be a multiple of those of key and value, "
            f"got {heads} and {key.shape[2]}"
        )


def check_scale(op: str, scale: object, dim: int) -> float:
    """The factor of the logits, dim ** -0.5 where None is given."""
    if scale is None:
        return dim**-0.5
    number = isinstance(scale, int | float | np.floating | np.integer)
    if not number or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be None or a finite number, got {scale!r}")
    return float(scale)


def _check_mask(op: str, mask: object, query: jax.Array, key: jax.Array) -> None:
    if not isinstance(mask, jax.Array | np.ndarray):
        raise TypeError(f"{op}: mask must be an array, got {type(mask).__name__}")
    if mask.dtype != bool:
        raise TypeError(
            f"{op}: mask must be boolean, True where a query sees a key, "
            f"got {mask.dtype}"
        )
    full = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
    fits = mask.ndim == 4 and all(
        got in (1, want) for got, want in zip(mask.shape, full, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{op}: mask must be broadcastable to (batch, heads, seq_q, seq_kv) = "
            f"{full}, got {mask.shape}"
        )


def _unsupported_by_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    is_causal: bool,
) -> str | None:
    """Why `jax.nn`'s cuDNN form is not this function here, or None."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    if device.platform != "gpu" or float(capability or 0) < 8:
        return (
            "cudnn needs an NVIDIA GPU of compute capability 8.0 or more, "
            f"got {device.device_kind}"
        )
    if query.dtype.itemsize != 2:
        return f"dtype must be bfloat16 or float16 for cudnn, got {query.dtype}"
    if mask is not None:
        return f"mask must be None for cudnn, got one of shape {mask.shape}"
    dim, limit = query.shape[-1], 256 if float(capability) >= 9 else 128
    if value.shape[-1] != dim or dim % 8 or dim > limit:
        return (
            f"dim and dim_v must be equal for cudnn, a multiple of 8 and at most "
            f"{limit}, got {dim} and {value.shape[-1]}"
        )
    if is_causal and query.shape[1] != key.shape[1]:
        return (
            "seq_q and seq_kv must be equal for cudnn with is_causal, "
            f"got {query.shape[1]} and {key.shape[1]}"
        )
    return None
