"""The Hopper kernels, in an emulator that detects races."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DTYPES,
    assert_as_exact,
    flash_mlp_args,
    flash_mlp_float64,
    flash_mlp_plain,
    to_float64,
    value_and_vjp,
    with_vjp,
)

from jaxkern import flash_mlp
from jaxkern._core import sharding as _mesh
from jaxkern._core.activations import ACTIVATIONS
from jaxkern._mlp import flash_mlp as _flash_mlp
from jaxkern._mlp.hopper import cost as _mlp_predictions
from jaxkern._mlp.hopper import flash as _flash_mlp_mgpu
from jaxkern._mlp.hopper import walk as _mgpu_walk
from jaxkern._mlp.hopper.cost import Layer
from jaxkern._mosaic.base import IN_KERNEL
from jaxkern._mosaic.launch import WalkTiles
from jaxkern.testing.compiler import lower

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
configs = _flash_mlp_mgpu.configs


def kernel(activation="silu"):
    def mlp(x, w1, w2, w_gate=None):
        ups = (w1,) if w_gate is None else (w_gate, w1)
        return _flash_mlp_mgpu.mlp(x, ups, w2, activation)

    return mlp


def check(args: Any, g, activation="silu", fn=None):
    got = value_and_vjp(fn or kernel(activation), args, g)
    bound = value_and_vjp(flash_mlp_plain(activation), args, g)
    assert_as_exact(got, bound, flash_mlp_float64(args, g, activation))


@pytest.fixture(params=["largest", "split"])
def tiles(request, monkeypatch):
    """Whatever the size, the largest tiles that can be chosen, or the smallest."""
    n = {"largest": 0, "split": -1}[request.param]
    monkeypatch.setattr(_flash_mlp_mgpu, "configs", lambda *a: (configs(*a)[n],))


# Sizes that cross tiles, fall short of one, and leave the second warpgroup nothing;
# each with both forms and both tiles, as those are with each other.
@pytest.mark.usefixtures("interpreted")
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
    ids=str,
)
def test_values_and_gradients(size, activation, dtype, tiles, gated):
    check(*flash_mlp_args(size, dtype, gated), activation)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "size, activation, dtype",
    [
        ((1, 17, 16, 8), "relu", jnp.bfloat16),
        ((1, 63, 96, 200), "relu2", jnp.float16),
        ((1, 1, 48, 400), "leaky_relu", jnp.bfloat16),
        ((1, 129, 128, 136), "identity", jnp.bfloat16),
        ((1, 70, 192, 72), "silu", jnp.bfloat16),
        ((1, 70, 256, 72), "silu", jnp.bfloat16),
    ],
    ids=str,
)
def test_other_sizes_and_activations(size, activation, dtype):
    check(*flash_mlp_args(size, dtype), activation)


def two_inputs_args(size, dtype):
    """Inputs of gate and up side by side, the weights, and a cotangent."""
    (x, w1, w2, w_gate), g = flash_mlp_args(size, dtype, gated=True)
    return (jnp.concatenate([x, -x[:, ::-1]], 2), w_gate, w1, w2), g


def gated_by_another_input(x, w_gate, w1, w2):
    return _flash_mlp_mgpu.mlp(x, (w_gate, w1), w2, "silu")


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


@pytest.mark.usefixtures("interpreted", "tiles")
@pytest.mark.parametrize("size", [(2, 150, 64, 264), (1, 65, 120, 72)], ids=str)
def test_gated_by_another_input(size):
    args, g = two_inputs_args(size, jnp.bfloat16)
    got = value_and_vjp(gated_by_another_input, args, g)
    bound = value_and_vjp(plain_gated_by_another_input, args, g)
    assert_as_exact(got, bound, gated_by_another_input_float64(args, g))


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 2047, 100, 1001)], ids=str)
def test_gated_by_another_input_lowers_for_a_gpu(size):
    args, g = two_inputs_args(size, jnp.bfloat16)
    modules = lower(
        lambda args, g: jax.vjp(gated_by_another_input, *args)[1](g), (args, g)
    )
    dim = size[2]
    passes = _flash_mlp_mgpu.input_passes(dim, 2), _flash_mlp_mgpu.weight_passes(dim, 2)
    assert len(modules) == sum(map(len, passes))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (2, 2047, 40, 1001), (3, 20, 190, 264)], ids=str
)
def test_any_size_lowers_for_a_gpu(size, gated):
    """Which asks for more than the emulator."""
    args, g = flash_mlp_args(size, jnp.bfloat16, gated)
    passes = _flash_mlp_mgpu.weight_passes(size[2], 1 + gated)
    modules = lower(lambda args, g: jax.vjp(kernel(), *args)[1](g), (args, g))
    assert len(modules) == 1 + len(passes)


def test_arrays_that_would_not_lower_are_refused():
    args = (jnp.zeros(s, jnp.bfloat16) for s in ((1, 20, 64), (1, 64, 64), (1, 64, 64)))
    with pytest.raises(ValueError, match="multiples of 8 rows and 64 columns, got 20"):
        _flash_mlp_mgpu.forward("silu")(*args)


@pytest.mark.usefixtures("interpreted")
def test_gated_at_its_largest_dim():
    check(*flash_mlp_args((1, 70, 192, 72), jnp.bfloat16, gated=True))


@pytest.mark.usefixtures("interpreted", "tiles")
def test_a_block_takes_several_tiles(monkeypatch):
    monkeypatch.setattr(_mgpu_walk, "multiprocessors", lambda: 2)
    check(*flash_mlp_args((5, 80, 16, 136), jnp.bfloat16))


@pytest.mark.usefixtures("interpreted")
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
        assert_as_exact(picked, bound, flash_mlp_float64(args, g, "silu"))


def in_scan(mlp):
    """Head by head."""

    def by_heads(*args):
        def step(carry, one):
            return carry, mlp(*(a[None] for a in one))[0]

        return jax.lax.scan(step, None, args)[1]

    return by_heads


def in_shard_map(spec):
    def wrap(mlp):
        # The emulator has one device at a time.
        mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        weights = spec if spec == jax.P("i") else jax.P()
        specs = spec, weights, weights
        return jax.shard_map(mlp, mesh=mesh, in_specs=specs, out_specs=spec)

    return wrap


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "transform",
    [
        in_scan,
        in_shard_map(jax.P("i")),
        in_shard_map(jax.P(None, "i")),
    ],
    ids=["scan", "shard_map over heads", "shard_map over batch"],
)
def test_under_other_transforms(transform):
    args, g = flash_mlp_args((2, 20, 32, 40), jnp.bfloat16)
    check(args, g, fn=transform(kernel()))


def test_under_remat():
    """Lowered for a GPU: the emulator's callbacks cannot be checkpointed."""
    args, _ = flash_mlp_args((2, 20, 32, 40), jnp.bfloat16)

    def kernels(fn):
        def loss(*args):
            return jnp.sin(fn(*args)).sum()

        return len(lower(jax.grad(loss, argnums=(0, 1, 2)), args))

    assert kernels(kernel()) == 3
    # The forward once more, for the cosine.
    assert kernels(jax.checkpoint(kernel())) == 3
    assert kernels(jax.checkpoint(lambda *a: jnp.sin(kernel()(*a)))) == 4


@pytest.mark.usefixtures("interpreted")
def test_deterministic():
    args, g = flash_mlp_args((1, 70, 64, 136), jnp.bfloat16)
    run = with_vjp(kernel())
    first, again = run(args, g), run(args, g)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))


@pytest.mark.usefixtures("interpreted")
def test_extreme_values_stay_in_their_token():
    (x, w1, w2), g = flash_mlp_args((2, 20, 32, 40), jnp.bfloat16)
    extremes = jnp.array([1e4, -1e4, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    args = x.at[1, :5, 0].set(extremes), w1, w2
    run = with_vjp(kernel())
    y, (dx, *_) = run(args, g)
    clean, (clean_dx, *_) = run((x, w1, w2), g)
    others = np.delete(np.arange(40), range(20, 25))
    for got, expected in ((y, clean), (dx, clean_dx)):
        got, expected = (to_float64(a).reshape(40, 32) for a in (got, expected))
        np.testing.assert_array_equal(got[others], expected[others])
    bound = to_float64(flash_mlp_plain("silu")(*args)[1, :5])
    np.testing.assert_allclose(to_float64(y[1, :5]), bound, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("interpreted")
def test_only_the_arguments_are_saved_for_the_backward():
    args, _ = flash_mlp_args((1, 24, 32, 64), jnp.bfloat16, gated=True)
    saved = jax.tree.leaves(jax.vjp(kernel(), *args)[1])
    assert sorted(a.shape for a in saved) == sorted(a.shape for a in args)


@pytest.mark.usefixtures("interpreted")
def test_none_picks_what_is_predicted_to_be_faster(monkeypatch):
    args, _ = flash_mlp_args((2, 72, 32, 128), jnp.bfloat16)

    def uses_the_kernel(**options):
        return "flash_mlp_forward" in str(
            jax.make_jaxpr(lambda *a: flash_mlp(*a, **options))(*args)
        )

    assert not uses_the_kernel()
    monkeypatch.setattr(_flash_mlp, "on_hopper", lambda: True)
    assert not uses_the_kernel()
    monkeypatch.setattr(_mesh, "runs_locally", lambda: True)
    assert uses_the_kernel()
    assert not uses_the_kernel(implementation="xla")
    monkeypatch.setattr(_mlp_predictions, "beats_xla", lambda *a: False)
    assert not uses_the_kernel()
    assert uses_the_kernel(implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "layer, faster",
    [
        (Layer(4096, 64, 512, 64, heads=32), True),
        (Layer(512, 64, 512, 64, heads=8), True),
        (Layer(1024, 64, 768, 64, products=2, heads=12), True),
        # One block would walk a long hidden axis alone.
        (Layer(64, 256, 2**20, 256), False),
        (Layer(128, 256, 8192, 256), False),
        # Of one head, few blocks would make the weights' gradients.
        (Layer(16384, 128, 1376, 128), False),
    ],
    ids=str,
)
def test_predictions(layer, faster):
    assert _mlp_predictions.beats_xla(layer, "flash_mlp") == faster


def test_small_problems_are_split_and_large_ones_take_large_tiles():
    def rows(heads, size):
        config = _flash_mlp_mgpu.choose("forward", heads, size, 64, 1)
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
        _flash_mlp_mgpu.forward("silu", config)(x, w1, w2)


@activations
def test_the_kernels_forms_are_those_of_the_table(activation):
    z = jnp.array([-1e4, -30.0, -1.0, 0.0, 0.5, 30.0, 1e4])
    ours, table = IN_KERNEL[activation], ACTIVATIONS[activation]
    for a, b in zip(ours, table, strict=True):
        np.testing.assert_allclose(a(z), b(z), rtol=1e-6, atol=1e-5)


@pytest.mark.gpu
@activations
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dim", [24, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: d.__name__)
def test_on_gpu(activation, dim, dtype, gated):
    if gated and dim > _flash_mlp_mgpu.MAX_GATED_DIM[1]:
        pytest.skip("too large to be gated")
    args, g = flash_mlp_args((3, 1000, dim, 520), dtype, gated)
    check(args, g, activation)


@pytest.mark.gpu
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("size", [(40, 1100, 64, 264), (2, 100, 64, 264)], ids=str)
def test_tiles_on_gpu(size):
    check(*flash_mlp_args(size, jnp.bfloat16))
