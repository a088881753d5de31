"""Attention of whole arrays by a ring of devices, and the order of the tokens in it."""

from functools import partial
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from .._core.checks import check_flag, check_integer, kind_of, raise_unknown
from .._core.dispatch import Implementation, check_implementation
from .checks import check_query_key_value, check_scale
from .dilation import Dilation
from .ring import RingOptions, check_layout, check_ring_dilation, ring_attention
from .ring_steps import Layout


def ring_permutation(
    seq: int, devices: int, layout: Layout
) -> tuple[Int[np.ndarray, " seq"], Int[np.ndarray, " seq"]]:
    r"""Return the order of the tokens in a layout of `ring_attention`, and its inverse.

    With indices $\pi$ and the inverse $\sigma$, for all $i$,

    $$\pi_{\sigma_i} = \sigma_{\pi_i} = i$$

    `x[:, indices]`, split into `devices` equal parts, gives each device its tokens, and
    `y[:, inverse]` brings the results back into the order of the text. `indices` are
    also the positions of the tokens, which a rotary embedding or a loss mask needs.

    Args:
        seq: The number of tokens of the whole sequence.
        devices: The number of devices that share them.
        layout: "contiguous", "striped" or "zigzag", as in `ring_attention`.

    Returns:
        The pair (indices, inverse), on the host.

    Raises:
        ValueError: The layout is unknown, or the layout cannot split `seq` into equal
            parts; the message says how much to pad.

    Examples:
        Two devices, with the parts 0 and 3 on the first one, and 1 and 2 on the other:

        ```python
        import jaxkern

        indices, inverse = jaxkern.ring_permutation(8, 2, "zigzag")
        print(indices, indices[inverse])
        ```
        ```text
        [0 1 6 7 2 3 4 5] [0 1 2 3 4 5 6 7]
        ```

    References:
        Striped: Striped Attention, https://arxiv.org/abs/2311.09431.
        Zigzag: Llama 3, section 3.3.2, https://arxiv.org/abs/2407.21783.
    """
    op = "ring_permutation"
    check_layout(op, layout)
    seq = check_integer(op, "seq", seq)
    devices = check_integer(op, "devices", devices)
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
    layout: Layout | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[RingOptions],
) -> Array: ...


@overload
def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis_name: str,
    layout: Layout | None = ...,
    return_lse: Literal[True],
    **options: Unpack[RingOptions],
) -> tuple[Array, Array]: ...


@overload
def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis_name: str,
    layout: Layout | None = ...,
    return_lse: bool,
    **options: Unpack[RingOptions],
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
    r"""Compute `attention` of whole arrays, with the sequence split over a mesh axis.

    $$o_i = \sum_j e^{s_{ij} - L_i} v_j, \quad L_i = \log \sum_j e^{s_{ij}}, \quad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j$$

    It permutes the tokens into `layout`, runs `ring_attention` in `jax.shard_map`, and
    permutes back. Other mesh axes, automatic or explicit, keep what they split. With a
    `dilation` it is `dilated_attention`, as far as `ring_attention` supports it.

    The permutation moves every token in every call, and may gather the sequence. A
    training loop therefore orders its tokens and positions once, by `ring_permutation`,
    when it loads a batch, and calls `ring_attention`. Without `is_causal` nothing is
    permuted.

    There is no mask. Tokens that pad the sequence at its end are seen only by each
    other with `is_causal`, and by all tokens without it.

    Args:
        query: The queries.
        key: The keys. Their number of heads divides the number of query heads.
        value: The values, with as many heads as the keys.
        mesh: The devices.
        axis_name: The axis of `mesh` that splits the tokens.
        is_causal: Let query $i$ see only the keys $j \le i$.
        layout: As in `ring_attention`; None stands for "zigzag", and with a `dilation`
            for "contiguous".
        scale: The factor of the logits, a Python number; None stands for dim ** -0.5.
        dilation: As in `ring_attention`.
        return_lse: Also return $L$.
        implementation: As in `attention`.

    Returns:
        The results $o$ in the dtype of `value`, split over `axis_name`. With
        `return_lse` a pair $(o, L)$, as from `ring_attention`.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes differ, or
            `dilation` is not a `Dilation`.
        ValueError: The mesh has no such axis, the axis does not divide the sequence, or
            for the reasons of `ring_attention`.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import jaxkern

        mesh = jax.make_mesh((jax.device_count(),), ("context",))
        x = jnp.ones((1, 8 * jax.device_count(), 2, 4))
        out, lse = jaxkern.context_parallel_attention(
            x, x, x, mesh=mesh, axis_name="context", is_causal=True, return_lse=True
        )
        assert jnp.allclose(out, jaxkern.attention(x, x, x, is_causal=True))
        assert lse.shape == x.shape[:3]
        ```

    References:
        Ring Attention: https://arxiv.org/abs/2310.01889.
    """
    op = "context_parallel_attention"
    check_implementation(op, implementation)
    if layout is None:
        layout = "zigzag" if dilation is None else "contiguous"
    check_layout(op, layout)
    query, key, value = check_query_key_value(op, query, key, value)
    check_flag(op, is_causal=is_causal, return_lse=return_lse)
    check_ring_dilation(op, dilation, layout)
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"{op}: mesh must be a jax.sharding.Mesh, got {kind_of(mesh)}")
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


# Without this `jit`, an eager call of a shard_map would compile each of its operations,
# and all of them again in the next call.
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
    """Take tokens in another order.

    The gradient takes them in the inverse order, where JAX's gradient of `take` would
    scatter.
    """
    del back
    return jnp.take(x, order, axis=1)


_permute.defvjp(
    lambda x, order, back: (jnp.take(x, order, axis=1), back),
    lambda back, d_y: (jnp.take(d_y, back, axis=1), None, None),
)


def _place(x, mesh, axis_name):
    """Split the sequence over `axis_name`, if the mesh axes are explicit."""
    if AxisType.Explicit not in mesh.axis_types:
        return x
    spec = [*jax.typeof(x).sharding.spec]
    spec[1] = axis_name
    return jax.reshard(x, NamedSharding(mesh, P(*spec)))


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
