"""Attention over a sequence that is split among devices, around a ring."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypedDict, Unpack, get_args, overload

from jax import lax
from jaxtyping import Array, Float

from .._core.checks import check_flag, raise_unknown
from .._core.dispatch import Implementation, check_implementation
from .checks import check_one_length, check_query_key_value, check_scale
from .dense import run_dense
from .dilated import attend_pattern, mix, select_rows
from .dilation import Dilation, Pattern, check_dilation, make_patterns
from .ring_steps import DeviceRing, Layout, attend_around
from .tiles import with_infinity


class RingOptions(TypedDict, total=False):
    """The options of a ring that are the same for `context_parallel_attention`."""

    is_causal: bool
    scale: float | None
    dilation: Dilation | None
    implementation: Implementation | None


@overload
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    layout: Layout = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[RingOptions],
) -> Array: ...


@overload
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    layout: Layout = ...,
    return_lse: Literal[True],
    **options: Unpack[RingOptions],
) -> tuple[Array, Array]: ...


@overload
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    layout: Layout = ...,
    return_lse: bool,
    **options: Unpack[RingOptions],
) -> Array | tuple[Array, Array]: ...


def ring_attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    axis_name: str,
    is_causal: bool = False,
    layout: Layout = "contiguous",
    scale: float | None = None,
    dilation: Dilation | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> (
    Float[Array, "batch seq_q heads dim_v"]
    | tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]
):
    r"""Compute `attention` over a sequence whose tokens are split among devices.

    $$o_i = \sum_j e^{s_{ij} - L_i} v_j, \quad L_i = \log \sum_j e^{s_{ij}}, \quad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j$$

    The sums run over the keys $j$ of all devices that query $i$ sees. Call it inside
    `jax.shard_map`, where each device has its part of the tokens. There are as many
    steps as devices. In each step a device attends to the keys and values that it
    holds, and sends them on to its neighbour. The results are merged by their
    log-sum-exps, in float32. In the backward the gradients of keys and values go round
    with them, in float32. The memory of a device is linear in its part of the sequence.
    There is no forward-mode derivative (`jax.jvp`).

    `layout` says which tokens device $r$ of $p$ devices holds, in ascending order. This
    decides what a causal query sees; without `is_causal` it makes no difference:

    - "contiguous": the part $r$ of $p$ equal parts. The first device computes in one
      step and the last one in all steps, so that a causal pass takes about twice as
      long as with the other layouts.
    - "striped": the tokens $r, r + p, r + 2p, \dots$ The work is balanced but for the
      diagonal.
    - "zigzag": the parts $r$ and $2p - 1 - r$ of $2p$ equal parts. All devices have the
      same work in every step.

    `ring_permutation` returns the order of the tokens. `context_parallel_attention`
    takes whole arrays and does everything.

    With a `dilation` this is `dilated_attention` of the whole sequence, in the layout
    "contiguous". Segment lengths are in tokens of the whole sequence. A segment within
    a device needs no other device. The $m$ devices that share a segment of $w$ tokens
    are a ring of their own, and only tokens that a head takes go round: each device
    sends $(w - w/m)/r$ keys and values for each query head, or once for all query heads
    that take the same rows of a key head.

    With `implementation="mosaic_gpu"` each step runs the kernel of `attention`. `None`
    chooses as `attention` does for the sizes of one step.

    Args:
        query: This device's part of the queries.
        key: This device's part of the keys. Their number of heads divides the number of
            query heads.
        value: This device's part of the values, with as many heads as the keys.
        axis_name: The mesh axis that splits the tokens.
        is_causal: Let a token see only itself and earlier tokens of the whole sequence.
        layout: The distribution of the tokens, see above.
        scale: The factor of the logits, a Python number; None stands for dim ** -0.5.
        dilation: The patterns of dilated attention; None for dense attention. On a ring
            `head_groups` and `stop_gradient_mix` must be False, and `uncovered` "zero".
        return_lse: Also return $L$, whose gradient is exact.
        implementation: As in `attention`.

    Returns:
        The results $o$ of this device's queries, in the dtype of `value`. With
        `return_lse` a pair $(o, L)$, where $L$ is float32 or float64 and has no axis of
        features; it is $-\infty$ for a query that sees no key.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes differ, or
            `dilation` is not a `Dilation`.
        ValueError: `axis_name` is not bound, a name is unknown, the shapes do not fit,
            `scale` is not finite, or a ring does not support a switch of the
            `dilation`. A segment must divide a device's tokens or be the tokens of m
            devices, where m divides their number, and the rate of a segment across
            devices must divide a device's tokens.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        ```python
        from functools import partial

        import jax
        import jax.numpy as jnp
        import jaxkern
        from jax.sharding import PartitionSpec as P

        mesh = jaxkern.nn.make_mesh(context=jax.device_count())
        attend = jax.shard_map(
            partial(jaxkern.ring_attention, axis_name="context", is_causal=True),
            mesh=mesh,
            in_specs=P(None, "context"),
            out_specs=P(None, "context"),
        )
        x = jnp.ones((1, 8 * jax.device_count(), 2, 4))
        assert jnp.allclose(attend(x, x, x), jaxkern.attention(x, x, x, is_causal=True))
        ```

    References:
        Ring Attention: https://arxiv.org/abs/2310.01889.
        Striped: Striped Attention, https://arxiv.org/abs/2311.09431.
        Zigzag: Llama 3, section 3.3.2, https://arxiv.org/abs/2407.21783.
        Dilated: LongNet, section 3, which gathers the keys that go round here,
            https://arxiv.org/abs/2307.02486.
    """
    op = "ring_attention"
    check_implementation(op, implementation)
    check_layout(op, layout)
    query, key, value = check_query_key_value(op, query, key, value)
    check_flag(op, is_causal=is_causal, return_lse=return_lse)
    scale = check_scale(op, scale, query.shape[-1])
    if is_causal:
        _check_causal(op, query.shape[1], key.shape[1], layout)
    check_ring_dilation(op, dilation, layout)
    try:
        ring = DeviceRing(axis_name, lax.axis_size(axis_name))
    except NameError:
        raise ValueError(
            f"{op}: axis_name must be an axis of the jax.shard_map around the call, "
            f"got {axis_name!r}"
        ) from None
    if dilation is None:
        out, lse = _run_around(
            op,
            implementation,
            query,
            key,
            value,
            ring=ring,
            scale=scale,
            layout=layout if is_causal else None,
        )
        out = out.astype(value.dtype)
    else:
        check_one_length(op, query, key)
        seq, heads = ring.devices * query.shape[1], query.shape[2]
        out, lse = _attend_dilated(
            query,
            key,
            value,
            op=op,
            ring=ring,
            patterns=make_patterns(dilation, seq, heads),
            is_causal=is_causal,
            scale=scale,
            implementation=implementation,
        )
    return (out, with_infinity(lse)) if return_lse else out


def _attend_dilated(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim_v"],
    *,
    op: str,
    ring: DeviceRing,
    patterns: Sequence[Pattern],
    is_causal: bool,
    scale: float,
    implementation: Implementation | None,
) -> tuple[Float[Array, "batch seq heads dim_v"], Float[Array, "batch seq heads"]]:
    """Return a device's part of `dilated_attention` over all, and its log-sum-exp.

    Only segments that span devices go round.
    """
    shard = query.shape[1]
    rings = [_ring_of_a_segment(op, x, shard, ring) for x in patterns]
    # A device holds `shard` tokens of a longer segment, and the first of them is at a
    # multiple of the rate.
    patterns = [replace(x, segment=min(x.segment, shard)) for x in patterns]
    options = {"op": op, "is_causal": is_causal, "scale": scale}
    parts = []
    for pattern, group in zip(patterns, rings, strict=True):
        if group.devices > 1:
            attend = partial(_attend_across, ring=group, **options)
        else:
            attend = partial(attend_pattern, key_mask=None, **options)
        part = attend(query, key, value, pattern=pattern, implementation=implementation)
        parts.append(part)
    return mix(patterns, parts, shard, value.dtype)


def _attend_across(
    query, key, value, *, op, pattern, ring, is_causal, scale, implementation
):
    """Run `attend_pattern` for the one segment that the devices of a ring share."""
    query, key, value = (x[:, 0] for x in select_rows(query, key, value, pattern))
    out, lse = _run_around(
        op,
        implementation,
        query,
        key,
        value,
        ring=ring,
        scale=scale,
        layout="contiguous" if is_causal else None,
    )
    return out[:, None], lse[:, None]


def _run_around(op, implementation, query, key, value, **options):
    """Run `attend_around` by the implementation that `attention` would choose."""
    return run_dense(
        op,
        implementation,
        query,
        key,
        value,
        xla=partial(attend_around, implementation="xla", **options),
        kernel=partial(attend_around, implementation="mosaic_gpu", **options),
    )


def _ring_of_a_segment(
    op: str, pattern: Pattern, shard: int, ring: DeviceRing
) -> DeviceRing:
    """Return the ring of the devices that share one segment."""
    w, r, devices = pattern.segment, pattern.dilation.rate, ring.devices
    if devices == 1 or shard % w == 0:
        return ring._replace(devices=1)
    groups = {n * shard: n for n in range(2, devices + 1) if devices % n == 0}
    if w not in groups:
        whole = ", ".join(map(str, groups))
        raise ValueError(
            f"{op}: segment_lengths must divide the {shard} tokens of a device, or be "
            f"the tokens of m devices, where m divides {devices}, so {whole}, got {w}"
        )
    if shard % r:
        raise ValueError(
            f"{op}: dilation_rates must divide the {shard} tokens of a device where a "
            f"segment spans {groups[w]} devices, got {r} for {w} tokens"
        )
    return ring._replace(devices=groups[w])


def _check_causal(op: str, seq_q: int, seq_kv: int, layout: Layout) -> None:
    if seq_q != seq_kv:
        raise ValueError(
            f"{op}: seq_q and seq_kv must be equal with is_causal, "
            f"got {seq_q} and {seq_kv}"
        )
    if layout == "zigzag" and seq_q % 2:
        raise ValueError(
            f"{op}: seq_q must be even for layout 'zigzag', two parts a device, "
            f"got {seq_q}"
        )


def check_layout(op: str, layout: object) -> None:
    if layout not in get_args(Layout):
        raise_unknown(op, "layout", layout, get_args(Layout))


def check_ring_dilation(op: str, dilation: Dilation | None, layout: Layout) -> None:
    """Check that a ring supports the dilation, if there is one."""
    if dilation is None:
        return
    check_dilation(op, dilation)
    if layout != "contiguous":
        raise ValueError(
            f"{op}: layout must be 'contiguous' with a dilation, got {layout!r}"
        )
    only = {"head_groups": False, "stop_gradient_mix": False, "uncovered": "zero"}
    for name, value in only.items():
        got = getattr(dilation, name)
        if got != value:
            raise ValueError(
                f"{op}: {name} of dilation must be {value!r} on a ring of devices, "
                f"got {got!r}; dilated_attention takes it"
            )
