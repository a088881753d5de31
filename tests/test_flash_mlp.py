import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DTYPES,
    assert_as_exact,
    assert_near,
    normal,
    to_float64,
    untyped,
    value_and_vjp,
)

from jaxkern import _flash_mlp_mgpu, flash_mlp
from jaxkern._activations import ACTIVATIONS
from jaxkern._mgpu import IN_KERNEL, on_hopper

activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def make_args(heads, batch, dim, hidden, dtype) -> Any:
    shapes = [(heads, batch, dim), (heads, dim, hidden), (heads, hidden, dim)]
    scales = [1.0, dim**-0.5, max(hidden, 1) ** -0.5]
    args = [
        normal(i, s, dtype, c)
        for i, (s, c) in enumerate(zip(shapes, scales, strict=True))
    ]
    return tuple(args), normal(3, shapes[0], dtype)


def exact(args, g, activation):
    """The equations and their gradients by hand, in NumPy, but for act and act'."""
    x, w1, w2, g = to_float64((*args, g))
    z = np.matmul(x, w1)
    with jax.enable_x64(True):
        act, derivative = ACTIVATIONS[activation]
        hidden, slope = (
            np.asarray(act(jnp.asarray(z))),
            np.asarray(derivative(jnp.asarray(z))),
        )
    dz = np.matmul(g, w2.swapaxes(1, 2)) * slope
    d_x = np.matmul(dz, w1.swapaxes(1, 2))
    d_w1, d_w2 = np.matmul(x.swapaxes(1, 2), dz), np.matmul(hidden.swapaxes(1, 2), g)
    return np.matmul(hidden, w2), (d_x, d_w1, d_w2)


def plain(activation):
    """As one writes it: the activation in float32, every result rounded once."""

    def mlp(x, w1, w2):
        z = jnp.einsum("hbd,hde->hbe", x, w1).astype(jnp.float32)
        hidden = ACTIVATIONS[activation].value(z).astype(x.dtype)
        return jnp.einsum("hbe,hed->hbd", hidden, w2)

    return mlp


@activations
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_xla(activation, dtype):
    args, g = make_args(3, 17, 65, 130, dtype)
    got = value_and_vjp(lambda *a: flash_mlp(*a, activation=activation), args, g)
    assert_as_exact(
        got, value_and_vjp(plain(activation), args, g), exact(args, g, activation)
    )


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 63, 17, 64), (1, 130, 64, 63)])
def test_xla_at_odd_sizes(size):
    heads, batch, dim, hidden = size
    args, g = make_args(heads, batch, dim, hidden, jnp.float32)
    got = value_and_vjp(flash_mlp, args, g)
    assert_as_exact(got, value_and_vjp(plain("silu"), args, g), exact(args, g, "silu"))


def test_heads_are_sharded_without_collectives():
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    args, g = make_args(4, 20, 16, 40, jnp.float32)
    spec = jax.P("heads")
    sharded = jax.shard_map(flash_mlp, mesh=mesh, in_specs=spec, out_specs=spec)
    got, expected = (value_and_vjp(fn, args, g) for fn in (sharded, flash_mlp))
    assert_near(got, expected)
    program = jax.jit(sharded).lower(*args).compile().as_text()
    assert program is not None
    assert not re.search("all-gather|all-reduce|collective-permute|all-to-all", program)


@activations
def test_transforms(activation):
    args, g = make_args(2, 6, 8, 12, jnp.float32)

    def mlp(*args):
        return flash_mlp(*args, activation=activation)

    expected = value_and_vjp(mlp, args, g)
    assert_near(value_and_vjp(jax.checkpoint(mlp), args, g), expected)

    def by_heads(*args):
        def step(carry, one):
            return carry, mlp(*(a[None] for a in one))[0]

        return jax.lax.scan(step, None, args)[1]

    assert_near(value_and_vjp(by_heads, args, g), expected)
    stacked = jax.vmap(mlp)(*(jnp.stack([a, -a]) for a in args))
    assert_near(stacked[0], expected[0])


def kernel(activation):
    return lambda *args: _flash_mlp_mgpu.mlp(*args, activation)


# Tiles are 64 rows for each of two warpgroups, and 128 or 64 columns: sizes that cross
# them, fall short of one, and leave the second warpgroup nothing.
@pytest.mark.parametrize(
    "size, activation, dtype",
    [
        ((2, 150, 64, 264), "silu", jnp.bfloat16),
        ((1, 130, 64, 136), "gelu", jnp.bfloat16),
        ((2, 65, 32, 72), "sigmoid", jnp.float16),
        ((1, 17, 16, 8), "relu", jnp.bfloat16),
        ((1, 63, 96, 200), "relu2", jnp.float16),
        ((1, 1, 48, 400), "leaky_relu", jnp.bfloat16),
        ((1, 129, 128, 136), "identity", jnp.bfloat16),
        ((1, 70, 192, 72), "silu", jnp.bfloat16),
        ((1, 70, 256, 72), "silu", jnp.bfloat16),
    ],
    ids=str,
)
def test_kernel(interpreted, size, activation, dtype):
    heads, batch, dim, hidden = size
    args, g = make_args(heads, batch, dim, hidden, dtype)
    got = value_and_vjp(kernel(activation), args, g)
    bound = value_and_vjp(plain(activation), args, g)
    assert_as_exact(got, bound, exact(args, g, activation))


def test_kernel_under_vmap(interpreted):
    (x, w1, w2), g = make_args(2, 20, 32, 40, jnp.bfloat16)
    several = jnp.stack([x, 2 * x, -x])

    def gradients(x):
        return value_and_vjp(kernel("silu"), (x, w1, w2), g)

    got = jax.vmap(gradients)(several)
    expected = [value_and_vjp(plain("silu"), (x, w1, w2), g) for x in several]
    for i, one in enumerate(expected):
        numbers = exact((several[i], w1, w2), g, "silu")
        assert_as_exact(jax.tree.map(lambda a, i=i: a[i], got), one, numbers)


def test_kernel_is_deterministic(interpreted):
    args, g = make_args(1, 70, 64, 136, jnp.bfloat16)
    first, again = (value_and_vjp(kernel("silu"), args, g) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))


def test_kernel_keeps_heads_apart_and_propagates_what_is_not_finite(interpreted):
    (x, w1, w2), _ = make_args(2, 20, 32, 40, jnp.bfloat16)
    expected = kernel("relu")(x, w1, w2)
    spoiled = x.at[1, 3].set(jnp.nan).at[1, 5, 0].set(jnp.inf)
    y = kernel("relu")(spoiled, w1, w2)
    np.testing.assert_array_equal(*to_float64((y[0], expected[0])))
    finite = np.isfinite(to_float64(y[1])).all(-1)
    assert set(np.flatnonzero(~finite)) == {3, 5}


def test_only_the_arguments_are_saved_for_the_backward(interpreted):
    args, _ = make_args(1, 20, 32, 40, jnp.bfloat16)
    saved = jax.tree.leaves(jax.vjp(kernel("silu"), *args)[1])
    assert sorted(a.shape for a in saved) == sorted(a.shape for a in args)


@activations
def test_the_kernels_forms_are_those_of_the_table(activation):
    z = jnp.array([-1e4, -30.0, -1.0, 0.0, 0.5, 30.0, 1e4])
    ours, table = IN_KERNEL[activation], ACTIVATIONS[activation]
    for a, b in zip(ours, table, strict=True):
        np.testing.assert_allclose(a(z), b(z), rtol=1e-6, atol=1e-5)


def shapes(heads=2, batch=8, dim=64, hidden=128, dtype=jnp.bfloat16):
    return make_args(heads, batch, dim, hidden, dtype)[0]


@pytest.mark.parametrize(
    "args, reason",
    [
        (shapes(dtype=jnp.float32), "dtype must be bfloat16 or float16 for mosaic_gpu"),
        (shapes(dim=320), "dim must be a multiple of 16 from 16 to 256 .*, got 320"),
        (shapes(dim=24), "dim must be a multiple of 16 from 16 to 256 .*, got 24"),
        (shapes(hidden=100), "hidden must be a multiple of 8 for mosaic_gpu, got 100"),
        (shapes(batch=0), r"no axis may be empty for mosaic_gpu, got \(2, 0, 64\)"),
    ],
)
def test_unsupported(args, reason):
    with pytest.raises(NotImplementedError, match=f"flash_mlp: {reason}"):
        flash_mlp(*args, implementation="mosaic_gpu")


def test_unsupported_device():
    assert not on_hopper()
    with pytest.raises(NotImplementedError, match="needs an H100 or H200"):
        flash_mlp(*shapes(), implementation="mosaic_gpu")
    assert _flash_mlp_mgpu.unsupported(*shapes(), on_hopper=True) is None


def test_empty():
    assert flash_mlp(*shapes(batch=0)).shape == (2, 0, 64)
    np.testing.assert_array_equal(flash_mlp(*shapes(hidden=0)), 0)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((63, 64, 2), "rows must be a multiple of 64, got 63"),
        ((64, 12, 2), "columns must be a multiple of 8, got 12"),
        ((64, 512, 2), "columns must be at most 256 .*, got 512 and 2"),
    ],
)
def test_config_refuses_nonsense(sizes, message):
    with pytest.raises(ValueError, match=f"flash_mlp: {message}"):
        _flash_mlp_mgpu.Config(*sizes)


X, W1, W2 = jnp.ones((2, 3, 8)), jnp.ones((2, 8, 5)), jnp.ones((2, 5, 8))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: untyped.flash_mlp(X[0], W1, W2),
            ValueError,
            r"flash_mlp: x must have shape \(heads, batch, dim\), got \(3, 8\)",
        ),
        (
            lambda: untyped.flash_mlp(X, W1[:1], W2),
            ValueError,
            r"w1 must have shape \(2, 8, 5\) for x of shape .*, got \(1, 8, 5\)",
        ),
        (
            lambda: untyped.flash_mlp(X, W1, W2.mT),
            ValueError,
            r"w2 must have shape \(2, 5, 8\) for x of shape .*, got \(2, 8, 5\)",
        ),
        (
            lambda: untyped.flash_mlp(X, W1[0], W2),
            ValueError,
            r"w1 must have shape \(2, 8, hidden\) .*, got \(8, 5\)",
        ),
        (
            lambda: untyped.flash_mlp(X, W1, W2, activation=""),
            ValueError,
            "flash_mlp: activation must be one of 'silu', .*, got ''",
        ),
        (
            lambda: untyped.flash_mlp(X, W1, W2, implementation="triton"),
            ValueError,
            "implementation must be one of None, 'xla', 'mosaic_gpu', got 'triton'",
        ),
        (
            lambda: untyped.flash_mlp(X, W1.astype(int), W2),
            TypeError,
            "w1 must have a floating-point dtype",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@activations
@pytest.mark.parametrize("dim", [16, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: d.__name__)
def test_kernel_on_gpu(activation, dim, dtype):
    args, g = make_args(3, 1000, dim, 520, dtype)

    def run(*args):
        return flash_mlp(*args, activation=activation, implementation="mosaic_gpu")

    got = value_and_vjp(run, args, g)
    bound = value_and_vjp(plain(activation), args, g)
    assert_as_exact(got, bound, exact(args, g, activation))
