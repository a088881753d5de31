from decimal import Decimal, localcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_definitions as definitions
from helpers import (
    assert_near,
    normal,
    to_float64,
    untyped,
    value_and_vjp,
)

from jaxkern import RotaryScaling, rotary_embedding
from jaxkern._attention import rotary_scaling

PAIRS = ("interleaved", "halves", "mismatched")
SHAPE = (2, 7, 3, 10)


def rotary_float64(x, positions, theta, pairs):
    """Rotate pair by pair, in NumPy."""
    x = np.asarray(x).astype(np.float64)
    half = x.shape[-1] // 2
    positions = np.broadcast_to(np.asarray(positions, np.float64), x.shape[:2])
    y = np.empty_like(x)
    for i in range(half):
        a, b = (i, i + half) if pairs == "halves" else (2 * i, 2 * i + 1)
        of_a, of_b = (a % half, b % half) if pairs == "mismatched" else (i, i)
        for out, frequency, sign, other in [(a, of_a, -1, b), (b, of_b, 1, a)]:
            angle = positions[..., None] * theta ** (-frequency / half)
            y[..., out] = x[..., out] * np.cos(angle)
            y[..., out] += sign * x[..., other] * np.sin(angle)
    return y


BY_SEQUENCE = np.array([[0, 3, 3, 9, -1, 4, 100], [7, 6, 5, 4, 3, 2, 1]])
VALUES = {
    "from zero": (SHAPE, None, jnp.float32, "interleaved"),
    "one token": ((1, 1, 1, 2), None, jnp.float32, "halves"),
    "shifted": (SHAPE, np.arange(7) + 5, jnp.float32, "interleaved"),
} | {
    f"{pairs} {name}": (SHAPE, BY_SEQUENCE, dtype, pairs)
    for pairs in PAIRS
    for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16))
}


@pytest.mark.parametrize("shape, positions, dtype, pairs", VALUES.values(), ids=VALUES)
def test_values(shape, positions, dtype, pairs):
    x = normal(0, shape, dtype)
    given = None if positions is None else jnp.asarray(positions)
    got = jax.jit(lambda x: rotary_embedding(x, given, rope_theta=50.0, pairs=pairs))(x)
    at = np.arange(shape[1]) if positions is None else positions
    exact = rotary_float64(x, at, 50.0, pairs)
    assert got.dtype == dtype
    assert_near(got, exact, 2 * float(jnp.finfo(dtype).eps))


TURN = Decimal("6.28318530717958647692528676655900576839433879875021164194988918")


def rotated_ones(positions, theta, half):
    """Return cos - sin and cos + sin of each pair's angle, reduced in 70 digits."""
    with localcontext(prec=70):
        frequencies = [Decimal(theta) ** (-Decimal(i) / half) for i in range(half)]
        angles = [[int(p) * f % TURN for f in frequencies] for p in positions]
    cos, sin = (f(np.array(angles, np.float64)) for f in (np.cos, np.sin))
    return np.stack([cos - sin, cos + sin], -1).reshape(len(positions), 2 * half)


INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("theta", [1e4, 0.5])
def test_exact_at_any_position(dtype, theta):
    """A float32 product of position and frequency would be off by whole turns."""
    limits, wide = np.iinfo(dtype), dtype.endswith("64")
    between = np.random.default_rng(0).integers(limits.min, limits.max, 3, dtype)
    positions = np.array([limits.min, limits.max, *between, 2, 1, 0], dtype)
    exact = rotated_ones(positions, theta, 4)
    with jax.enable_x64(wide):
        for kind in (jnp.float32, jnp.float64)[: 1 + wide]:
            x = jnp.ones((1, len(positions), 1, 8), kind)
            got = rotary_embedding(x, jnp.asarray(positions), rope_theta=theta)
            bound = 1e-6 if kind == jnp.float32 else 2e-15
            np.testing.assert_allclose(got[0, :, 0], exact, rtol=0, atol=bound)


@pytest.mark.usefixtures("unchecked_types")
def test_wide_positions_of_numpy_are_exact_or_refused():
    x = jnp.ones((1, 2, 1, 8))
    for positions in ([-(2**31), 2**31 - 1], [0, 2**32 - 1]):
        got = untyped.rotary_embedding(x, np.array(positions, np.int64))
        exact = rotated_ones(positions, 1e4, 4)
        np.testing.assert_allclose(got[0, :, 0], exact, rtol=0, atol=1e-6)
    for positions in ([0, 2**32], [-1, 2**31], [-(2**63), 0]):
        least, most = positions
        with pytest.raises(ValueError, match=f"must fit .*, got {least} to {most}"):
            untyped.rotary_embedding(x, np.array(positions))


@pytest.mark.parametrize("pairs", PAIRS)
def test_gradient(pairs):
    x, g = normal(0, SHAPE), normal(1, SHAPE)
    _, (got,) = value_and_vjp(lambda x: rotary_embedding(x, pairs=pairs), (x,), g)
    size = np.prod(SHAPE[2:])
    basis = np.eye(size).reshape(size, 1, *SHAPE[2:])
    for token in range(SHAPE[1]):
        matrix = rotary_float64(basis, [token], 1e4, pairs).reshape(size, size)
        expected = to_float64(g)[:, token].reshape(-1, size) @ matrix.T
        assert_near(got[:, token].reshape(-1, size), expected)
    if pairs != "mismatched":
        assert_near(got, rotary_embedding(g, -jnp.arange(SHAPE[1]), pairs=pairs))


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_products_depend_on_the_distance_only(pairs):
    query, key = normal(0, SHAPE), normal(1, SHAPE)

    def logits(shift):
        at = jnp.arange(SHAPE[1]) + shift
        q, k = (rotary_embedding(x, at, pairs=pairs) for x in (query, key))
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    assert_near(logits(100_000), logits(0), 3e-6)


def test_halves_are_interleaved_pairs_in_another_order():
    x = normal(0, SHAPE)
    order = np.arange(10).reshape(5, 2).T.reshape(-1)
    got = rotary_embedding(x[..., order], pairs="halves")
    assert_near(got, rotary_embedding(x)[..., order])


def test_transformations():
    x = normal(0, SHAPE)
    at = jnp.arange(SHAPE[1])
    stacked = jnp.stack([x, 2 * x])
    got = jax.vmap(rotary_embedding, in_axes=(0, None))(stacked, at)
    assert_near(got, jnp.stack([rotary_embedding(y) for y in stacked]))
    out, tangent = jax.jvp(rotary_embedding, (x,), (x,))
    assert_near(out, tangent)
    with jax.enable_x64(True):
        wide = rotary_embedding(jnp.asarray(x, jnp.float64))
        np.testing.assert_allclose(
            wide, rotary_float64(x, at, 1e4, "interleaved"), rtol=1e-12
        )


X = jnp.ones(SHAPE)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((X[0],), {}, ValueError, r"x must have shape \(batch, seq, heads, dim\)"),
        ((X.astype(int),), {}, TypeError, "x must have a floating-point dtype"),
        ((X[..., :5],), {}, ValueError, "rotary_embedding: dim must be even, got 5"),
        ((X, jnp.ones(7)), {}, TypeError, "positions must be an integer array, got fl"),
        ((X, [1] * 7), {}, TypeError, "positions must be an array, got list"),
        (
            (X, jnp.arange(6)),
            {},
            ValueError,
            r"positions must have shape \(7,\) or \(2, 7\), got \(6,\)",
        ),
        ((X,), {"rope_theta": 0.0}, ValueError, "rope_theta must be positive, got 0"),
        (
            (X,),
            {"rope_theta": np.inf},
            ValueError,
            "rope_theta must be finite, got inf",
        ),
        (
            (X,),
            {"rope_theta": "10"},
            TypeError,
            "rope_theta must be one number, got '10'",
        ),
        ((X,), {"pairs": "half"}, ValueError, "pairs must be one of 'interleaved', 'h"),
    ],
)
def test_refusals(args, options, error, message):
    with pytest.raises(error, match=message):
        untyped.rotary_embedding(*args, **options)


ROPE: dict[str, Any] = {"original_context_length": 256, "beta_fast": 8.0}
SCALINGS = {
    "linear": RotaryScaling("linear", 4.0),
    "llama3": RotaryScaling("llama3", 8.0, original_context_length=64),
    "yarn": RotaryScaling("yarn", 4.0, **ROPE),
    "yarn, not truncated": RotaryScaling("yarn", 4.0, truncate=False, **ROPE),
    "longrope": RotaryScaling(
        "longrope", 32.0, original_context_length=64, factors=[1.0, 1.5, 2.0, 4.0, 8.0]
    ),
    "a factor of its own": RotaryScaling("linear", 2.0, attention_factor=1.5),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_of_the_first_features(name):
    scaling = SCALINGS[name]
    x = normal(0, (2, 7, 3, 14))
    got = jax.jit(
        lambda x: rotary_embedding(
            x,
            jnp.asarray(BY_SEQUENCE),
            rope_theta=50.0,
            pairs="halves",
            rotary_dim=10,
            scaling=scaling,
        )
    )(x)
    np.testing.assert_array_equal(got[..., 10:], x[..., 10:])
    frequencies, factor = definitions.frequencies(50.0, 10, scaling)
    kept = frequencies == definitions.frequencies(50.0, 10, None)[0]
    assert kept.any() == (scaling.kind != "linear") and not kept.all()
    angles = BY_SEQUENCE[..., None, None] * frequencies
    wide = to_float64(x)
    turned = (wide[..., :5] + 1j * wide[..., 5:10]) * factor * np.exp(1j * angles)
    exact = np.concatenate([turned.real, turned.imag], -1)
    assert_near(got[..., :10], exact, 3e-7)


@pytest.mark.parametrize(
    "kind, factor, length",
    [
        # The original length does not change "linear".
        ("linear", 4.0, 64),
        # The first limit of "yarn" would be below 0 here, and here both limits are 0.
        ("yarn", 4.0, 16),
        ("yarn", 4.0, 5),
        # A shorter context needs no attention factor.
        ("yarn", 0.5, 256),
    ],
)
def test_scalings_at_their_limits(kind, factor, length):
    scaling = RotaryScaling(kind, factor, original_context_length=length, beta_fast=8.0)
    plain, _ = definitions.frequencies(50.0, 10, None)
    scaled, attention = definitions.frequencies(50.0, 10, scaling)
    got = rotary_scaling.multipliers(scaling, 50.0, 5)
    np.testing.assert_allclose(got, scaled / plain, rtol=1e-12)
    assert rotary_scaling.attention_factor(scaling) == pytest.approx(attention)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: untyped.RotaryScaling("ntk", 2.0),
            ValueError,
            "RotaryScaling: kind must be one of 'linear', 'llama3', .*, got 'ntk'",
        ),
        (
            lambda: untyped.RotaryScaling("linear", 0.0),
            ValueError,
            "RotaryScaling: factor must be positive, got 0.0",
        ),
        (
            lambda: untyped.RotaryScaling("yarn", 2.0),
            ValueError,
            "original_context_length must be an integer of at least 2, got None",
        ),
        (
            lambda: untyped.RotaryScaling(
                "llama3", 2.0, original_context_length=8, low_frequency_factor=5.0
            ),
            ValueError,
            "low_frequency_factor must be below high_frequency_factor=4.0, got 5.0",
        ),
        (
            lambda: untyped.RotaryScaling("longrope", 2.0, original_context_length=8),
            ValueError,
            "factors must be given for 'longrope', and only there, got 0 for 'longrope",
        ),
        (
            lambda: untyped.RotaryScaling("linear", 2.0, factors=3),
            TypeError,
            "factors must be a sequence, got int",
        ),
        (
            lambda: untyped.rotary_embedding(normal(0, SHAPE), scaling="linear"),
            TypeError,
            "scaling must be a RotaryScaling or None, got str",
        ),
        (
            lambda: untyped.rotary_embedding(
                normal(0, SHAPE), scaling=SCALINGS["longrope"], rotary_dim=8
            ),
            ValueError,
            "scaling must have 4 factors, one for each pair of features, got 5",
        ),
        (
            lambda: untyped.rotary_embedding(
                normal(0, SHAPE), rope_theta=1.0, scaling=SCALINGS["yarn"]
            ),
            ValueError,
            "rope_theta must be above 1 for a scaling of kind 'yarn', got 1.0",
        ),
        (
            lambda: untyped.rotary_embedding(normal(0, SHAPE), rotary_dim=12),
            ValueError,
            "rotary_dim must be even and at most dim=10, got 12",
        ),
    ],
)
def test_refused_scalings(call, error, message):
    with pytest.raises(error, match=message):
        call()
