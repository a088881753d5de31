"""The ring in which devices send keys and values: its steps, forward and backward."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._core.dispatch import Implementation
from .._core.sharding import vary_alike
from .block_mask.mask import BlockMask, band_mask
from .dense import merge
from .tiles import cotangents_of, nothing, pad_axis
from .tiling import Tiling, attend, attend_gradients, make_tiling

Layout = Literal["contiguous", "striped", "zigzag"]


class DeviceRing(NamedTuple):
    """Rings on a mesh axis: each group of `devices` neighbours forms one."""

    axis_name: str
    devices: int

    def rank(self) -> jax.Array:
        """Return the place of this device in its ring."""
        return lax.axis_index(self.axis_name) % self.devices

    def send_on(self, tree: Any) -> Any:
        """Send the arrays of every device to the next device in its ring."""
        ranks = range(lax.axis_size(self.axis_name))
        return lax.ppermute(
            tree,
            self.axis_name,
            [(i, i - i % self.devices + (i + 1) % self.devices) for i in ranks],
        )


def attend_around(
    query: Float[Array, "batch seq_q heads dim"],
    key: Float[Array, "batch seq_kv kv_heads dim"],
    value: Float[Array, "batch seq_kv kv_heads dim_v"],
    *,
    ring: DeviceRing,
    scale: float,
    layout: Layout | None,
    implementation: Implementation,
) -> tuple[Float[Array, "batch seq_q heads dim_v"], Float[Array, "batch seq_q heads"]]:
    """Attend to all keys of a ring: causally if there is a layout, else fully.

    Both results are float32, or float64 if the arguments are.
    """
    arrays = vary_alike(query, key, value, ring.rank())
    return _around(*arrays, ring, scale, layout, implementation)


class _Part(NamedTuple):
    """The pairs that attend in a step.

    Queries from `first_query` on see the keys before `end_key`, up to a diagonal.
    """

    first_query: int
    end_key: int
    diagonal: int | None

    def tiling(self, seq_q: int) -> Tiling:
        """Return the part as XLA's tiles."""
        return make_tiling(seq_q - self.first_query, self.end_key, self.diagonal)

    def mask(self, seq_q: int) -> BlockMask:
        """Return the part as the kernel's mask."""
        rows = seq_q - self.first_query
        return band_mask(None, self.diagonal, rows, self.end_key)


def _parts(
    layout: Layout | None, seq_q: int, seq_kv: int
) -> tuple[_Part, _Part, _Part | None]:
    """Return the parts of a device's own keys, an earlier and a later device's keys."""
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
    """Apply `run` to the part that is seen at a step after the first.

    In these steps the keys come from another device. Until step `rank` it is an earlier
    one.
    """
    _, earlier, later = parts
    if earlier == later:
        return run(earlier)
    return lax.cond(step <= rank, partial(run, earlier), partial(run, later))


def _attend(query, keys_values, *, part, scale, implementation: Implementation):
    """Return (out, lse) of all queries over the keys that they see, in float32."""
    first, end, _ = part
    key, value = (x[:, :end] for x in keys_values)
    match implementation:
        case "mosaic_gpu":
            # Mosaic is imported on first use of a kernel.
            from .hopper import attend as kernel

            mask = part.mask(query.shape[1])
            out, lse = kernel.attend_part(
                query[:, first:], key, value, mask=mask, scale=scale
            )
        case "xla":
            tiling = part.tiling(query.shape[1])
            out, lse = attend(query[:, first:], key, value, None, scale, tiling)
    return pad_axis(out, 1, first, 0), pad_axis(lse, 1, first, 0, nothing(lse.dtype))


def _gradients(
    query,
    keys_values,
    d_out,
    lse,
    delta,
    *,
    part,
    scale,
    implementation: Implementation,
):
    """Return what some keys add to d_query, and (d_key, d_value), in float32."""
    first, end, _ = part
    key, value = (x[:, :end] for x in keys_values)
    rows, d_out, lse, delta = (x[:, first:] for x in (query, d_out, lse, delta))
    match implementation:
        case "mosaic_gpu":
            from .hopper import attend as kernel

            mask = part.mask(query.shape[1])
            d_query, d_key, d_value = kernel.part_gradients(
                rows, key, value, d_out, lse, delta, mask=mask, scale=scale
            )
        case "xla":
            tiling = part.tiling(query.shape[1])
            d_query, d_key, d_value = attend_gradients(
                rows, key, value, None, d_out, lse, delta, scale, tiling
            )
    missing = keys_values[0].shape[1] - end
    d_keys_values = tuple(pad_axis(x, 1, 0, missing) for x in (d_key, d_value))
    return pad_axis(d_query, 1, first, 0), d_keys_values


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _around(query, key, value, rank, ring, scale, layout, implementation):
    outs, _ = _around_forward(
        query, key, value, rank, ring, scale, layout, implementation
    )
    return outs


def _around_forward(query, key, value, rank, ring, scale, layout, implementation):
    devices = ring.devices
    parts = _parts(layout, query.shape[1], key.shape[1])

    attend = partial(_attend, query, scale=scale, implementation=implementation)

    def add(out, lse, held, step):
        def run(part):
            if part is None:
                return out, lse
            return merge(out, lse, *attend(held, part=part))

        return _pick(parts, step, rank, run)

    def turn(carry, step):
        out, lse, held = carry
        # The send comes before the tiles, which do not read what arrives, so that both
        # can run at once.
        arriving = ring.send_on(held)
        return (*add(out, lse, held, step), arriving), None

    keys_values = key, value
    arriving = ring.send_on(keys_values) if devices > 1 else None
    out, lse = attend(keys_values, part=parts[0])
    if devices > 1:
        carry = out, lse, arriving
        (out, lse, held), _ = lax.scan(turn, carry, jnp.arange(1, devices - 1))
        out, lse = add(out, lse, held, devices - 1)
    return (out, lse), (query, key, value, rank, out, lse)


def _around_backward(ring, scale, layout, implementation, saved, cotangents):
    query, key, value, rank, out, lse = saved
    d_out, d_lse = cotangents
    d_out, delta = cotangents_of(out, lse, d_out, d_lse, query.dtype)
    devices = ring.devices
    parts = _parts(layout, query.shape[1], key.shape[1])

    def gradients(keys_values, part):
        return _gradients(
            query,
            keys_values,
            d_out,
            lse,
            delta,
            part=part,
            scale=scale,
            implementation=implementation,
        )

    def add(d_query, d_held, held, step):
        # The neighbour's sums arrive while this device computes what it adds to them.
        sums = d_query, ring.send_on(d_held)

        def run(part):
            if part is None:
                return sums
            return jax.tree.map(jnp.add, sums, gradients(held, part))

        return _pick(parts, step, rank, run)

    def turn(carry, step):
        d_query, d_held, held = carry
        arriving = ring.send_on(held)
        return (*add(d_query, d_held, held, step), arriving), None

    keys_values = key, value
    arriving = ring.send_on(keys_values) if devices > 1 else None
    d_query, d_held = gradients(keys_values, parts[0])
    if devices > 1:
        carry = d_query, d_held, arriving
        (d_query, d_held, held), _ = lax.scan(turn, carry, jnp.arange(1, devices - 1))
        d_query, d_held = add(d_query, d_held, held, devices - 1)
        d_held = ring.send_on(d_held)
    return *(x.astype(query.dtype) for x in (d_query, *d_held)), None


_around.defvjp(_around_forward, _around_backward)
