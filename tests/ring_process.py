"""One of two processes that share a ring; started by test_ring.py."""

import sys
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import (
    Dilation,
    attention,
    dilated_attention,
    ring_attention,
    ring_permutation,
)

SEQ = 32
PATTERNS: Any = {"dilation": Dilation([4, 16, 32], [1, 2, 4])}
# The layout of the tokens, options of the ring, and the equal op of whole arrays.
CASES = [
    ("zigzag", {}, attention),
    ("contiguous", PATTERNS, partial(dilated_attention, **PATTERNS)),
]


def main(process, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    devices = jax.device_count()
    assert devices == 4 and jax.local_device_count() == 2
    mesh = jax.make_mesh((devices,), ("ring",))
    for layout, options, whole in CASES:
        check(layout, options, whole, mesh)
    print("equal on process", process)


def check(layout, options, whole, mesh):
    indices, _ = ring_permutation(SEQ, mesh.size, layout)
    rng = np.random.default_rng(0)
    shapes = [(1, SEQ, heads, 8) for heads in (4, 2, 2, 4)]
    *args, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    spec = P(None, "ring")

    def split(x):
        x = x[:, indices]
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda part: x[part]
        )

    ring = jax.shard_map(
        partial(
            ring_attention, axis_name="ring", is_causal=True, layout=layout, **options
        ),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )

    @partial(jax.jit, static_argnums=0)
    def both_passes(fn, d_out, *args):
        out, vjp = jax.vjp(fn, *args)
        return out, *vjp(d_out)

    got = both_passes(ring, *map(split, (d_out, *args)))
    expected = both_passes(partial(whole, is_causal=True), d_out, *args)
    for ours, dense in zip(got, expected, strict=True):
        dense = np.asarray(dense)[:, indices]
        for shard in ours.addressable_shards:
            np.testing.assert_allclose(shard.data, dense[shard.index], atol=2e-5)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
