"""The ops that share the kernel of block-sparse attention."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import (
    assert_close,
    assert_largest_error,
    attention_args,
    check_attention,
)
from helpers import assert_as_close, mesh, value_and_vjp

from jaxkern import (
    BlockMask,
    Dilation,
    attention,
    block_sparse_attention,
    dilated_attention,
    ring_attention,
)
from jaxkern._attention import ring_steps
from jaxkern._attention.tiles import sees
from jaxkern.testing.compiler import lower

BF16 = jnp.bfloat16
KERNEL: Any = {"implementation": "mosaic_gpu"}


@pytest.mark.usefixtures("hopper")
def test_attention():
    def whole(*args):
        return attention(*args, return_lse=True, **KERNEL)

    size = 1, 140, 130, 2, 1, 16, 16
    check_attention(whole, size, np.ones((140, 130), bool), BF16)


@pytest.mark.usefixtures("hopper")
def test_mask_of_keys():
    """The sequences of a batch are padded, with other lengths for each head."""
    lengths = np.array([[130, 70], [0, 129]])[:, :, None, None]
    mask = jnp.asarray(np.arange(130) < lengths)

    def whole(*args):
        options: Any = {"mask": mask, "is_causal": True, "return_lse": True}
        return attention(*args, **options, **KERNEL)

    size = 2, 140, 130, 2, 1, 16, 16
    visible = np.tri(140, 130, dtype=bool) & np.asarray(mask)
    check_attention(whole, size, visible, BF16)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "padded, heads, head_offsets",
    [(True, 2, "paper"), (False, 4, "blocks")],
    ids=["heads of a key differ, padded", "heads of a key are alike"],
)
def test_dilated_attention(padded, heads, head_offsets):
    """Kernels are as exact as XLA, with a key mask and with a part of a segment.

    Rate 1 is dense attention, which other tests cover.
    """
    seq = 70 if padded else 64
    args, (d_out, d_lse) = attention_args(
        (2, seq, seq, heads, heads // 2, 16, 16), BF16
    )
    key_mask = jnp.arange(seq)[None] < jnp.array([[seq], [40]]) if padded else None

    def dilated(implementation, *args):
        return dilated_attention(
            *args,
            dilation=Dilation((64,), (2,), head_offsets=head_offsets),
            is_causal=True,
            key_mask=key_mask,
            return_lse=True,
            implementation=implementation,
        )

    cotangents = d_out, d_lse
    got, xla = (
        value_and_vjp(partial(dilated, name), args, cotangents)
        for name in ("mosaic_gpu", "xla")
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (args, cotangents))
    exact = value_and_vjp(partial(dilated, "xla"), *wide)
    assert_as_close(got[0][0], xla[0][0], exact[0][0])
    unseen = ~np.asarray(sees(exact[0][1]))
    np.testing.assert_array_equal(sees(got[0][1]), ~unseen)
    lse, exact_lse = (np.where(unseen, 0, x) for x in (got[0][1], exact[0][1]))
    assert_close(lse, exact_lse)
    assert_largest_error(got[1], xla[1], exact[1])


@pytest.mark.usefixtures("chooses_hopper")
def test_dilated_attention_copies_no_rows_for_the_kernel():
    """It keeps arguments, which kernels read with strides, and the kernels' results."""
    args, _ = attention_args((1, 1024, 1024, 4, 2, 16, 16), BF16)

    def dilated(*args):
        dilation = Dilation((256, 1024), (2, 4))
        return dilated_attention(*args, dilation=dilation, **KERNEL)

    def shapes(*args):
        kept = jax.tree.leaves(jax.vjp(dilated, *args)[1])
        return [x for x in kept if x.dtype == BF16 and x.ndim]

    kept = [x.shape for x in jax.eval_shape(shapes, *args)]
    rows = {(4, 128, 4, 16), (1, 256, 4, 16)}
    folded = {(4, 128, 8, 16), (4, 128, 4, 16), (1, 256, 16, 16), (1, 256, 8, 16)}
    assert folded <= set(kept) <= folded | rows


# A step with all keys is left out: it is the same as `attention`.
PARTS = {
    "keys from the diagonal on": ("striped", 2, -0.25),
    "half of the keys": ("zigzag", 1, 0.25),
    "half of the queries": ("zigzag", 2, 0.25),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("layout, which, scale", PARTS.values(), ids=PARTS)
def test_steps_of_a_ring(layout, which, scale):
    """Each step is as exact as by XLA; the emulator's one device runs them one by one.

    The kernel does not round `out` to 16 bits. It rounds gradients, which the ring adds
    in float32.
    """
    part = ring_steps._parts(layout, 140, 140)[which]
    (query, key, value), (d_out, _) = attention_args((1, 140, 140, 2, 1, 16, 16), BF16)
    lse, delta = jnp.full((1, 140, 2), 5.0), jnp.full((1, 140, 2), 0.1)
    held = key, value

    @partial(jax.jit, static_argnums=3)
    def step(query, held, d_out, implementation):
        options = {"part": part, "scale": scale, "implementation": implementation}
        attended = ring_steps._attend(query, held, **options)
        given = query, held, d_out, lse, delta
        return attended, ring_steps._gradients(*given, **options)

    got = step(query, held, d_out, "mosaic_gpu")
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    assert (got[0][0].astype(BF16).astype(jnp.float32) != got[0][0]).any()
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (query, held, d_out))
    exact, xla = step(*wide, "xla"), step(query, held, d_out, "xla")
    unseen = ~np.asarray(sees(exact[0][1]))
    np.testing.assert_array_equal(sees(got[0][1]), ~unseen)
    assert_largest_error(got[0][0], xla[0][0], exact[0][0])
    lse, exact_lse = (np.where(unseen, 0, x[0][1]) for x in (got, exact))
    assert_close(lse, exact_lse, 5e-7)
    assert_largest_error(got[1], xla[1], exact[1], rounded_to=BF16)


@pytest.mark.usefixtures("hopper")
def test_ring_of_one():
    devices, spec = mesh(i=1), jax.P(None, "i")
    args, (d_out, _) = attention_args((1, 140, 140, 2, 1, 16, 16), BF16)

    def ring(implementation, *args):
        local = partial(
            ring_attention, axis_name="i", is_causal=True, implementation=implementation
        )
        return jax.shard_map(local, mesh=devices, in_specs=spec, out_specs=spec)(*args)

    got, xla = (
        value_and_vjp(partial(ring, name), args, d_out)
        for name in ("mosaic_gpu", "xla")
    )
    wide = [x.astype(jnp.float32) for x in args], d_out.astype(jnp.float32)
    assert_as_close(got, xla, value_and_vjp(partial(ring, "xla"), *wide))


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize("layout", ["zigzag", "dilated"])
def test_ring_of_four_lowers_for_a_gpu(layout):
    """Inside `jax.shard_map` each device runs kernels, which `None` picks."""
    devices, spec = mesh(i=4), jax.P(None, "i")
    args, (d_out, _) = attention_args((1, 4 * 272, 4 * 272, 2, 1, 16, 16), BF16)
    options: Any = {"layout": layout}
    if layout == "dilated":
        options = {"dilation": Dilation((272, 4 * 272), (1, 1))}

    def gradients(*args):
        local = partial(ring_attention, axis_name="i", is_causal=True, **options)
        ring = jax.shard_map(local, mesh=devices, in_specs=spec, out_specs=spec)
        out, vjp = jax.vjp(ring, *args)
        return out, vjp(d_out)

    assert len(lower(gradients, args)) >= 6


def kernels_of(fn, *args):
    return len(lower(lambda *args: fn(*args), args))


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize(
    "seq_q, seq_kv, kernels",
    [(256, 256, 0), (264, 264, 1), (1, 65_537, 0), (63, 2000, 0), (64, 2000, 1)],
)
def test_none_picks_the_kernel_for_many_queries_and_logits(seq_q, seq_kv, kernels):
    query = jax.ShapeDtypeStruct((1, seq_q, 1, 16), BF16)
    key = jax.ShapeDtypeStruct((1, seq_kv, 1, 16), BF16)
    assert kernels_of(attention, query, key, key) == kernels


def causal_blocks(query, key, value):
    return block_sparse_attention(query, key, value, mask=BlockMask.causal(264, 264))


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize("op", [attention, causal_blocks])
def test_none_picks_the_kernel_where_arrays_lie_whole(op):
    """XLA cannot split a kernel over devices."""
    args, _ = attention_args((2, 264, 264, 2, 1, 16, 16), BF16)
    assert jax.device_count() == 8
    assert kernels_of(op, *jax.device_put(args, jax.devices()[3])) == 1
    devices, spec = mesh(i=2), jax.P("i")
    spread = jax.device_put(args, jax.NamedSharding(devices, spec))
    assert kernels_of(op, *spread) == 0
    inside = jax.shard_map(op, mesh=devices, in_specs=spec, out_specs=spec)
    assert kernels_of(inside, *spread) == 1


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize("seq_q, kernels", [(1, 0), (63, 0), (64, 1)])
def test_none_picks_the_kernel_of_blocks_for_many_queries(seq_q, kernels):
    query = jax.ShapeDtypeStruct((1, seq_q, 1, 16), BF16)
    key = jax.ShapeDtypeStruct((1, 264, 1, 16), BF16)
    blocks = partial(block_sparse_attention, mask=BlockMask.causal(seq_q, 264))
    assert kernels_of(blocks, query, key, key) == kernels
    assert kernels_of(partial(blocks, **KERNEL), query, key, key) == 1


def test_refused_without_a_gpu():
    args, _ = attention_args((1, 70, 70, 2, 1, 16, 16), BF16)
    with pytest.raises(
        NotImplementedError,
        match="attention: mosaic_gpu needs an H100 or H200, but the default .* is cpu",
    ):
        attention(*args, **KERNEL)
    spec = jax.P(None, "i")
    ring = jax.shard_map(
        partial(ring_attention, axis_name="i", **KERNEL),
        mesh=mesh(i=2),
        in_specs=spec,
        out_specs=spec,
    )
    with pytest.raises(NotImplementedError, match="ring_attention: mosaic_gpu needs"):
        ring(*args)


@pytest.mark.usefixtures("chooses_hopper")
def test_attention_refuses_a_mask_of_queries():
    args, _ = attention_args((1, 70, 70, 2, 1, 16, 16), BF16)
    mask = jnp.ones((1, 1, 70, 70), bool)
    with pytest.raises(NotImplementedError, match="the same for all queries, .* Block"):
        attention(*args, mask=mask, **KERNEL)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dim, is_causal",
    [(64, False), *((d, True) for d in (32, 64, 80, 96, 128, 192, 256))],
)
def test_attention_on_gpu(dim, is_causal):
    mask = np.ones((1000, 777), bool)

    def whole(*args):
        return attention(*args, is_causal=is_causal, return_lse=True, **KERNEL)

    mask = np.tril(mask) if is_causal else mask
    check_attention(whole, (2, 1000, 777, 4, 2, dim, dim), mask, BF16)
