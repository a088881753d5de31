import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    normal,
    relative_error,
    soft_float64,
    to_float64,
    top2_float64,
    untyped,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxkern
from jaxkern import matmul_2_4, pack_2_4, sparsify_2_4, unpack_2_4

# Few distinct values, so that ties and zeros are common.
tied_rows = hnp.arrays(
    np.float32,
    # A few shapes, because each new one compiles.
    st.sampled_from([(1,), (3,), (8,), (1, 2), (5, 4), (3, 13), (2, 1, 6), (2, 3, 7)]),
    elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]),
)


def groups_of(x):
    """Return x in the shape (rows, groups, 4), padded with zeros."""
    x = np.asarray(x).reshape(-1, x.shape[-1])
    return np.pad(x, ((0, 0), (0, -x.shape[-1] % 4))).reshape(len(x), -1, 4)


@given(tied_rows)
def test_top2_keeps_the_two_largest_and_the_first_of_equals(x):
    got = np.asarray(sparsify_2_4(jnp.asarray(x)))
    rows = x.reshape(-1, x.shape[-1])
    np.testing.assert_array_equal(got.reshape(rows.shape), rows * top2_float64(rows))
    assert ((groups_of(got) != 0).sum(-1) <= 2).all()


def test_top2_on_every_order_and_tie_of_a_group():
    groups = jnp.array(list(itertools.product([0.0, 1.0, 2.0, 3.0], repeat=4)))
    np.testing.assert_array_equal(sparsify_2_4(groups), groups * top2_float64(groups))
    np.testing.assert_array_equal(sparsify_2_4(jnp.ones(4)), [1, 1, 0, 0])


@given(tied_rows)
def test_soft_shrinks_by_the_second_smallest(x):
    got = sparsify_2_4(jnp.asarray(x), method="soft").reshape(-1, x.shape[-1])
    exact = soft_float64(to_float64(x).reshape(-1, x.shape[-1]))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)
    assert ((groups_of(got) != 0).sum(-1) <= 2).all()


def test_soft_is_continuous_where_top2_jumps():
    a, b = (
        jnp.array([3.0, 1.0, 1.0 + 1e-4, 0.2]),
        jnp.array([3.0, 1.0 + 1e-4, 1.0, 0.2]),
    )
    assert abs(sparsify_2_4(a) - sparsify_2_4(b)).max() > 0.9
    soft = [sparsify_2_4(x, method="soft", scale=1.0) for x in (a, b)]
    assert abs(soft[0] - soft[1]).max() < 1e-3


def test_soft_scale_is_the_least_squares_one_of_each_row():
    x = normal(0, (3, 16))
    shrunk = sparsify_2_4(x, method="soft", scale=1.0)
    got = sparsify_2_4(x, method="soft")
    for row, s, y in zip(x, shrunk, got, strict=True):
        best = np.linalg.lstsq(np.asarray(s)[:, None], np.asarray(row), rcond=None)[0][
            0
        ]
        np.testing.assert_allclose(y, best * s, rtol=1e-5)
    np.testing.assert_allclose(got[1], sparsify_2_4(x[1], method="soft"), rtol=1e-6)
    np.testing.assert_array_equal(sparsify_2_4(jnp.zeros((2, 8)), method="soft"), 0)


@given(tied_rows)
def test_static_keeps_positions_0_and_1(x):
    mask = np.arange(x.shape[-1]) % 4 < 2
    np.testing.assert_array_equal(
        sparsify_2_4(jnp.asarray(x), method="static"), np.where(mask, x, 0)
    )


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
def test_mvue_is_unbiased(width):
    draws = 100_000
    x = jnp.array([1.5, -0.3, 0.02, 0.8, -2.0, 0.1, 0.5])[:width]
    keys = jax.random.split(jax.random.key(0), draws)
    got = jax.vmap(lambda key: sparsify_2_4(x, method="mvue", key=key))(keys)
    got = np.asarray(got, np.float64)
    assert ((groups_of(got) != 0).sum(-1) <= 2).all()
    # Five standard errors.
    allowed = 5 * got.std(0) / np.sqrt(draws) + 1e-6
    np.testing.assert_array_less(abs(got.mean(0) - np.asarray(x)), allowed)


@pytest.mark.usefixtures("optimized")
def test_mvue_draws_light_entries_as_often_as_it_says():
    """An entry of 1e-6 beside two of 1 is drawn with probability 1.6e-6."""
    x = jnp.broadcast_to(jnp.array([1.0, 1.0, 1e-6, 1e-6]), (2**22, 4))
    draws = [sparsify_2_4(x, method="mvue", key=jax.random.key(i)) for i in range(4)]
    drawn = sum(int((d[:, 2:] != 0).sum()) for d in draws)
    light = 1e-6 + 2**-23
    expected = 4 * 2**22 * 2 * (light / 2 + 2 * 0.5 * light)
    assert abs(drawn - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize(
    "draw",
    [
        partial(sparsify_2_4, method="mvue"),
        jaxkern.gumbel_softmax,
        jaxkern.reinmax_categorical,
    ],
    ids=["mvue", "gumbel_softmax", "reinmax_categorical"],
)
def test_noise_reaches_far_tails(draw, monkeypatch):
    """A chance of 1e-9 needs noise of 21, but noise of one uniform number ends at 16.

    Random draws that show it would take minutes, so the test sets the noise.
    """
    far = jnp.array([0.0, 0.0, 22.0, -5.0])

    def gumbel(key, shape, dtype, mode):
        assert mode == "high"
        return jnp.broadcast_to(far, shape).astype(dtype)

    monkeypatch.setattr(jax.random, "gumbel", gumbel)
    # mvue takes weights, and the others take logits. No other test has this shape, so
    # no program with real noise is kept for it.
    weights = jnp.full((3, 1, 5, 4), jnp.array([1.0, 1.0, 1e-9, 1e-9]))
    is_mvue = isinstance(draw, partial)
    got = draw(weights if is_mvue else jnp.log(weights), key=jax.random.key(0))
    assert (got[..., 2] != 0).all() and (got[..., 3] == 0).all()
    jax.clear_caches()


@pytest.mark.parametrize(
    "magnitude, dtype",
    [*((m, jnp.float32) for m in (1e-30, 1e-15, 1e15, 1e30)), (1e30, jnp.bfloat16)],
)
def test_soft_does_not_depend_on_the_unit(magnitude, dtype):
    x = jnp.array([3.0, 1.0, 0.5, 2.0], dtype)
    got = sparsify_2_4(x * jnp.asarray(magnitude, dtype), method="soft")
    expected = sparsify_2_4(x, method="soft") * jnp.asarray(magnitude, dtype)
    assert relative_error(got, expected) < 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    "x", [[0.0, 0, 0, 0], [7.0, 0, 0, 0], [1e-6, 1, 1e6, 1], [1.0, 2], [3.0]], ids=str
)
def test_mvue_on_extreme_groups_is_finite_and_exact_where_two_are_enough(x):
    x = jnp.array(x)
    keys = jax.random.split(jax.random.key(1), 1000)
    got = jax.vmap(lambda key: sparsify_2_4(x, method="mvue", key=key))(keys)
    assert np.isfinite(got).all()
    if (x != 0).sum() <= 2:
        np.testing.assert_allclose(got, np.broadcast_to(x, got.shape), rtol=1e-5)


def test_gradients():
    x, g = normal(0, (3, 11)), normal(1, (3, 11))

    def gradient(**options):
        return jax.vjp(lambda x: sparsify_2_4(x, **options), x)[1](g)[0]

    np.testing.assert_array_equal(gradient(method="top2"), g * top2_float64(x))
    np.testing.assert_array_equal(
        gradient(method="static"), np.where(np.arange(11) % 4 < 2, g, 0)
    )
    np.testing.assert_array_equal(gradient(method="soft"), g)
    np.testing.assert_array_equal(gradient(method="mvue", key=jax.random.key(0)), g)
    tangent = jax.jvp(lambda x: sparsify_2_4(x, method="soft"), (x,), (g,))[1]
    np.testing.assert_array_equal(tangent, g)


def test_gradients_by_name():
    x, g = normal(0, (3, 11)), normal(1, (3, 11))

    def gradient(**options):
        return jax.vjp(lambda x: sparsify_2_4(x, **options), x)[1](g)[0]

    for method, mask in [("top2", top2_float64(x)), ("static", np.arange(11) % 4 < 2)]:
        exact = gradient(method=method, gradient="exact")
        np.testing.assert_array_equal(exact, jnp.where(mask, g, 0))
        straight = gradient(method=method, gradient="straight_through")
        np.testing.assert_array_equal(straight, g)
    key = jax.random.key(0)
    for options in ({"method": "soft"}, {"method": "mvue", "key": key}):
        np.testing.assert_array_equal(
            gradient(**options, gradient="straight_through"), g
        )


@pytest.mark.parametrize("scale", [None, 0.7])
def test_exact_gradient_of_soft(scale):
    """The differences are of float64 values, where threshold and scale move too."""
    x, g = (to_float64(normal(i, (3, 11))) for i in range(2))

    def soft(x, scale):
        definition = soft_float64(x)
        if scale is None:
            return definition
        unscaled = np.sign(x) * np.maximum(abs(x) - threshold_float64(x), 0)
        return scale * unscaled

    def slope(along):
        return (along(1e-6) - along(-1e-6)) / 2e-6

    steps = np.eye(x.size).reshape(-1, *x.shape)
    expected = [slope(lambda h, e=e: (g * soft(x + h * e, scale)).sum()) for e in steps]
    with jax.enable_x64(True):
        got = jax.grad(
            lambda x, scale: (
                g * sparsify_2_4(x, method="soft", scale=scale, gradient="exact")
            ).sum(),
            argnums=(0, 1) if scale else 0,
        )(jnp.asarray(x), scale)
    d_x = got[0] if scale else got
    np.testing.assert_allclose(d_x.ravel(), expected, rtol=1e-6, atol=1e-8)
    if scale:
        np.testing.assert_allclose(got[1], (g * soft(x, 1.0)).sum(), rtol=1e-12)


def threshold_float64(x):
    """Return the second smallest magnitude of each entry's group."""
    smallest = np.sort(abs(groups_of(x)), axis=-1)[..., 1]
    return np.repeat(smallest, 4, axis=-1)[:, : x.shape[-1]]


@pytest.mark.parametrize(
    "method, dtype",
    [
        *((method, jnp.bfloat16) for method in ("top2", "soft", "mvue", "static")),
        *(("soft", dtype) for dtype in (jnp.float32, jnp.float16)),
    ],
)
def test_dtype_and_transforms(method, dtype):
    key = jax.random.key(0) if method == "mvue" else None
    x = normal(0, (2, 3, 9), dtype)

    def apply(x):
        return sparsify_2_4(x, method=method, key=key)

    got = jax.jit(apply)(x)
    assert got.dtype == dtype
    # A compiled program may fuse what single ops round: one rounding is allowed.
    rounding = float(jnp.finfo(dtype).eps)
    assert relative_error(got, apply(x)) <= rounding
    if method != "mvue":
        assert relative_error(jax.vmap(apply)(x), apply(x)) <= rounding


@pytest.mark.parametrize("method", ["top2", "soft"])
def test_nan_is_not_hidden(method):
    nan, inf = jnp.nan, jnp.inf
    x = jnp.array([[nan, 1, 2, 3], [1, 2, 3, -nan], [inf, -inf, nan, 1], [1, 2, 3, 4]])
    has_nan = np.isnan(sparsify_2_4(x, method=method)).any(-1)
    np.testing.assert_array_equal(has_nan, [True, True, True, False])


@given(tied_rows)
def test_unpack_of_pack_is_top2(x):
    packed = pack_2_4(jnp.asarray(x))
    np.testing.assert_array_equal(unpack_2_4(packed), sparsify_2_4(jnp.asarray(x)))
    again = pack_2_4(unpack_2_4(packed))
    np.testing.assert_array_equal(unpack_2_4(again), unpack_2_4(packed))


def test_packed_layout():
    packed = pack_2_4(jnp.array([0.0, 5, 0, 7, 1, 0, 2, 0, 0, 0, 3, 4]))
    np.testing.assert_array_equal(packed.values, [5, 7, 1, 2, 3, 4])
    # Positions 1, 3, 0, 2 are in the first byte and 2, 3 in the next, low bits first.
    expected = [1 + (3 << 2) + (0 << 4) + (2 << 6), 2 + (3 << 2)]
    np.testing.assert_array_equal(packed.indices, expected)
    x = normal(0, (64, 1024), jnp.bfloat16)
    packed = pack_2_4(x)
    assert packed.values.nbytes + packed.indices.nbytes == x.nbytes * 9 // 16


@pytest.mark.parametrize(
    "width, dtype",
    [
        *((width, jnp.bfloat16) for width in (8, 11, 13)),
        *((11, dtype) for dtype in (jnp.float32, jnp.float16)),
    ],
)
def test_matmul_2_4(dtype, width):
    x, w, g = normal(0, (2, 3, width), dtype), normal(1, (width, 5), dtype), None
    packed = pack_2_4(x)
    expected = jnp.matmul(sparsify_2_4(x), w)
    np.testing.assert_array_equal(*to_float64((matmul_2_4(packed, w), expected)))
    no_rows = pack_2_4(x[:0])
    assert matmul_2_4(no_rows, w).shape == (0, 3, 5)
    g = normal(2, (2, 3, 5), dtype)
    got = jax.vjp(lambda x, w: matmul_2_4(pack_2_4(x), w), x, w)[1](g)

    def plain(x, w):
        # With one batch axis: XLA's CPU backend contracts two of them in 16 bits.
        rows = sparsify_2_4(x).reshape(-1, width)
        return jnp.matmul(rows, w).reshape(2, 3, 5)

    exact = jax.vjp(plain, x, w)[1](g)
    chex.assert_trees_all_equal(got, exact)


def test_packed_is_a_pytree():
    x = normal(0, (4, 3, 10))
    batched = jax.vmap(pack_2_4)(x)
    assert batched.features == 10
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(unpack_2_4))(batched), sparsify_2_4(x)
    )


X = jnp.ones((2, 8))


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: untyped.sparsify_2_4(X, method="mvue"),
            TypeError,
            "sparsify_2_4: key must be a key, as .*, for method='mvue', got None",
        ),
        (
            lambda: untyped.sparsify_2_4(X, method="mvue", key=3),
            TypeError,
            "key must be a key, .*, got 3",
        ),
        (
            lambda: untyped.sparsify_2_4(
                X, method="mvue", key=jax.random.split(jax.random.key(0))
            ),
            TypeError,
            r"key must be a key, .*, got key<fry>\(2,\)",
        ),
        (
            lambda: untyped.sparsify_2_4(X, method="soft", scale=jnp.ones((2, 1))),
            TypeError,
            "sparsify_2_4: scale must be one number, got float32",
        ),
        (
            lambda: untyped.unpack_2_4(X),
            TypeError,
            "unpack_2_4: packed must be a Packed24, got float32",
        ),
        (
            lambda: untyped.matmul_2_4(X, X.T),
            TypeError,
            "matmul_2_4: packed must be a Packed24, got float32",
        ),
        (
            lambda: untyped.unpack_2_4(jaxkern.Packed24(X, X, 16)),
            TypeError,
            "unpack_2_4: indices must be an integer array, got float32",
        ),
        (
            lambda: untyped.sparsify_2_4(X, key=jax.random.key(0)),
            ValueError,
            "key must be given for method='mvue' only, got one for 'top2'",
        ),
        (
            lambda: untyped.sparsify_2_4(X, scale=1.0),
            ValueError,
            "scale must be given for method='soft' only, got one for 'top2'",
        ),
        (
            lambda: untyped.sparsify_2_4(X, gradient="feature_wise"),
            ValueError,
            "sparsify_2_4: gradient must be one of None, 'exact', 'straight_through', "
            "got 'feature_wise'",
        ),
        (
            lambda: untyped.sparsify_2_4(
                X, method="mvue", key=jax.random.key(0), gradient="exact"
            ),
            ValueError,
            "gradient must be None or 'straight_through' for method='mvue', got 'exa",
        ),
        (
            lambda: untyped.sparsify_2_4(X, method="top3"),
            ValueError,
            "method must be one of 'top2', 'soft', 'mvue', 'static', got 'top3'",
        ),
        (
            lambda: untyped.sparsify_2_4(X.astype(int)),
            TypeError,
            "sparsify_2_4: x must have a floating-point dtype out of .*, got int32",
        ),
        (
            lambda: untyped.sparsify_2_4(jnp.ones(())),
            ValueError,
            r"x must have shape \(..., features\) with features at least 1, got \(\)",
        ),
        (
            lambda: untyped.sparsify_2_4([1.0, 2.0]),
            TypeError,
            "x must be an array, got list",
        ),
        (
            lambda: untyped.pack_2_4(X.astype(int)),
            TypeError,
            "pack_2_4: x must have a floating",
        ),
        (
            lambda: untyped.unpack_2_4(
                jaxkern.Packed24(X, jnp.zeros((2, 2), jnp.uint8), 8)
            ),
            ValueError,
            r"unpack_2_4: values must have shape \(2, 4\), got \(2, 8\)",
        ),
        (
            lambda: untyped.unpack_2_4(
                jaxkern.Packed24(X, jnp.zeros((2, 1), jnp.uint8), 16)
            ),
            ValueError,
            r"unpack_2_4: indices must have shape \(2, 2\), got \(2, 1\)",
        ),
        (
            lambda: untyped.matmul_2_4(pack_2_4(X), jnp.ones((7, 3))),
            ValueError,
            r"matmul_2_4: w must have shape \(8, d_out\), got \(7, 3\)",
        ),
        (
            lambda: untyped.matmul_2_4(pack_2_4(X), jnp.ones((8, 3), jnp.bfloat16)),
            TypeError,
            "w must have the dtype of values, float32, got bfloat16",
        ),
        (
            lambda: untyped.matmul_2_4(pack_2_4(X), X.T, implementation="mosaic_gpu"),
            NotImplementedError,
            "matmul_2_4: dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
