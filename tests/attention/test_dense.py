from functools import partial

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
    random_mask,
    see,
)
from helpers import DTYPES, mesh, normal, value_and_vjp, with_vjp
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import attention, merge_attention
from jaxkern._attention.tiles import with_infinity
from jaxkern._attention.tiling import TILE, attention_by_tiles, make_tiling

# (batch, seq_q, seq_kv, heads, kv_heads, dim, dim_v), the mask's shape, is_causal
CASES = {
    "one": ((1, 1, 1, 1, 1, 1, 1), None, True),
    "17x65": ((2, 17, 65, 6, 3, 24, 8), None, False),
    "17x65-causal": ((2, 17, 65, 6, 3, 24, 8), None, True),
    "65x17-causal": ((1, 65, 17, 4, 1, 8, 40), None, True),
    "130-causal": ((1, 130, 130, 2, 2, 64, 64), None, True),
    "65-mask": ((2, 65, 65, 4, 2, 16, 16), (2, 4, 65, 65), False),
    "65-mask-causal": ((2, 65, 65, 4, 2, 16, 16), (2, 1, 65, 65), True),
    "17x130-key-mask": ((3, 17, 130, 2, 1, 8, 8), (3, 1, 1, 130), True),
}
LONG = ((1, 300, 257, 2, 1, 16, 16), (1, 2, 300, 257), True)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)


def public(*args, **options):
    return attention(*args, return_lse=True, **options)


def by_tiles(query, key, value, *, mask=None, is_causal=False, scale=None, limit=16):
    """Attention by tiles, so small that short sequences have many of them."""
    diagonal = 0 if is_causal else None
    tiling = make_tiling(query.shape[1], key.shape[1], diagonal, limit)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attention_by_tiles(query, key, value, mask, scale, tiling)
    return out.astype(value.dtype), with_infinity(lse)


FORMS = {"short": public, "tiles": by_tiles}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def check(form, case, dtype, scale=0.3, spread=None):
    size, mask_shape, is_causal = case
    batch, seq_q, seq_kv, heads = size[:4]
    mask = None if mask_shape is None else random_mask(mask_shape)
    visible = see(mask, is_causal, (batch, heads, seq_q, seq_kv))
    args, cotangents = attention_args(size, dtype, spread)
    run = partial(form, mask=mask, is_causal=is_causal, scale=scale)
    got = value_and_vjp(run, args, cotangents)
    exact = attention_float64(args, cotangents, visible, scale)
    plain = partial(plain_attention, visible=visible, scale=scale)
    assert_attention(
        got,
        exact,
        None if dtype == jnp.float32 else value_and_vjp(plain, args, cotangents),
    )


@cases
@forms
def test_values_and_gradients(form, case):
    check(form, case, jnp.float32)


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("17x65-causal", jnp.bfloat16),
        ("130-causal", jnp.bfloat16),
        ("65-mask-causal", jnp.float16),
    ],
)
@forms
def test_error_in_16_bits_is_that_of_the_plain_form(form, name, dtype):
    check(form, CASES[name], dtype)


@dtypes
def test_long_sequences_go_by_tiles(dtype):
    check(public, LONG, dtype)
    args, _ = attention_args(LONG[0], dtype)
    mask = random_mask(LONG[1])
    np.testing.assert_array_equal(
        attention(*args, mask=mask, is_causal=True),
        by_tiles(*args, mask=mask, is_causal=True, limit=TILE)[0],
    )


@forms
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_logits_up_to_1e4(form, dtype):
    check(form, CASES["130-causal"], dtype, scale=1.0, spread=30)
    check(form, CASES["65-mask"], dtype, scale=-1.0, spread=50)


@forms
def test_queries_that_see_nothing(form):
    args, cotangents = attention_args((1, 33, 40, 2, 1, 8, 8))
    for mask in (jnp.zeros((1, 1, 1, 1), bool), jnp.zeros((1, 2, 33, 40), bool)):
        with jax.debug_nans(True):
            (out, lse), gradients = value_and_vjp(
                partial(form, mask=mask), args, cotangents
            )
        assert np.isneginf(lse).all()
        assert not any(np.asarray(x).any() for x in (out, *gradients))


@given(
    batch=st.integers(1, 2),
    seq_q=st.integers(1, 40),
    seq_kv=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dims=st.sampled_from([(1, 5), (8, 8)]),
    limit=st.integers(1, 16),
    is_causal=st.booleans(),
    masked=st.sampled_from([None, (1, 1, 0, 0), (1, 1, 0, 1), (1, 0, 1, 0)]),
)
@settings(max_examples=10)
def test_any_tiles_give_the_same(
    batch, seq_q, seq_kv, heads, dims, limit, is_causal, masked
):
    args, cotangents = attention_args((batch, seq_q, seq_kv, *heads, *dims))
    mask = None
    if masked is not None:
        full = batch, heads[0], seq_q, seq_kv
        mask = random_mask(
            tuple(n if own else 1 for n, own in zip(full, masked, strict=True))
        )
    options = {"mask": mask, "is_causal": is_causal}
    got = value_and_vjp(partial(by_tiles, **options, limit=limit), args, cotangents)
    visible = see(mask, is_causal, (batch, heads[0], seq_q, seq_kv))
    exact = attention_float64(args, cotangents, visible, dims[0] ** -0.5)
    assert_attention(got, exact)


@given(
    seq_q=st.integers(1, 50),
    seq_kv=st.integers(1, 50),
    limit=st.integers(1, 20),
    diagonal=st.sampled_from([None, -1, 0, 3]),
)
def test_only_tiles_with_something_to_see_are_visited(seq_q, seq_kv, limit, diagonal):
    tiling = make_tiling(seq_q, seq_kv, diagonal, limit)
    visible = np.ones((seq_q, seq_kv), bool)
    if diagonal is not None:
        visible = np.tri(seq_q, seq_kv, diagonal, dtype=bool)
    expected = [
        [
            j
            for j in range(-(-seq_kv // tiling.columns))
            if visible[
                i * tiling.rows : (i + 1) * tiling.rows,
                j * tiling.columns : (j + 1) * tiling.columns,
            ].any()
        ]
        for i in range(-(-seq_q // tiling.rows))
    ]
    assert [[*range(last + 1)] for last in tiling.last_columns()] == expected


@pytest.mark.parametrize("diagonal", [None, -1, 0, 1])
def test_every_tile_is_visited_once(diagonal):
    tiling = make_tiling(4, 6, diagonal, 1)
    visited = tiling.visit(lambda count, i, j: count.at[i, j].add(1), jnp.zeros((4, 6)))
    expected = np.ones((4, 6)) if diagonal is None else np.tri(4, 6, diagonal)
    np.testing.assert_array_equal(visited, expected)


def test_programs_are_as_long_for_any_sequence():
    def text(seq):
        def both_passes(query, key, value):
            out, vjp = jax.vjp(partial(attention, is_causal=True), query, key, value)
            return vjp(out)

        args = [jax.ShapeDtypeStruct((1, seq, 1, 8), jnp.float32)] * 3
        return jax.jit(both_passes).lower(*args).as_text()

    # A list of all tiles would make the program longer by at least 2**20 bytes. The
    # list of the rows of tiles has 4 bytes, as 8 digits, for each row.
    assert len(text(2**17)) - len(text(2**12)) < 2**14


def temporary_bytes(fn, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    memory = jax.jit(fn).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_memory_is_linear_in_the_sequence():
    def both_passes(query, key, value):
        out, vjp = jax.vjp(partial(attention, is_causal=True), query, key, value)
        return vjp(out)

    short, long = (
        temporary_bytes(both_passes, *[(1, seq, 2, 32)] * 3) for seq in (4096, 8192)
    )
    assert long < 2.1 * short
    assert long < 4 * 2 * 8192**2 / 16


def test_grouped_keys_are_not_repeated():
    used = temporary_bytes(attention, (1, 256, 16, 64), *[(1, 16384, 1, 64)] * 2)
    repeated = 4 * 16384 * 16 * 64
    assert used < repeated / 2


TRANSFORMS = {"short": public, "tiles": partial(by_tiles, limit=8)}


@pytest.mark.parametrize("form", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(form):
    size = (2, 17, 19, 4, 2, 8, 8)
    args, cotangents = attention_args(size)
    mask = random_mask((2, 1, 17, 19))
    run = partial(form, mask=mask, is_causal=True)
    expected = value_and_vjp(run, args, cotangents)
    assert_close(run(*args)[0], expected[0][0])
    remat = value_and_vjp(jax.checkpoint(run), args, cotangents)
    assert_attention(remat, expected)

    one = jax.tree.map(lambda x: x[:1], args)
    other = jax.tree.map(lambda x: x[1:], args)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    for masks, axis in [(mask[:, None], 0), (mask[:1], None)]:

        def loss(query, key, value, mask):
            out, lse = form(query, key, value, mask=mask, is_causal=True)
            return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        mapped = jax.jit(jax.vmap(gradient, in_axes=(0, 0, 0, axis)))(*stacked, masks)
        for i, part in enumerate((one, other)):
            its = masks if axis is None else masks[i]
            assert_close(
                jax.tree.map(lambda x, i=i: x[i], mapped), gradient(*part, its)
            )

    def layers(query, key, value):
        def layer(x, _):
            return x + form(x, key, value)[0], None

        return jax.lax.scan(layer, query, None, length=3)[0].sum()

    def unrolled(query, key, value):
        for _ in range(3):
            query = query + form(query, key, value)[0]
        return query.sum()

    assert_close(
        jax.jit(jax.grad(layers, argnums=(0, 1, 2)))(*args),
        jax.jit(jax.grad(unrolled, argnums=(0, 1, 2)))(*args),
    )


@pytest.mark.parametrize("form", TRANSFORMS.values(), ids=TRANSFORMS)
def test_jacobian_and_second_derivatives(form):
    args, _ = attention_args((1, 9, 10, 2, 1, 3, 2))
    visible = see(None, True, (1, 2, 9, 10))
    plain = partial(plain_attention, visible=visible, scale=0.5)
    run = partial(form, is_causal=True, scale=0.5)
    got, expected = (
        jax.jit(jax.jacrev(f, argnums=(0, 1, 2)))(*args) for f in (run, plain)
    )
    assert_close(got, expected)

    def sharpness(fn, query):
        def loss(query):
            out, lse = fn(query, *args[1:])
            return (out**2).sum() + (lse**2).sum()

        return (jax.grad(loss)(query) ** 2).sum()

    got, expected = (
        jax.jit(jax.grad(partial(sharpness, f)))(args[0]) for f in (run, plain)
    )
    assert_close(got, expected, 1e-4)


def test_forward_mode_of_short_sequences():
    args, _ = attention_args((1, 9, 10, 2, 1, 3, 2))
    mask = random_mask((1, 2, 9, 10))
    run = partial(attention, mask=mask)
    forward, reverse = (jax.jit(f(run))(*args) for f in (jax.jacfwd, jax.jacrev))
    assert_close(forward, reverse)


@forms
def test_float64(form):
    with jax.enable_x64(True):
        args, cotangents = attention_args(CASES["65x17-causal"][0], jnp.float64)
        run = partial(form, is_causal=True, scale=0.3)
        got = value_and_vjp(run, args, cotangents)
        exact = attention_float64(
            args, cotangents, see(None, True, (1, 4, 65, 17)), 0.3
        )
        assert got[0][1].dtype == jnp.float64
        assert_close(got, exact, 1e-12)


@forms
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_batch_and_heads_need_no_collective(form, kind):
    devices = mesh(kind, data=2, model=4)
    args, cotangents = attention_args((2, 33, 20, 8, 4, 8, 8))
    run = partial(form, is_causal=True)
    expected = value_and_vjp(run, args, cotangents)
    place = NamedSharding(devices, P("data", None, "model"))
    args, cotangents = jax.device_put((args, cotangents), place)
    both_passes = with_vjp(run)
    got = both_passes(args, cotangents)
    assert_attention(got, expected)
    assert got[0][0].sharding.spec[::2] == ("data", "model")
    program = both_passes.lower(args, cotangents).compile().as_text()
    assert program is not None
    assert not any(f"all-{x}" in program for x in ("gather", "reduce", "to-all"))


@forms
def test_shard_map_sums_the_gradients_of_shared_keys(form):
    devices = mesh("explicit", data=8)
    args, cotangents = attention_args((1, 64, 20, 4, 2, 8, 8))
    split, shared = P(None, "data"), P()
    sharded = jax.shard_map(
        form, mesh=devices, in_specs=(split, shared, shared), out_specs=(split, split)
    )
    args, cotangents = (
        jax.device_put(x, NamedSharding(devices, spec))
        for x, spec in [(args, shared), (cotangents, split)]
    )
    query = jax.device_put(args[0], NamedSharding(devices, split))
    got = value_and_vjp(sharded, (query, *args[1:]), cotangents)
    visible = see(None, False, (1, 4, 64, 20))
    assert_attention(got, attention_float64(args, cotangents, visible, 8**-0.5))


def merged(query, key, value, *, split, mask=None):
    parts = []
    for keys in (slice(None, split), slice(split, None)):
        its = None if mask is None else mask[..., keys]
        part = attention(query, key[:, keys], value[:, keys], mask=its, return_lse=True)
        parts.extend(part)
    return merge_attention(*parts)


@pytest.mark.parametrize("split", [1, 20])
def test_merge_of_two_halves_is_the_whole(split):
    size = (2, 9, 40, 4, 2, 8, 8)
    args, cotangents = attention_args(size)
    mask = np.array(random_mask((2, 4, 9, 40)))
    mask[:, 0, 2, :split] = mask[:, 1, 3, split:] = False
    mask = jnp.asarray(mask)
    got = value_and_vjp(partial(merged, split=split, mask=mask), args, cotangents)
    visible = see(mask, False, (2, 4, 9, 40))
    assert_attention(got, attention_float64(args, cotangents, visible, 8**-0.5))


@given(
    lse_a=st.sampled_from([-np.inf, -1e4, 0.0, 3.0, 1e4]),
    lse_b=st.sampled_from([-np.inf, -1e4, -1.0, 1e4]),
)
def test_merge_equals_its_equations(lse_a, lse_b):
    shape = (1, 1, 1)
    rng = np.random.default_rng(0)
    out_a, out_b, d_out = rng.standard_normal((3, *shape, 4)).astype(np.float32)
    args = out_a, np.full(shape, lse_a, "f"), out_b, np.full(shape, lse_b, "f")
    args = jax.tree.map(jnp.asarray, args)
    top = max(lse_a, lse_b)
    a, b = (np.exp(x - top) if top > -np.inf else 0.0 for x in (lse_a, lse_b))
    with np.errstate(divide="ignore"):
        lse = np.log(a + b) + top
    a, b = (x / (a + b) if a + b else 0.0 for x in (a, b))
    out = a * out_a + b * out_b
    d_lse_a = a * (d_out * (out_a - out)).sum(-1) + a
    d_lse_b = b * (d_out * (out_b - out)).sum(-1) + b
    with jax.debug_nans(True):
        got = value_and_vjp(
            merge_attention, args, (jnp.asarray(d_out), jnp.ones(shape))
        )
    expected = (out, np.full(shape, lse)), (a * d_out, d_lse_a, b * d_out, d_lse_b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        *(got, expected),
    )


def test_merge_rounds_once():
    parts = [normal(i, (1, 3, 2, 8), jnp.bfloat16) for i in (0, 1)]
    lses = [normal(i, (1, 3, 2)) for i in (2, 3)]
    out, lse = merge_attention(parts[0], lses[0], parts[1], lses[1])
    wide = [x.astype(jnp.float32) for x in parts]
    exact, _ = merge_attention(wide[0], lses[0], wide[1], lses[1])
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
    assert lse.dtype == jnp.float32
