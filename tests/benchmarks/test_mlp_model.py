"""Kernel rows, floors and peers of `benchmarks.mlp`."""

import sys
from argparse import Namespace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from benchmarks import _mlp_model as shapes
from benchmarks import _mlp_peers as peers
from benchmarks import _mlp_programs as programs
from benchmarks import _torch, frame, mlp
from benchmarks._harness import KERNEL, Options, run
from jaxkern._mlp import thresholds
from jaxkern.testing import plain

# Features are to be padded.
TINY = shapes.Model(32, 46, 8, 1)


@pytest.fixture
def dense_kernel(monkeypatch):
    """Sets which kernel takes the dense rows, as if by their ranks."""

    def set_kernel(name):
        monkeypatch.setattr(thresholds, "dense_kernel", lambda ranks: name)

    return set_kernel


@pytest.fixture
def tiny(monkeypatch, unchecked_types):
    monkeypatch.setattr(shapes, "MODELS", {"60M": TINY})
    monkeypatch.setattr(shapes, "SEQ", 40)


def cases(*argv):
    return frame.parse(mlp.BENCHMARK, ["--models", "60M", *argv]).cases


def measured(by, *argv):
    found = [c for c in cases("--no-peers", *argv) if c.labels["by"] == by]
    return run(found, Options(warmup=1, iterations=1))


KINDS = {"flash_mlp": shapes.KERNEL_ROWS[:2], "matmul": shapes.KERNEL_ROWS}


@pytest.mark.usefixtures("hopper", "tiny")
@pytest.mark.parametrize("kernel", KINDS)
def test_rows_of_kernels(dense_kernel, kernel):
    dense_kernel(kernel)
    # Both passes of the one that is at home here.
    backward = kernel == "matmul"
    flags = ["--backward"] if backward else ["--only", "gpu low_rank_(swiglu|relu2)$"]
    rows = measured(KERNEL, "--dtype", "bfloat16", *flags)
    names = [n for n in KINDS[kernel] if not backward or n != shapes.PRUNED]
    assert [mlp.name_of(r) for r in rows] == names
    assert {(r["status"], r["reason"]) for r in rows} == {("ok", None)}


def test_floors_by_hand():
    # 4 tokens of 8 features, rank 2, hidden 12 and for ReLU² 18, of which 10 are kept.
    model, tokens = shapes.Model(8, 12, 2, 1), 4
    flops = 4 * tokens * 2 * (8 + 18)
    dense = shapes.floors_us(model, tokens, shapes.RELU2)
    assert dense["tensor"] == pytest.approx(flops / 989e6)
    assert dense["bytes"] == pytest.approx(2 * (2 * 4 * 8 + 2 * 2 * (8 + 18)) / 4.8e6)
    both = shapes.floors_us(model, tokens, shapes.RELU2, backward=True)
    assert both["tensor"] == pytest.approx(3 * dense["tensor"])
    assert both["bytes"] == pytest.approx(2 * dense["bytes"])
    # The product with 18 hidden features at twice the rate, a quarter of 2 x 18.
    sparse = shapes.floors_us(model, tokens, shapes.TOP2)["tensor"]
    assert sparse == pytest.approx((flops - 4 * 2 * 18) / 989e6)
    static = shapes.floors_us(model, tokens, shapes.STATIC)["tensor"]
    assert static == pytest.approx(4 * tokens * 2 * (8 + 10) / 989e6)
    pruned = shapes.floors_us(model, tokens, shapes.PRUNED)
    assert pruned["tensor"] == pytest.approx(flops / 2 / 989e6)
    numbers = 2 * 4 * 8 + 9 / 16 * 2 * 2 * (8 + 18)
    assert pruned["bytes"] == pytest.approx(2 * numbers / 4.8e6)
    gated = shapes.floors_us(model, tokens, shapes.SWIGLU)["tensor"]
    assert gated == pytest.approx(6 * tokens * 2 * (8 + 12) / 989e6)
    full = shapes.floors_us(model, tokens, "swiglu")["bytes"]
    assert full == pytest.approx(2 * (2 * 4 * 8 + 3 * 8 * 12) / 4.8e6)
    alone = shapes.floors_us(model, tokens, "sparsify_2_4 top2")
    assert alone == {"tensor": 0, "bytes": pytest.approx(2 * 2 * 4 * 18 / 4.8e6)}


def test_unpack_by_hand():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 23)), jnp.float32)
    packed = jaxkern.pack_2_4(x)
    np.testing.assert_array_equal(plain.unpack(packed), plain.top2(x))


@pytest.fixture
def tokamax(monkeypatch):
    """A stand-in with the signature of tokamax 0.0.17."""
    module = ModuleType("tokamax")

    def gated_linear_unit(x, weights, *, activation):
        assert activation is jax.nn.silu
        gate, up = weights
        return jax.nn.silu(x @ gate) * (x @ up)

    vars(module)["gated_linear_unit"] = gated_linear_unit
    monkeypatch.setitem(sys.modules, "tokamax", module)
    missing = _torch.importlib.util.find_spec
    monkeypatch.setattr(
        _torch.importlib.util,
        "find_spec",
        lambda name: name == "tokamax" or missing(name),
    )
    return module


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tokamax_row(tokamax, backward):
    found = cases("--only", "tokamax", *["--backward"] * backward)
    assert [c.labels["op"] for c in found] == ["swiglu"]
    (row,) = run(found, Options(warmup=1, iterations=1))
    assert (row["status"], row["reason"]) == ("ok", None)

    def broken(x, weights, **options):
        raise NotImplementedError("no tiles for this")

    tokamax.gated_linear_unit = broken
    (row,) = run(found, Options(warmup=1, iterations=1))
    assert row["status"] == "failed" and "no tiles for this" in row["reason"]


def test_peers_that_are_left_out_have_a_reason():
    args = Namespace(peers=True, backward=False, dtype=jnp.dtype("float32"))
    lines = _torch.left_out(mlp.PEERS, args)["left out"].splitlines()
    if _torch.importlib.util.find_spec("tokamax") is None:
        assert "tokamax: it is not installed (pip install tokamax)" in lines
    assert _torch.why_left_out(_torch.TORCH_SPARSE, args)
    assert _torch.why_left_out(_torch.CUDNN, args)
    none = _torch.left_out(mlp.PEERS, Namespace(peers=False))["left out"]
    assert none == f"{', '.join(mlp.PEERS)}: --no-peers"


@pytest.mark.parametrize("name", peers.SPARSE)
def test_weights_of_torch_sparse_are_2_to_4_and_give_the_row(name):
    inputs = programs.make_inputs(
        TINY, 8, programs.IMPLEMENTATIONS[name].weights, jnp.dtype("float32"), 0
    )
    (x, *weights), sparse = peers.SPARSE[name](*inputs)
    for i in sparse:
        w = np.asarray(weights[i])
        w = np.pad(w, ((0, 0), (0, -w.shape[1] % 4)))
        assert ((w.reshape(len(w), -1, 4) != 0).sum(-1) <= 2).all()
    functions = Namespace(
        linear=lambda x, w: x @ w.T, relu=lambda z: Squarable(jax.nn.relu(z))
    )
    got = peers._linear_relu2(functions, x, *weights)
    expected = programs.IMPLEMENTATIONS[name].plain(*inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


class Squarable:
    """As a tensor of PyTorch."""

    def __init__(self, z):
        self.z = z

    def square(self):
        return self.z**2
