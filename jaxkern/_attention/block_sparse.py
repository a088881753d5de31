"""Attention to the blocks of a BlockMask, in the time and memory of these blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from .._core.checks import check_flag, kind_of
from .._core.dispatch import Implementation, check_implementation, run
from .._core.precision import widen
from .._core.sharding import on_automatic_axes, vary_alike
from .block_mask.mask import BlockMask
from .block_mask.runs import BlockLists
from .checks import (
    LEAST_QUERIES,
    check_query_key_value,
    check_scale,
    check_whole_sequence,
)
from .tiles import (
    add_tile,
    cotangents_of,
    empty_carry,
    normalize,
    tile_gradients,
    tile_logits,
    with_infinity,
)


@overload
def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: BlockMask,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Array: ...


@overload
def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: BlockMask,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Array, Array]: ...


@overload
def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: BlockMask,
    scale: float | None = ...,
    return_lse: bool,
    implementation: Implementation | None = ...,
) -> Array | tuple[Array, Array]: ...


def block_sparse_attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    mask: BlockMask,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> (
    Float[Array, "batch seq_q heads dim_v"]
    | tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]
):
    r"""Compute softmax attention under a `BlockMask`, and only in its non-empty blocks.

    $$o_i = \sum_j e^{s_{ij} - L_i} v_j, \quad L_i = \log \sum_j e^{s_{ij}}, \quad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j$$

    The sums run over the keys $j$ that query $i$ sees. The result equals
    `attention(query, key, value, mask=mask.to_dense())`, with the same precision. A
    query that sees no key has $o_i = 0$, $L_i = -\infty$ and no gradient. Query head
    $h$ reads the key head $\lfloor h \cdot \mathrm{kv\_heads} / \mathrm{heads}
    \rfloor$.

    Time and memory, forward and backward, are proportional to the number of non-empty
    blocks. The gradient of $L$ is exact. There is no forward-mode derivative
    (`jax.jvp`).

    Implementations:

    - "xla" runs on every device. Batches and heads between which the mask differs are
      computed one after the other.
    - "mosaic_gpu" is a fused kernel, forward and backward, on an H100 or H200, in
      bfloat16 and float16, for `dim` and `dim_v` up to 256 and a `block_size` that is a
      multiple of 64. The mask's `mask_fn` is compiled into the kernel, so a function of
      your own may only do arithmetic on its arguments. Nothing is padded by copies if
      lengths are multiples of 8, `dim` is a multiple of 16 and `dim_v` equals `dim`.
      Create the mask outside of `jax.jit`: for a mask that is an argument of the
      program, each call computes the schedule of the blocks again.
    - `None` uses the kernel if it supports the inputs, for at least 64 queries, and
      "xla" otherwise. That the kernel is faster is predicted: on an H200 XLA's form was
      not timed.

    Args:
        query: The queries.
        key: The keys. Their number of heads divides the number of query heads.
        value: The values, with as many heads as the keys.
        mask: The pairs that attend. Its lengths are the lengths of query and key; its
            batch and heads equal the query's or are 1. It may be an argument of
            `jax.jit`. Where devices share batches or heads between which it differs,
            use `jax.shard_map` with `BlockMask.partition_specs`, so that each device
            computes its own blocks; elsewhere XLA gathers the keys of a row of blocks.
        scale: The factor of the logits, a Python number; None stands for dim ** -0.5.
        return_lse: Also return $L$.
        implementation: See above.

    Returns:
        The results $o$ in the dtype of `value`. With `return_lse` a pair $(o, L)$,
        where $L$ is float32 or float64 and has no axis of features.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes differ, `mask` is
            not a `BlockMask`, or `scale` is not a number.
        ValueError: The shapes do not fit, `scale` is not finite, or `implementation` is
            unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
        mask = jaxkern.BlockMask.local_window(8, 8, window=1, block_size=2)
        out = jaxkern.block_sparse_attention(query, key, value, mask=mask)
        dense = jaxkern.attention(query, key, value, mask=mask.to_dense())
        assert jnp.allclose(out, dense, atol=1e-6)
        print(f"{mask.density:.0%} of the blocks")
        ```
        ```text
        62% of the blocks
        ```

    References:
        The tiles and their gradients: FlashAttention-2, algorithms 1 and 2,
            https://arxiv.org/abs/2307.08691.
        The lists of blocks: FlexAttention, section 4, https://arxiv.org/abs/2412.05496.
    """
    op = "block_sparse_attention"
    check_implementation(op, implementation)
    query, key, value = check_query_key_value(op, query, key, value)
    check_whole_sequence(op, query=query, key=key, value=value)
    check_flag(op, return_lse=return_lse)
    _check_mask(op, mask, query, key)
    scale = check_scale(op, scale, query.shape[-1])
    out, lse = run(
        op,
        implementation,
        query,
        key,
        value,
        xla=partial(_attend_by_xla, mask=mask, scale=scale),
        kernel=partial(_attend_in_kernel, mask=mask, scale=scale),
        unsupported=partial(_unsupported, query, value, mask),
        faster=query.shape[1] >= LEAST_QUERIES,
    )
    return (out, with_infinity(lse)) if return_lse else out


def _attend_in_kernel(query, key, value, mask, scale):
    # Mosaic is imported on first use of a kernel.
    from .hopper import attend

    return attend.attend(query, key, value, mask=mask, scale=scale)


@on_automatic_axes(lambda query: (P(*query[:3], None), P(*query[:3])))
def _attend_by_xla(query, key, value, mask, scale):
    leaves, tree = jax.tree.flatten(mask)
    query, key, value, *leaves = vary_alike(
        query, key, value, *map(jnp.asarray, leaves)
    )
    return _attend(query, key, value, jax.tree.unflatten(tree, leaves), scale)


def _unsupported(query: jax.Array, value: jax.Array, mask: BlockMask) -> str | None:
    from .hopper import attend

    return attend.unsupported(query, value, mask)


def _check_mask(op: str, mask: object, query: jax.Array, key: jax.Array) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"{op}: mask must be a BlockMask, such as BlockMask.causal(seq_q, seq_kv) "
            f"or BlockMask.from_dense(mask), got {kind_of(mask)}"
        )
    batch, seq_q, heads, _ = query.shape
    lengths = seq_q, key.shape[1]
    if mask.shape[2:] != lengths:
        raise ValueError(
            f"{op}: mask must have the lengths of query and key, {lengths}, "
            f"got {mask.shape[2:]}"
        )
    for name, got, want in [
        ("batch", mask.shape[0], batch),
        ("heads", mask.shape[1], heads),
    ]:
        if got not in (1, want):
            choices = "1" if want == 1 else f"1 or {want}"
            raise ValueError(f"{op}: {name} of mask must be {choices}, got {got}")


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, scale):
    return _attend_forward(query, key, value, mask, scale)[0]


def _attend_forward(query, key, value, mask, scale):
    out, lse = _forward(query, key, value, mask, scale)
    return (out.astype(value.dtype), lse), (query, key, value, mask, out, lse)


def _attend_backward(scale, saved, cotangents):
    return *_backward(*saved, *cotangents, scale), None


_attend.defvjp(_attend_forward, _attend_backward)


@partial(jax.jit, static_argnames="scale")
def _forward(query, key, value, mask, scale):
    queries, keys, values = _cut_all(mask, query, key, value)

    def row(b, h, i):
        def add(j, carry, visible):
            at = b, _key_head(h, queries, keys), j
            logits = tile_logits(queries[b, h, i], keys[at], visible, scale)
            return add_tile(carry, logits, values[at])

        carry = empty_carry(queries[b, h, i], value.shape[-1])
        return normalize(*_visit(mask, "kv", (b, h, i), add, carry))

    out, lse = _map_rows(row, *queries.shape[:3])
    return _join(out, query.shape[1]), _join(lse, query.shape[1])


@partial(jax.jit, static_argnames="scale")
def _backward(query, key, value, mask, out, lse, d_out, d_lse, scale):
    d_out, delta = cotangents_of(out, lse, d_out, d_lse, query.dtype)
    queries, keys, values = _cut_all(mask, query, key, value)
    d_outs, lses, deltas = (_cut(mask, x, key.shape[2]) for x in (d_out, lse, delta))

    def gradients(b, h, i, j, visible):
        row, at = (b, h, i), (b, _key_head(h, queries, keys), j)
        logits = tile_logits(queries[row], keys[at], visible, scale)
        return tile_gradients(
            logits,
            queries[row],
            keys[at],
            values[at],
            d_outs[row],
            lses[row],
            deltas[row],
            scale,
        )

    def row(b, h, i):
        def add(j, d_query, visible):
            return d_query + gradients(b, h, i, j, visible)[0]

        zeros = jnp.zeros_like(widen(queries[b, h, i]))
        return _visit(mask, "kv", (b, h, i), add, zeros)

    def column(b, h, j):
        def add(i, sums, visible):
            return jax.tree.map(jnp.add, sums, gradients(b, h, i, j, visible)[1:])

        at = b, _key_head(h, queries, keys), j
        zeros = tuple(jnp.zeros_like(widen(x[at])) for x in (keys, values))
        return _visit(mask, "q", (b, h, j), add, zeros)

    d_query = _join(_map_rows(row, *queries.shape[:3]), query.shape[1])
    batch, heads = mask.shape[:2]
    d_key, d_value = (
        _sum_groups(_join(x[:, :, :, :, :, None], key.shape[1]), key.shape[2])
        for x in _map_rows(column, batch, heads, keys.shape[2])
    )
    return tuple(x.astype(query.dtype) for x in (d_query, d_key, d_value))


def _map_rows(fn: Callable[..., Any], batch: int, heads: int, rows: int) -> Any:
    """Compute `fn(b, h, i)` for all rows of blocks, one after the other."""

    def at(n):
        return fn(n // (heads * rows), n // rows % heads, n % rows)

    results = lax.map(at, jnp.arange(batch * heads * rows))
    return jax.tree.map(lambda x: x.reshape(batch, heads, rows, *x.shape[1:]), results)


def _visit(
    mask: BlockMask, side: str, row: tuple[Any, Any, Any], add: Any, carry: Any
) -> Any:
    """Add every block of a row (side "kv") or of a column (side "q") to the carry."""
    b, h, i = row

    def visit(lists: BlockLists, carry, is_partial):
        start = lists.starts[row]

        def step(n, carry):
            j = lists.indices[b, h, start + n]
            if not is_partial:
                return add(j, carry, None)
            blocks = (i, j) if side == "kv" else (j, i)
            return add(j, carry, _visible(mask, b, h, *blocks))

        return lax.fori_loop(0, lists.num_blocks[row], step, carry)

    carry = visit(getattr(mask, f"full_{side}"), carry, False)
    return visit(getattr(mask, side), carry, True)


def _visible(mask: BlockMask, b: Any, h: Any, i: Any, j: Any) -> Bool[Array, "..."]:
    """Return which pairs of a partial block attend."""
    size = mask.block_size
    q = i * size + jnp.arange(size)[:, None]
    k = j * size + jnp.arange(size)[None]
    return mask.mask_fn(b, h, q, k) & (k < mask.seq_kv)


def _key_head(h: Any, queries: jax.Array, keys: jax.Array) -> Any:
    return h * keys.shape[1] // queries.shape[1]


def _cut_all(mask, query, key, value):
    kv_heads = key.shape[2]
    keys, values = (_cut(mask, x, kv_heads)[:, :, :, :, :, 0] for x in (key, value))
    return _cut(mask, query, kv_heads), keys, values


def _cut(
    mask: BlockMask, x: Float[Array, "batch seq heads *rest"], kv_heads: int
) -> Float[Array, "mask_batch mask_heads blocks batch_2 heads_2 groups size *rest"]:
    """Cut an array into blocks of tokens, for the loop over rows of blocks.

    The first three axes are those that the mask distinguishes: its batch, its heads and
    the blocks. The others are computed together in one tile.
    """
    batch, seq, heads, *rest = x.shape
    mask_batch, mask_heads = mask.shape[:2]
    if mask_heads > 1:
        mask_heads, together = heads, (1, 1)
    else:
        together = kv_heads, heads // kv_heads
    missing = -seq % mask.block_size
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(
        *(mask_batch, batch // mask_batch, (seq + missing) // mask.block_size),
        *(mask.block_size, mask_heads, *together, *rest),
    )
    return x.transpose(0, 4, 2, 1, 5, 6, 3, *range(7, x.ndim))


def _join(
    x: Float[Array, "mask_batch mask_heads blocks batch_2 heads_2 groups size *rest"],
    seq: int,
) -> Float[Array, "batch seq heads *rest"]:
    """Join the blocks that `_cut` made."""
    mask_batch, mask_heads, blocks, batch, kv_heads, groups, size, *rest = x.shape
    x = x.transpose(0, 3, 2, 6, 1, 4, 5, *range(7, x.ndim))
    heads = mask_heads * kv_heads * groups
    return x.reshape(mask_batch * batch, blocks * size, heads, *rest)[:, :seq]


def _sum_groups(
    x: Float[Array, "batch seq heads dim"], kv_heads: int
) -> Float[Array, "batch seq kv_heads dim"]:
    batch, seq, heads, dim = x.shape
    return x.reshape(batch, seq, kv_heads, heads // kv_heads, dim).sum(3)
