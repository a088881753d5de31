"""Which masked products the Hopper kernels take, and with what tiles."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from test_masked_mgpu import F32, KEY, hard, make

from jaxkern import masked_matmul, reinmax, seed_reinmax, straight_through
from jaxkern._core import sharding as _mesh
from jaxkern._masked import masked as _masked
from jaxkern._masked.hopper import multiply as _masked_mgpu
from jaxkern._masked.hopper.product import MaskedTiles


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(_masked, "on_hopper", lambda: True)


SMALL, _ = make((2, 24, 64, 64))


def test_which_estimators_are_in_the_kernel():
    def kind(estimator, key=None):
        return _masked._kind(SMALL[2:], estimator, key)

    assert kind(straight_through) == "straight_through"
    assert [kind(f) for f in (seed_reinmax, reinmax)] == ["seed_reinmax", "reinmax"]
    assert kind(straight_through, KEY) == kind(reinmax, KEY) == "mask"
    assert kind(partial(straight_through, clip=1.0)) == kind(lambda x: x) == "mask"


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x": SMALL[0].astype(F32), "w": SMALL[1].astype(F32)},
            "dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
        ),
        ({"method": "bmm"}, "method must be 'fused' for mosaic_gpu, got 'bmm'"),
    ],
    ids=["float32", "method"],
)
def test_what_the_kernel_refuses(changes, message):
    options = dict(zip(("x", "w", "mask_logits"), SMALL, strict=True)) | changes
    with pytest.raises(NotImplementedError, match=f"masked_matmul: {message}"):
        hard(**options)


def test_without_the_device_it_is_refused(monkeypatch):
    monkeypatch.setattr(_masked, "on_hopper", lambda: False)
    with pytest.raises(NotImplementedError, match="needs an H100 or H200"):
        hard(x=SMALL[0], w=SMALL[1], mask_logits=SMALL[2])


def test_float64_logits_are_refused():
    with (
        jax.enable_x64(True),
        pytest.raises(NotImplementedError, match="at most 32 bits .* got float64"),
    ):
        x, w, logits = SMALL
        hard(x, w, logits.astype(jnp.float64))


def test_none_picks_what_is_predicted_to_be_faster(monkeypatch):
    def uses_the_kernel(**options):
        fn = partial(masked_matmul, estimator=straight_through, **options)
        return "masked_product_logits" in str(jax.make_jaxpr(fn)(*SMALL))

    assert not uses_the_kernel()
    monkeypatch.setattr(_mesh, "runs_locally", lambda: True)
    assert uses_the_kernel()
    assert not uses_the_kernel(implementation="xla")
    assert not uses_the_kernel(method="vmap")
    monkeypatch.setattr(_masked, "on_hopper", lambda: False)
    assert not uses_the_kernel()
    monkeypatch.setattr(_masked, "on_hopper", lambda: True)
    monkeypatch.setattr(_masked_mgpu, "predicted_faster", lambda *a: False)
    assert not uses_the_kernel()
    assert uses_the_kernel(implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "shape, faster",
    [
        ((16, 256, 512, 2048), True),
        ((16, 256, 2048, 512), True),
        # There are fewer tiles than multiprocessors.
        ((1, 256, 512, 2048), False),
        # Masks of one weight, once for many tokens, are cheap to store.
        ((1, 4096, 512, 2048), False),
        ((16, 250, 500, 2000), True),
    ],
)
def test_predictions(shape, faster):
    assert _masked_mgpu.predicted_faster([shape], 4.0) == faster


def test_few_samples_are_split_and_many_take_large_tiles():
    sizes = [(16, 512, 2048), (16, 2048, 512), (1, 512, 2048), (1, 2048, 512)]
    chosen = [_masked_mgpu.choose(n, 256, c, f, 4.0) for n, c, f in sizes]
    assert chosen == [
        MaskedTiles(256),
        MaskedTiles(128),
        MaskedTiles(128, 4),
        MaskedTiles(64, 8),
    ]
    # Parts of whole steps alone.
    assert _masked_mgpu.choose(1, 256, 7 * 64, 64, 4.0).splits == 1


def test_config_refuses_nonsense():
    with pytest.raises(
        ValueError, match="MaskedTiles: .* 64, 128 or 256 .* got 96 and 1"
    ):
        MaskedTiles(96)
