"""Softmax attention with its log-sum-exp, and the merge of two partial results."""

from functools import partial
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from .._core.checks import check_flag, check_floating, check_shape
from .._core.dispatch import Implementation, check_implementation, choose, run
from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from .block_mask.mask import BlockMask, band_mask, with_keys
from .checks import (
    LEAST_QUERIES,
    check_mask,
    check_query_key_value,
    check_scale,
    check_whole_sequence,
    unsupported_by_cudnn,
)
from .tiles import (
    TILE,
    attention_by_tiles,
    finite,
    group_heads,
    make_tiling,
    normalize,
    nothing,
    sees,
    with_infinity,
)

ImplementationOrCudnn = Literal["xla", "cudnn", "mosaic_gpu"]


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
    implementation: ImplementationOrCudnn | None = ...,
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
    implementation: ImplementationOrCudnn | None = ...,
) -> tuple[Array, Array]: ...


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: bool,
    implementation: ImplementationOrCudnn | None = ...,
) -> Array | tuple[Array, Array]: ...


def attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    mask: Bool[Array, "#batch #heads #seq_q #seq_kv"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: ImplementationOrCudnn | None = None,
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
    sequences; in float16 their gradients are not, since they would underflow: those
    products are float32. $L$ is not rounded, and its gradient is exact.

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

    None picks "mosaic_gpu" where it can run, for at least 64 queries and more logits
    than 256 x 256, and "xla" otherwise. On an H200 "cudnn" takes as long forward and 3
    to 20 % less forward and backward; only who names it gets it, since its results are
    other ones.

    Args:
        scale: a number known when traced; None stands for dim ** -0.5.

    Raises:
        TypeError: an argument is no floating-point array, the dtypes differ, `mask` is
            not boolean, `scale` is no number, or a flag neither True nor False.
        ValueError: the shapes do not fit, `scale` is not finite, `implementation` is
            unknown, or an explicit mesh axis splits the tokens.
        NotImplementedError: the named implementation cannot run this; it says why.

    References:
        The tiles and their gradients: FlashAttention-2, algorithms 1 and 2,
        https://arxiv.org/abs/2307.08691.
    """
    op = "attention"
    check_implementation(op, implementation, ImplementationOrCudnn)
    query, key, value = check_query_key_value(op, query, key, value)
    check_whole_sequence(op, key=key, value=value)
    if query.shape[2] != key.shape[2] or not _is_small(query.shape[1], key.shape[1]):
        # Else it may be split, since no axis of it is cut or joined.
        check_whole_sequence(op, query=query)
    check_flag(op, is_causal=is_causal, return_lse=return_lse)
    scale = check_scale(op, scale, query.shape[-1])
    if mask is not None:
        check_mask(op, mask, query, key)
    if implementation == "cudnn":
        if reason := unsupported_by_cudnn(
            query, key, value, mask, is_causal, return_lse
        ):
            raise NotImplementedError(f"{op}: {reason}")
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=is_causal,
            implementation="cudnn",
        )
    options = {"mask": mask, "is_causal": is_causal, "scale": scale}
    out, lse = run(
        choose_dense(op, implementation, query, key, value, mask=mask),
        query,
        key,
        value,
        implementation=implementation,
        xla=partial(_attend_rounded, **options),
        kernel=partial(_attend_in_kernel, **options),
    )
    return (out, with_infinity(lse)) if return_lse else out


def _attend_rounded(query, key, value, *, mask, is_causal, scale):
    out, lse = attend_by_xla(query, key, value, mask, is_causal, scale)
    return out.astype(value.dtype), lse


def _attend_in_kernel(query, key, value, *, mask, is_causal, scale):
    # Mosaic is imported on first use of a kernel.
    from .hopper import attend

    blocks = dense_blocks(query, key, mask, is_causal)
    return attend.attend(query, key, value, mask=blocks, scale=scale)


def choose_dense(
    op: str,
    implementation: Implementation | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    rows: int | None = None,
) -> Implementation:
    """The implementation that runs attention to all keys, or to those of a mask.

    rows: how many queries attend to each other, where those are not all of the arrays.

    Raises:
        NotImplementedError: the kernel is named and cannot run this.
    """

    def unsupported() -> str | None:
        from .hopper import attend

        if mask is not None and mask.shape[2] != 1:
            return (
                "mask must be the same for all queries, (batch, heads, 1, seq_kv), for "
                f"mosaic_gpu, got {mask.shape}; block_sparse_attention takes a "
                "BlockMask"
            )
        return attend.unsupported(query, value, None)

    queries, keys = rows or query.shape[1], rows or key.shape[1]
    faster = queries >= LEAST_QUERIES and not _is_small(queries, keys)
    return choose(op, implementation, (query, key, value), unsupported, faster)


def dense_blocks(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, is_causal: bool
) -> BlockMask:
    """The keys that queries see, for the kernel; a mask is (batch, heads, 1, seq)."""
    upper = 0 if is_causal else None
    blocks = band_mask(None, upper, query.shape[1], key.shape[1])
    return blocks if mask is None else with_keys(blocks, mask[:, :, 0])


@on_automatic_axes(lambda query: (P(*query[:3], None), P(*query[:3])))
def attend_by_xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    is_causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse), in float32: all logits of a head at once if they are few.

    Else by tiles. The log-sum-exp of no key is `nothing`.
    """
    if _is_small(query.shape[1], key.shape[1]):
        return _reference(query, key, value, mask, is_causal, scale)
    tiling = make_tiling(query.shape[1], key.shape[1], 0 if is_causal else None)
    return attention_by_tiles(query, key, value, mask, scale, tiling)


def _is_small(queries: int, keys: int) -> bool:
    """Whether all logits of a head are computed at once.

    Up to here that is no slower than tiles, and has all derivatives; for a single query
    over many keys it is faster: 3.5 ms against 5.4 over 4096, on two cores. There it
    still is at 512 x 512, 7.5 against 9.4 (causal: slower), but saves that many
    weights.
    """
    return queries * keys <= TILE**2


@partial(jax.jit, static_argnames=("is_causal", "scale"))
def _reference(query, key, value, mask, is_causal, scale):
    if is_causal:
        causal = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
        mask = causal if mask is None else mask & causal
    batch, seq_q, heads, dim = query.shape
    kv_heads = key.shape[2]
    # All sizes are named, since an empty batch leaves -1 open.
    sharing = heads // kv_heads * seq_q
    # Query heads that share a key head are more rows of it. Of products with one such
    # axis XLA's CPU backend fuses the softmax, with two it took up to 3 times as long.
    rows = query.reshape(batch, seq_q, kv_heads, heads // kv_heads, dim)
    rows = jnp.moveaxis(rows, 1, 3).reshape(batch, kv_heads, sharing, dim)
    logits = jnp.einsum("bkqd,bskd->bkqs", widen(rows), widen(key)) * scale
    if mask is not None:
        seen = group_heads(mask, kv_heads)
        seen = jnp.broadcast_to(
            seen, (*seen.shape[:2], heads // kv_heads, seq_q, seen.shape[4])
        )
        seen = seen.reshape(*seen.shape[:2], sharing, seen.shape[4])
        logits = jnp.where(seen, logits, nothing(logits.dtype))
    top = finite(lax.stop_gradient(logits.max(-1)))
    weights = jnp.exp(logits - top[..., None])
    summed = jnp.einsum("bkqs,bskd->bkqd", weights, widen(value))
    out, lse = normalize(summed, top, weights.sum(-1))

    def in_order(x):
        x = x.reshape(batch, kv_heads, heads // kv_heads, seq_q, *x.shape[3:])
        return jnp.moveaxis(x, 3, 1).reshape(batch, seq_q, heads, *x.shape[4:])

    return in_order(out), in_order(lse)


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
    out_a, out_b = check_floating(op, out_a=out_a, out_b=out_b)
    lse_a, lse_b = check_floating(op, lse_a=lse_a, lse_b=lse_b)
    if lse_a.dtype.itemsize < 4:
        raise TypeError(f"{op}: lse_a must be float32 or float64, got {lse_a.dtype}")
    check_shape(op, "out_a", out_a, ("batch", "seq", "heads", "dim"))
    check_shape(op, "out_b", out_b, out_a.shape)
    for name, lse in [("lse_a", lse_a), ("lse_b", lse_b)]:
        check_shape(op, name, lse, out_a.shape[:3])
    lse_a, lse_b = (jnp.maximum(lse, nothing(lse.dtype)) for lse in (lse_a, lse_b))
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    return out, with_infinity(lse)


def merge(
    out_a: Float[Array, "batch seq heads dim"],
    lse_a: Float[Array, "batch seq heads"],
    out_b: Float[Array, "batch seq heads dim"],
    lse_b: Float[Array, "batch seq heads"],
) -> tuple[Float[Array, "batch seq heads dim"], Float[Array, "batch seq heads"]]:
    """`merge_attention`, where the log-sum-exp of no key is `nothing`."""
    top = finite(lax.stop_gradient(jnp.maximum(lse_a, lse_b)))
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    wide = max(out_a.dtype, lse_a.dtype, key=lambda dtype: dtype.itemsize)
    part_a, part_b = (
        weight[..., None].astype(wide)
        * jnp.where(sees(lse)[..., None], out.astype(wide), 0)
        for weight, lse, out in [(weight_a, lse_a, out_a), (weight_b, lse_b, out_b)]
    )
    out, lse = normalize(part_a + part_b, top, weight_a + weight_b)
    return out.astype(out_a.dtype), lse
