"""One of two processes that share a ring; started by test_ring.py."""

import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import attention, ring_attention, ring_permutation

SEQ, LAYOUT = 32, "zigzag"


def main(process, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    devices = jax.device_count()
    assert devices == 4 and jax.local_device_count() == 2
    mesh = jax.make_mesh((devices,), ("ring",))
    indices, inverse = ring_permutation(SEQ, devices, LAYOUT)
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
        partial(ring_attention, axis_name="ring", is_causal=True, layout=LAYOUT),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )

    @partial(jax.jit, static_argnums=0)
    def both_passes(fn, d_out, *args):
        out, vjp = jax.vjp(fn, *args)
        return out, *vjp(d_out)

    got = both_passes(ring, *map(split, (d_out, *args)))
    expected = both_passes(partial(attention, is_causal=True), d_out, *args)
    for ours, whole in zip(got, expected, strict=True):
        whole = np.asarray(whole)[:, indices]
        for shard in ours.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], atol=2e-5)
    print("equal on process", process)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
