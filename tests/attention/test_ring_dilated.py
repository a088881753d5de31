import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import assert_close, attention_args
from flax import nnx
from helpers import (
    assert_as_close,
    mesh,
    normal,
    to_float64,
    untyped,
    value_and_vjp,
    with_vjp,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import (
    Dilation,
    context_parallel_attention,
    dilated_attention,
    ring_attention,
)
from jaxkern.nn import MultiHeadAttention

RING = P(None, "ring")
# For 64 tokens on 8 devices: half of a device's tokens, the tokens of two and of four
# devices, and more tokens than there are.
DILATION = Dilation([4, 16, 32, 100], [1, 2, 4, 8])


def make_ring(devices, **options):
    """Return ring attention of whole arrays, which are split over so many devices."""
    ring = partial(ring_attention, axis_name="ring", **options)
    return jax.shard_map(ring, mesh=mesh(ring=devices), in_specs=RING, out_specs=RING)


def with_finite_lse(run):
    """With a number for the lse of rows without keys."""

    def finite(*args):
        out, lse = run(*args)
        return out, jnp.where(jnp.isneginf(lse), 0, lse)

    return finite


def compiled(ring, *shape) -> Any:
    """Return the compiled program of both passes for arrays of that shape."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    run: Any = with_vjp(ring)
    return run.lower((x, x, x), x).compile()


def check(devices, size=(2, 64, 64, 4, 2, 8, 5), dilation=DILATION, **options):
    """Values, lse and gradients of both."""
    options |= {"dilation": dilation, "return_lse": True}
    args, cotangents = attention_args(size)
    whole = with_finite_lse(partial(dilated_attention, **options))
    ring = with_finite_lse(make_ring(devices, **options))
    expected = value_and_vjp(whole, args, cotangents)
    assert_close(value_and_vjp(ring, args, cotangents), expected)


@pytest.mark.parametrize(
    "devices, is_causal", [(1, True), (2, True), (4, False), (8, True)]
)
def test_equals_dilated_attention_of_whole_arrays(devices, is_causal):
    check(devices, is_causal=is_causal)


@pytest.mark.parametrize("head_offsets", ["blocks", "pattern"])
def test_head_offsets(head_offsets):
    dilation = replace(DILATION, head_offsets=head_offsets)
    check(4, dilation=dilation, is_causal=True, scale=0.7)


def test_rows_that_no_pattern_takes():
    check(4, (1, 48, 48, 3, 3, 8, 8), Dilation([6, 48], [4, 3]), is_causal=True)


def test_one_device_may_hold_what_does_not_align():
    check(1, (1, 19, 19, 3, 1, 8, 8), Dilation([7, 19], [1, 3]))


def test_error_in_16_bits_is_that_of_whole_arrays():
    args, (d_out, _) = attention_args((1, 64, 64, 4, 2, 16, 16), jnp.bfloat16)
    run = partial(dilated_attention, is_causal=True, dilation=DILATION)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (args, d_out))
    exact = to_float64(value_and_vjp(run, *wide))
    got = value_and_vjp(make_ring(4, is_causal=True, dilation=DILATION), args, d_out)
    assert_as_close(got, value_and_vjp(run, args, d_out), exact)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_context_parallel_attention(kind):
    """The batch stays split over the other axis of the mesh."""
    devices = mesh(kind, data=2, ring=4)
    args, cotangents = attention_args((2, 64, 64, 4, 2, 8, 8))
    options: Any = {"is_causal": True, "dilation": DILATION, "return_lse": True}
    expected = value_and_vjp(partial(dilated_attention, **options), args, cotangents)
    run = partial(context_parallel_attention, mesh=devices, axis_name="ring", **options)
    args = jax.device_put(args, NamedSharding(devices, P("data")))
    place = NamedSharding(devices, P("data", "ring"))
    got = value_and_vjp(run, args, jax.device_put(cotangents, place))
    assert_close(got, expected)
    assert all(x.sharding.spec[0] == "data" for x in got[0])


def test_in_a_module_under_remat_scan_and_vmap():
    patterns: Any = {"dilation": Dilation([8, 32], [1, 2])}

    def layers(attention_fn, x):
        module = MultiHeadAttention(
            *(16, 4), attention_fn=partial(attention_fn, **patterns), rngs=nnx.Rngs(0)
        )

        @jax.checkpoint
        def layer(x, _):
            return x + jax.vmap(module)(x), None

        return jax.lax.scan(layer, x, None, length=2)[0]

    x, spec = normal(0, (3, 1, 32, 16)), P(None, None, "ring")
    ring = jax.shard_map(
        partial(layers, partial(ring_attention, axis_name="ring")),
        mesh=mesh(ring=4),
        in_specs=spec,
        out_specs=spec,
    )
    expected = value_and_vjp(partial(layers, dilated_attention), (x,), x)
    assert_close(value_and_vjp(ring, (x,), x), expected)


def sent(text):
    """Yield the pairs (sender, receiver) and the array sizes of each message."""
    for line in text.splitlines():
        if re.search(r"= .*collective-permute(-start)?\(", line):
            shapes = re.findall(r"f32\[([\d,]*)\]", line.split("collective-permute")[0])
            pairs = re.findall(r"\{(\d+),(\d+)\}", line)
            sizes = {int(np.prod([int(n) for n in s.split(",")])) for s in shapes}
            yield {(int(a), int(b)) for a, b in pairs}, sizes


@pytest.mark.parametrize("group, rate", [(2, 1), (4, 2), (8, 8)])
def test_only_selected_tokens_go_round_and_only_in_their_group(group, rate):
    seq, heads, dim = 128, 2, 8
    dilation = Dilation([group * 16], [rate])
    ring = make_ring(8, is_causal=True, dilation=dilation)
    text = compiled(ring, 1, seq, heads, dim).as_text()
    assert not any(f"all-{x}" in text for x in ("gather", "reduce", "to-all"))
    assert "conditional" in text
    neighbours = {(i, i // group * group + (i + 1) % group) for i in range(8)}
    messages = list(sent(text))
    assert messages
    for pairs, sizes in messages:
        assert pairs == neighbours
        assert sizes == {seq // 8 // rate * heads * dim}


def test_segments_within_devices_send_nothing():
    ring = make_ring(4, dilation=Dilation([4, 16], [1, 3]))
    text = compiled(ring, 1, 64, 3, 8).as_text()
    assert "collective" not in text and "all-" not in text


def test_memory_is_linear_in_the_sequence_over_the_devices():
    used = {}
    for devices, share in [(4, 1024), (8, 1024), (8, 2048)]:
        seq = devices * share
        dilation = Dilation([256, seq], [1, 4])
        ring = make_ring(devices, is_causal=True, dilation=dilation)
        memory = compiled(ring, 1, seq, 4, 32).memory_analysis()
        used[devices, share] = memory.temp_size_in_bytes
    assert used[8, 1024] < 1.1 * used[4, 1024]
    assert used[8, 2048] < 2.1 * used[8, 1024]


X = jnp.zeros((1, 64, 2, 4))
ALIGN = (
    "ring_attention: segment_lengths must divide the 16 tokens of a device, or be "
    "the tokens of m devices, where m divides 4, so 32, 64, got "
)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"dilation": Dilation([6], [1])}, ALIGN + "6"),
        ({"dilation": Dilation([24], [1])}, ALIGN + "24"),
        ({"dilation": Dilation([48], [1])}, ALIGN + "48"),
        (
            {"dilation": Dilation([32], [3])},
            "dilation_rates must divide the 16 tokens of a device where a segment "
            "spans 2 devices, got 3 for 32 tokens",
        ),
        (
            {"dilation": Dilation([16], [1], head_groups=True)},
            "ring_attention: head_groups of dilation must be False on a ring of "
            "devices, got True; dilated_attention takes it",
        ),
        (
            {"dilation": Dilation([16], [1], stop_gradient_mix=True)},
            "stop_gradient_mix of dilation must be False .*, got True",
        ),
        (
            {"dilation": Dilation([16], [1], uncovered="error")},
            "uncovered of dilation must be 'zero' .*, got 'error'",
        ),
        ({"layout": "striped"}, "layout must be 'contiguous' .*, got 'striped'"),
        ({"layout": "zigzag"}, "layout must be 'contiguous' .*, got 'zigzag'"),
    ],
)
def test_refusals(options, message):
    options = {"dilation": Dilation([16], [1])} | options
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make_ring(4, **options), X, X, X)


@pytest.mark.usefixtures("unchecked_types")
def test_other_refusals():
    options: Any = {"dilation": Dilation([16], [1])}
    with pytest.raises(ValueError, match=r"key must have shape \(1, 16, 2, 4\)"):
        jax.eval_shape(make_ring(4, **options), X, X[:, :32], X[:, :32])
    run = partial(
        untyped.context_parallel_attention, mesh=mesh(ring=4), axis_name="ring"
    )
    with pytest.raises(ValueError, match="context_parallel_attention: layout must be"):
        run(X, X, X, layout="zigzag", **options)
    with pytest.raises(ValueError, match="multiple of 4 .*, got 62: pad it by 2"):
        run(*[X[:, :62]] * 3, is_causal=True, **options)
    with pytest.raises(TypeError, match="context_.*: dilation must be a Dilation, .*"):
        run(X, X, X, dilation={"segment_lengths": [16], "dilation_rates": [1]})
