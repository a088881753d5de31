"""Low-rank MLPs in Hopper kernels, in an emulator that detects races."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    SELECTIONS,
    assert_as_close,
    low_rank_relu2_float64,
    mesh,
    swiglu_args,
    swiglu_float64,
    to_float64,
    value_and_vjp,
    with_vjp,
)
from mlp_definitions import low_rank_swiglu_float64, make

from jaxkern import low_rank_relu2, low_rank_swiglu, swiglu
from jaxkern._mlp import thresholds
from jaxkern._mlp.hopper import fused, sparse
from jaxkern._mosaic.matmul import MatmulTiles
from jaxkern._sparsity.hopper import product
from jaxkern.testing import plain as definitions
from jaxkern.testing.compiler import lower

BF16, F16 = jnp.bfloat16, jnp.float16
relu2 = partial(low_rank_relu2, implementation="mosaic_gpu")
gated = partial(low_rank_swiglu, implementation="mosaic_gpu")


emulated = pytest.mark.usefixtures("hopper")
lowered = pytest.mark.usefixtures("chooses_hopper")


@pytest.fixture(params=[256, 128, 64])
def columns(request, monkeypatch):
    """Use tiles of so many columns, or of the most below that a kernel allows."""

    def choose(work, valid=(256, 128, 64)):
        return max(c for c in valid if c <= max(request.param, min(valid)))

    for module in (fused, sparse, product):
        monkeypatch.setattr(module, "choose_columns", choose)


def signs(rng, shape, count, dtype):
    """Return zeros with `count` entries of 0.5 or -0.5 in each column."""
    there = rng.random(shape).argsort(0) < count
    return jnp.asarray(there * rng.choice([-0.5, 0.5], shape), dtype)


def make_exact(size, dtype=BF16) -> Any:
    """Return `make`'s arguments, with hidden features that are exact in any order.

    So all matmuls give the same features, of which 2:4 selects the same, ties included.
    The features are squares of at most 16 quarters, which take 8 bits.
    """
    tokens, d_in, hidden, rank, _ = size
    _, gate, _, down, g = make(size, dtype)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-1, 2, (tokens, d_in)), dtype)
    up = signs(rng, (d_in, rank), 4, dtype), signs(rng, (rank, hidden), 4, dtype)
    return x, gate, up, down, g


def check_relu2(size, dtype=BF16, sparsity=None, fn: Any = relu2, make=make):
    x, _, up, down, g = make(size, dtype)
    run = partial(fn, sparsity=sparsity)
    got = value_and_vjp(run, (x, up, down), g)
    plain = partial(definitions.relu2, select=SELECTIONS[sparsity])
    bound = value_and_vjp(plain, (x, up, down), g)
    wide = to_float64((x, up, down, g))
    assert_as_close(got, bound, low_rank_relu2_float64(*wide, sparsity=sparsity))


def check_gated(size, dtype=BF16):
    *args, g = make(size, dtype)
    got = value_and_vjp(gated, args, g)
    bound = value_and_vjp(definitions.low_rank_swiglu, args, g)
    assert_as_close(got, bound, low_rank_swiglu_float64(args, g))


def check_swiglu(size, dtype=BF16):
    """Check the full-rank MLP; `size` is (tokens, d_in, hidden, d_out)."""
    tokens, d_in, hidden, d_out = size
    args, g = swiglu_args((tokens, d_in, hidden, 0, d_out), dtype)
    got = value_and_vjp(partial(swiglu, implementation="mosaic_gpu"), args, g)
    bound = value_and_vjp(definitions.swiglu, args, g)
    assert_as_close(got, bound, swiglu_float64(*to_float64((*args, g))))


# Ranks that differ, so that hidden features go to memory, and multiples of no tile.
SIZE = (150, 160, 203, 70, 40)
SIZES = [SIZE, (7, 90, 130, 3, 1), (264, 140, 320, 64, 66)]
LARGE = (2000, 1024, 2730, 320, 300)
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
sizes_and_dtypes = pytest.mark.parametrize(
    "size, dtype", [*((size, BF16) for size in (*SIZES, LARGE)), (SIZE, F16)]
)
sparse_kinds = pytest.mark.parametrize("sparsity", ["2:4", "2:4-soft"])


@emulated
@sizes
def test_relu2(size):
    check_relu2(size)


@emulated
@sizes
def test_gated(size):
    check_gated(size)


@emulated
@pytest.mark.parametrize("size", [(150, 90, 203, 70), (7, 3, 5, 2)])
def test_swiglu(size):
    check_swiglu(size)


@emulated
@sparse_kinds
@pytest.mark.parametrize("size", SIZES[:2])
def test_sparse(size, sparsity):
    check_relu2(size, sparsity=sparsity)


@emulated
@pytest.mark.usefixtures("columns")
def test_tiles(request):
    size = (140, 160, 300, 70, 40)
    check_relu2(size)
    check_relu2(size, sparsity="2:4-soft")
    # The gate's tiles have 128 columns at most.
    if request.node.callspec.params["columns"] < 256:
        check_gated(size)


@emulated
def test_float16():
    size = SIZES[1]
    check_relu2(size, F16)
    check_gated(size, F16)
    check_relu2(size, F16, "2:4")
    check_relu2(size, F16, "2:4-soft")


@emulated
def test_features_that_are_dropped_for_all_tokens():
    check_relu2(SIZES[1], sparsity="2:4-static")


@emulated
def test_equal_ranks_need_not_reach_memory(monkeypatch):
    """The kernels of `flash_mlp` run, where these are faster."""
    monkeypatch.setattr(thresholds, "dense_kernel", lambda ranks: "flash_mlp")
    check_relu2((70, 33, 144, 16, 16), sparsity="2:4-static")
    check_gated((70, 80, 144, 40, 40))


def integers(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).integers(-1, 2, shape), BF16)


@pytest.mark.parametrize(
    "size, dtype", [*((size, BF16) for size in SIZES), (SIZE, F16)]
)
def test_exact_hidden_features(size, dtype):
    x, _, up, _, _ = make_exact(size, dtype)
    plain = definitions.relu2
    hidden = jnp.eye(up[1].shape[1], dtype=dtype)
    got = plain(x, up, (hidden, hidden))
    wide_x, (first, second) = to_float64((x, up))
    exact = np.maximum(wide_x @ first @ second, 0) ** 2
    np.testing.assert_array_equal(to_float64(got), exact)
    _, third, second, _ = np.moveaxis(
        np.sort(to_float64(definitions.groups(got))), 2, 0
    )
    assert ((second == third) & (second > 0)).mean() > 0.05
    assert (second > third).mean() > 0.3


@emulated
@pytest.mark.parametrize("size, sparsity", [(SIZE, "2:4"), (SIZES[1], "2:4-soft")])
def test_sparse_with_exact_hidden_features(size, sparsity):
    check_relu2(size, sparsity=sparsity, make=make_exact)


@emulated
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_what_is_selected_is_the_references(gradient):
    """Small integers have many ties, and nothing is rounded before the last result."""
    x, w_up = integers(0, (140, 72)), integers(1, (72, 200))
    up = jnp.eye(72, 8, dtype=BF16), w_up[:8]
    down = integers(2, (200, 16)), jnp.eye(16, 72, dtype=BF16)
    g = integers(3, (140, 72))
    run = partial(low_rank_relu2, sparsity="2:4", gradient=gradient)
    got, expected = (
        value_and_vjp(partial(run, implementation=name), (x, up, down), g)
        for name in ("mosaic_gpu", "xla")
    )
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))


@emulated
def test_straight_through():
    """All of the gradient reaches the hidden features, whatever was kept."""
    x, _, up, down, g = make((40, 160, 203, 20, 24))
    _, (_, dense, _) = value_and_vjp(relu2, (x, up, down), g)
    for sparsity in ("2:4", "2:4-soft"):
        run = partial(relu2, sparsity=sparsity, gradient="straight_through")
        _, (_, d_up, _) = value_and_vjp(run, (x, up, down), g)
        # The gradient depends on no value that was dropped.
        np.testing.assert_array_equal(*to_float64((d_up[1], dense[1])))


@emulated
def test_packed_features_are_all_that_is_kept():
    """With 2:4's exact gradient, packed features take 9/16 of dense features' bytes."""
    x, _, up, down, _ = make((128, 160, 512, 70, 40))

    def kept(**options):
        pull = jax.vjp(partial(relu2, **options), x, up, down)[1]
        return sum(a.nbytes for a in jax.tree.leaves(pull))

    hidden = 2 * 128 * 512
    dense = kept()
    assert kept(sparsity="2:4") == dense - hidden * 7 // 16
    more = hidden * 9 // 16
    assert kept(sparsity="2:4", gradient="straight_through") == dense + more


@emulated
def test_under_vmap():
    x, _, up, down, g = make((20, 60, 70, 8, 9))
    several = jnp.stack([x, 2 * x, -x])

    def gradients(x):
        return value_and_vjp(relu2, (x, up, down), g)

    got = jax.vmap(gradients)(several)
    plain = definitions.relu2
    for i, one in enumerate(several):
        bound = value_and_vjp(plain, (one, up, down), g)
        picked = jax.tree.map(lambda a, i=i: a[i], got)
        wide = to_float64((one, up, down, g))
        assert_as_close(picked, bound, low_rank_relu2_float64(*wide, sparsity=None))


@emulated
@pytest.mark.parametrize("sparsity", [None, "2:4"])
def test_in_shard_map_and_scan(sparsity):
    # The emulator has one device at a time.
    one = mesh(i=1)
    tokens = jax.P("i")

    def run(x, up, down, sparsity=None):
        def local(x, up, down):
            def step(carry, one):
                y = relu2(one, up, down, sparsity=sparsity)
                return carry, y

            return jax.lax.scan(step, None, x.reshape(2, -1, x.shape[1]))[1]

        specs = tokens, jax.P(), jax.P()
        split = jax.shard_map(
            local, mesh=one, in_specs=specs, out_specs=jax.P(None, "i")
        )
        return split(x, up, down).reshape(x.shape)

    check_relu2((24, 60, 70, 8, 9), sparsity=sparsity, fn=run)


@emulated
def test_more_batch_axes():
    def run(x, up, down, sparsity=None):
        y = relu2(x.reshape(2, 3, 4, -1), up, down, sparsity=sparsity)
        assert y.shape[:3] == (2, 3, 4)
        return y.reshape(x.shape)

    check_relu2((24, 60, 70, 8, 9), fn=run)


@lowered
def test_under_remat():
    """Programs are only lowered: the emulator's callbacks cannot be checkpointed."""
    x, _, up, down, _ = make((20, 60, 70, 8, 9))

    def count(fn):
        def loss(*args):
            return jnp.sin(fn(*args)).astype(jnp.float32).sum()

        return len(lower(jax.grad(loss, argnums=(0, 1, 2)), (x, up, down)))

    assert count(relu2) == 2
    assert count(jax.checkpoint(lambda *a: jnp.sin(relu2(*a)))) == 3
    assert count(partial(relu2, sparsity="2:4")) == 3


@emulated
@pytest.mark.parametrize("sparsity", [None, "2:4", "2:4-soft"])
def test_extreme_values_stay_in_their_token_and_calls_are_equal(sparsity):
    x, _, up, down, g = make((140, 60, 70, 8, 9))
    extremes = jnp.array([1e4, -1e4, jnp.inf, -jnp.inf, jnp.nan], BF16)
    run = with_vjp(partial(relu2, sparsity=sparsity))
    y, (dx, *_) = run((x.at[:5, 0].set(extremes), up, down), g)
    first = run((x, up, down), g)
    for a, b in zip(*map(jax.tree.leaves, (first, run((x, up, down), g))), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))
    clean, (clean_dx, *_) = first
    for got, expected in ((y, clean), (dx, clean_dx)):
        np.testing.assert_array_equal(*to_float64((got[5:], expected[5:])))
    assert np.isfinite(to_float64(y[:2])).all()
    assert np.isnan(to_float64(y[4])).all()


@lowered
@pytest.mark.parametrize("size", [(1, 40, 40, 1, 2), (2047, 600, 1021, 130, 70)])
def test_any_size_lowers_for_a_gpu(size):
    """Lowering checks more than the emulator does."""
    x, gate, up, down, g = make(size)

    def count(fn, *args):
        return len(lower(lambda args, g: jax.vjp(fn, *args)[1](g), (args, g)))

    assert count(relu2, x, up, down) == 2
    assert count(gated, x, gate, up, down) == 2
    assert count(partial(relu2, sparsity="2:4"), x, up, down) == 3
    assert count(partial(relu2, sparsity="2:4-soft"), x, up, down) == 3


def test_arrays_that_would_not_lower_are_refused():
    a, b = jnp.zeros((20, 64), BF16), jnp.zeros((64, 64), BF16)
    with pytest.raises(ValueError, match="multiples of 8 rows and 64 columns, got"):
        fused.relu2_forward()(a, b)


@pytest.mark.parametrize("columns, steps", [(96, 4), (512, 4), (128, 1)])
def test_config_refuses_nonsense(columns, steps):
    message = f"columns must be 64, 128 or 256 .* got {columns} and {steps}"
    with pytest.raises(ValueError, match=f"MatmulTiles: {message}"):
        MatmulTiles(columns, steps)


@lowered
def test_gate_and_up_must_have_the_same_rank():
    x, gate, up, down, _ = make((7, 90, 144, 16, 20))
    gate = gate[0][:, 1:], gate[1][1:]
    match = "low_rank_swiglu: ranks of gate and up must be equal for mosaic_gpu, got 15"
    with pytest.raises(NotImplementedError, match=match):
        gated(x, gate, up, down)


@pytest.mark.gpu
@sizes_and_dtypes
def test_on_gpu(size, dtype):
    check_relu2(size, dtype)
    check_gated(size, dtype)
    check_swiglu(size[:4], dtype)


@pytest.mark.gpu
@sparse_kinds
@sizes_and_dtypes
def test_sparse_on_gpu(size, dtype, sparsity):
    check_relu2(size, dtype, sparsity, make=make_exact)


@pytest.mark.gpu
@pytest.mark.usefixtures("columns")
def test_tiles_on_gpu():
    size = (1000, 520, 1030, 130, 70)
    check_relu2(size)
    check_gated(size)
    check_relu2(size, sparsity="2:4", make=make_exact)
