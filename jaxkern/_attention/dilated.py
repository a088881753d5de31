"""Dilated attention: sparse patterns of segments, mixed as one softmax."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._core.checks import check_flag
from .._core.dispatch import Implementation, check_implementation
from .._core.precision import widen
from .checks import (
    check_key_mask,
    check_one_length,
    check_query_key_value,
    check_scale,
    check_whole_sequence,
)
from .dense import attend_by_xla, dense_blocks, run_dense
from .dilation import (
    Dilation,
    Pattern,
    check_covered,
    check_dilation,
    make_patterns,
    split_heads,
)
from .tiles import nothing, sees, with_infinity


@overload
def dilated_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    dilation: Dilation,
    is_causal: bool = ...,
    scale: float | None = ...,
    key_mask: Array | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Array: ...


@overload
def dilated_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    dilation: Dilation,
    is_causal: bool = ...,
    scale: float | None = ...,
    key_mask: Array | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Array, Array]: ...


@overload
def dilated_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    dilation: Dilation,
    is_causal: bool = ...,
    scale: float | None = ...,
    key_mask: Array | None = ...,
    return_lse: bool,
    implementation: Implementation | None = ...,
) -> Array | tuple[Array, Array]: ...


def dilated_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim_v"],
    *,
    dilation: Dilation,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Bool[Array, "batch seq"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> (
    Float[Array, "batch seq heads dim_v"]
    | tuple[Float[Array, "batch seq heads dim_v"], Float[Array, "batch seq heads"]]
):
    r"""Compute LongNet's attention: near tokens densely, far ones at larger strides.

    Pattern $i$ of the `dilation` cuts the sequence into segments of $w_i$ tokens. In
    each segment, head $j$ takes the rows $o, o + r_i, o + 2 r_i, \dots$ with the offset
    $o = j \bmod r_i$, and attends among these rows alone. This gives $O_i$ and the
    log-sum-exp $L_i$; in the rows that the head does not take they are 0 and $-\infty$.
    Then, for each token and head,

    $$O = \sum_i \alpha_i O_i, \qquad
      \alpha_i = \frac{\exp L_i}{\sum_j \exp L_j}$$

    This is one softmax over all keys, where a key that $c$ patterns share with the
    query counts $c$ times. The gradient is exact, through $\alpha$ too. A pattern costs
    $4\,\mathrm{batch}\,\mathrm{heads}\,\mathrm{seq}\,w\,\mathrm{dim}/r^2$ FLOPs
    forward. The last segment may be shorter, $w$ need not be a multiple of $r$, and a
    segment that is longer than the sequence ends with it.

    Each pattern is computed as by `attention`, and its docstring says what the
    implementations support. `None` chooses for each pattern.

    Inside `jax.shard_map` heads are counted within a device's part. To split heads
    among devices, give each device a multiple of every rate and keep
    `head_offsets="paper"`.

    Args:
        query: The queries.
        key: The keys of the same tokens. Their number of heads divides the number of
            query heads.
        value: The values, with as many heads as the keys.
        dilation: The patterns, and how heads share them.
        is_causal: Let a token see only itself and earlier tokens.
        scale: The factor of the logits, a Python number; None stands for dim ** -0.5.
        key_mask: False for padding, which no query sees.
        return_lse: Also return $\log \sum_i \exp L_i$.
        implementation: As in `attention`.

    Returns:
        The results $O$ in the dtype of `value`. With `return_lse` a pair of $O$ and the
        log-sum-exp, which is float32 or float64 and has no axis of features.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes differ, or another
            argument has the wrong type.
        ValueError: The shapes do not fit, there are fewer heads than patterns to split
            them among, a row is in no pattern though `uncovered` is "error", or
            `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        Every token sees its segment of 4 densely, and each head a fourth of the
        sequence:

        ```python
        import jax.numpy as jnp
        import jaxkern

        x = jnp.ones((1, 16, 2, 8))
        dilation = jaxkern.Dilation([4, 16], [1, 4])
        out, lse = jaxkern.dilated_attention(
            x, x, x, dilation=dilation, return_lse=True
        )
        print(out.shape, lse.shape)
        ```
        ```text
        (1, 16, 2, 8) (1, 16, 2)
        ```

    References:
        LongNet, sections 2.2 and 2.3: https://arxiv.org/abs/2307.02486.
    """
    op = "dilated_attention"
    check_implementation(op, implementation)
    query, key, value = check_query_key_value(op, query, key, value)
    scale = check_scale(op, scale, query.shape[-1])
    batch, seq, heads, _ = query.shape
    check_one_length(op, query, key)
    check_key_mask(op, key_mask, (batch, seq))
    check_whole_sequence(op, query=query, key=key, value=value)
    check_flag(op, is_causal=is_causal, return_lse=return_lse)
    check_dilation(op, dilation)
    patterns = make_patterns(dilation, seq, heads)
    groups = split_heads(op, patterns, heads, dilation.head_groups)
    if dilation.uncovered == "error":
        check_covered(op, groups, seq)
    attend = partial(
        attend_pattern,
        op=op,
        key_mask=key_mask,
        is_causal=is_causal,
        scale=scale,
        implementation=implementation,
    )
    mixed = []
    for (start, stop), members in groups:
        of_heads = [pattern.of_heads(start, stop) for pattern in members]
        keys, values = _key_value_heads(key, value, start, stop, heads)
        queries = query[:, :, start:stop]
        parts = [attend(queries, keys, values, pattern=x) for x in of_heads]
        stop_mix = dilation.stop_gradient_mix
        mixed.append(mix(of_heads, parts, seq, value.dtype, stop_mix))
    out, lse = (jnp.concatenate(part, axis=2) for part in zip(*mixed, strict=True))
    return (out, with_infinity(lse)) if return_lse else out


def mix(
    patterns: Sequence[Pattern],
    parts: Sequence[tuple[Float[Array, "..."], Float[Array, "..."]]],
    seq: int,
    dtype: jnp.dtype,
    stop_gradient_mix: bool = False,
) -> tuple[Float[Array, "batch seq heads dim_v"], Float[Array, "batch seq heads"]]:
    """Mix the results of all patterns, each over its selected rows, as one softmax."""
    stacked = jnp.stack(
        [
            pattern.spread(lse, seq, fill=nothing(lse.dtype))
            for pattern, (_, lse) in zip(patterns, parts, strict=True)
        ]
    )
    reached = sees(stacked).any(0)
    # Without the inner guard rows that no pattern reaches would share their sum.
    total = jax.nn.logsumexp(jnp.where(reached[None], stacked, 0), axis=0)
    shares = jnp.exp(stacked - total[None])
    if stop_gradient_mix:
        shares = jax.lax.stop_gradient(shares)
    # Results are weighted before they are spread. Without this, each pattern would keep
    # all rows for the backward, and not only those that it selects.
    weighted = [
        pattern.spread(pattern.select(share)[..., None] * widen(out), seq, fill=0.0)
        for pattern, share, (out, _) in zip(patterns, shares, parts, strict=True)
    ]
    mixed = reduce(jnp.add, weighted)
    return mixed.astype(dtype), jnp.where(reached, total, nothing(total.dtype))


def attend_pattern(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim_v"],
    *,
    op: str,
    pattern: Pattern,
    key_mask: Bool[Array, "batch seq"] | None,
    is_causal: bool,
    scale: float,
    implementation: Implementation | None,
) -> tuple[
    Float[Array, "batch segments rows heads dim_v"],
    Float[Array, "batch segments rows heads"],
]:
    """Attend within every segment, in the selected rows; return the log-sum-exp too."""
    mask = None
    if key_mask is not None or not pattern.divides(query.shape[1]):
        # `select` gives padded rows False, as masked rows have.
        valid = jnp.ones(query.shape[:2], bool) if key_mask is None else key_mask
        mask = pattern.select(valid[:, :, None]).swapaxes(2, 3)[:, :, :, None]
    options = {"mask": mask, "pattern": pattern, "is_causal": is_causal, "scale": scale}
    return run_dense(
        op,
        implementation,
        query,
        key,
        value,
        xla=partial(_attend_selected, **options),
        kernel=partial(_attend_in_strides, **options),
        rows=pattern.rows,
    )


def _attend_selected(query, key, value, *, mask, pattern, is_causal, scale):
    selected = select_rows(query, key, value, pattern)
    attend = partial(attend_by_xla, is_causal=is_causal, scale=scale)

    # Segments have an axis of their own, since a mesh may split the batch.
    @partial(jax.vmap, in_axes=1, out_axes=1)
    def attend_segment(query, key, value, mask):
        return attend(query, key, value, mask)

    return attend_segment(*selected, mask)


def _attend_in_strides(query, key, value, *, mask, pattern, is_causal, scale):
    """Run the kernel on segments as a batch; it reads the rows that each head takes."""
    # Mosaic is imported on first use of a kernel.
    from .hopper import attend

    batch = query.shape[0]
    query, key, value = (
        x.reshape(-1, pattern.rows, x.shape[3] * x.shape[4], x.shape[5])
        for x in map(pattern.split, (query, key, value))
    )
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[2:])
    out, lse = attend.attend(
        query,
        key,
        value,
        mask=dense_blocks(query, key, mask, is_causal),
        scale=scale,
        dilation=pattern.dilation,
    )
    # The mix takes results in float32, as XLA's form returns them.
    out, lse = (x.reshape(batch, -1, *x.shape[1:]) for x in (widen(out), lse))
    return out, lse


def select_rows(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim_v"],
    pattern: Pattern,
) -> tuple[
    Float[Array, "batch segments rows heads dim"],
    Float[Array, "batch segments rows heads_kv dim"],
    Float[Array, "batch segments rows heads_kv dim_v"],
]:
    """Return the rows that attend to each other.

    Heads of keys are repeated if the query heads that share one take different rows.
    """
    of_keys = pattern.dilation.of_keys(key.shape[2])
    if of_keys.group > 1:
        key, value = _repeat(key, of_keys.group), _repeat(value, of_keys.group)
        of_keys = pattern.dilation
    keys = replace(pattern, dilation=of_keys)
    return pattern.select(query), keys.select(key), keys.select(value)


def _key_value_heads(key, value, start, stop, heads):
    """Return the key and value heads of the query heads from `start` up to `stop`."""
    group = heads // key.shape[2]
    if start % group or stop % group:
        key, value, group = _repeat(key, group), _repeat(value, group), 1
    kept = slice(start // group, stop // group)
    return key[:, :, kept], value[:, :, kept]


def _repeat(x, group):
    # `jnp.repeat` needs the sharding on explicit mesh axes and refuses it elsewhere.
    sharding = jax.typeof(x).sharding
    kept = sharding if sharding.mesh.explicit_axes else None
    return jnp.repeat(x, group, axis=2, out_sharding=kept)
