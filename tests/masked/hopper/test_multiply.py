"""The Hopper kernels of masked products, in an emulator that detects races."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_as_close, mesh, to_float64, value_and_vjp, with_vjp
from masked_definitions import (
    BF16,
    F16,
    F32,
    KEY,
    SLOPES,
    apply_bilinear,
    bilinear_args,
    bilinear_float64,
    exact_matmul,
    kernel_args,
    one_plus_sigmoid,
    plain_bilinear,
)

from jaxkern import (
    PackedMask,
    masked_matmul,
    pack_mask,
    reinmax,
    straight_through,
)
from jaxkern._masked.hopper import product
from jaxkern._masked.hopper.product import MaskedTiles
from jaxkern.testing import plain as definitions
from jaxkern.testing.compiler import lower

kernel = partial(masked_matmul, implementation="mosaic_gpu")
hard = partial(kernel, estimator="straight_through")
on_hopper = pytest.mark.usefixtures("hopper")


def plain(x, w, logits):
    """The plain form, in which every result is rounded once."""
    mask = straight_through(logits).astype(w.dtype)
    return definitions.masked_matmul(x, w, mask if mask.ndim == 3 else mask[None])


def check(args, g, fn=hard):
    bound = value_and_vjp(plain, args, g)
    assert_as_close(value_and_vjp(fn, args, g), bound, exact_matmul(args, g))


def check_masks_alone(args, g, estimator=straight_through):
    x, w, logits = args

    def of_logits(fn):
        return value_and_vjp(lambda logits: fn(x, w, logits), (logits,), g)

    got = of_logits(partial(kernel, estimator=estimator))
    bound = of_logits(partial(sloped, estimator))
    y, (_, _, d_logits) = exact_matmul(args, g, SLOPES[estimator])
    assert_as_close(got, bound, (y, (d_logits,)))


def check_packed(args, g):
    """Check values and the gradients of x and w; bits have no gradient."""
    x, w, logits = args
    packed = pack_mask(logits)
    assert isinstance(packed, PackedMask)
    got = value_and_vjp(lambda x, w: kernel(x, w, packed), (x, w), g)
    bound = value_and_vjp(lambda x, w: plain(x, w, logits), (x, w), g)
    y, gradients = exact_matmul(args, g)
    assert_as_close(got, bound, (y, gradients[:2]))


def sloped(estimator, x, w, logits):
    return definitions.masked_matmul(x, w, estimator(logits).astype(w.dtype))


def check_sloped(args, g, estimator, called=None):
    """Check an estimator, which the kernel gets, or `called` in its place."""
    got = value_and_vjp(partial(kernel, estimator=called or estimator), args, g)
    bound = value_and_vjp(partial(sloped, estimator), args, g)
    assert_as_close(got, bound, exact_matmul(args, g, SLOPES[estimator]))


# (batch, seq, d_in, d_out): several tiles, less than a tile, and multiples of none.
@on_hopper
@pytest.mark.parametrize(
    "size, dtype, logits_dtype, shared",
    [
        ((2, 72, 70, 72), BF16, F32, False),
        ((2, 20, 130, 64), F16, F16, False),
        ((1, 1, 1, 1), BF16, BF16, False),
        ((3, 30, 72, 64), BF16, F32, True),
    ],
    ids=["float32 logits", "float16", "one of each", "shared"],
)
def test_values_and_gradients(size, dtype, logits_dtype, shared):
    check(*kernel_args(size, dtype, logits_dtype, shared))


@on_hopper
def test_a_packed_mask_that_all_share():
    check_packed(*kernel_args((2, 20, 70, 40), shared=True))


def use_tiles(monkeypatch, *sizes):
    monkeypatch.setattr(product, "choose_tiles", lambda *a: MaskedTiles(*sizes))


@on_hopper
@pytest.mark.parametrize("tokens", [256, 64])
def test_tiles(tokens, monkeypatch):
    """There are more steps than the rings have slots."""
    use_tiles(monkeypatch, tokens)
    check(*kernel_args((1, 72, 264, 72), logits_dtype=F32))


@on_hopper
def test_tiles_of_gradients():
    """Each gradient takes several tiles of 64 columns, or of 128 if w's is alone."""
    args, g = kernel_args((3, 20, 136, 136), logits_dtype=F32)
    check(args, g)
    check_masks_alone(args, g)
    check_packed(args, g)


@on_hopper
@pytest.mark.parametrize("splits", [2, 6])
def test_parts_of_the_contracted_axis(splits, monkeypatch):
    """One of two parts has a step less than the other, and one of six has no step."""
    use_tiles(monkeypatch, 128, splits)
    check(*kernel_args((1, 72, 264, 72), logits_dtype=F32))


@on_hopper
def test_packed_masks_in_large_tiles(monkeypatch):
    use_tiles(monkeypatch, 256, 2)
    check_packed(*kernel_args((1, 72, 136, 72)))


@on_hopper
def test_a_block_takes_more_samples_than_it_has_slots():
    """A second run gives the same bits."""
    args, g = kernel_args((5, 8, 64, 64), logits_dtype=F32)
    pull = with_vjp(hard)
    first, again = (pull(args, g) for _ in range(2))
    assert_as_close(first, value_and_vjp(plain, args, g), exact_matmul(args, g))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(*to_float64((a, b)))


@on_hopper
def test_masks_alone_are_trained():
    """No gradient is summed over the samples, so these may come in any order."""
    check_masks_alone(*kernel_args((5, 8, 64, 200), logits_dtype=F32))


@on_hopper
def test_mask_of_an_estimator():
    """XLA computes mask and gradient of an estimator that the kernel does not know."""
    args, g = kernel_args((2, 20, 40, 64), logits_dtype=F32)
    check_sloped(args, g, reinmax, lambda logits: reinmax(logits))


@on_hopper
@pytest.mark.parametrize(
    "estimator, alone",
    [(one_plus_sigmoid, False), (reinmax, False), (reinmax, True)],
    ids=["one_plus_sigmoid", "reinmax", "reinmax alone"],
)
def test_slopes_in_the_kernel(estimator, alone):
    """Small slopes are as exact; there are more samples than slots."""
    args, g = kernel_args((3, 20, 40, 64), logits_dtype=F32)
    x, w, logits = args
    args = x, w, logits.at[1].multiply(20)
    (check_masks_alone if alone else check_sloped)(args, g, estimator)


@on_hopper
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_drawn_masks_are_those_of_xla(shared):
    args, g = kernel_args((2, 10, 30, 40), logits_dtype=F32, shared=shared)
    fn = partial(masked_matmul, estimator=reinmax, key=KEY)
    ours, theirs = (
        value_and_vjp(partial(fn, implementation=name), args, g)
        for name in ("mosaic_gpu", "xla")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = to_float64((a, b))
        assert np.abs(a - b).max() < float(jnp.finfo(BF16).eps) * np.abs(b).max()


@on_hopper
def test_bilinear():
    args, g = bilinear_args((1, 20, 40, 36, 12), BF16)
    options = {"estimator": "straight_through", "implementation": "mosaic_gpu"}
    fn = partial(apply_bilinear, **options)
    bound = value_and_vjp(plain_bilinear, args, g)
    expected = bilinear_float64(*to_float64((*args, g)), slope=np.ones_like)
    assert_as_close(value_and_vjp(fn, args, g), bound, expected)


@on_hopper
def test_logits_at_the_threshold_and_beyond():
    """A weight that is off adds nothing, and a NaN stays in its own sample."""
    (x, w, logits), g = kernel_args((3, 8, 64, 64), logits_dtype=F32)
    values = jnp.array([0.0, -0.0, -jnp.inf, jnp.inf, 1e-45])
    logits = logits.at[0, :5].set(values[:, None]).at[1].set(-1.0)
    check((x, w, logits), g)
    run = jax.jit(hard)
    y = run(x, w, logits)
    assert (y[1] == 0).all()
    spoiled = run(x, w, logits.at[2, 3, 7].set(jnp.nan))
    assert np.isnan(to_float64(spoiled[2, :, 7])).all()
    kept = spoiled.at[2, :, 7].set(y[2, :, 7])
    np.testing.assert_array_equal(*to_float64((kept, y)))


@on_hopper
def test_a_sample_does_not_see_another_ones_infinity():
    (x, w, logits), g = kernel_args((2, 20, 64, 64))
    pull = jax.jit(lambda x: value_and_vjp(hard, (x, w, logits), g))
    y, (d_x, _, d_logits) = pull(x)
    again = pull(x.at[1, 2, 3].set(jnp.inf))
    for a, b in ((y, again[0]), (d_x, again[1][0]), (d_logits, again[1][2])):
        np.testing.assert_array_equal(*to_float64((a[0], b[0])))


@on_hopper
@pytest.mark.parametrize("own_weights", [False, True], ids=["one w", "a w each"])
def test_under_vmap(own_weights):
    (x, w, logits), g = kernel_args((2, 20, 40, 64))
    xs = jnp.stack([x, 2 * x])
    ws = jnp.stack([w, -w]) if own_weights else w

    def pull(x, w):
        return value_and_vjp(hard, (x, w, logits), g)

    got = jax.vmap(pull, in_axes=(0, 0 if own_weights else None))(xs, ws)
    for i in range(2):
        args = xs[i], ws[i] if own_weights else w, logits
        one = jax.tree.map(lambda a, i=i: a[i], got)
        assert_as_close(one, value_and_vjp(plain, args, g), exact_matmul(args, g))


def in_scan(fn):
    """Return `fn` as a scan over the samples."""

    def by_samples(x, w, logits):
        def step(carry, one):
            return carry, fn(one[0][None], w, one[1][None])[0]

        return jax.lax.scan(step, None, (x, logits))[1]

    return by_samples


def in_shard_map(fn):
    # The emulator has one device at a time.
    rows = jax.P("i")
    specs = {"in_specs": (rows, jax.P(), rows), "out_specs": rows}
    return jax.shard_map(fn, mesh=mesh(i=1), **specs)


@on_hopper
@pytest.mark.parametrize("transform", [in_scan, in_shard_map])
def test_under_other_transforms(transform):
    check(*kernel_args((2, 20, 40, 64)), fn=transform(hard))


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize(
    "size, packed",
    [
        ((1, 1, 1, 1), False),
        ((3, 2047, 40, 1001), False),
        ((2, 20, 190, 264), False),
        ((2, 20, 190, 264), True),
    ],
)
def test_any_size_lowers_for_a_gpu(size, packed):
    """Lowering checks more than the emulator does."""
    (x, w, logits), g = kernel_args(size, logits_dtype=F32)
    masks = pack_mask(logits) if packed else logits
    fn = partial(kernel, estimator=None if packed else straight_through)

    def pull(x, w, g):
        return jax.vjp(lambda x, w: fn(x, w, masks), x, w)[1](g)

    # With logits, the forward runs too, because it makes their bits.
    assert len(lower(pull, (x, w, g))) == (2 if packed else 3)


ON_GPU = [
    ((16, 256, 512, 2048), kind) for kind in ("packed", reinmax, one_plus_sigmoid)
]
ON_GPU += [((5, 250, 2048, 500), "logits"), ((1, 256, 512, 2048), "logits")]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size, kind, dtype",
    [((16, 256, 512, 2048), "logits", F16), *((*case, BF16) for case in ON_GPU)],
)
def test_on_gpu(size, kind, dtype):
    """Cases have all kinds of masks at one size, and all sizes with one kind."""
    args, g = kernel_args(size, dtype, F32)
    match kind:
        case "packed":
            check_packed(args, g)
        case "logits":
            check(args, g)
        case _:
            check_sloped(args, g, kind)
