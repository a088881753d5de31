"""Attention over a sequence that is split among devices: keys and values go round."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from .._core.checks import check_flag, raise_unknown
from .._core.dispatch import Implementation, check_implementation, run
from .checks import check_one_length, check_query_key_value, check_scale
from .dense import choose_dense
from .dilated import attend_pattern, mix, select_rows
from .dilation import Dilation, Pattern, check_dilation, make_patterns
from .ring_steps import DeviceRing, Layout, attend_around
from .tiles import with_infinity


@overload
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    is_causal: bool = ...,
    layout: Layout = ...,
    scale: float | None = ...,
    dilation: Dilation | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Array: ...


@overload
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    is_causal: bool = ...,
    layout: Layout = ...,
    scale: float | None = ...,
    dilation: Dilation | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Array, Array]: ...


@overload
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    is_causal: bool = ...,
    layout: Layout = ...,
    scale: float | None = ...,
    dilation: Dilation | None = ...,
    return_lse: bool,
    implementation: Implementation | None = ...,
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
    r"""`attention` over a sequence split among the devices of a mesh axis.

    Call it inside `jax.shard_map`, each device with its part of the tokens. In as many
    steps as there are devices every one attends to the keys and values it holds, while
    it sends them on to its neighbour. The results are merged by their log-sum-exps, in
    float32. In the backward the gradients of key and value, in float32, go round with
    them and end where they belong. A device holds its own tokens, those that it works
    on and those that arrive, and no more logits than a tile has: its memory is linear
    in its share of the sequence. Saved for the backward are its arguments, and in
    float32 its output and log-sum-exp. There is no forward-mode derivative.

    `layout` says which tokens device $r$ of $p$ holds, in ascending order, and so what
    a causal query sees; without `is_causal` it makes no difference:

    - "contiguous": the $r$-th of $p$ equal parts. The first device computes in one step
      only and the last in all of them, so a causal pass takes about twice as long as
      with the others.
    - "striped": the tokens $r, r + p, r + 2p, ...$; balanced but for the diagonal.
    - "zigzag": the $r$-th and the $r$-th last of $2p$ equal parts. Balanced: of parts
      of $c$ tokens every device computes $2 c^2$ logits in every step, all of them
      seen; in the first step they form its triangle.

    `ring_permutation` gives the order of the tokens, `context_parallel_attention` does
    it all for arrays that are whole.

    With a `dilation` it is `dilated_attention` of the whole sequence, in whose tokens
    the segments' lengths are, in the layout "contiguous". Its `head_groups` and
    `stop_gradient_mix` must be False and its `uncovered` "zero". A segment
    within a device needs nothing of the others. The $m$ devices that share one of $w$
    tokens are a ring of their own, and only tokens that a head takes go round: each
    device sends $(w - w/m)/r$ keys and values for every head of the query; in the
    backward these again, and $w/r$ gradients of each. Where all query heads of a key
    take the same rows, these are sent once.

    With `implementation` "mosaic_gpu" each step runs the kernel of `attention`, which
    None picks as it does there.

    ```python
    >>> from functools import partial
    >>> import jax, jax.numpy as jnp, jaxkern
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jaxkern.nn.make_mesh(context=jax.device_count())
    >>> ring = jax.shard_map(
    ...     partial(jaxkern.ring_attention, axis_name="context", return_lse=True),
    ...     mesh=mesh, in_specs=P(None, "context"), out_specs=P(None, "context"),
    ... )
    >>> x = jnp.ones((1, 8 * jax.device_count(), 2, 4))
    >>> out, lse = ring(x, x, x)
    >>> print(out.shape == x.shape, lse.shape == x.shape[:3])
    True True

    ```

    Args:
        axis_name: the mesh axis that splits the tokens.
        scale: a number known when traced; None stands for dim ** -0.5.
        return_lse: also return the log-sum-exp of each query's logits, (batch, seq_q,
            heads) in float32, whose gradient is exact; -inf for a query that sees no
            key.

    Raises:
        TypeError: an argument is no floating-point array, the dtypes differ, or
            `dilation` is no `Dilation`.
        ValueError: `axis_name` is not bound, a name is unknown, the shapes do not fit,
            `scale` is not finite, or the `dilation` has a switch that a ring does not
            support; a segment is neither a divisor of a device's tokens nor all of
            those of one of several equal groups of devices, or the rate of one across
            devices does not divide a device's tokens.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.

    References:
        Ring Attention, https://arxiv.org/abs/2310.01889; striped:
        https://arxiv.org/abs/2311.09431; zigzag: Llama 3, section 3.3.2,
        https://arxiv.org/abs/2407.21783; dilated: LongNet, section 3, which gathers
        what here goes round, https://arxiv.org/abs/2307.02486.
    """
    op = "ring_attention"
    check_implementation(op, implementation)
    _check_layout(op, layout)
    query, key, value = check_query_key_value(op, query, key, value)
    check_flag(op, is_causal=is_causal, return_lse=return_lse)
    scale = check_scale(op, scale, query.shape[-1])
    if is_causal:
        _check_causal(op, query.shape[1], key.shape[1], layout)
    _check_dilation(op, dilation, layout)
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
    """A device's tokens of `dilated_attention`, and their lse, over all devices.

    Only segments that span devices go round.
    """
    shard = query.shape[1]
    rings = [_ring_of_a_segment(op, x, shard, ring) for x in patterns]
    # Of a longer segment, a device holds as many tokens, from a multiple of the rate.
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
    """`attend_pattern`, of the one segment that the devices of a ring share."""
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
    """`attend_around` by the implementation that `attention` would choose here."""
    return run(
        choose_dense(op, implementation, query, key, value),
        query,
        key,
        value,
        implementation=implementation,
        xla=partial(attend_around, implementation="xla", **options),
        kernel=partial(attend_around, implementation="mosaic_gpu", **options),
    )


def _ring_of_a_segment(
    op: str, pattern: Pattern, shard: int, ring: DeviceRing
) -> DeviceRing:
    """The devices that share a segment, of all in the ring."""
    w, r, devices = pattern.segment, pattern.dilation.rate, ring.devices
    if devices == 1 or shard % w == 0:
        return ring._replace(devices=1)
    groups = {n * shard: n for n in range(2, devices + 1) if devices % n == 0}
    if w not in groups:
        whole = ", ".join(map(str, groups))
        raise ValueError(
            f"{op}: segment_lengths must divide the {shard} tokens of a device, or be "
            f"those of one of several equal groups of the {devices} devices, {whole}, "
            f"got {w}"
        )
    if shard % r:
        raise ValueError(
            f"{op}: dilation_rates must divide the {shard} tokens of a device where a "
            f"segment spans {groups[w]} devices, got {r} for {w} tokens"
        )
    return ring._replace(devices=groups[w])


def ring_permutation(
    seq: int, devices: int, layout: Layout
) -> tuple[Int[np.ndarray, " seq"], Int[np.ndarray, " seq"]]:
    """The order of the tokens in a layout, and the way back: (indices, inverse).

    `x[:, indices]`, split into `devices` equal parts, gives each device its tokens, and
    `y[:, inverse]` undoes it. `indices` are also the tokens' positions, as a rotary
    embedding or a loss mask needs them.

    Raises:
        ValueError: the layout is unknown, or `seq` cannot be divided so.
    """
    op = "ring_permutation"
    _check_layout(op, layout)
    _check_divisible(op, seq, devices, layout, True)
    tokens = np.arange(seq)
    match layout:
        case "contiguous":
            indices = tokens
        case "striped":
            indices = tokens.reshape(-1, devices).T.ravel()
        case "zigzag":
            parts = tokens.reshape(2 * devices, -1)
            indices = np.stack([parts[:devices], parts[: devices - 1 : -1]], 1).ravel()
    return indices, np.argsort(indices)


@overload
def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis_name: str,
    is_causal: bool = ...,
    layout: Layout | None = ...,
    scale: float | None = ...,
    dilation: Dilation | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Array: ...


@overload
def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis_name: str,
    is_causal: bool = ...,
    layout: Layout | None = ...,
    scale: float | None = ...,
    dilation: Dilation | None = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Array, Array]: ...


@overload
def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis_name: str,
    is_causal: bool = ...,
    layout: Layout | None = ...,
    scale: float | None = ...,
    dilation: Dilation | None = ...,
    return_lse: bool,
    implementation: Implementation | None = ...,
) -> Array | tuple[Array, Array]: ...


def context_parallel_attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    mesh: Mesh,
    axis_name: str,
    is_causal: bool = False,
    layout: Layout | None = None,
    scale: float | None = None,
    dilation: Dilation | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> (
    Float[Array, "batch seq_q heads dim_v"]
    | tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]
):
    """`attention` of whole arrays, its sequence split over one axis of a mesh.

    With a `dilation` it is `dilated_attention`, of which it supports what
    `ring_attention` does.

    Permutes the tokens into `layout`, runs `ring_attention` in `jax.shard_map`, and
    permutes back. Other mesh axes, automatic or explicit, keep what they split. The
    permutation moves every token in every call, and may gather the sequence for it: a
    training loop permutes its tokens and positions once, by `ring_permutation`, when
    it loads a batch, and then calls `ring_attention`. A `layout` of None is "zigzag",
    and with dilation "contiguous". Without `is_causal`, nothing is permuted. There is
    no mask, so tokens that pad the sequence at its end are seen by all without
    `is_causal`, and with it by each other only.

    ```python
    >>> import jax, jax.numpy as jnp, jaxkern
    >>> mesh = jax.make_mesh((jax.device_count(),), ("seq",))
    >>> x = jnp.ones((1, 8 * jax.device_count(), 2, 4))
    >>> out, lse = jaxkern.context_parallel_attention(
    ...     x, x, x, mesh=mesh, axis_name="seq", is_causal=True, return_lse=True
    ... )
    >>> print(out.shape == x.shape, lse.shape == x.shape[:3])
    True True

    ```

    Args:
        axis_name: the axis of `mesh` that splits the tokens.
        return_lse: also return the log-sum-exp, as `ring_attention` does.

    Raises:
        TypeError: an argument is no floating-point array, the dtypes differ, or
            `dilation` is no `Dilation`.
        ValueError: as `ring_attention`; the mesh has no such axis, or it does not
            divide the sequence.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.
    """
    op = "context_parallel_attention"
    check_implementation(op, implementation)
    if layout is None:
        layout = "zigzag" if dilation is None else "contiguous"
    _check_layout(op, layout)
    query, key, value = check_query_key_value(op, query, key, value)
    check_flag(op, is_causal=is_causal, return_lse=return_lse)
    _check_dilation(op, dilation, layout)
    if axis_name not in mesh.axis_names:
        raise_unknown(op, "axis_name", axis_name, mesh.axis_names)
    devices = mesh.shape[axis_name]
    layout = layout if is_causal else "contiguous"
    for seq in (query.shape[1], key.shape[1]):
        _check_divisible(op, seq, devices, layout, is_causal)
    return _in_parallel(
        query,
        key,
        value,
        mesh=mesh,
        axis_name=axis_name,
        is_causal=is_causal,
        layout=layout,
        scale=check_scale(op, scale, query.shape[-1]),
        dilation=dilation,
        return_lse=return_lse,
        implementation=implementation,
    )


# One program for a call that is not within jit: a shard_map would compile each of its
# operations, and all of them again in the next call.
@partial(
    jax.jit,
    static_argnames=(
        *("mesh", "axis_name", "is_causal", "layout", "scale", "dilation"),
        *("return_lse", "implementation"),
    ),
)
def _in_parallel(query, key, value, *, mesh, axis_name, layout, **options):
    indices, inverse = ring_permutation(query.shape[1], mesh.shape[axis_name], layout)
    whole, split = (partial(_place, mesh=mesh, axis_name=x) for x in (None, axis_name))

    def reorder(x, order, back):
        return x if layout == "contiguous" else _permute(whole(x), order, back)

    spec = P(None, axis_name)
    ring = jax.shard_map(
        partial(
            ring_attention,
            axis_name=axis_name,
            layout=layout,
            **options,
        ),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names={axis_name},
    )
    out = ring(*(split(reorder(x, indices, inverse)) for x in (query, key, value)))
    return jax.tree.map(lambda x: split(reorder(x, inverse, indices)), out)


@jax.custom_vjp
def _permute(x, order, back):
    """Tokens in another order; its gradient gathers too, where JAX would scatter."""
    del back
    return jnp.take(x, order, axis=1)


_permute.defvjp(
    lambda x, order, back: (jnp.take(x, order, axis=1), back),
    lambda back, d_y: (jnp.take(d_y, back, axis=1), None, None),
)


def _place(x, mesh, axis_name):
    """On explicit axes, with the sequence split over `axis_name`."""
    if AxisType.Explicit not in mesh.axis_types:
        return x
    spec = [*jax.typeof(x).sharding.spec]
    spec[1] = axis_name
    return jax.reshard(x, NamedSharding(mesh, P(*spec)))


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


def _check_layout(op: str, layout: object) -> None:
    if layout not in get_args(Layout):
        raise_unknown(op, "layout", layout, get_args(Layout))


def _check_dilation(op: str, dilation: Dilation | None, layout: Layout) -> None:
    """A ring supports the dilation, if there is one."""
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


def _check_divisible(
    op: str, seq: int, devices: int, layout: Layout, is_causal: bool
) -> None:
    parts = 2 * devices if layout == "zigzag" else devices
    if seq % parts:
        advice = (
            f"pad it by {-seq % parts} at the end, which causal queries do not see"
            if is_causal
            else "no padding helps without is_causal, since all queries would see it"
        )
        raise ValueError(
            f"{op}: seq must be a multiple of {parts} for layout {layout!r} over "
            f"{devices} devices, got {seq}: {advice}"
        )
