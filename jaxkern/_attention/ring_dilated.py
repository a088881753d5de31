"""Dilated attention over a split sequence: only segments across devices go round."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Array, Float

from .._core.dispatch import Implementation
from .dense import choose_for_keys
from .dilated import attend_pattern, mix, select_rows
from .dilation import HeadOffsets, Pattern, make_patterns
from .ring_steps import Ring, attend_around


def attend_dilated_around(
    op: str,
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim_v"],
    ring: Ring,
    is_causal: bool,
    scale: float,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: HeadOffsets,
    implementation: Implementation | None,
) -> Float[Array, "batch seq heads dim_v"]:
    """A device's tokens of `dilated_attention` over those of all devices."""
    shard, heads = query.shape[1:3]
    seq = ring.devices * shard
    patterns = make_patterns(
        op, segment_lengths, dilation_rates, seq, heads, head_offsets
    )
    rings = [_ring_of_a_segment(op, x, shard, ring) for x in patterns]
    # Of a longer segment, a device holds as many tokens, from a multiple of the rate.
    patterns = [replace(x, segment=min(x.segment, shard)) for x in patterns]
    given = is_causal, scale, implementation
    parts = [
        _attend_across(op, query, key, value, pattern, group, *given)
        if group.devices > 1
        else attend_pattern(op, query, key, value, None, pattern, *given)
        for pattern, group in zip(patterns, rings, strict=True)
    ]
    return mix(patterns, parts, shard, value.dtype)[0]


def _attend_across(
    op, query, key, value, pattern, ring, is_causal, scale, implementation
):
    """`attend_pattern`, of the one segment that the devices of a ring share."""
    query, key, value = (x[:, 0] for x in select_rows(query, key, value, pattern))
    layout = "contiguous" if is_causal else None
    chosen = choose_for_keys(op, implementation, query, key, value)
    out, lse = attend_around(query, key, value, ring, scale, layout, chosen)
    return out[:, None], lse[:, None]


def _ring_of_a_segment(op: str, pattern: Pattern, shard: int, ring: Ring) -> Ring:
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
