"""Attention over a sequence that is split among devices: keys and values go round."""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ._attention import check_query_key_value, check_scale, merge_attention
from ._attention_tiles import (
    Tiling,
    attend,
    attend_gradients,
    make_tiling,
)
from ._checks import Implementation, check_xla_only, raise_unknown
from ._mesh import vary_alike

Layout = Literal["contiguous", "striped", "zigzag"]


def ring_attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    axis_name: str,
    is_causal: bool = False,
    layout: Layout = "contiguous",
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq_q heads dim_v"]:
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

    Raises:
        TypeError: an argument is no floating-point array, or the dtypes differ.
        ValueError: `axis_name` is not bound, a name is unknown, the shapes do not fit,
            or `scale` is not finite.
        NotImplementedError: `implementation` is "mosaic_gpu", which has no kernel yet.

    References:
        Ring Attention, https://arxiv.org/abs/2310.01889; striped:
        https://arxiv.org/abs/2311.09431; zigzag: Llama 3, section 3.3.2,
        https://arxiv.org/abs/2407.21783.
    """
    op = "ring_attention"
    check_xla_only(op, implementation)
    _check_layout(op, layout)
    check_query_key_value(op, query, key, value)
    scale = check_scale(op, scale, query.shape[-1])
    seq_q, seq_kv = query.shape[1], key.shape[1]
    if is_causal and seq_q != seq_kv:
        raise ValueError(
            f"{op}: seq_q and seq_kv must be equal with is_causal, "
            f"got {seq_q} and {seq_kv}"
        )
    if is_causal and layout == "zigzag" and seq_q % 2:
        raise ValueError(
            f"{op}: seq_q must be even for layout 'zigzag', two parts a device, "
            f"got {seq_q}"
        )
    try:
        rank = lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"{op}: axis_name must be an axis of the jax.shard_map around the call, "
            f"got {axis_name!r}"
        ) from None
    arrays = vary_alike(query, key, value, rank)
    return _ring(*arrays, axis_name, scale, layout if is_causal else None)


class _Part(NamedTuple):
    """Queries from `first_query` on see keys before `end_key`, up to a diagonal."""

    first_query: int
    end_key: int
    diagonal: int | None

    def tiling(self, seq_q: int) -> Tiling:
        return make_tiling(seq_q - self.first_query, self.end_key, self.diagonal)


def _parts(
    layout: Layout | None, seq_q: int, seq_kv: int
) -> tuple[_Part, _Part, _Part | None]:
    """What is seen of one's own keys, an earlier device's and a later device's."""
    everything = _Part(0, seq_kv, None)
    triangle = _Part(0, seq_kv, 0)
    match layout:
        case None:
            return everything, everything, everything
        case "contiguous":
            return triangle, everything, None
        case "striped":
            return triangle, triangle, _Part(0, seq_kv, -1)
        case "zigzag":
            return (
                triangle,
                _Part(0, seq_kv // 2, None),
                _Part(seq_q // 2, seq_kv, None),
            )


def _pick(parts, step, rank, run):
    """`run` on what is seen at a step after the first: then nothing is one's own."""
    _, earlier, later = parts
    if earlier == later:
        return run(earlier)
    return lax.cond(step <= rank, partial(run, earlier), partial(run, later))


def _pad(x, before, after, fill=0.0):
    widths = [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill)


def _attend(query, keys_values, scale, part):
    first, end, _ = part
    key, value = (x[:, :end] for x in keys_values)
    tiling = part.tiling(query.shape[1])
    out, lse = attend(query[:, first:], key, value, None, scale, tiling)
    return _pad(out, first, 0), _pad(lse, first, 0, -jnp.inf)


def _gradients(query, keys_values, d_out, lse, delta, scale, part):
    first, end, _ = part
    key, value = (x[:, :end] for x in keys_values)
    rows, d_out, lse, delta = (x[:, first:] for x in (query, d_out, lse, delta))
    tiling = part.tiling(query.shape[1])
    d_query, d_key, d_value = attend_gradients(
        rows, key, value, None, d_out, lse, delta, scale, tiling
    )
    missing = keys_values[0].shape[1] - end
    return _pad(d_query, first, 0), (_pad(d_key, 0, missing), _pad(d_value, 0, missing))


def _send_on(tree, axis_name):
    devices = lax.axis_size(axis_name)
    return lax.ppermute(
        tree, axis_name, [(i, (i + 1) % devices) for i in range(devices)]
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(query, key, value, rank, axis_name, scale, layout):
    return _ring_forward(query, key, value, rank, axis_name, scale, layout)[0]


def _ring_forward(query, key, value, rank, axis_name, scale, layout):
    devices = lax.axis_size(axis_name)
    parts = _parts(layout, query.shape[1], key.shape[1])

    def add(out, lse, held, step):
        def run(part):
            if part is None:
                return out, lse
            return merge_attention(out, lse, *_attend(query, held, scale, part))

        return _pick(parts, step, rank, run)

    def turn(carry, step):
        out, lse, held = carry
        # Before the tiles, which need nothing of it, so that both can go on at once.
        arriving = _send_on(held, axis_name)
        return (*add(out, lse, held, step), arriving), None

    keys_values = key, value
    arriving = _send_on(keys_values, axis_name) if devices > 1 else None
    out, lse = _attend(query, keys_values, scale, parts[0])
    if devices > 1:
        carry = out, lse, arriving
        (out, lse, held), _ = lax.scan(turn, carry, jnp.arange(1, devices - 1))
        out, lse = add(out, lse, held, devices - 1)
    return out.astype(value.dtype), (query, key, value, rank, out, lse)


def _ring_backward(axis_name, scale, layout, saved, d_out):
    query, key, value, rank, out, lse = saved
    devices = lax.axis_size(axis_name)
    parts = _parts(layout, query.shape[1], key.shape[1])
    delta = (d_out * out).sum(-1)

    def gradients(keys_values, part):
        return _gradients(query, keys_values, d_out, lse, delta, scale, part)

    def add(d_query, d_held, held, step):
        # The sums so far come from the neighbour while this device's share is computed.
        sums = d_query, _send_on(d_held, axis_name)

        def run(part):
            if part is None:
                return sums
            return jax.tree.map(jnp.add, sums, gradients(held, part))

        return _pick(parts, step, rank, run)

    def turn(carry, step):
        d_query, d_held, held = carry
        arriving = _send_on(held, axis_name)
        return (*add(d_query, d_held, held, step), arriving), None

    keys_values = key, value
    arriving = _send_on(keys_values, axis_name) if devices > 1 else None
    d_query, d_held = gradients(keys_values, parts[0])
    if devices > 1:
        carry = d_query, d_held, arriving
        (d_query, d_held, held), _ = lax.scan(turn, carry, jnp.arange(1, devices - 1))
        d_query, d_held = add(d_query, d_held, held, devices - 1)
        d_held = _send_on(d_held, axis_name)
    return *(x.astype(query.dtype) for x in (d_query, *d_held)), None


_ring.defvjp(_ring_forward, _ring_backward)


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
    _check_divisible(op, seq, devices, layout)
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


def context_parallel_attention(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    mesh: Mesh,
    axis_name: str,
    is_causal: bool = False,
    layout: Layout = "zigzag",
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq_q heads dim_v"]:
    """`attention` of whole arrays, its sequence split over one axis of a mesh.

    Permutes the tokens into `layout`, runs `ring_attention` in `jax.shard_map`, and
    permutes back. Other mesh axes, automatic or explicit, keep what they split. The
    permutation moves every token in every call, and may gather the sequence for it: a
    training loop permutes its tokens and positions once, by `ring_permutation`, when
    it loads a batch, and then calls `ring_attention`. Without `is_causal`, nothing is
    permuted. There is no mask, so tokens that pad the sequence at its end are seen by
    all without `is_causal`, and with it by each other only.

    Raises:
        TypeError: an argument is no floating-point array, or the dtypes differ.
        ValueError: as `ring_attention`; the mesh has no such axis, or it does not
            divide the sequence.
        NotImplementedError: `implementation` is "mosaic_gpu", which has no kernel yet.
    """
    op = "context_parallel_attention"
    check_xla_only(op, implementation)
    _check_layout(op, layout)
    check_query_key_value(op, query, key, value)
    if axis_name not in mesh.axis_names:
        raise_unknown(op, "axis_name", axis_name, mesh.axis_names)
    devices = mesh.shape[axis_name]
    layout = layout if is_causal else "contiguous"
    for seq in (query.shape[1], key.shape[1]):
        _check_divisible(op, seq, devices, layout)
    indices, inverse = ring_permutation(query.shape[1], devices, layout)
    whole, split = (partial(_place, mesh=mesh, axis_name=x) for x in (None, axis_name))

    def reorder(x, order, back):
        return x if layout == "contiguous" else _permute(whole(x), order, back)

    spec = P(None, axis_name)
    ring = jax.shard_map(
        partial(
            ring_attention,
            axis_name=axis_name,
            is_causal=is_causal,
            layout=layout,
            scale=scale,
            implementation=implementation,
        ),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names={axis_name},
    )
    out = ring(*(split(reorder(x, indices, inverse)) for x in (query, key, value)))
    return split(reorder(out, inverse, indices))


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


def _check_layout(op: str, layout: object) -> None:
    if layout not in get_args(Layout):
        raise_unknown(op, "layout", layout, get_args(Layout))


def _check_divisible(op: str, seq: int, devices: int, layout: Layout) -> None:
    parts = 2 * devices if layout == "zigzag" else devices
    if seq % parts:
        raise ValueError(
            f"{op}: seq must be a multiple of {parts} for layout {layout!r} over "
            f"{devices} devices, got {seq}: pad it by {-seq % parts} at the end, "
            "which causal queries do not see"
        )
