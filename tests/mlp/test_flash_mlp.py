import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DTYPES,
    assert_as_close,
    assert_near,
    flash_mlp_args,
    flash_mlp_float64,
    flash_mlp_plain,
    mesh,
    to_float64,
    untyped,
    value_and_vjp,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkern import flash_mlp
from jaxkern._core import device
from jaxkern._core.activations import ACTIVATIONS
from jaxkern._core.sharding import lie_whole

BF16 = jnp.bfloat16
gates = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def op(activation: Any = "silu", **options):
    """`flash_mlp` with w_gate, if there is one, as the last argument."""

    def mlp(x, w1, w2, w_gate=None):
        return flash_mlp(x, w1, w2, w_gate=w_gate, activation=activation, **options)

    return mlp


def check(args: Any, g, activation):
    got = value_and_vjp(op(activation), args, g)
    bound = value_and_vjp(flash_mlp_plain(activation), args, g)
    assert_as_close(got, bound, flash_mlp_float64(args, g, activation))


# Activations and dtypes do not interact; each activation has tests of its own.
@pytest.mark.parametrize(
    "activation, dtype",
    [*((name, BF16) for name in ACTIVATIONS), *(("silu", d) for d in DTYPES[::2])],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_values_and_gradients(activation, dtype):
    check(*flash_mlp_args((3, 17, 65, 130), dtype), activation)


@pytest.mark.parametrize(
    "activation, dtype",
    [*((name, BF16) for name in ("gelu", "identity")), *(("silu", d) for d in DTYPES)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_gated(activation, dtype):
    check(*flash_mlp_args((3, 17, 65, 130), dtype, gated=True), activation)


sizes = st.sampled_from([1, 17, 63, 64, 65, 130])


@settings(max_examples=8)
@given(batch=sizes, dim=sizes, hidden=sizes, gated=st.booleans())
def test_any_size(batch, dim, hidden, gated):
    check(*flash_mlp_args((2, batch, dim, hidden), jnp.float32, gated), "silu")


@gates
def test_heads_are_sharded_without_collectives(gated):
    args, g = flash_mlp_args((4, 20, 16, 40), jnp.float32, gated)
    spec = jax.P("heads")
    by_head = mesh(heads=4)
    sharded = jax.shard_map(op(), mesh=by_head, in_specs=spec, out_specs=spec)
    got, expected = (value_and_vjp(fn, args, g) for fn in (sharded, op()))
    assert_near(got, expected)
    program = jax.jit(sharded).lower(*args).compile().as_text()
    assert program is not None
    assert not re.search("all-gather|all-reduce|collective-permute|all-to-all", program)


def test_batch_is_sharded_and_only_the_weights_gradients_are_summed():
    by_token = mesh(batch=4)
    args, g = flash_mlp_args((2, 20, 16, 40), jnp.float32)
    specs = jax.P(None, "batch"), jax.P(), jax.P()
    sharded = jax.shard_map(op(), mesh=by_token, in_specs=specs, out_specs=specs[0])
    assert_near(*(value_and_vjp(fn, args, g) for fn in (sharded, op())))

    def gradients(args, g):
        return jax.vjp(sharded, *args)[1](g)

    forward = jax.jit(sharded).lower(*args).compile().as_text()
    backward = jax.jit(gradients).lower(args, g).compile().as_text()
    assert forward and backward
    assert not re.search("all-gather|all-reduce|collective-permute|all-to-all", forward)
    assert re.search("all-reduce", backward)
    assert not re.search("all-gather|collective-permute|all-to-all", backward)


@gates
def test_transforms(gated):
    args, g = flash_mlp_args((2, 6, 8, 12), jnp.float32, gated)
    mlp = op("silu")
    expected = value_and_vjp(mlp, args, g)
    assert_near(value_and_vjp(jax.checkpoint(mlp), args, g), expected)

    def by_heads(*args):
        def step(carry, one):
            return carry, mlp(*(a[None] for a in one))[0]

        return jax.lax.scan(step, None, args)[1]

    assert_near(value_and_vjp(by_heads, args, g), expected)
    stacked = jax.vmap(mlp)(*(jnp.stack([a, -a]) for a in args))
    assert_near(stacked[0], expected[0])


def test_gate_of_ones_is_no_gate():
    (x, w1, w2), _ = flash_mlp_args((2, 6, 8, 12), jnp.float32)
    # The last feature of x is 1, and the gate takes only this feature.
    x = x.at[..., -1].set(1)
    gate = jnp.zeros_like(w1).at[:, -1].set(1)
    y = flash_mlp(x, w1, w2, w_gate=gate, activation="identity")
    assert_near(y, flash_mlp(x, w1, w2, activation="identity"))


EXTREMES = [1e4, -1e4, jnp.inf, -jnp.inf, jnp.nan]


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
def test_extreme_values_stay_in_their_token(activation):
    (x, w1, w2), g = flash_mlp_args((2, 7, 8, 12), jnp.float32)
    spoiled = x.at[1, :5, 0].set(jnp.array(EXTREMES)), w1, w2
    y, gradients = value_and_vjp(op(activation), spoiled, g)
    plain, _ = value_and_vjp(flash_mlp_plain(activation), spoiled, g)
    np.testing.assert_allclose(*to_float64((y, plain)), rtol=1e-5, atol=1e-5)
    clean_y, clean = value_and_vjp(op(activation), (x, w1, w2), g)
    assert_near([y[1, 5:], gradients[0][1, 5:]], [clean_y[1, 5:], clean[0][1, 5:]])
    assert_near(
        [y[0], *(d[0] for d in gradients)], [clean_y[0], *(d[0] for d in clean)]
    )
    # Gradients of large but finite inputs are finite.
    assert np.isfinite(to_float64(gradients[0][1, :2])).all()


def shapes(heads=2, batch=8, dim=64, hidden=128, dtype=jnp.bfloat16):
    return flash_mlp_args((heads, batch, dim, hidden), dtype)[0]


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize(
    "args, reason",
    [
        (shapes(dtype=jnp.float32), "dtype must be bfloat16 or float16 for mosaic_gpu"),
        (shapes(dim=320), "dim must be at most 256 for mosaic_gpu, got 320"),
        (
            shapes(batch=0),
            r"no axis of x may be empty for mosaic_gpu, got \(2, 0, 64\)",
        ),
        (
            shapes(hidden=0),
            r"no axis of w1 may be empty for mosaic_gpu, got \(2, 64, 0\)",
        ),
    ],
)
def test_unsupported_arguments(args, reason):
    with pytest.raises(NotImplementedError, match=f"flash_mlp: {reason}"):
        flash_mlp(*args, implementation="mosaic_gpu")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_unsupported_device(dtype):
    assert not device.on_hopper()
    reason = "mosaic_gpu needs an H100 or H200, but the default device is cpu"
    with pytest.raises(NotImplementedError, match=f"flash_mlp: {reason}"):
        flash_mlp(*shapes(dtype=dtype), implementation="mosaic_gpu")


def test_which_arrays_lie_whole():
    seen = []

    def look(x):
        seen.append(lie_whole(x))
        return x

    both, x = mesh(i=2), jnp.ones(2)
    spread = jax.device_put(x, jax.NamedSharding(both, jax.P("i")))
    split = jax.shard_map(look, mesh=both, in_specs=jax.P("i"), out_specs=jax.P("i"))
    for call in (look, jax.jit(look), jax.jit(split)):
        call(x)
    for call in (look, jax.jit(look)):
        call(spread)
    with jax.set_mesh(mesh("explicit", i=1)):
        look(x)
    assert seen == [True, True, True, False, False, False]


def test_empty():
    assert flash_mlp(*shapes(batch=0)).shape == (2, 0, 64)
    np.testing.assert_array_equal(flash_mlp(*shapes(hidden=0)), 0)


X, W1, W2 = jnp.ones((2, 3, 8)), jnp.ones((2, 8, 5)), jnp.ones((2, 5, 8))
mlp = untyped.flash_mlp


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: mlp(X[0], W1, W2),
            ValueError,
            r"flash_mlp: x must have shape \(heads, batch, dim\), got \(3, 8\)",
        ),
        (
            lambda: mlp(X, W1[:1], W2),
            ValueError,
            r"w1 must have shape \(2, 8, 5\) for x of shape .*, got \(1, 8, 5\)",
        ),
        (
            lambda: mlp(X, W1, W2.mT),
            ValueError,
            r"w2 must have shape \(2, 5, 8\) for x of shape .*, got \(2, 8, 5\)",
        ),
        (
            lambda: mlp(X, W1[0], W2),
            ValueError,
            r"w1 must have shape \(2, 8, hidden\) .*, got \(8, 5\)",
        ),
        (
            lambda: mlp(X, W1, W2, w_gate=W1[..., 1:]),
            ValueError,
            r"w_gate must have shape \(2, 8, 5\), that of w1, got \(2, 8, 4\)",
        ),
        (
            lambda: mlp(X, W1, W2, w_gate=W1.astype(jnp.bfloat16)),
            TypeError,
            "w_gate must have the dtype of x, float32, got bfloat16",
        ),
        (
            lambda: mlp(X, W1, W2, activation=""),
            ValueError,
            "flash_mlp: activation must be one of 'silu', .*, got ''",
        ),
        (
            lambda: mlp(X, W1, W2, implementation="triton"),
            ValueError,
            "implementation must be one of None, 'xla', 'mosaic_gpu', got 'triton'",
        ),
        (
            lambda: mlp(X, W1.astype(int), W2),
            TypeError,
            "w1 must have a floating-point dtype",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
