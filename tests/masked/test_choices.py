"""Which masked products the Hopper kernels take, and XLA's method for the others."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh
from jax.sharding import PartitionSpec as P
from masked_definitions import F32, KEY, kernel_args, one_plus_sigmoid

from jaxkern import (
    masked_bilinear,
    masked_matmul,
    pack_mask,
    reinmax,
    straight_through,
)
from jaxkern._core import device
from jaxkern._masked.estimators import rule_of
from jaxkern._masked.hopper import product
from jaxkern._masked.hopper.product import MaskedTiles

hard = partial(masked_matmul, estimator=straight_through)
SMALL, _ = kernel_args((2, 24, 64, 64))
X, W, LOGITS = SMALL


def program(*args, **options):
    fn = partial(masked_matmul, **{"estimator": straight_through} | options)
    return str(jax.make_jaxpr(fn)(*(args or SMALL)))


def uses_the_kernel(*args, **options):
    return "masked_product_logits" in program(*args, **options)


def test_which_rules_the_kernels_know():
    assert rule_of(straight_through) == "straight_through"
    assert rule_of(reinmax) == "reinmax"
    assert rule_of(lambda x: x) is None


@pytest.mark.parametrize(
    "estimator, options, rule",
    [
        (straight_through, {}, "straight_through"),
        (straight_through, {"clip": None}, "straight_through"),
        (straight_through, {"derivative": "identity"}, "straight_through"),
        (straight_through, {"derivative": "sigmoid"}, None),
        (straight_through, {"derivative": "one_plus_sigmoid"}, "one_plus_sigmoid"),
        (one_plus_sigmoid, {"key": None}, "one_plus_sigmoid"),
        (one_plus_sigmoid, {"clip": 1.0}, None),
        (reinmax, {"temperature": 1.0, "key": None}, "reinmax"),
        (reinmax, {"temperature": 1.5}, None),
        (reinmax, {"temperature": jnp.ones(())}, None),
        (reinmax, {"key": KEY}, None),
        (straight_through, {"clip": 1.0}, None),
        (straight_through, {"slope": 1.0}, None),
        (lambda x, scale=1.0: x, {"scale": 1.0}, None),
    ],
)
def test_a_partial_is_known_if_it_binds_defaults(estimator, options, rule):
    assert rule_of(partial(estimator, **options)) == rule
    assert rule_of(partial(partial(estimator), **options)) == rule
    assert rule_of(partial(estimator, LOGITS)) is None


@pytest.mark.usefixtures("chooses_hopper")
def test_kernels_make_the_masks_of_known_rules_alone():
    for known in (straight_through, "straight_through", partial(straight_through)):
        assert uses_the_kernel(estimator=known)
        assert "masked_product_mask" in program(estimator=known, key=KEY)
    for other in (partial(straight_through, clip=1.0), lambda x: x):
        assert "masked_product_mask" in program(estimator=other)
    assert "masked_product_bits" in program(X, W, pack_mask(LOGITS), estimator=None)


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x": X.astype(F32), "w": W.astype(F32)},
            "dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
        ),
        (
            {"method": "bmm"},
            "method must be None or 'fused' for mosaic_gpu, got 'bmm'",
        ),
    ],
    ids=["float32", "method"],
)
def test_what_the_kernel_refuses(changes, message):
    options = dict(zip(("x", "w", "mask_logits"), SMALL, strict=True)) | changes
    with pytest.raises(NotImplementedError, match=f"masked_matmul: {message}"):
        hard(**options, implementation="mosaic_gpu")


def test_without_the_device_it_is_refused():
    message = "masked_matmul: mosaic_gpu needs an H100 or H200, but the default device"
    with pytest.raises(NotImplementedError, match=f"{message} is cpu"):
        hard(*SMALL, implementation="mosaic_gpu")


@pytest.mark.usefixtures("chooses_hopper")
def test_float64_logits_are_refused():
    with (
        jax.enable_x64(True),
        pytest.raises(NotImplementedError, match="at most 32 bits .* got float64"),
    ):
        logits = LOGITS.astype(jnp.float64)
        hard(X, W, logits, implementation="mosaic_gpu")


def test_none_picks_what_is_faster(chooses_hopper, monkeypatch):
    assert uses_the_kernel() and uses_the_kernel(method="fused")
    assert not uses_the_kernel(implementation="xla")
    assert not uses_the_kernel(method="vmap")
    # One sample's masks, and masks that all samples share.
    one = X[:1], W, LOGITS[:1]
    assert not uses_the_kernel(*one) and not uses_the_kernel(X, W, LOGITS[0])
    assert uses_the_kernel(*one, implementation="mosaic_gpu")
    few, many = X[:, :7], jnp.zeros((2, 2049, 64), X.dtype)
    assert not uses_the_kernel(few, W, LOGITS)
    assert not uses_the_kernel(many, W, LOGITS)
    assert uses_the_kernel(X[:, :8], W, LOGITS)
    assert uses_the_kernel(many[:, 1:], W, LOGITS)
    monkeypatch.setattr(device, "on_hopper", lambda: False)
    assert not uses_the_kernel()


@pytest.mark.usefixtures("chooses_hopper")
def test_none_picks_the_kernel_where_one_device_has_the_arrays():
    rows = jax.NamedSharding(mesh(data=2), P("data"))
    assert not uses_the_kernel(jax.device_put(X, rows), W, LOGITS)
    assert uses_the_kernel(jax.device_put(X, jax.devices()[3]), W, LOGITS)


def method_of(fn, *args, **options):
    """Return the name of the XLA method that is in the program."""
    text = str(
        jax.make_jaxpr(partial(fn, estimator="straight_through", **options))(*args)
    )
    # "fused" has loops, and "bmm" has a barrier.
    found = [name for name in ("scan[", "optimization_barrier") if name in text]
    return {"scan[": "fused", "optimization_barrier": "bmm"}["".join(found)]


def test_none_picks_the_method_of_the_device(monkeypatch):
    bilinear = X, (W, W, W), (LOGITS, LOGITS, LOGITS)
    of_matmul = partial(method_of, masked_matmul, *SMALL)
    of_bilinear = partial(method_of, masked_bilinear, *bilinear)
    assert of_matmul() == of_bilinear() == "fused"
    assert of_matmul(method="bmm") == "bmm"
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    assert of_matmul() == of_bilinear() == "bmm"
    assert of_matmul(method="fused") == "fused"
    # "bmm" is picked if the batch's masked weights, in 16 bits, take at most an eighth
    # of the memory.
    monkeypatch.setattr(device, "memory_bytes", lambda: 8.0 * 2 * 2 * 64 * 64)
    assert of_matmul() == "bmm" and of_bilinear() == "fused"
    monkeypatch.setattr(device, "memory_bytes", lambda: 8.0 * 2 * 2 * 64 * 64 - 1)
    assert of_matmul() == "fused"
    assert of_matmul(method="bmm") == "bmm"


def test_few_samples_are_split_and_many_take_large_tiles():
    sizes = [(16, 512, 2048), (16, 2048, 512), (1, 512, 2048), (1, 2048, 512)]
    chosen = [product.choose_tiles(n, 256, c, f, 4.0) for n, c, f in sizes]
    assert chosen == [
        MaskedTiles(256),
        MaskedTiles(128),
        MaskedTiles(128, 4),
        MaskedTiles(64, 8),
    ]
    # Parts have whole steps only, and seven steps have no halves.
    assert product.choose_tiles(1, 256, 7 * 64, 64, 4.0).splits == 1


def test_config_refuses_nonsense():
    with pytest.raises(
        ValueError, match="MaskedTiles: .* 64, 128 or 256 .* got 96 and 1"
    ):
        MaskedTiles(96)
