from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import assert_close
from helpers import (
    DTYPES,
    assert_as_close,
    assert_near,
    mesh,
    normal,
    to_float64,
    value_and_vjp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import Dilation, attention, dilated_attention
from jaxkern.testing import plain as plain_forms

# seq, heads, kv_heads, segment_lengths, dilation_rates
CASES: dict[str, Any] = {
    "one full segment": (16, 2, 2, [16], [1]),
    "all divides": (16, 4, 4, [4, 8, 16], [1, 2, 4]),
    "ragged tail": (19, 4, 4, [4, 8, 32], [1, 2, 4]),
    "rate does not divide segment": (21, 3, 3, [5, 7, 11], [1, 2, 3]),
    "segment above seq": (9, 2, 2, [16, 64], [1, 2]),
    "fewer heads than rate": (20, 2, 2, [6, 20], [1, 5]),
    "offset beyond segment": (12, 5, 5, [3, 6], [4, 1]),
    "uncovered rows": (14, 3, 3, [7, 14], [2, 4]),
    "offset beyond seq": (3, 4, 4, [8], [4]),
    "two heads a key": (18, 6, 3, [6, 9], [1, 2]),
    "one key head": (18, 4, 1, [6, 18], [1, 3]),
    "same pattern twice": (10, 2, 2, [5, 5], [1, 1]),
    "single token": (1, 2, 1, [1, 4], [1, 2]),
}
EMPTY = 7.0
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def inputs(case: Any, dtype=jnp.float32, batch=2, dim=4, dim_v=5):
    seq, heads, kv_heads, lengths, rates = case
    shapes = (seq, heads, dim), (seq, kv_heads, dim), (seq, kv_heads, dim_v)
    # NumPy draws the numbers: JAX would compile a generator for each new shape.
    rng, wide = np.random.default_rng(0), np.promote_types(dtype, jnp.float32)

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    args = tuple(draw(batch, *shape) for shape in shapes)
    g = draw(batch, seq, heads, dim_v), draw(batch, seq, heads, dtype=wide)
    return args, g, {"dilation": Dilation(lengths, rates)}


def head_offset(rule, head, heads, pattern, rate):
    match rule:
        case "paper":
            return head % rate
        case "blocks":
            return head // -(-heads // rate)
        case _:
            return pattern % rate


def multiplicity(seq, heads, lengths, rates, rule="paper", runs=None):
    """Count the patterns of each head that select a query and a key in one segment."""
    count = np.zeros((heads, seq, seq))
    for i, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        for head in range(heads):
            if runs is not None and i not in runs[head]:
                continue
            offset = head_offset(rule, head, heads, i, r)
            for start in range(0, seq, w):
                rows = np.arange(start + offset, min(start + w, seq), r)
                count[head][np.ix_(rows, rows)] += 1
    return count


def allowed(count, is_causal, key_mask=None, batch=2):
    count = count * np.tri(count.shape[-1]) if is_causal else count
    count = np.broadcast_to(count, (batch, *count.shape))
    return count if key_mask is None else count * np.asarray(key_mask)[:, None, None]


def exact(args, g, count, scale=None):
    """Return values and gradients of a softmax with log(count) added to the logits."""
    q, k, v = to_float64(args)
    d_out, d_lse = to_float64(g)
    group, scale = q.shape[2] // k.shape[2], scale or q.shape[-1] ** -0.5
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    weights = count * np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) * scale)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=weights, where=total > 0)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    total = total[..., 0]
    lse = np.log(total, out=np.full(total.shape, EMPTY), where=total > 0)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    d_logits = d_weights - np.einsum("bqhd,bqhd->bhq", d_out, out)[..., None]
    d_logits = weights * (d_logits + d_lse.swapaxes(1, 2)[..., None]) * scale

    def per_key_head(x):
        return x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)

    d_q = np.einsum("bhqk,bkhd->bqhd", d_logits, k)
    d_k = per_key_head(np.einsum("bhqk,bqhd->bkhd", d_logits, q))
    d_v = per_key_head(np.einsum("bhqk,bqhd->bkhd", weights, d_out))
    return (out, lse.swapaxes(1, 2)), (d_q, d_k, d_v)


def with_multiplicities(count):
    """Return the plain form with log(count) added to the logits."""

    def run(query, key, value):
        bias = jnp.log(jnp.asarray(count, jnp.float32))
        out, lse = plain_forms.attention(query, key, value, bias)
        return out, lse.swapaxes(1, 2)

    return run


def with_lse(**options):
    """Return `dilated_attention` with EMPTY as the lse of rows without keys."""

    def run(query, key, value):
        out, lse = dilated_attention(query, key, value, return_lse=True, **options)
        return out, jnp.where(jnp.isneginf(lse), EMPTY, lse)

    return run


def assert_exact(case, is_causal=False, key_mask=None, batch=2, rule: Any = "paper"):
    args, g, _ = inputs(case, batch=batch)
    seq, heads, _, lengths, rates = case
    dilation = Dilation(lengths, rates, head_offsets=rule)
    run = with_lse(is_causal=is_causal, key_mask=key_mask, dilation=dilation)
    got = value_and_vjp(run, args, g)
    count = multiplicity(seq, heads, lengths, rates, rule)
    count = allowed(count, is_causal, key_mask, batch)
    assert_near(got, exact(args, g, count), 3e-5)
    return got


@cases
def test_is_one_softmax_with_multiplicities(case):
    assert_exact(case)


@pytest.mark.parametrize(
    "name",
    ["ragged tail", "offset beyond segment", "two heads a key", "single token"],
)
def test_causal_with_a_key_mask(name):
    case = CASES[name]
    # The second sequence is padding only.
    key_mask = np.random.default_rng(5).random((2, case[0])) < [[0.6], [0.0]]
    got = assert_exact(case, is_causal=True, key_mask=jnp.asarray(key_mask))
    (out, _), gradients = got
    assert not any(np.asarray(x[1]).any() for x in (out, *gradients))


@pytest.mark.parametrize("name", ["all divides", "ragged tail", "offset beyond seq"])
def test_causal(name):
    assert_exact(CASES[name], is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_segments_longer_than_a_tile_of_attention(is_causal):
    case = 701, 2, 1, [301, 701], [1, 2]
    key_mask = jnp.asarray(np.random.default_rng(5).random((1, 701)) < 0.8)
    assert_exact(case, is_causal=is_causal, key_mask=key_mask, batch=1)


@pytest.mark.parametrize("head_offsets", ["blocks", "pattern"])
@pytest.mark.parametrize("name", ["all divides", "one key head"])
def test_head_offsets(name, head_offsets):
    assert_exact(CASES[name], rule=head_offsets)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: d.__name__)
def test_low_precision_is_within_twice_the_plain_form(dtype):
    case = 19, 4, 2, [4, 8, 32], [1, 2, 4]
    args, g, patterns = inputs(case, dtype, dim=32, dim_v=32)
    count = allowed(multiplicity(case[0], case[1], *case[3:]), False)

    plain = with_multiplicities(count)
    got = value_and_vjp(with_lse(**patterns), args, g)
    assert_as_close(got, value_and_vjp(plain, args, g), exact(args, g, count))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_plain_form_is_one_softmax_with_multiplicities(is_causal):
    case = CASES["all divides"]
    args, g, _ = inputs(case, dim_v=4)

    plain = partial(
        plain_forms.dilated_attention,
        segment_lengths=case[3],
        dilation_rates=case[4],
        is_causal=is_causal,
    )
    count = allowed(multiplicity(*case[:2], *case[3:]), is_causal)
    (out, _), gradients = exact(args, (g[0], np.zeros(g[1].shape)), count)
    assert_near(value_and_vjp(plain, args, g[0]), (out, gradients), 3e-5)


@settings(max_examples=8)
@given(
    seq=st.integers(1, 33),
    heads=st.integers(1, 5),
    patterns=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=3
    ).filter(lambda ps: any(r <= w for w, r in ps)),
    is_causal=st.booleans(),
)
def test_any_patterns(seq, heads, patterns, is_causal):
    lengths, rates = zip(*patterns, strict=True)
    case = seq, heads, heads, lengths, rates
    assert_exact(case, is_causal=is_causal, batch=1)


def test_gradients_by_finite_differences_through_the_mixture():
    case = CASES["uncovered rows"]
    with jax.enable_x64(True):
        args, g, patterns = inputs(case, jnp.float64)
        along = [np.cos(7.0 * np.arange(x.size)).reshape(x.shape) for x in args]
        run = with_lse(**patterns)

        @jax.jit
        def loss(step):
            moved = [x + step * d for x, d in zip(args, along, strict=True)]
            out, lse = run(*moved)
            return (out * g[0]).sum() + (lse * g[1]).sum()

        _, gradients = value_and_vjp(run, args, g)
        slope = sum(np.vdot(a, b) for a, b in zip(gradients, along, strict=True))
        step = 1e-5
        difference = (loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-8)


def test_stop_gradient_mix_keeps_the_value_and_freezes_the_shares():
    case = CASES["two heads a key"]
    args, (g, _), patterns = inputs(case)
    dilation = replace(patterns["dilation"], stop_gradient_mix=True)
    stopped = partial(dilated_attention, dilation=dilation)
    ours = partial(dilated_attention, **patterns)
    got, gradients = value_and_vjp(stopped, args, g)
    masks = [
        jnp.asarray(multiplicity(case[0], case[1], [w], [r]) > 0)[None]
        for w, r in zip(*case[3:], strict=True)
    ]

    def frozen(*args):
        parts = [attention(*args, mask=mask, return_lse=True) for mask in masks]
        lse = jnp.stack([lse for _, lse in parts])
        shares = jax.lax.stop_gradient(jax.nn.softmax(lse, axis=0))
        return sum(s[..., None] * o for s, (o, _) in zip(shares, parts, strict=True))

    assert_near((got, gradients), value_and_vjp(frozen, args, g), 3e-5)
    _, true_gradients = value_and_vjp(ours, args, g)
    assert abs(np.asarray(gradients[0] - true_gradients[0])).max() > 1e-2


@pytest.mark.parametrize(
    "heads, kv_heads, sizes, head_offsets",
    [
        (6, 6, (2, 2, 2), "pattern"),
        (5, 5, (2, 2, 1), "paper"),
        (6, 3, (2, 2, 2), "paper"),
        (8, 2, (3, 3, 2), "blocks"),
    ],
)
def test_heads_split_among_patterns(heads, kv_heads, sizes, head_offsets):
    case = 13, heads, kv_heads, [4, 8, 16], [1, 2, 3]
    args, g, patterns = inputs(case)
    options = {"head_groups": True, "head_offsets": head_offsets}
    dilation = replace(patterns["dilation"], **options)
    got = value_and_vjp(with_lse(dilation=dilation), args, g)
    runs = np.repeat(np.arange(3), sizes)[:, None]
    count = multiplicity(13, heads, *case[3:], head_offsets, runs)
    assert_near(got, exact(args, g, allowed(count, False)), 3e-5)


def test_weights_sum_to_one():
    (q, k, v), _, patterns = inputs(CASES["rate does not divide segment"])
    run = jax.jit(partial(dilated_attention, **patterns))
    np.testing.assert_allclose(run(q, k, jnp.ones_like(v)), 1, rtol=1e-6)


def test_large_logits_do_not_overflow():
    case = CASES["uncovered rows"]
    args, g, patterns = inputs(case)
    args = (100 * args[0], 100 * args[1], args[2])
    got = value_and_vjp(with_lse(**patterns), args, g)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_transforms():
    args, (g, _), patterns = inputs(CASES["two heads a key"])
    run = partial(dilated_attention, **patterns)

    def one(*args):
        return run(*(x[None] for x in args))[0]

    def scanned(*args):
        return jax.lax.scan(lambda _, a: (None, one(*a)), None, args)[1]

    expected = value_and_vjp(run, args, g)
    for transformed in (jax.checkpoint(run), jax.vmap(one), scanned):
        assert_near(value_and_vjp(transformed, args, g), expected)


@pytest.mark.parametrize("name", ["rate does not divide segment", "two heads a key"])
def test_jacobian(name):
    case = CASES[name]
    args, _, patterns = inputs(case, batch=1, dim=2, dim_v=2)
    count = allowed(multiplicity(*case[:2], *case[3:]), True, batch=1)

    plain = with_multiplicities(count)
    run = with_lse(is_causal=True, **patterns)
    every = [jax.jit(jax.jacrev(f, argnums=(0, 1, 2)))(*args) for f in (run, plain)]
    assert_close(*every)


def compiled_gradients(case) -> Any:
    args, (g, _), patterns = inputs(case)
    run = partial(dilated_attention, **patterns)
    return jax.jit(lambda *a: jax.vjp(run, *a)[1](g)).lower(*args).compile().as_text()


@pytest.mark.parametrize("name", ["all divides", "two heads a key"])
def test_rows_are_not_gathered(name):
    text = compiled_gradients(CASES[name])
    assert " gather(" not in text and " scatter(" not in text


def flops(fn, *args):
    cost: Any = jax.jit(fn).lower(*args).compile().cost_analysis()
    return cost["flops"]


@pytest.mark.parametrize("w, r", [(64, 1), (256, 1), (256, 2), (512, 4)])
def test_cost(w, r):
    seq, heads, dim = 512, 4, 64
    x = normal(0, (1, seq, heads, dim))
    run = partial(dilated_attention, dilation=Dilation([w], [r]))
    matmuls = 4 * heads * seq * w * dim / r**2
    # The rest is for the softmax, and for selecting and spreading rows.
    assert 1 < flops(run, x, x, x) / matmuls < 1.25


def test_cost_of_a_mixture_beside_dense_attention():
    seq, heads, dim = 512, 4, 64
    x = normal(0, (1, seq, heads, dim))
    lengths, rates = [seq // 4, seq // 2, seq], [1, 2, 4]
    run = partial(dilated_attention, dilation=Dilation(lengths, rates))
    dense = 4 * heads * seq**2 * dim
    # The patterns take 1/4, 1/8 and 1/16 of the dense cost.
    assert flops(run, x, x, x) / dense == pytest.approx(7 / 16, rel=0.2)


def test_needs_no_collective_where_batch_and_heads_are_sharded():
    devices = mesh(data=2, heads=4)
    args, (g, _), patterns = inputs((16, 8, 8, [8, 16], [1, 3]))
    run = partial(dilated_attention, **patterns)
    place = NamedSharding(devices, P("data", None, "heads", None))
    placed = jax.device_put((args, g), place)
    gradients = jax.jit(lambda args, g: jax.vjp(run, *args)[1](g))
    text: Any = gradients.lower(*placed).compile().as_text()
    assert not any(f" {name}" in text for name in ("all-", "collective-"))
    assert_near(gradients(*placed), gradients(args, g))


def test_shard_map_over_batch_and_heads():
    devices = mesh(data=2, heads=2)
    args, (g, _), patterns = inputs((16, 4, 4, [4, 16], [1, 2]))
    run = partial(dilated_attention, **patterns)
    spec = P("data", None, "heads", None)
    sharded = jax.shard_map(run, mesh=devices, in_specs=(spec,) * 3, out_specs=spec)
    expected = value_and_vjp(run, args, g)
    assert_near(value_and_vjp(sharded, args, g), expected)
