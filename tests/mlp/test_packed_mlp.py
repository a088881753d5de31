import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    DTYPES,
    assert_as_close,
    assert_near,
    low_rank_relu2_float64,
    normal,
    pair,
    to_float64,
    untyped,
)

from jaxkern import low_rank_relu2, nn, pack_2_4, sparsify_2_4, unpack_2_4
from jaxkern._mlp import packed_mlp
from jaxkern.testing import plain as definitions
from jaxkern.testing.compiler import lower

BF16, F16 = jnp.bfloat16, jnp.float16


def make(size, dtype) -> Any:
    """Return x and two pairs of pruned factors, dense and packed.

    size: (tokens, d_in, hidden, rank of up, rank of down).
    """
    tokens, d_in, hidden, rank, other = size
    weights = (
        *pair(10, d_in, rank, hidden, dtype),
        *pair(30, hidden, other, 52, dtype),
    )
    packed = [pack_2_4(w.mT) for w in weights]
    pruned = [unpack_2_4(p).mT for p in packed]
    x = normal(0, (tokens, d_in), dtype)
    return x, (pruned[:2], pruned[2:]), (tuple(packed[:2]), tuple(packed[2:]))


def check(size, dtype, **options):
    x, pruned, packed = make(size, dtype)
    got = low_rank_relu2(x, *packed, **options)
    bound = definitions.relu2(x, pruned[0], pruned[1])
    g = np.zeros(bound.shape)
    wide = to_float64((x, pruned[0], pruned[1]))
    exact, _ = low_rank_relu2_float64(wide[0], wide[1], wide[2], g, sparsity=None)
    assert_as_close(got, bound, exact)


SIZES = [(1, 8, 12, 4, 3), (70, 70, 150, 33, 20), (200, 140, 300, 72, 64)]
IN_HALF = [*((size, BF16) for size in SIZES), (SIZES[1], F16)]
in_half = pytest.mark.parametrize("size, dtype", IN_HALF)


@pytest.mark.parametrize("size, dtype", [*IN_HALF, (SIZES[1], jnp.float32)])
def test_values(size, dtype):
    check(size, dtype)


@pytest.mark.usefixtures("hopper")
@in_half
def test_kernel(size, dtype):
    check(size, dtype, implementation="mosaic_gpu")


@pytest.mark.gpu
@in_half
def test_kernel_on_gpu(size, dtype):
    check(size, dtype, implementation="mosaic_gpu")


@pytest.mark.usefixtures("hopper")
def test_gradients_are_those_of_xla():
    x, _, packed = make((70, 40, 60, 20, 16), BF16)
    factors, positions = zip(
        *(
            (f.values, dataclasses.replace(f, values=X))
            for pair in packed
            for f in pair
        ),
        strict=True,
    )

    def run(x, values, implementation):
        pairs = zip(positions, values, strict=True)
        up_in, up_out, *down = (dataclasses.replace(f, values=v) for f, v in pairs)
        pairs = (up_in, up_out), tuple(down)
        y = low_rank_relu2(x, *pairs, implementation=implementation)
        return y.astype(jnp.float32).sum()

    got, expected = (
        jax.jit(jax.grad(run, argnums=(0, 1)), static_argnums=2)(x, factors, name)
        for name in ("mosaic_gpu", "xla")
    )
    jax.tree.map(np.testing.assert_array_equal, *to_float64((got, expected)))


@pytest.mark.usefixtures("chooses_hopper")
def test_a_kernel_is_four_and_is_picked_for_many_tokens(monkeypatch):
    x, _, packed = make((70, 70, 150, 33, 20), BF16)
    arrays, tree = jax.tree.flatten(packed)

    def run(x, *arrays, **options):
        return low_rank_relu2(x, *tree.unflatten(arrays), **options)

    assert lower(run, (x, *arrays)) == []
    named = partial(run, implementation="mosaic_gpu")
    assert len(lower(named, (x, *arrays))) == 4
    monkeypatch.setattr(packed_mlp, "PACKED_RELU2_TOKENS", 70)
    # A new function, because JAX keeps traces by function.
    assert len(lower(lambda *args: run(*args), (x, *arrays))) == 4
    assert lower(run, (x[1:], *arrays)) == []


def test_more_batch_axes():
    x, _, packed = make((6, 8, 12, 4, 3), jnp.float32)
    y = low_rank_relu2(x.reshape(2, 3, 8), *packed)
    np.testing.assert_array_equal(y.reshape(6, 52), low_rank_relu2(x, *packed))


@pytest.mark.parametrize("dtype", [None, BF16])
def test_pruned_module(dtype):
    module = nn.LowRankReLU2(24, 48, rank=8, dtype=dtype, rngs=nnx.Rngs(0))
    pruned, errors = module.prune_2_4()
    factors = *module.up.weight, *module.down.weight
    for w, factor in zip(factors, pruned.factors, strict=True):
        kept = sparsify_2_4(w.astype(dtype or w.dtype).mT)
        np.testing.assert_array_equal(*to_float64((unpack_2_4(factor), kept)))
    lost = to_float64((factors[0], unpack_2_4(pruned.factors[0]).mT))
    error = np.linalg.norm(lost[0] - lost[1]) / np.linalg.norm(lost[0])
    assert abs(errors["up_in"] - error) < 0.01 and 0.2 < error < 0.6
    x = normal(0, (2, 3, 24))
    up_in, up_out, down_in, down_out = pruned.factors
    expected = low_rank_relu2(
        x.astype(dtype or x.dtype), (up_in, up_out), (down_in, down_out)
    )
    np.testing.assert_array_equal(*to_float64((pruned(x), expected)))
    graph, state = nnx.split(pruned)
    again = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    # A fused activation need not be rounded.
    assert_near(again, expected, 1e-5 if dtype is None else 2**-6)
    # No weight is trained, and 9/16 of the bytes are left, or 17/32 in 32 bits.
    assert not jax.tree.leaves(nnx.state(pruned, nnx.Param))
    sizes = [a.nbytes for a in jax.tree.leaves(nnx.state(pruned))]
    dense = sum(w.size for w in factors) * jnp.dtype(dtype or jnp.float32).itemsize
    assert sum(sizes) < 0.65 * dense


@pytest.mark.usefixtures("promoting")
def test_pruned_module_promotes_as_others_do():
    module = nn.LowRankReLU2(24, 48, rank=8, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    pruned, _ = module.prune_2_4()
    assert pruned.factors[0].values.dtype == jnp.float16
    for dtype in DTYPES:
        x = normal(0, (3, 24), dtype)
        assert pruned(x).dtype == module(x).dtype
    wide = normal(0, (3, 24))
    up_in, up_out, down_in, down_out = (
        dataclasses.replace(f, values=f.values.astype(jnp.float32))
        for f in pruned.factors
    )
    expected = low_rank_relu2(wide, (up_in, up_out), (down_in, down_out))
    np.testing.assert_array_equal(pruned(wide), expected)


def test_nothing_is_lost_of_zeros():
    init = nnx.initializers.zeros_init()
    module = nn.LowRankReLU2(24, 48, rank=8, kernel_init=init, rngs=nnx.Rngs(0))
    assert set(module.prune_2_4()[1].values()) == {0.0}


X = jnp.ones((3, 8))
PACKED = tuple(pack_2_4(jnp.ones(shape)) for shape in ((4, 8), (12, 4)))
DOWN = tuple(pack_2_4(jnp.ones(shape)) for shape in ((4, 12), (8, 4)))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: untyped.low_rank_relu2(X, PACKED[:1], DOWN),
            TypeError,
            r"low_rank_relu2: up must be a pair \(w_in, w_out\), got tuple of 1",
        ),
        (
            lambda: untyped.low_rank_relu2(X, (PACKED[0], X), DOWN),
            TypeError,
            r"low_rank_relu2: up\[1\] must be a Packed24, got float32",
        ),
        (
            lambda: untyped.low_rank_relu2(X, PACKED, DOWN[::-1]),
            ValueError,
            r"down\[0\] must be a packed matrix of 12 features, got values of shape "
            r"\(8, 2\) and 4 features",
        ),
        (
            lambda: untyped.low_rank_relu2(X.astype(BF16), PACKED, DOWN),
            TypeError,
            r"values of up\[0\] must have the dtype of x, bfloat16, got float32",
        ),
        (
            lambda: untyped.low_rank_relu2(X, PACKED, DOWN, implementation="cuda"),
            ValueError,
            "implementation must be one of None, 'xla', 'mosaic_gpu', got 'cuda'",
        ),
        (
            lambda: untyped.low_rank_relu2(
                X, PACKED, DOWN, implementation="mosaic_gpu"
            ),
            NotImplementedError,
            "low_rank_relu2: dtype must be bfloat16 or float16 for mosaic_gpu, got",
        ),
        (
            lambda: untyped.low_rank_relu2(X, PACKED, DOWN, sparsity="2:4"),
            ValueError,
            "low_rank_relu2: sparsity must be None with Packed24 factors, .*'2:4'",
        ),
        (
            lambda: nn.Packed24ReLU2({"up_in": PACKED[0]}),
            ValueError,
            "Packed24ReLU2: factors must be up_in, up_out, .*, down_out, got up_in",
        ),
        (
            lambda: nn.LowRankReLU2(
                24, 48, rank=9, sparsity="2:4", rngs=nnx.Rngs(0)
            ).prune_2_4(),
            ValueError,
            "prune_2_4: sparsity must be None, .* got '2:4'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_packed_weight_is_a_tree():
    """Checkpoints and `jax.jit` take it as one."""
    leaves, tree = jax.tree.flatten(PACKED[0])
    assert dataclasses.astuple(tree.unflatten(leaves))[2] == 8
