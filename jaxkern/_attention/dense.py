"""Softmax attention with its log-sum-exp, and the merge of two partial results."""

from collections.abc import Callable
from functools import partial
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from .._core.checks import check_flag, check_floating, check_shape
from .._core.dispatch import Implementation, check_implementation, run
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
from .tiles import finite, normalize, nothing, sees, with_infinity
from .tiling import TILE, attention_by_tiles, group_heads, make_tiling

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
    r"""Compute softmax attention and, on request, the log-sum-exp of its logits.

    $$o_i = \sum_j e^{s_{ij} - L_i} v_j, \quad L_i = \log \sum_j e^{s_{ij}}, \quad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j$$

    The sums run over the keys $j$ that query $i$ sees. A query that sees no key has
    $o_i = 0$, $L_i = -\infty$ and no gradient. Query head $h$ reads the key head
    $\lfloor h \cdot \mathrm{kv\_heads} / \mathrm{heads} \rfloor$.

    Logits, softmax and sums are float32, or float64 if the arguments are. 16-bit
    arguments are multiplied as they are, and beyond 256 x 256 logits a head the weights
    are rounded to 16 bits before they multiply the values. $L$ is not rounded, and its
    gradient is exact.

    Implementations:

    - "xla" runs on every device. Up to 256 x 256 logits a head it computes all of them
      at once and supports every derivative. Beyond that it computes tiles, in memory
      linear in the sequence, skips the tiles above the causal diagonal, and has no
      forward-mode derivative (`jax.jvp`).
    - "mosaic_gpu" is a fused kernel, forward and backward, on an H100 or H200, in
      bfloat16 and float16, for `dim` and `dim_v` up to 256. It needs a `mask` that is
      the same for all queries, (batch, heads, 1, seq_kv). Nothing is padded by copies
      if lengths are multiples of 8, `dim` is a multiple of 16 and `dim_v` equals `dim`.
    - "cudnn" is the kernel behind `jax.nn.dot_product_attention`, for bfloat16 and
      float16 on NVIDIA GPUs. It supports neither `mask` nor `return_lse`, because it
      gives masked rows the mean of the values, rounds $L$ and drops the gradient of
      $L$.
    - `None` uses "mosaic_gpu" if it supports the inputs and each array lies whole on
      one device, for at least 64 queries and more than 256 x 256 logits a head, and
      "xla" otherwise. These sizes are predicted, not measured. `None` never uses
      "cudnn", which on an H200 took 2 to 20 % less time forward and backward.

    Args:
        query: The queries.
        key: The keys. Their number of heads divides the number of query heads.
        value: The values, with as many heads as the keys.
        mask: True where a query sees a key. An axis of 1 stands for all. None lets
            every query see every key.
        is_causal: Let query $i$ see only the keys $j \le i$. Both are counted from the
            start, as in `jax.nn`, also where the lengths differ.
        scale: The factor of the logits, a Python number; None stands for dim ** -0.5.
        return_lse: Also return $L$.
        implementation: See above.

    Returns:
        The results $o$ in the dtype of `value`. With `return_lse` a pair $(o, L)$,
        where $L$ is float32 or float64 and has no axis of features.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes differ, `mask` is
            not boolean, `scale` is not a number, or a flag is neither True nor False.
        ValueError: The shapes do not fit, `scale` is not finite, `implementation` is
            unknown, or an explicit mesh axis splits the tokens.
        NotImplementedError: The named implementation cannot run these arguments here;
            the message says why.

    Examples:
        Logits that are all 0 give the mean of the values that a query sees, and $e^L$
        is their number:

        ```python
        import jax.numpy as jnp
        import jaxkern

        query = key = jnp.zeros((1, 3, 1, 2))
        value = jnp.arange(3.0).reshape(1, 3, 1, 1)
        out, lse = jaxkern.attention(query, key, value, is_causal=True, return_lse=True)
        print(out.ravel())
        assert jnp.allclose(jnp.exp(lse).ravel(), jnp.array([1, 2, 3]))
        ```
        ```text
        [0.  0.5 1. ]
        ```

    References:
        The tiles and their gradients: FlashAttention-2, algorithms 1 and 2,
            https://arxiv.org/abs/2307.08691.
    """
    op = "attention"
    check_implementation(op, implementation, ImplementationOrCudnn)
    query, key, value = check_query_key_value(op, query, key, value)
    check_whole_sequence(op, key=key, value=value)
    if query.shape[2] != key.shape[2] or not _is_small(query.shape[1], key.shape[1]):
        # Otherwise a mesh axis may split the queries, since none of their axes is cut
        # or joined.
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
    out, lse = run_dense(
        op,
        implementation,
        query,
        key,
        value,
        xla=partial(_attend_rounded, **options),
        kernel=partial(_attend_in_kernel, **options),
        mask=mask,
    )
    return (out, with_infinity(lse)) if return_lse else out


def _attend_rounded(query, key, value, *, mask, is_causal, scale):
    """Return `attend_by_xla` with its result in the dtype of `value`."""
    out, lse = attend_by_xla(query, key, value, mask, is_causal, scale)
    return out.astype(value.dtype), lse


def _attend_in_kernel(query, key, value, *, mask, is_causal, scale):
    # Mosaic is imported on first use of a kernel.
    from .hopper import attend

    blocks = dense_blocks(query, key, mask, is_causal)
    return attend.attend(query, key, value, mask=blocks, scale=scale)


def run_dense[Out](
    op: str,
    implementation: Implementation | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    xla: Callable[[jax.Array, jax.Array, jax.Array], Out],
    kernel: Callable[[jax.Array, jax.Array, jax.Array], Out],
    mask: jax.Array | None = None,
    rows: int | None = None,
) -> Out:
    """Run attention to all keys, or to the keys of a mask, in the kernel or by XLA.

    Args:
        xla: As in `run`.
        kernel: As in `run`.
        mask: The mask that both hold.
        rows: The number of queries that attend to each other, where a segment has fewer
            than the arrays.

    Raises:
        NotImplementedError: The kernel is named and cannot run these arguments.
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
    return run(
        op,
        implementation,
        query,
        key,
        value,
        xla=xla,
        kernel=kernel,
        unsupported=unsupported,
        faster=faster,
        held=() if mask is None else (mask,),
    )


def dense_blocks(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, is_causal: bool
) -> BlockMask:
    """Return the block mask with which the kernel computes dense attention.

    `mask` has the shape (batch or 1, heads or 1, 1, seq_kv).
    """
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
    """Return the result and the log-sum-exp, both in float32 or wider.

    Few logits are computed all at once, many of them in tiles. The log-sum-exp of a
    query that sees no key is `nothing`.
    """
    if _is_small(query.shape[1], key.shape[1]):
        return _reference(query, key, value, mask, is_causal, scale)
    tiling = make_tiling(query.shape[1], key.shape[1], 0 if is_causal else None)
    return attention_by_tiles(query, key, value, mask, scale, tiling)


def _is_small(queries: int, keys: int) -> bool:
    """Say whether all logits of a head are computed at once.

    At most 256 x 256 logits: the plain form is as fast as tiles and supports every
    derivative. On two CPU cores one query over 4096 keys takes 3.5 ms, and 5.4 ms in
    tiles. At 512 x 512 the plain form still takes 7.5 ms against 9.4 (but is slower
    with `is_causal`); there tiles save the memory of the weights.
    """
    return queries * keys <= TILE**2


@partial(jax.jit, static_argnames=("is_causal", "scale"))
def _reference(query, key, value, mask, is_causal, scale):
    if is_causal:
        causal = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
        mask = causal if mask is None else mask & causal
    batch, seq_q, heads, dim = query.shape
    kv_heads = key.shape[2]
    # No size is -1, which an empty batch would leave undetermined.
    sharing = heads // kv_heads * seq_q
    # Query heads that share a key head become more rows of one product. XLA's CPU
    # backend fuses the softmax with products that have one axis of rows; with a second
    # axis for the heads it took up to 3 times as long.
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
    r"""Merge the attention over two disjoint sets of keys into the attention over both.

    $$L = \log(e^{L_a} + e^{L_b}), \quad o = e^{L_a - L} o_a + e^{L_b - L} o_b$$

    It is exact in value and gradient. A side with $L = -\infty$ adds nothing, and two
    such sides give $o = 0$ and $L = -\infty$. It is computed in float32, or float64 if
    the log-sum-exps are, and $o$ is rounded once.

    Args:
        out_a: The result over the first set of keys.
        lse_a: Its log-sum-exp, float32 or float64, as `return_lse=True` gives it.
        out_b: The result over the second set.
        lse_b: Its log-sum-exp.

    Returns:
        The pair $(o, L)$: the result in the dtype of the parts, and its log-sum-exp.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes of the two sides
            differ, or the log-sum-exps are neither float32 nor float64.
        ValueError: The shapes do not fit.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
        near = jaxkern.attention(query, key[:, :2], value[:, :2], return_lse=True)
        far = jaxkern.attention(query, key[:, 2:], value[:, 2:], return_lse=True)
        out, lse = jaxkern.merge_attention(*near, *far)
        assert jnp.allclose(out, jaxkern.attention(query, key, value), atol=1e-6)
        print(lse.shape)
        ```
        ```text
        (1, 4, 2)
        ```

    References:
        FlashInfer, which calls the pair an attention state:
            https://arxiv.org/abs/2501.01005.
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
    """Merge as `merge_attention` does, where the log-sum-exp of no key is `nothing`."""
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
