"""Which kernel runs an MLP: by name, and by what is predicted."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import swiglu_args
from test_mlp_mgpu import hopper as hopper
from test_mlp_mgpu import make

from benchmarks import _mlp_model as shapes
from jaxkern import low_rank_relu2, swiglu
from jaxkern._core import sharding as _mesh
from jaxkern._mlp.hopper import cost as _mlp_predictions
from jaxkern._mlp.hopper import fused as _matmul_mgpu
from jaxkern._mlp.hopper.cost import Layer
from jaxkern._mlp.hopper.fused import Work

BF16 = jnp.bfloat16


def kernels(**options):
    """What runs a ReLU² MLP of these ranks, by the names of its kernels."""
    ranks = options.pop("ranks", (70, 40))
    x, _, up, down, _ = make((150, 300, 640, *ranks))
    text = str(jax.make_jaxpr(partial(low_rank_relu2, **options))(x, up, down))
    names = "flash_mlp_forward", "relu2_forward", "relu2_select", "sparse_matmul"
    return [name for name in names if name in text]


def test_what_runs_by_name(monkeypatch):
    named = {"implementation": "mosaic_gpu"}
    assert kernels(**named) == ["relu2_forward"]
    for kernel, name in (
        ("flash_mlp", "flash_mlp_forward"),
        ("matmul", "relu2_forward"),
    ):
        monkeypatch.setattr(_mlp_predictions, "fastest", lambda *a, k=kernel: k)
        assert kernels(**named, ranks=(70, 70)) == [name]
    assert kernels(**named, sparsity="2:4") == ["relu2_select", "sparse_matmul"]
    assert kernels(**named, sparsity="2:4", ranks=(70, 70))[0] == "relu2_select"
    assert kernels(implementation="xla") == []


def test_none_picks_what_is_predicted(monkeypatch):
    def predict(faster):
        monkeypatch.setattr(_mlp_predictions, "beats_xla", lambda *a: faster)

    monkeypatch.setattr(_mesh, "runs_locally", lambda: True)
    predict(True)
    assert kernels() == ["relu2_forward"]
    assert kernels(sparsity="2:4") == ["relu2_select", "sparse_matmul"]
    predict(False)
    assert kernels() == []
    monkeypatch.setattr(_mesh, "runs_locally", lambda: False)
    predict(True)
    assert kernels() == []


# 32 x 512 tokens of 60M, 130M and 350M: hidden features of one head have few tiles for
# the weights' gradients of `flash_mlp`, where a step takes up to four times as long.
@pytest.mark.parametrize(
    "layer",
    [
        Layer(16384, 128, 1376, 128, 2, 2),
        Layer(16384, 256, 3072, 256),
        Layer(16384, 256, 4104, 256),
    ],
    ids=["60M", "130M", "350M"],
)
def test_many_tokens_of_one_head_take_matmul_kernels(layer):
    assert _mlp_predictions.fastest(layer, ["flash_mlp", "matmul"]) == "matmul"
    assert _mlp_predictions.beats_xla(layer, "matmul")
    step = _mlp_predictions.flash_us(layer, True)
    assert step > 2 * _mlp_predictions.matmul_us(layer, True)


def test_no_kernel_is_picked_that_is_predicted_to_be_slower_than_xla():
    """In any of the published study's rows, forward, or forward and backward."""
    predicted, picked = _mlp_predictions, 0
    for model in shapes.MODELS.values():
        for tokens in (512, 2048, 4096, 8192, 16384):
            for name in (shapes.SWIGLU, shapes.RELU2):
                layer = shapes.layer_of(model, tokens, name)
                kernel = shapes.kernel_of(model, tokens, name)
                if not predicted.beats_xla(layer, kernel):
                    continue
                picked += 1
                by = {"flash_mlp": predicted.flash_us, "matmul": predicted.matmul_us}
                for backward in (False, True):
                    ours = by[kernel](layer, backward)
                    assert ours <= predicted.xla_us(layer, backward)
    assert picked > 10


def test_swiglu_runs_where_it_is_predicted_to_be_faster(monkeypatch):
    monkeypatch.setattr(_mesh, "runs_locally", lambda: True)
    args, _ = swiglu_args((40, 60, 70, 0, 60), BF16)

    def runs_kernel(**options):
        text = str(jax.make_jaxpr(partial(swiglu, **options))(*args))
        return "gated_forward" in text

    for faster in (True, False):
        monkeypatch.setattr(_mlp_predictions, "beats_xla", lambda *a, f=faster: f)
        assert runs_kernel() == faster
    assert runs_kernel(implementation="mosaic_gpu")
    assert not runs_kernel(implementation="xla")


def test_small_results_take_small_tiles():
    choose = _matmul_mgpu.choose_columns
    assert choose(Work(16384, 1024, 16512)) == 256
    assert choose(Work(512, 1024, 1024)) < 256


def test_what_is_kept_and_what_xla_selects_are_in_the_choice():
    """Of 7B's widths: more is kept for straight-through, and S-STE costs XLA more."""
    layer = Layer(1024, 768, 16512, 768)
    pick = partial(_mlp_predictions.beats_xla, layer, "sparse")
    assert [pick(), pick(keep=True), pick(soft=True)] == [True, False, True]
    assert not _mlp_predictions.beats_xla(Layer(512, 768, 16512, 768), "sparse")
