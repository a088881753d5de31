"""The Hopper kernels of `flash_mlp`, in an emulator that detects races."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DTYPES,
    assert_as_close,
    flash_mlp_args,
    flash_mlp_float64,
    flash_mlp_plain,
    mesh,
    to_float64,
    value_and_vjp,
    with_vjp,
)

from jaxkern._core.activations import ACTIVATIONS
from jaxkern._mlp.hopper import flash, flash_tiles
from jaxkern._mlp.hopper.flash_tiles import choose_tiles, configs, weight_passes
from jaxkern._mosaic.base import IN_KERNEL
from jaxkern._mosaic.launch import WalkTiles
from jaxkern.testing.compiler import lower

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
emulated = pytest.mark.usefixtures("interpreted")


def kernel(activation="silu"):
    def mlp(x, w1, w2, w_gate=None):
        ups = (w1,) if w_gate is None else (w_gate, w1)
        return flash.mlp(x, ups, w2, activation)

    return mlp


def check(args: Any, g, activation="silu", fn=None):
    got = value_and_vjp(fn or kernel(activation), args, g)
    bound = value_and_vjp(flash_mlp_plain(activation), args, g)
    assert_as_close(got, bound, flash_mlp_float64(args, g, activation))


@pytest.fixture(params=["largest", "split"])
def tiles(request, monkeypatch):
    """Use the largest tiles that can be chosen, or the smallest, whatever the size."""
    n = {"largest": 0, "split": -1}[request.param]
    monkeypatch.setattr(flash_tiles, "configs", lambda *a: (configs(*a)[n],))


# Sizes of several tiles, of less than a tile, and with nothing for the second
# warpgroup. Each has both forms and both tiles, but not all pairs of these.
@emulated
@pytest.mark.parametrize(
    "size, activation, dtype, tiles, gated",
    [
        ((2, 150, 64, 264), "silu", jnp.bfloat16, "largest", False),
        ((2, 150, 64, 264), "silu", jnp.bfloat16, "split", True),
        ((1, 130, 120, 136), "gelu", jnp.float16, "split", False),
        ((1, 130, 120, 136), "gelu", jnp.float16, "largest", True),
        ((1, 65, 24, 72), "sigmoid", jnp.bfloat16, "largest", False),
        ((1, 65, 24, 72), "sigmoid", jnp.bfloat16, "split", True),
    ],
    indirect=["tiles"],
)
def test_values_and_gradients(size, activation, dtype, tiles, gated):
    check(*flash_mlp_args(size, dtype, gated), activation)


@emulated
@pytest.mark.parametrize(
    "size, activation, dtype",
    [
        ((1, 17, 16, 8), "relu", jnp.bfloat16),
        ((1, 63, 96, 200), "relu2", jnp.float16),
        ((1, 1, 48, 400), "leaky_relu", jnp.bfloat16),
        ((1, 129, 128, 136), "identity", jnp.bfloat16),
        ((1, 70, 256, 72), "silu", jnp.bfloat16),
    ],
)
def test_other_sizes_and_activations(size, activation, dtype):
    check(*flash_mlp_args(size, dtype), activation)


def two_inputs_args(size, dtype):
    """Return inputs of gate and up side by side, the weights, and a cotangent."""
    (x, w1, w2, w_gate), g = flash_mlp_args(size, dtype, gated=True)
    return (jnp.concatenate([x, -x[:, ::-1]], 2), w_gate, w1, w2), g


def gated_by_another_input(x, w_gate, w1, w2):
    return flash.mlp(x, (w_gate, w1), w2, "silu")


def plain_gated_by_another_input(x, w_gate, w1, w2):
    gate, up = jnp.split(x, 2, axis=2)
    hidden = jax.nn.silu(jnp.matmul(gate, w_gate)) * jnp.matmul(up, w1)
    return jnp.matmul(hidden, w2)


def gated_by_another_input_float64(args, g):
    (x, w_gate, w1, w2), g = to_float64((args, g))
    gate, up = np.split(x, 2, axis=2)
    z, factor = gate @ w_gate, up @ w1
    sigmoid = 1 / (1 + np.exp(-z))
    hidden = z * sigmoid * factor
    d_hidden = g @ w2.mT
    d_z = d_hidden * factor * sigmoid * (1 + z * (1 - sigmoid))
    d_factor = d_hidden * z * sigmoid
    dx = np.concatenate([d_z @ w_gate.mT, d_factor @ w1.mT], 2)
    return hidden @ w2, (dx, gate.mT @ d_z, up.mT @ d_factor, hidden.mT @ g)


@emulated
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "size, tiles",
    [((2, 150, 32, 264), "split"), ((1, 65, 16, 72), "largest")],
    indirect=["tiles"],
)
def test_gated_by_another_input(size):
    args, g = two_inputs_args(size, jnp.bfloat16)
    got = value_and_vjp(gated_by_another_input, args, g)
    bound = value_and_vjp(plain_gated_by_another_input, args, g)
    assert_as_close(got, bound, gated_by_another_input_float64(args, g))


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 2047, 30, 1001)])
def test_gated_by_another_input_lowers_for_a_gpu(size):
    args, g = two_inputs_args(size, jnp.bfloat16)
    modules = lower(
        lambda args, g: jax.vjp(gated_by_another_input, *args)[1](g), (args, g)
    )
    assert len(modules) == 1 + len(weight_passes(size[2], 2))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 2047, 40, 1001), (3, 20, 190, 264)])
def test_any_size_lowers_for_a_gpu(size, gated):
    """Lowering checks more than the emulator does."""
    args, g = flash_mlp_args(size, jnp.bfloat16, gated)
    passes = weight_passes(size[2], 1 + gated)
    modules = lower(lambda args, g: jax.vjp(kernel(), *args)[1](g), (args, g))
    assert len(modules) == 1 + len(passes)


def test_arrays_that_would_not_lower_are_refused():
    args = (jnp.zeros(s, jnp.bfloat16) for s in ((1, 20, 64), (1, 64, 64), (1, 64, 64)))
    with pytest.raises(ValueError, match="multiples of 8 rows and 64 columns, got 20"):
        flash.forward("silu")(*args)


@emulated
def test_gated_at_its_largest_dim():
    check(*flash_mlp_args((1, 70, 192, 72), jnp.bfloat16, gated=True))


@pytest.mark.usefixtures("hopper", "tiles")
def test_a_block_takes_several_tiles():
    check(*flash_mlp_args((5, 80, 16, 136), jnp.bfloat16))


@emulated
def test_under_vmap():
    (x, w1, w2), g = flash_mlp_args((2, 20, 32, 40), jnp.bfloat16)
    several = jnp.stack([x, 2 * x, -x])

    def gradients(x):
        return value_and_vjp(kernel(), (x, w1, w2), g)

    got = jax.vmap(gradients)(several)
    for i, one in enumerate(several):
        args = one, w1, w2
        bound = value_and_vjp(flash_mlp_plain("silu"), args, g)
        picked = jax.tree.map(lambda a, i=i: a[i], got)
        assert_as_close(picked, bound, flash_mlp_float64(args, g, "silu"))


def in_scan(mlp):
    """Return `mlp` as a scan over the heads."""

    def by_heads(*args):
        def step(carry, one):
            return carry, mlp(*(a[None] for a in one))[0]

        return jax.lax.scan(step, None, args)[1]

    return by_heads


def in_shard_map(spec):
    def wrap(mlp):
        # The emulator has one device at a time.
        one = mesh(i=1)
        specs = spec, jax.P(), jax.P()
        return jax.shard_map(mlp, mesh=one, in_specs=specs, out_specs=spec)

    return wrap


@emulated
@pytest.mark.parametrize(
    "transform",
    [
        in_scan,
        in_shard_map(jax.P(None, "i")),
    ],
    ids=["scan", "shard_map"],
)
def test_under_other_transforms(transform):
    args, g = flash_mlp_args((2, 20, 32, 40), jnp.bfloat16)
    check(args, g, fn=transform(kernel()))


def test_under_remat():
    """Programs are only lowered: the emulator's callbacks cannot be checkpointed."""
    args, _ = flash_mlp_args((2, 20, 32, 40), jnp.bfloat16)

    def kernels(fn):
        def loss(*args):
            return jnp.sin(fn(*args)).sum()

        return len(lower(jax.grad(loss, argnums=(0, 1, 2)), args))

    assert kernels(kernel()) == 3
    assert kernels(jax.checkpoint(kernel())) == 3
    # The forward runs again, for the cosine.
    assert kernels(jax.checkpoint(lambda *a: jnp.sin(kernel()(*a)))) == 4


@emulated
def test_extreme_values_stay_in_their_token_and_calls_are_equal():
    (x, w1, w2), g = flash_mlp_args((2, 20, 32, 40), jnp.bfloat16)
    extremes = jnp.array([1e4, -1e4, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    args = x.at[1, :5, 0].set(extremes), w1, w2
    run = with_vjp(kernel())
    y, (dx, *_) = run(args, g)
    first = run((x, w1, w2), g)
    for a, b in zip(*map(jax.tree.leaves, (first, run((x, w1, w2), g))), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))
    clean, (clean_dx, *_) = first
    others = np.delete(np.arange(40), range(20, 25))
    for got, expected in ((y, clean), (dx, clean_dx)):
        got, expected = (to_float64(a).reshape(40, 32) for a in (got, expected))
        np.testing.assert_array_equal(got[others], expected[others])
    bound = to_float64(flash_mlp_plain("silu")(*args)[1, :5])
    np.testing.assert_allclose(to_float64(y[1, :5]), bound, rtol=0.02, atol=0.02)


@emulated
def test_only_the_arguments_are_saved_for_the_backward():
    args, _ = flash_mlp_args((1, 24, 32, 64), jnp.bfloat16, gated=True)
    saved = jax.tree.leaves(jax.vjp(kernel(), *args)[1])
    assert sorted(a.shape for a in saved) == sorted(a.shape for a in args)


def test_small_problems_are_split_and_large_ones_take_large_tiles():
    def rows(heads, size):
        config = choose_tiles("forward", heads, size, 64, 1)
        return config.rows * config.parts

    assert rows(8, 512) == 64
    assert rows(12, 1024) == 128
    assert rows(32, 4096) == 256


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows": 63}, "rows must be a multiple of 64, got 63"),
        ({"columns": 12}, "columns must be a multiple of 8, got 12"),
        ({"columns": 512}, "columns must be at most 256, .*, got 512, 2 and 2"),
        ({"steps": 3, "split": True}, "steps must be a multiple of 2 to split, got 3"),
    ],
)
def test_config_refuses_nonsense(options, message):
    with pytest.raises(ValueError, match=f"WalkTiles: {message}"):
        WalkTiles(**({"rows": 64, "columns": 64} | options))


@pytest.mark.parametrize(
    "config, message",
    [
        (
            WalkTiles(64, 256, steps=4),
            "must fit 232448 bytes of shared memory, got 884912",
        ),
    ],
)
def test_config_that_does_not_fit_says_what_it_needs(config, message):
    (x, w1, w2), _ = flash_mlp_args((2, 24, 192, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"flash_mlp_forward: .* {message}"):
        flash.forward("silu", config)(x, w1, w2)


@activations
def test_the_kernels_forms_are_those_of_the_table(activation):
    z = jnp.array([-1e4, -30.0, -1.0, 0.0, 0.5, 30.0, 1e4])
    ours, table = IN_KERNEL[activation], ACTIVATIONS[activation]
    for a, b in zip(ours, table, strict=True):
        np.testing.assert_allclose(a(z), b(z), rtol=1e-6, atol=1e-5)


BF16, F16 = DTYPES[1:]
OTHERS = [name for name in ACTIVATIONS if name != "silu"]
# Dims, activations and dtypes do not interact.
ON_GPU = [
    *((False, "silu", dim, BF16) for dim in (24, 64, 96, 128, 192, 256)),
    *((True, "silu", dim, BF16) for dim in (24, 64, 96, 128, 192)),
    *((gated, name, 64, BF16) for gated in (False, True) for name in OTHERS),
    (False, "silu", 128, F16),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "gated, activation, dim, dtype",
    ON_GPU,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_on_gpu(gated, activation, dim, dtype):
    args, g = flash_mlp_args((3, 1000, dim, 520), dtype, gated)
    check(args, g, activation)


@pytest.mark.gpu
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("size", [(40, 1100, 64, 264), (2, 100, 64, 264)])
def test_tiles_on_gpu(size):
    check(*flash_mlp_args(size, jnp.bfloat16))
