from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near, normal, untyped, value_and_vjp
from masked_definitions import (
    apply_bilinear,
    apply_matmul,
    bilinear_args,
    each_method_once,
    matmul_args,
)

from jaxkern import (
    PackedMask,
    masked_bilinear,
    masked_matmul,
    pack_mask,
    reinmax,
    straight_through,
    unpack_mask,
)


@pytest.mark.parametrize(
    "batch, d_in, d_out", [((), 1, 1), ((2,), 32, 3), ((3, 1), 33, 5), ((1, 2), 70, 4)]
)
def test_round_trip(batch, d_in, d_out):
    """The masks take a part of a word, a whole word, and more than whole words."""
    mask = normal(d_in, (*batch, d_in, d_out)) > 0
    packed = pack_mask(mask)
    assert packed.words.dtype == jnp.uint32
    assert packed.words.shape == (*batch, -(-d_in // 32), d_out)
    np.testing.assert_array_equal(unpack_mask(packed), mask)


def test_layout():
    """Bit i of word j is for input feature 32 j + i; bits past the last one are 0."""
    mask = np.zeros((35, 2), bool)
    mask[[0, 5, 31, 33], [0, 0, 0, 1]] = True
    words = np.array([[1 + 2**5 + 2**31, 0], [0, 2]], np.uint32)
    np.testing.assert_array_equal(pack_mask(jnp.asarray(mask)).words, words)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_logits_and_masks_pack_alike(dtype):
    edges = [0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, -3.0, 1e-3]
    logits = jnp.array(edges, dtype)[:, None]
    packed = pack_mask(logits)
    on = [False, False, False, True, False, False, True]
    np.testing.assert_array_equal(unpack_mask(packed)[:, 0], on)
    for same in (logits > 0, straight_through(logits)):
        np.testing.assert_array_equal(pack_mask(same).words, packed.words)


def pack(logits) -> Any:
    return jax.tree.map(pack_mask, logits)


@cache
def by_logits(op, make, shared):
    """Return values and gradients from the logits, which are equal for all methods."""
    args, g = make((3, 4, 37, 5, 6), shared=shared)

    def fn(x, w, *rest):
        return op(x, w, args[2], *rest, estimator=straight_through)

    return value_and_vjp(fn, (*args[:2], *args[3:]), g)


def check_bits(op, make, method, shared):
    (x, w, logits, *rest), g = make((3, 4, 37, 5, 6), shared=shared)
    packed = pack(logits)

    def by_bits(x, w, *rest):
        return op(x, w, packed, *rest, method=method)

    got = value_and_vjp(by_bits, (x, w, *rest), g)
    assert_near(got, by_logits(op, make, shared))


@each_method_once
def test_values_and_gradients_are_those_of_the_mask(op, make, method):
    check_bits(op, make, method, shared=False)


@pytest.mark.parametrize(
    "op, make", [(apply_matmul, matmul_args), (apply_bilinear, bilinear_args)]
)
def test_a_shared_mask(op, make):
    check_bits(op, make, "fused", shared=True)


@pytest.mark.parametrize("method", ["fused", "bmm"])
def test_first_samples_of_more_masks(method):
    (x, w, logits), _ = matmul_args((3, 4, 37, 5, 6))
    first = jax.tree.map(lambda words: words[:2], pack_mask(logits))
    got = masked_matmul(x[:2], w, first, method=method)
    masks = straight_through(logits[:2])
    assert_near(got, jnp.einsum("bsd,bdm->bsm", x[:2], w[None] * masks))


def test_transforms():
    (x, w, logits), g = matmul_args((3, 4, 37, 5, 6))
    packed = pack_mask(logits)

    def pull(packed, x):
        return value_and_vjp(lambda x, w: masked_matmul(x, w, packed), (x, w), g)

    expected = pull(packed, x)
    assert_near(jax.jit(pull)(packed, x), expected)
    two = jax.tree.map(lambda a: jnp.stack([a, a]), (packed, x))
    got = jax.vmap(pull)(*two)
    assert_near(jax.tree.map(lambda a: a[1], got), expected)
    _, got = jax.lax.scan(lambda carry, args: (carry, pull(*args)), None, two)
    assert_near(jax.tree.map(lambda a: a[1], got), expected)
    remat = jax.checkpoint(lambda x, w: masked_matmul(x, w, packed))
    assert_near(value_and_vjp(remat, (x, w), g), expected)


(X, W, L), _ = matmul_args((2, 3, 40, 5, 0))
PACKED = pack_mask(L)
(H, WEIGHTS, LOGITS, _), _ = bilinear_args((2, 3, 4, 5, 6))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"estimator": reinmax},
            ValueError,
            "estimator must be None for packed masks",
        ),
        ({"key": jax.random.key(0)}, ValueError, "key must be None for packed masks"),
        (
            {"mask_logits": PackedMask(PACKED.words, 39)},
            ValueError,
            "mask_logits must have d_in=40, got 39",
        ),
        (
            {"mask_logits": PackedMask(PACKED.words[:, :1], 40)},
            ValueError,
            r"words of .* must have shape \(2, 2, 5\) for d_in = 40, got \(2, 1",
        ),
        (
            {"mask_logits": PackedMask(PACKED.words[:1], 40)},
            ValueError,
            r"words of .* must have shape \(2, 2, 5\) for the 2 samples of x, got \(1",
        ),
        (
            {"mask_logits": PackedMask(PACKED.words.astype(jnp.int32), 40)},
            TypeError,
            "words of mask_logits must be uint32, got int32",
        ),
        (
            {"mask_logits": PackedMask(PACKED.words[0, 0], 40)},
            ValueError,
            r"must have shape \(..., words, d_out\), got \(5,\)",
        ),
        (
            {"mask_logits": L},
            TypeError,
            "estimator must be callable or one of .*, got None",
        ),
    ],
)
def test_refusals_of_masked_matmul(changes, error, message):
    options = {"x": X, "w": W, "mask_logits": PACKED} | changes
    with pytest.raises(error, match=f"masked_matmul: .*{message}"):
        untyped.masked_matmul(**options)


def test_masks_are_all_packed_or_none():
    some = (pack_mask(LOGITS[0]), *LOGITS[1:])
    with pytest.raises(TypeError, match="masked_bilinear: .* must be all packed"):
        masked_bilinear(H, WEIGHTS, some)


@pytest.mark.usefixtures("unchecked_types")
def test_refusals_of_packing():
    with pytest.raises(TypeError, match="pack_mask: mask must have a floating-point"):
        untyped.pack_mask(jnp.zeros((3, 4), jnp.int32))
    with pytest.raises(TypeError, match="pack_mask: mask must be an array, got list"):
        untyped.pack_mask([[True]])
    with pytest.raises(ValueError, match=r"must have shape \(..., d_in, d_out\), got"):
        untyped.pack_mask(jnp.zeros(3))
    with pytest.raises(TypeError, match="unpack_mask: packed must be a PackedMask"):
        untyped.unpack_mask(L)
