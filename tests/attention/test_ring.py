import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import (
    assert_attention,
    assert_close,
    attention_args,
    attention_float64,
    plain_attention,
    see,
)
from helpers import free_port, mesh, run_together, untyped, value_and_vjp
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import (
    attention,
    context_parallel_attention,
    ring_attention,
    ring_permutation,
)
from jaxkern._attention import ring_steps
from jaxkern._attention.tiling import make_tiling

LAYOUTS = ("contiguous", "striped", "zigzag")
# (batch, seq_q, seq_kv, heads, kv_heads, dim, dim_v)
SIZE = (2, 48, 48, 4, 2, 8, 4)
RING = P(None, "ring")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make_ring(devices, layout, is_causal, return_lse: Any = False, **options):
    """Return ring attention of whole arrays, with tokens in the order of the layout."""
    ring = partial(ring_attention, axis_name="ring", is_causal=is_causal, layout=layout)
    ring = partial(ring, return_lse=return_lse)
    specs = {"in_specs": RING, "out_specs": RING}
    return jax.shard_map(ring, mesh=mesh(ring=devices), **specs, **options)


def in_order(run, devices, layout):
    """Return `run` for tokens in sequence: it permutes arguments, and results back."""

    def reordered(*args):
        indices, inverse = ring_permutation(args[0].shape[1], devices, layout)
        results = run(*(x[:, indices] for x in args))
        return jax.tree.map(lambda x: x[:, inverse], results)

    return reordered


def check(devices, layout, size, is_causal, dtype=jnp.float32):
    """Value, lse and gradients of both are those of dense attention."""
    run = make_ring(devices, layout, is_causal, return_lse=True)
    if is_causal:
        run = in_order(run, devices, layout)
    args, cotangents = attention_args(size, dtype)
    batch, seq_q, seq_kv, heads, *_, dim, _ = size
    visible = see(None, is_causal, (batch, heads, seq_q, seq_kv))
    exact = attention_float64(args, cotangents, visible, dim**-0.5)
    plain = None
    if dtype != jnp.float32:
        plain = partial(plain_attention, visible=visible, scale=dim**-0.5)
        plain = value_and_vjp(plain, args, cotangents)
    got = value_and_vjp(run, args, cotangents)
    assert got[0][1].dtype == jnp.float32
    assert_attention(got, exact, plain)


@pytest.mark.parametrize(
    "layout, devices", [*((layout, 8) for layout in LAYOUTS), ("zigzag", 2)]
)
def test_causal_equals_dense(layout, devices):
    check(devices, layout, SIZE, True)


@pytest.mark.parametrize("devices", [1, 4])
def test_full_equals_dense(devices):
    check(devices, "contiguous", SIZE, False)
    if devices == 4:
        check(4, "striped", (1, 8, 20, 3, 1, 5, 5), False)


def test_one_device():
    check(1, "zigzag", SIZE, True)


@layouts
def test_several_tiles_a_part(layout, monkeypatch):
    monkeypatch.setattr(ring_steps, "make_tiling", partial(make_tiling, limit=8))
    check(4, layout, (1, 88, 88, 2, 1, 8, 8), True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_error_in_16_bits_is_that_of_the_plain_form(dtype):
    check(8, "zigzag", (1, 128, 128, 2, 1, 32, 32), True, dtype)


@pytest.mark.parametrize(
    "layout, kind", [*((layout, "explicit") for layout in LAYOUTS), ("zigzag", "auto")]
)
def test_context_parallel_attention(layout, kind):
    """The batch stays split over the other axis of the mesh."""
    devices = mesh(kind, data=2, ring=4)
    run = partial(
        context_parallel_attention,
        mesh=devices,
        axis_name="ring",
        layout=layout,
        return_lse=True,
    )
    args, cotangents = attention_args(SIZE)
    args = jax.device_put(args, NamedSharding(devices, P("data")))
    placed = jax.device_put(cotangents, NamedSharding(devices, P("data", "ring")))
    for is_causal in (False, True) if layout == "zigzag" else (True,):
        visible = see(None, is_causal, (2, 4, 48, 48))
        exact = attention_float64(args, cotangents, visible, 8**-0.5)
        got = value_and_vjp(partial(run, is_causal=is_causal), args, placed)
        assert_close(got, exact)
        assert all(x.sharding.spec[0] == "data" for x in got[0])


def test_keys_shared_along_another_axis():
    """Gradients of keys and values are summed over that axis, which is explicit."""
    devices = mesh("explicit", data=2, ring=4)
    args, (d_out, _) = attention_args((1, 16, 16, 4, 2, 8, 8))
    query = jnp.concatenate([args[0], 2 * args[0]], 2)
    specs = P(None, "ring", "data"), RING, RING
    ring = jax.shard_map(
        partial(ring_attention, axis_name="ring", is_causal=True, layout="zigzag"),
        mesh=devices,
        in_specs=specs,
        out_specs=specs[0],
    )
    d_out = jnp.concatenate([d_out, d_out], 2)

    def dense(query, key, value):
        first, last = jnp.split(query, 2, axis=2)
        run: Any = partial(attention, is_causal=True)
        return jnp.concatenate([run(first, key, value), run(last, key, value)], 2)

    expected = value_and_vjp(dense, (query, *args[1:]), d_out)
    indices, inverse = ring_permutation(16, 4, "zigzag")
    placed = [
        jax.device_put(x[:, indices], NamedSharding(devices, spec))
        for x, spec in zip((query, *args[1:], d_out), (*specs, specs[0]), strict=True)
    ]
    got = value_and_vjp(ring, placed[:3], placed[3])
    assert_close(jax.tree.map(lambda x: jax.device_get(x)[:, inverse], got), expected)


def test_remat_and_scan():
    args, (d_out, _) = attention_args((1, 16, 16, 2, 2, 8, 8))

    def layers(attend, query, key, value):
        def layer(x, _):
            return x + attend(x, key, value), None

        return jax.lax.scan(jax.checkpoint(layer), query, None, length=2)[0]

    forms = make_ring(2, "contiguous", True), partial(attention, is_causal=True)
    got, expected = (value_and_vjp(partial(layers, f), args, d_out) for f in forms)
    assert_close(got, expected)


def test_vmap_and_unchecked_types():
    args, (d_out, _) = attention_args((1, 16, 16, 2, 2, 8, 8))
    expected = value_and_vjp(partial(attention, is_causal=True), args, d_out)
    mapped = jax.vmap(make_ring(2, "contiguous", True), in_axes=-1, out_axes=-1)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3, -1), (args, d_out))
    got = value_and_vjp(mapped, *stacked)
    for i in range(3):
        assert_close(jax.tree.map(lambda x, i=i: x[..., i], got), expected)
    unchecked = make_ring(2, "contiguous", True, check_vma=False)
    assert_close(value_and_vjp(unchecked, args, d_out), expected)


def compiled(devices, seq, layout="zigzag"):
    ring = make_ring(devices, layout, True)

    def both_passes(d_out, *args):
        out, vjp = jax.vjp(ring, *args)
        return out, vjp(d_out)

    arrays = [jax.ShapeDtypeStruct((1, seq, 2, 32), jnp.float32)] * 4
    return jax.jit(both_passes).lower(*arrays).compile()


def test_only_neighbours_talk():
    program = compiled(8, 64).as_text()
    assert program is not None and "collective-permute" in program
    assert not any(f"all-{x}" in program for x in ("gather", "reduce", "to-all"))


def test_memory_is_linear_in_the_sequence_over_the_devices():
    used = {}
    for devices, share in [(4, 2048), (8, 2048), (8, 4096)]:
        memory = compiled(devices, devices * share).memory_analysis()
        assert memory is not None
        used[devices, share] = memory.temp_size_in_bytes
    assert used[8, 2048] < 1.1 * used[4, 2048]
    assert used[8, 4096] < 2.1 * used[8, 2048]


def scores(part, seq):
    """Count the logits of a part, by tiles of one logit."""
    if part is None:
        return 0
    tiling = make_tiling(seq - part.first_query, part.end_key, part.diagonal, 1)
    return (tiling.last_columns() + 1).sum()


@given(devices=st.integers(1, 6), half=st.integers(1, 6))
def test_zigzag_gives_every_device_the_same_work_in_every_step(devices, half):
    seq = 2 * half
    work = {}
    for layout in LAYOUTS:
        own, earlier, later = ring_steps._parts(layout, seq, seq)
        work[layout] = np.array(
            [
                [scores(own, seq)]
                + [scores(earlier if t <= r else later, seq) for t in range(1, devices)]
                for r in range(devices)
            ]
        )
        tokens = devices * seq
        assert work[layout].sum() == tokens * (tokens + 1) // 2
    assert (work["zigzag"][:, 1:] == 2 * half**2).all()
    assert (work["zigzag"][:, 0] == 2 * half**2 + half).all()
    # Every step waits for the slowest device, so the sum of slowest times counts.
    slowest = {layout: each.max(0).sum() for layout, each in work.items()}
    assert slowest["zigzag"] <= slowest["striped"] <= slowest["contiguous"]


@given(
    devices=st.integers(1, 9), half=st.integers(1, 9), layout=st.sampled_from(LAYOUTS)
)
def test_permutation(devices, half, layout):
    seq = 2 * half * devices
    indices, inverse = ring_permutation(seq, devices, layout)
    tokens = np.arange(seq)
    np.testing.assert_array_equal(indices[inverse], tokens)
    np.testing.assert_array_equal(inverse[indices], tokens)
    for rank, held in enumerate(np.split(indices, devices)):
        match layout:
            case "contiguous":
                expected = tokens // (2 * half) == rank
            case "striped":
                expected = tokens % devices == rank
            case _:
                part = tokens // half
                expected = (part == rank) | (part == 2 * devices - 1 - rank)
        np.testing.assert_array_equal(held, tokens[expected])


def test_two_processes():
    program, port = Path(__file__).parents[1] / "ring_process.py", str(free_port())
    outputs = run_together([[sys.executable, program, str(i), port] for i in range(2)])
    for i, output in enumerate(outputs):
        assert f"equal on process {i}" in output, output


@pytest.mark.usefixtures("unchecked_types")
def test_refusals():
    x = jnp.zeros((1, 12, 2, 4))
    with pytest.raises(ValueError, match="axis of the jax.shard_map around .* 'ring'"):
        ring_attention(x, x, x, axis_name="ring")
    with pytest.raises(ValueError, match="layout must be one of 'contiguous', 'strip"):
        untyped.ring_attention(x, x, x, axis_name="ring", layout="brick")
    with pytest.raises(ValueError, match="heads of query must be a multiple"):
        ring_attention(x, *[jnp.zeros((1, 12, 3, 4))] * 2, axis_name="ring")
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        ring_attention(x, x, x, axis_name="ring", scale=float("inf"))
    with pytest.raises(ValueError, match="seq_q and seq_kv must be equal with is_cau"):
        make_ring(2, "striped", True)(x, x[:, :8], x[:, :8])
    with pytest.raises(ValueError, match="seq_q must be even for layout 'zigzag'.*3"):
        make_ring(4, "zigzag", True)(x, x, x)


@pytest.mark.usefixtures("unchecked_types")
def test_context_parallel_refusals():
    x = jnp.zeros((1, 100, 2, 4))
    run = partial(context_parallel_attention, x, x, x, mesh=mesh(ring=8))
    with pytest.raises(ValueError, match="axis_name must be one of 'ring', got 'seq'"):
        run(axis_name="seq")
    with pytest.raises(ValueError, match="multiple of 16 .* got 100: pad it by 12"):
        run(axis_name="ring", is_causal=True)
    with pytest.raises(ValueError, match="multiple of 8 .* got 100: pad it by 4"):
        run(axis_name="ring", is_causal=True, layout="striped")
    with pytest.raises(ValueError, match="got 100: no padding helps without is_causal"):
        run(axis_name="ring")
    with pytest.raises(TypeError, match="mesh must be a jax.sharding.Mesh, got NoneT"):
        untyped.context_parallel_attention(x, x, x, mesh=None, axis_name="ring")
    with pytest.raises(ValueError, match="ring_permutation: seq must be an integer"):
        untyped.ring_permutation(np.arange(8), 2, "zigzag")
    with pytest.raises(ValueError, match="ring_permutation: layout must be one of"):
        untyped.ring_permutation(8, 2, "brick")
