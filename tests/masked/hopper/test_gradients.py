"""The backward of masked kernels: its launches, and what the forward keeps for it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_definitions import BF16, F32, apply_bilinear, bilinear_args, kernel_args

from jaxkern import masked_matmul, pack_mask, reinmax, straight_through
from jaxkern._masked.hopper.product import MaskedTiles, product_kernel
from jaxkern.testing.compiler import lower

kernel = partial(masked_matmul, implementation="mosaic_gpu")
hard = partial(kernel, estimator=straight_through)
chooses_hopper = pytest.mark.usefixtures("chooses_hopper")


def launches(fn, *args):
    """Count the kernels that the program for a GPU launches."""
    return len(lower(fn, args))


def in_scan(fn):
    """Return `fn` as a scan over the samples."""

    def by_samples(x, w, logits):
        def step(carry, one):
            return carry, fn(one[0][None], w, one[1][None])[0]

        return jax.lax.scan(step, None, (x, logits))[1]

    return by_samples


ONE, TWO = [(0,), (1,), (2,)], [(1, 2), (0, 1, 2)]


@chooses_hopper
@pytest.mark.parametrize(
    "wrap, trained",
    [(lambda f: f, ONE + TWO), (jax.jit, [(2,)]), (in_scan, [(1,), (0, 1, 2)])],
    ids=["plainly", "jit", "scan"],
)
def test_only_wanted_gradients_are_computed(wrap, trained):
    """One launch is the forward, one gives the gradient of x, and one all others."""
    args, _ = kernel_args((2, 20, 64, 64))

    def count(argnums):
        def loss(*args):
            return jnp.sin(wrap(hard)(*args).astype(F32)).sum()

        return launches(jax.grad(loss, argnums), *args)

    expected = {argnums: 3 if argnums == (0, 1, 2) else 2 for argnums in trained}
    assert {argnums: count(argnums) for argnums in trained} == expected


@chooses_hopper
def test_masks_alone_do_not_read_masks_for_their_gradient():
    args, _ = kernel_args((2, 20, 64, 64))

    def names(*argnums):
        gradient = jax.grad(lambda *a: hard(*a).astype(F32).sum(), argnums)
        text = str(jax.make_jaxpr(gradient)(*args))
        wanted = "masked_gradients_mask_w", "masked_gradients_mask_straight"
        return [name for name in wanted if name in text]

    assert names(2) == ["masked_gradients_mask_straight"]
    assert names(1, 2) == ["masked_gradients_mask_w"]


@chooses_hopper
def test_under_remat():
    """Programs are only lowered: the emulator's callbacks cannot be checkpointed."""
    args, _ = kernel_args((2, 20, 64, 64))

    def count(fn, args):
        def loss(*args):
            return jnp.sin(fn(*args).astype(F32)).sum()

        return launches(jax.grad(loss, argnums=tuple(range(len(args)))), *args)

    # The forward runs again, which makes the mask's bits with the product.
    assert count(jax.checkpoint(hard), args) == 4
    (h, weights, biases, masks), _ = bilinear_args((2, 16, 64, 64, 64), BF16)
    given = h, weights, biases, masks
    layer = partial(
        apply_bilinear, estimator=straight_through, implementation="mosaic_gpu"
    )
    assert count(jax.checkpoint(layer), given) == 12


@chooses_hopper
@pytest.mark.parametrize(
    "estimator, trained, saves_logits",
    [
        (straight_through, (0, 1, 2), False),
        (reinmax, (0, 1, 2), True),
        (reinmax, (0, 1), False),
    ],
)
def test_what_is_saved_for_the_backward(estimator, trained, saves_logits):
    """x, w and bits are kept, and logits only if the mask's slope depends on them."""
    args, _ = kernel_args((2, 24, 64, 128), logits_dtype=F32)

    def pull(*args):
        def fn(*some):
            given = dict(zip(trained, some, strict=True))
            all_args = [given.get(i, a) for i, a in enumerate(args)]
            return kernel(*all_args, estimator=estimator)

        return jax.vjp(fn, *(args[i] for i in trained))[1]

    saved = jax.tree.leaves(jax.eval_shape(pull, *args))
    x, w, logits = args
    of_masks = logits.nbytes // 32 + logits.nbytes * saves_logits
    got = sum(a.size * a.dtype.itemsize for a in saved)
    assert got == x.nbytes + w.nbytes + of_masks


@pytest.mark.parametrize(
    "run",
    [
        product_kernel("mask", pack=True),
        product_kernel("reinmax", transposed=True, pack=True),
    ],
    ids=["mask", "transposed"],
)
def test_bits_are_of_logits_and_not_transposed(run):
    (x, w, logits), _ = kernel_args((1, 8, 64, 64))
    with pytest.raises(
        ValueError, match="must be made of logits .*, got (mask and F|reinmax and T)"
    ):
        run(x, w[None], logits)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("splits", [1, 3])
def test_the_forward_packs_the_masks(splits):
    """There are several tiles of tokens; tiles and parts reach past the end."""
    (x, w, logits), _ = kernel_args((2, 72, 320, 192), logits_dtype=F32)
    logits = logits.at[1, 33, 5].set(jnp.nan)
    run = product_kernel("reinmax", tiles=MaskedTiles(64, splits), pack=True)
    _, words = jax.jit(run)(x, w[None], logits)
    np.testing.assert_array_equal(words.view(jnp.uint32), pack_mask(logits).words)
