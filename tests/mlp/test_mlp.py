import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DTYPES,
    OPS,
    SELECTIONS,
    SPARSITIES,
    assert_as_close,
    assert_near,
    low_rank_args,
    low_rank_relu2_float64,
    normal,
    op_args,
    pair_gradient,
    relative_error,
    swiglu_args,
    swiglu_float64,
    to_float64,
    untyped,
    value_and_vjp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlp_definitions import DOWN, UP, V, W, X, low_rank_swiglu_float64

from jaxkern import low_rank_matmul, low_rank_relu2, low_rank_swiglu, swiglu
from jaxkern._core import precision
from jaxkern.testing import plain as definitions

# (tokens, d_in, hidden, rank, d_out); hidden is a multiple of 4 only once.
SIZES = [
    (1, 3, 5, 1, 2),
    (17, 33, 64, 8, 33),
    (63, 65, 131, 16, 20),
    (130, 24, 90, 7, 24),
]
BF16 = jnp.bfloat16


def name_of(value):
    """Return the id of a size or a dtype."""
    return getattr(value, "__name__", None) or "x".join(map(str, value))


# No size is special without a selection; that of groups is tested at all of them.
sizes_and_dtypes = pytest.mark.parametrize(
    "size, dtype",
    [
        (SIZES[1], BF16),
        (SIZES[1], jnp.float32),
        (SIZES[1], jnp.float16),
    ],
    ids=name_of,
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
sparsities = pytest.mark.parametrize("sparsity", SPARSITIES)
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@sizes_and_dtypes
def test_swiglu(size, dtype):
    args, g = swiglu_args(size, dtype)
    got = value_and_vjp(swiglu, args, g)
    plain = value_and_vjp(definitions.swiglu, args, g)
    assert_as_close(got, plain, swiglu_float64(*to_float64((*args, g))))


@sizes_and_dtypes
def test_low_rank_matmul(size, dtype):
    x, weight, _, _, _ = low_rank_args(size, dtype)
    g = normal(5, (size[0], size[2]), dtype)
    got = value_and_vjp(low_rank_matmul, (x, weight), g)
    plain = value_and_vjp(lambda x, w: (x @ w[0]) @ w[1], (x, weight), g)
    x, weight, g = to_float64((x, weight, g))
    product = weight[0] @ weight[1]
    exact = x @ product, (g @ product.T, pair_gradient(weight, x.T @ g))
    assert_as_close(got, plain, exact)


@sizes_and_dtypes
def test_low_rank_swiglu(size, dtype):
    x, gate, up, down, g = low_rank_args(size, dtype)
    got = value_and_vjp(low_rank_swiglu, (x, gate, up, down), g)
    plain = value_and_vjp(definitions.low_rank_swiglu, (x, gate, up, down), g)
    assert_as_close(got, plain, low_rank_swiglu_float64((x, gate, up, down), g))


@pytest.mark.parametrize(
    "size, sparsity, dtype",
    [
        *((size, sparsity, BF16) for size in SIZES for sparsity in SPARSITIES),
        *((SIZES[1], None, dtype) for dtype in (jnp.float32, jnp.float16)),
        *((SIZES[1], "2:4-soft", dtype) for dtype in (jnp.float32, jnp.float16)),
    ],
    ids=lambda value: value if isinstance(value, str | None) else name_of(value),
)
def test_low_rank_relu2(size, sparsity, dtype):
    x, up, _, down, g = low_rank_args(size, dtype)

    def ours(x, up, down):
        return low_rank_relu2(x, up, down, sparsity=sparsity)

    plain = partial(definitions.relu2, select=SELECTIONS[sparsity])
    got = value_and_vjp(ours, (x, up, down), g)
    bound = value_and_vjp(plain, (x, up, down), g)
    wide = to_float64((x, up, down, g))
    assert_as_close(got, bound, low_rank_relu2_float64(*wide, sparsity=sparsity))


@sizes_and_dtypes
def test_straight_through_gradient(size, dtype):
    x, up, _, down, g = low_rank_args(size, dtype)

    def ours(x, up, down):
        return low_rank_relu2(x, up, down, sparsity="2:4", gradient="straight_through")

    def select(a):
        return a + jax.lax.stop_gradient(definitions.top2(a) - a)

    got = value_and_vjp(ours, (x, up, down), g)
    bound = value_and_vjp(partial(definitions.relu2, select=select), (x, up, down), g)
    wide = to_float64((x, up, down, g))
    straight = partial(low_rank_relu2_float64, straight_through=True)
    exact = straight(*wide, sparsity="2:4")
    assert_as_close(got, bound, exact)


def test_exact_gradient_of_soft():
    """The slope along one direction is compared with differences of float64 values."""
    with jax.enable_x64(True):
        x, up, _, down, g = low_rank_args((9, 24, 63, 4, 24), jnp.float64)
        args, g = (x, up, down), to_float64(g)
        along = jax.tree.map(lambda a: np.cos(np.arange(a.size)).reshape(a.shape), args)

        def value(h):
            x, up, down = jax.tree.map(lambda a, d: np.asarray(a) + h * d, args, along)
            y, _ = low_rank_relu2_float64(x, up, down, g, sparsity="2:4-soft")
            return (y * g).sum()

        _, got = value_and_vjp(
            partial(low_rank_relu2, sparsity="2:4-soft", gradient="exact"), args, g
        )
        pairs = zip(*map(jax.tree.leaves, (got, along)), strict=True)
        slope = sum(float((a * b).sum()) for a, b in pairs)
    np.testing.assert_allclose(slope, (value(1e-6) - value(-1e-6)) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("width", [5, 6, 131])
def test_2_4_of_a_ragged_width_is_that_of_the_padded_one(width):
    x, up, _, down, _ = low_rank_args((9, 24, width, 4, 24), jnp.float32)
    missing = -width % 4
    padded_up = up[0], jnp.pad(up[1], ((0, 0), (0, missing)))
    padded_down = jnp.pad(down[0], ((0, missing), (0, 0))), down[1]
    for sparsity in ("2:4", "2:4-soft", "2:4-static"):
        run = jax.jit(partial(low_rank_relu2, sparsity=sparsity))
        assert_near(run(x, up, down), run(x, padded_up, padded_down))


def flops(fn, *args):
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert cost is not None
    return cost["flops"]


def test_static_sparsity_never_computes_the_dropped_half():
    x, up, _, down, _ = low_rank_args((64, 64, 8191, 32, 64), jnp.float32)
    dense = flops(low_rank_relu2, x, up, down)
    static = flops(lambda *a: low_rank_relu2(*a, sparsity="2:4-static"), x, up, down)
    assert 0.49 < static / dense < 0.53


@dtypes
def test_accumulation_is_float32(dtype):
    # A bfloat16 sum of ones stops at 256, a float16 one at 2048.
    d_in = 4096
    x, weight = jnp.ones((2, d_in), dtype), jnp.ones((d_in, 1), dtype)
    y = low_rank_matmul(x, (weight, jnp.full((1, 2), 0.5, dtype)))
    np.testing.assert_array_equal(to_float64(y), d_in / 2)


def saved_bytes(fn, *args):
    """Count the bytes that are kept between forward and backward."""
    residuals = jax.tree.leaves(jax.vjp(fn, *args)[1])
    return sum(x.nbytes for x in {id(x): x for x in residuals}.values())


def test_nothing_wider_than_the_input_is_saved_for_the_backward():
    tokens, d_in, hidden, rank = 256, 32, 128, 8
    size = (tokens, d_in, hidden, rank, d_in)
    args, _ = swiglu_args(size, jnp.bfloat16)
    arguments = sum(a.nbytes for a in args)
    wide = 2 * tokens * hidden
    assert saved_bytes(swiglu, *args) <= arguments + 3 * wide
    x, gate, up, down, _ = low_rank_args(size, jnp.bfloat16)
    thin = 2 * tokens * rank
    arguments = sum(a.nbytes for a in jax.tree.leaves((x, gate, up, down)))
    saved = saved_bytes(low_rank_swiglu, x, gate, up, down)
    assert saved <= arguments + 3 * wide + 3 * thin
    arguments = sum(a.nbytes for a in jax.tree.leaves((x, up, down)))
    for sparsity in SPARSITIES:
        saved = saved_bytes(
            lambda *a, s=sparsity: low_rank_relu2(*a, sparsity=s), x, up, down
        )
        # The static form saves kept halves of two factors and half of the activations.
        halves = (up[1].nbytes + down[0].nbytes) // 2 if sparsity == "2:4-static" else 0
        activations = wide if halves else 2 * wide
        assert saved <= arguments + halves + activations + 2 * thin


@ops
def test_transforms(op):
    op, (x, weights) = jax.jit(op), op_args()
    y = op(x, weights)
    assert_near(op(x.reshape(2, 2, 4, -1), weights).reshape(y.shape), y)
    assert_near(op(x[0], weights), y[0])
    assert_near(jax.vmap(op, (0, None))(x, weights), y)
    assert op(x[:0], weights).shape == (0, y.shape[1])

    def gradient(fn):
        return jax.jit(jax.grad(lambda x: (fn(x, weights) ** 2).sum()))(x)

    def scanned(x, weights):
        return jax.lax.scan(lambda c, row: (c, op(row, weights)), 0.0, x)[1]

    assert_near(gradient(jax.checkpoint(op)), gradient(op))
    assert_near(gradient(scanned), gradient(op))
    tangent = jax.jvp(lambda x: op(x, weights), (x,), (jnp.ones_like(x),))[1]
    cotangent = normal(9, y.shape)
    pulled = jax.vjp(lambda x: op(x, weights), x)[1](cotangent)[0]
    np.testing.assert_allclose((tangent * cotangent).sum(), pulled.sum(), rtol=1e-4)


@settings(max_examples=12)
@given(
    st.sampled_from([(), (1,), (2, 3), (1, 3, 2)]),
    st.sampled_from([(6, 7), (12, 16)]),
    st.sampled_from(sorted(OPS)),
)
def test_any_batch_shape(batch, sizes, name):
    d_in, hidden = sizes
    _, weights = op_args(1, d_in, hidden, 3)
    x = normal(7, (*batch, d_in))
    rows = x.reshape(-1, d_in)
    op = jax.jit(OPS[name])
    assert_near(op(x, weights).reshape(rows.shape), op(rows, weights))


def test_a_rank_that_saves_nothing_warns():
    # 4 (8 + 12) < 8 x 12 <= 5 (8 + 12)
    message = r"rank of weight should be below .* = 4.8, .* no larger, got 5"
    with pytest.warns(UserWarning, match=message) as caught:
        low_rank_matmul(X, (jnp.ones((8, 5)), jnp.ones((5, 12))))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low_rank_matmul(X, (jnp.ones((8, 4)), jnp.ones((4, 12))))


@pytest.mark.usefixtures("unchecked_types")
def test_numpy_arrays_are_what_jax_makes_of_them():
    x, w = np.ones((2, 8)), np.ones((8, 12))
    np.testing.assert_array_equal(untyped.swiglu(x, w, W, V), swiglu(X, W, W, V))
    pairs = [[np.asarray(a, np.float64) for a in p] for p in (UP, DOWN)]
    got = untyped.low_rank_relu2(x, *pairs, sparsity="2:4-static")
    assert_near(got, low_rank_relu2(X, UP, DOWN, sparsity="2:4-static"))
    assert got.dtype == jnp.float32


@sparsities
def test_float64_is_computed_in_float64(sparsity):
    with jax.enable_x64(True):
        x, up, _, down, g = low_rank_args((9, 24, 63, 4, 24), jnp.float64)
        got = value_and_vjp(
            lambda *a: low_rank_relu2(*a, sparsity=sparsity), (x, up, down), g
        )
        wide = to_float64((x, up, down, g))
        exact = low_rank_relu2_float64(*wide, sparsity=sparsity)
        assert relative_error(got, exact) < 1e-12
        args, g = swiglu_args((9, 24, 63, 4, 24), jnp.float64)
        exact = swiglu_float64(*to_float64((*args, g)))
        assert relative_error(value_and_vjp(swiglu, args, g), exact) < 1e-12


@pytest.mark.gpu
@dtypes
def test_on_gpu(dtype):
    """The bounds hold on the device too, where matmuls are other programs."""
    size = (300, 520, 1030, 130, 510)
    with jax.default_matmul_precision("highest"):
        test_swiglu(size, dtype)
        test_low_rank_swiglu(size, dtype)
        for sparsity in SPARSITIES:
            test_low_rank_relu2(size, sparsity, dtype)
        test_accumulation_is_float32(dtype)


def test_gradients_of_weights_are_as_exact_with_more_batch_axes(monkeypatch):
    """XLA's CPU backend sums over two axes in 16 bits."""
    monkeypatch.setattr(precision, "lie_whole", lambda *arrays: True)
    x, *pairs, g = low_rank_args((70, 33, 144, 24, 33), jnp.bfloat16)

    def run(axes, x, *pairs):
        return low_rank_swiglu(x.reshape(*axes, 33), *pairs).reshape(70, 33)

    one, three = (
        jax.jit(value_and_vjp, static_argnums=0)(partial(run, axes), (x, *pairs), g)
        for axes in [(70,), (2, 5, 7)]
    )
    for a, b in zip(*map(jax.tree.leaves, (one, three)), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))
