"""Low-rank MLPs in Hopper kernels, in an emulator that detects races."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DTYPES,
    SELECTIONS,
    assert_as_exact,
    low_rank_relu2_float64,
    normal,
    pair,
    swiglu_args,
    swiglu_float64,
    to_float64,
    value_and_vjp,
    with_vjp,
)
from test_mlp import low_rank_swiglu_float64

from jaxkern import low_rank_relu2, low_rank_swiglu, swiglu
from jaxkern._mlp import flash_mlp as _flash_mlp
from jaxkern._mlp.hopper import choose as _mlp_mgpu
from jaxkern._mlp.hopper import fused as _matmul_mgpu
from jaxkern._mosaic import launch as _mgpu_tiles
from jaxkern._mosaic.matmul import Factor, MatmulTiles
from jaxkern._sparsity.hopper import product as _sparsity_mgpu
from jaxkern.testing import plain as definitions
from jaxkern.testing.compiler import lower

BF16, F16 = jnp.bfloat16, jnp.float16
relu2 = partial(low_rank_relu2, implementation="mosaic_gpu")
gated = partial(low_rank_swiglu, implementation="mosaic_gpu")


@pytest.fixture(autouse=True)
def hopper(request, monkeypatch):
    """As if the default device were one, whose blocks take several tiles each."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(_flash_mlp, "on_hopper", lambda: True)
        monkeypatch.setattr(_mlp_mgpu, "on_hopper", lambda: True)
        monkeypatch.setattr(_mgpu_tiles, "multiprocessors", lambda: 2)


@pytest.fixture(params=[256, 128, 64])
def columns(request, monkeypatch):
    """Tiles of so many columns, or the most that a kernel has."""

    def choose(work, valid=(256, 128, 64)):
        return max(c for c in valid if c <= max(request.param, min(valid)))

    for module in (_matmul_mgpu, _sparsity_mgpu):
        monkeypatch.setattr(module, "choose_columns", choose)


def make(size, dtype=BF16) -> Any:
    """x, gate, up, down and a cotangent: (tokens, d_in, hidden, rank, other rank)."""
    tokens, d_in, hidden, rank, other = size
    gate, up = (pair(seed, d_in, rank, hidden, dtype) for seed in (10, 20))
    down = pair(30, hidden, other, d_in, dtype)
    x, g = (normal(seed, (tokens, d_in), dtype) for seed in (0, 1))
    return x, gate, up, down, g


def signs(rng, shape, count, dtype):
    """Halves of either sign, so many in each column, and zeros."""
    there = rng.random(shape).argsort(0) < count
    return jnp.asarray(there * rng.choice([-0.5, 0.5], shape), dtype)


def make_exact(size, dtype=BF16) -> Any:
    """As of `make`, with hidden features that are exact, in whatever order one adds.

    So they are selected alike, ties included, where a matmul before adds otherwise than
    another. They are squares of at most 16 quarters: 8 bits.
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
    plain = partial(definitions.relu2, SELECTIONS[sparsity])
    bound = value_and_vjp(plain, (x, up, down), g)
    wide = to_float64((x, up, down, g))
    assert_as_exact(got, bound, low_rank_relu2_float64(*wide, sparsity=sparsity))


def check_gated(size, dtype=BF16):
    *args, g = make(size, dtype)
    got = value_and_vjp(gated, args, g)
    bound = value_and_vjp(definitions.low_rank_swiglu, args, g)
    assert_as_exact(got, bound, low_rank_swiglu_float64(args, g))


def check_swiglu(size, dtype=BF16):
    """(tokens, d_in, hidden, d_out) of full rank."""
    tokens, d_in, hidden, d_out = size
    args, g = swiglu_args((tokens, d_in, hidden, 0, d_out), dtype)
    got = value_and_vjp(partial(swiglu, implementation="mosaic_gpu"), args, g)
    bound = value_and_vjp(definitions.swiglu, args, g)
    assert_as_exact(got, bound, swiglu_float64(*to_float64((*args, g))))


# Ranks that differ, so that the hidden features go to memory; multiples of no tile.
SIZE = (150, 160, 203, 70, 40)
SIZES = [SIZE, (7, 90, 130, 3, 1), (264, 140, 320, 64, 66)]
LARGE = (2000, 1024, 2730, 320, 300)
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
with_large = pytest.mark.parametrize("size", [*SIZES, LARGE], ids=str)
half = pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: d.__name__)
sparse = pytest.mark.parametrize("sparsity", ["2:4", "2:4-soft"])


@pytest.mark.usefixtures("interpreted")
@sizes
def test_relu2(size):
    check_relu2(size)


@pytest.mark.usefixtures("interpreted")
@sizes
def test_gated(size):
    check_gated(size)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "size", [(150, 90, 203, 70), (7, 3, 5, 2), (264, 64, 320, 130)], ids=str
)
def test_swiglu(size):
    check_swiglu(size)


@pytest.mark.usefixtures("interpreted")
@sparse
@sizes
def test_sparse(size, sparsity):
    check_relu2(size, sparsity=sparsity)


@pytest.mark.usefixtures("interpreted", "columns")
def test_tiles():
    size = (140, 160, 300, 70, 40)
    check_relu2(size)
    check_gated(size)
    check_swiglu((140, 70, 300, 40))
    check_relu2(size, sparsity="2:4-soft")


@pytest.mark.usefixtures("interpreted")
def test_float16():
    check_relu2(SIZE, F16)
    check_gated(SIZE, F16)
    check_relu2(SIZE, F16, "2:4")
    check_relu2(SIZE, F16, "2:4-soft")


@pytest.mark.usefixtures("interpreted")
def test_every_matmul_in_our_kernel(monkeypatch):
    monkeypatch.setattr(_matmul_mgpu, "PLAIN", "mosaic_gpu")
    check_relu2(SIZE)
    check_gated(SIZE)
    check_swiglu((150, 90, 203, 70))
    check_relu2(SIZE, sparsity="2:4")


@pytest.mark.usefixtures("interpreted")
def test_features_that_are_dropped_for_all_tokens():
    check_relu2(SIZE, sparsity="2:4-static")


@pytest.mark.usefixtures("interpreted")
def test_equal_ranks_need_not_reach_memory(monkeypatch):
    """Where the kernels of `flash_mlp` are faster."""
    monkeypatch.setattr(_mlp_mgpu, "kernel_of", lambda *a: "flash_mlp")
    check_relu2((70, 33, 144, 16, 16))
    check_relu2((70, 33, 144, 16, 16), sparsity="2:4-static")
    check_gated((70, 33, 144, 24, 24))


def integers(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).integers(-1, 2, shape), BF16)


@half
@sizes
def test_exact_hidden_features(size, dtype):
    x, _, up, _, _ = make_exact(size, dtype)
    plain = partial(definitions.relu2, definitions.keep_all)
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


@pytest.mark.usefixtures("interpreted")
@sparse
@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_sparse_with_exact_hidden_features(size, sparsity):
    check_relu2(size, sparsity=sparsity, make=make_exact)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_what_is_selected_is_the_references(gradient):
    """In small integers, with many ties, nothing is rounded before the last result."""
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


@pytest.mark.usefixtures("interpreted")
@sparse
def test_straight_through(sparsity):
    """All of the gradient reaches the hidden features, whatever was kept."""
    x, _, up, down, g = make((40, 160, 203, 20, 24))
    run = partial(relu2, sparsity=sparsity, gradient="straight_through")
    _, (_, d_up, _) = value_and_vjp(run, (x, up, down), g)
    _, (_, dense, _) = value_and_vjp(partial(relu2), (x, up, down), g)
    # It depends on no value that was dropped.
    np.testing.assert_array_equal(*to_float64((d_up[1], dense[1])))


@pytest.mark.usefixtures("interpreted")
def test_packed_features_are_all_that_is_kept():
    """Of 2:4 with its exact gradient: 9 bytes in 16, and not the hidden features."""
    x, _, up, down, _ = make((128, 160, 512, 70, 40))

    def kept(**options):
        pull = jax.vjp(partial(relu2, **options), x, up, down)[1]
        return sum(a.nbytes for a in jax.tree.leaves(pull))

    hidden = 2 * 128 * 512
    dense = kept()
    assert kept(sparsity="2:4") == dense - hidden * 7 // 16
    more = hidden * 9 // 16
    assert kept(sparsity="2:4", gradient="straight_through") == dense + more


@pytest.mark.usefixtures("interpreted")
def test_under_vmap():
    x, _, up, down, g = make((20, 60, 70, 8, 9))
    several = jnp.stack([x, 2 * x, -x])

    def gradients(x):
        return value_and_vjp(relu2, (x, up, down), g)

    got = jax.vmap(gradients)(several)
    plain = partial(definitions.relu2, definitions.keep_all)
    for i, one in enumerate(several):
        bound = value_and_vjp(plain, (one, up, down), g)
        picked = jax.tree.map(lambda a, i=i: a[i], got)
        wide = to_float64((one, up, down, g))
        assert_as_exact(picked, bound, low_rank_relu2_float64(*wide, sparsity=None))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("sparsity", [None, "2:4"])
def test_in_shard_map_and_scan(sparsity):
    # The emulator has one device at a time.
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = jax.P("i")

    def run(x, up, down, sparsity=None):
        def local(x, up, down):
            def step(carry, one):
                y = relu2(one, up, down, sparsity=sparsity)
                return carry, y

            return jax.lax.scan(step, None, x.reshape(2, -1, x.shape[1]))[1]

        specs = tokens, jax.P(), jax.P()
        split = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=jax.P(None, "i")
        )
        return split(x, up, down).reshape(x.shape)

    check_relu2((24, 60, 70, 8, 9), sparsity=sparsity, fn=run)


@pytest.mark.usefixtures("interpreted")
def test_more_batch_axes():
    def run(x, up, down, sparsity=None):
        y = relu2(x.reshape(2, 3, 4, -1), up, down, sparsity=sparsity)
        assert y.shape[:3] == (2, 3, 4)
        return y.reshape(x.shape)

    check_relu2((24, 60, 70, 8, 9), fn=run)


def test_under_remat():
    """Lowered for a GPU: the emulator's callbacks cannot be checkpointed."""
    x, _, up, down, _ = make((20, 60, 70, 8, 9))

    def count(fn):
        def loss(*args):
            return jnp.sin(fn(*args)).astype(jnp.float32).sum()

        return len(lower(jax.grad(loss, argnums=(0, 1, 2)), (x, up, down)))

    assert count(relu2) == 2
    assert count(jax.checkpoint(lambda *a: jnp.sin(relu2(*a)))) == 3
    assert count(partial(relu2, sparsity="2:4")) == 3


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("sparsity", [None, "2:4", "2:4-soft"])
def test_extreme_values_stay_in_their_token(sparsity):
    x, _, up, down, g = make((140, 60, 70, 8, 9))
    extremes = jnp.array([1e4, -1e4, jnp.inf, -jnp.inf, jnp.nan], BF16)
    run = with_vjp(partial(relu2, sparsity=sparsity))
    y, (dx, *_) = run((x.at[:5, 0].set(extremes), up, down), g)
    clean, (clean_dx, *_) = run((x, up, down), g)
    for got, expected in ((y, clean), (dx, clean_dx)):
        np.testing.assert_array_equal(*to_float64((got[5:], expected[5:])))
    assert np.isfinite(to_float64(y[:2])).all()
    assert np.isnan(to_float64(y[4])).all()


@pytest.mark.usefixtures("interpreted")
def test_deterministic():
    x, _, up, down, g = make(SIZE)
    run = with_vjp(partial(relu2, sparsity="2:4-soft"))
    both = run((x, up, down), g), run((x, up, down), g)
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("left", [False, True], ids=["left", "left transposed"])
@pytest.mark.parametrize("right", [False, True], ids=["right", "right transposed"])
def test_matmul(left, right):
    """Either factor as it lies or transposed, and some of its columns."""
    m, depth, n = 200, 192, 264
    a = normal(0, (depth, m + 56) if left else (m, depth + 64), BF16)
    b = normal(1, (n, depth + 64) if right else (depth, n + 56), BF16)
    operands = (
        Factor(a, left, 0 if left else 64, m if left else depth),
        Factor(b, right, 64 if right else 0, depth if right else n),
    )
    got = _matmul_mgpu.matmul(*operands)
    a, b = to_float64((a, b))
    exact = (a[:, :m].T if left else a[:, 64:]) @ (b[:, 64:].T if right else b[:, :n])
    assert got.shape == exact.shape
    assert np.abs(to_float64(got) - exact).max() < 0.004 * np.abs(exact).max()


@pytest.mark.parametrize(
    "size", [(1, 40, 40, 1, 2), (2047, 600, 1021, 130, 70)], ids=str
)
def test_any_size_lowers_for_a_gpu(size):
    """Which asks for more than the emulator."""
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
        _matmul_mgpu.matmul(Factor(a), Factor(b))


@pytest.mark.parametrize("columns, steps", [(96, 4), (512, 4), (128, 1)])
def test_config_refuses_nonsense(columns, steps):
    message = f"columns must be 64, 128 or 256 .* got {columns} and {steps}"
    with pytest.raises(ValueError, match=f"MatmulTiles: {message}"):
        MatmulTiles(columns, steps)


def test_gate_and_up_must_have_the_same_rank():
    x, gate, up, down, _ = make((7, 90, 144, 16, 20))
    gate = gate[0][:, 1:], gate[1][1:]
    match = "low_rank_swiglu: ranks of gate and up must be equal for mosaic_gpu, got 15"
    with pytest.raises(NotImplementedError, match=match):
        gated(x, gate, up, down)


@pytest.mark.gpu
@half
@with_large
def test_on_gpu(size, dtype):
    check_relu2(size, dtype)
    check_gated(size, dtype)
    check_swiglu(size[:4], dtype)


@pytest.mark.gpu
@sparse
@half
@with_large
def test_sparse_on_gpu(size, dtype, sparsity):
    check_relu2(size, dtype, sparsity, make=make_exact)


@pytest.mark.gpu
@pytest.mark.usefixtures("columns")
def test_tiles_on_gpu():
    size = (1000, 520, 1030, 130, 70)
    check_relu2(size)
    check_gated(size)
    check_relu2(size, sparsity="2:4", make=make_exact)


@pytest.mark.gpu
def test_every_matmul_in_our_kernel_on_gpu(monkeypatch):
    monkeypatch.setattr(_matmul_mgpu, "PLAIN", "mosaic_gpu")
    check_relu2((1000, 520, 1030, 130, 70))
    check_gated((1000, 520, 1030, 130, 70))
