"""Kernel rows, stages, predictions, break-even and peers of `benchmarks.mlp`."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from benchmarks import _mlp_break_even as break_even
from benchmarks import _mlp_cost as cost
from benchmarks import _mlp_model as shapes
from benchmarks import _mlp_peers as peers
from benchmarks import _mlp_predictions as predictions
from benchmarks import _mlp_programs as programs
from benchmarks import _mlp_stages as stages
from benchmarks import _mlp_stages_report as stages_report
from benchmarks import mlp
from benchmarks._harness import Options, run
from benchmarks._report import make_console
from jaxkern._mlp import thresholds
from jaxkern._mlp.hopper import fused, sparse
from jaxkern._mosaic.matmul import choose_columns
from jaxkern._sparsity.hopper import product
from jaxkern.testing import plain

# Features are to be padded.
TINY = shapes.Model(32, 46, 8, 1)
SEVEN_B = shapes.MODELS["7B"]


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


def measured(framework, *argv):
    """The rows of ours or of the kernels."""
    args = mlp.parse(["--models", "60M", "--no-peers", "--iterations", "1", *argv])
    cases = [c for c in mlp.make_cases(args) if c.labels["framework"] in framework]
    return run(cases, Options(warmup=1, iterations=1))


KINDS = {"flash_mlp": shapes.KERNEL_ROWS[:2], "matmul": shapes.KERNEL_ROWS}


@pytest.mark.usefixtures("hopper", "tiny")
@pytest.mark.parametrize("kernel", KINDS)
def test_rows_of_kernels(dense_kernel, kernel):
    dense_kernel(kernel)
    # Both passes of the one that is at home here.
    backward = kernel == "matmul"
    flags = ["--backward"] if backward else ["--only", "low_rank_(swiglu|relu2)$"]
    rows = measured("mosaic_gpu", "--dtype", "bfloat16", *flags)
    names = [n for n in KINDS[kernel] if not backward or n != shapes.PRUNED]
    assert [r["implementation"] for r in rows] == names
    assert {(r["status"], r["reason"]) for r in rows} == {("ok", None)}
    assert all(r["predicted_us"] > 0 for r in rows)


@pytest.mark.usefixtures("hopper", "tiny")
def test_stages_with_kernels():
    rows = measured("mosaic_gpu", "--stages", "--dtype", "bfloat16")
    assert {(r["status"], r["reason"]) for r in rows} == {("ok", None)}
    found = [r["implementation"] for r in rows if r["part"] == "stage"]
    assert found == [*stages.KERNEL_STAGES]
    assert all(r["predicted_us"] > 0 for r in rows if r["part"] == "stage")


def test_measured_gains():
    ms = {
        stages.FIRST: 1, stages.UP: 4, stages.ACTIVATION: 3, stages.DOWN: 4,
        stages.LAST: 1, stages.UP_ACTIVATION: 5, stages.UP_SELECT: 6,
        stages.DOWN_SPARSE: 2,
    }  # fmt: skip
    labels = {"model": "7B", "batch": 4, "tokens": 2048, "framework": "any"}
    rows = [
        labels | {"implementation": name, "time_ms": 99, "device_ms": value}
        | {"status": "ok"}
        for name, value in ms.items()
    ]  # fmt: skip
    (point,) = break_even.measured(rows)
    # 2:4 takes 10 and dense ReLU² 11, by our kernels.
    assert point == break_even.Point("7B", 1024, 2048, point.percent)
    assert point.percent == pytest.approx(10)
    assert break_even.measured(rows[:3]) == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", stages.XLA_STAGES)
def test_a_wrong_stage_is_refused(monkeypatch, name):
    stage = stages.BY_XLA[name]

    def wrong(*args):
        # The first number of what is 32 bits or wider: not positions.
        return jax.tree.map(
            lambda y: y.at[0, 0].add(1) if y.dtype == jnp.float32 else y,
            stage.run(*args),
        )

    broken = replace(stage, run=wrong, plain=stage.plain or stage.run)
    monkeypatch.setitem(stages.BY_XLA, name, broken)
    rows = {r["implementation"]: r for r in measured("jaxkern", "--stages")}
    assert rows[name]["reason"].startswith("WrongValues")


def test_stages_command(tiny, tmp_path, capsys):
    saved, plot = tmp_path / "stages.json", tmp_path / "gain.png"
    argv = ["--stages", "--models", "60M", "--iterations", "1", "--no-peers"]
    assert mlp.main([*argv, "--json", str(saved), "--break-even", str(plot)]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("Low-rank ReLU² by stages") :]
    problem = "skipped: mosaic_gpu needs an H100 or H200, but the default device is cpu"
    assert problem in table
    assert break_even.NOTHING in " ".join(table.split()) and not plot.exists()
    lines = [line for line in table.splitlines() if not line.startswith("skipped")]
    assert "…" not in table and max(map(len, lines)) <= 80
    rows = json.loads(saved.read_text())["rows"]
    assert {"part", "model", "batch", "tokens", "framework"} <= set(rows[0])
    found = stages_report.times(rows)
    total = stages_report.sum_of(found, stages.WAYS["2:4"])
    parts = [ms for (_, name), ms in found.items() if name in stages.WAYS["2:4"]]
    assert total == pytest.approx(sum(parts)) and len(parts) == 6
    assert stages_report.sum_of(found, stages.WAYS["sparse"]) is None


def test_floors_by_hand():
    # 4 tokens of 8 features, rank 2, hidden 12 and for ReLU² 18, of which 10 are kept.
    model, tokens = shapes.Model(8, 12, 2, 1), 4
    flops = 4 * tokens * 2 * (8 + 18)
    dense = shapes.floors_us(model, tokens, shapes.RELU2)
    assert dense["tensor"] == pytest.approx(flops / 989e6)
    assert dense["bytes"] == pytest.approx(2 * (2 * 4 * 8 + 2 * 2 * (8 + 18)) / 4.8e6)
    both = shapes.floors_us(model, tokens, shapes.RELU2, shapes.BOTH)
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
    alone = shapes.floors_us(model, tokens, "2:4 alone")
    assert alone == {"tensor": 0, "bytes": pytest.approx(2 * 2 * 4 * 18 / 4.8e6)}


def test_floors_of_stages_by_hand():
    model, tokens = shapes.Model(8, 12, 2, 1), 4

    def floors(stage):
        return tuple(stages.floors_us(model, tokens, stage).values())

    def expected(flops, numbers):
        return pytest.approx((flops / 989e6, 2 * numbers / 4.8e6))

    hidden, up = 4 * 18, 2 * 4 * 2 * 18
    assert floors(stages.FIRST) == expected(2 * 4 * 2 * 8, 4 * 8 + 8 * 2 + 4 * 2)
    assert floors(stages.ACTIVATION) == expected(0, 2 * hidden)
    assert floors(stages.PACK) == expected(0, (1 + 9 / 16) * hidden)
    assert floors(stages.UP_ACTIVATION) == expected(up, 4 * 2 + 2 * 18 + hidden)
    assert floors(stages.DOWN_SPARSE) == expected(
        up / 2, 4 * 2 + 2 * 18 + hidden * 9 / 16
    )


@pytest.fixture
def works(monkeypatch):
    """Of which launches tiles were chosen."""
    asked = set()

    def recorded(work, *valid):
        asked.add(work)
        return choose_columns(work, *valid)

    for module in (fused, sparse, product, cost):
        monkeypatch.setattr(module, "choose_columns", recorded)
    return asked


TRACED = shapes.Model(1000, 1432, 320, 1)


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize("name", shapes.KERNEL_ROWS)
def test_predicted_launches_are_those_of_the_op(works, name):
    impl, tokens = programs.IMPLEMENTATIONS[name], 72
    dtype = jnp.dtype("bfloat16")
    make = partial(programs.make_inputs, TRACED, tokens, impl.weights, dtype, 0)
    inputs = jax.eval_shape(make)
    fn = partial(impl.ours, implementation="mosaic_gpu")

    def predicted(which):
        works.clear()
        shapes.kernels_us(TRACED, tokens, name, which)
        return set(works)

    jax.eval_shape(fn, *inputs)
    forward = set(works)
    assert forward and predicted(shapes.FORWARD) == forward
    if name == shapes.PRUNED:
        return
    works.clear()
    jax.eval_shape(jax.grad(lambda *args: fn(*args).sum()), *inputs)
    both = set(works)
    assert len(both) > len(forward) and predicted(shapes.BOTH) == both


def test_predictions_of_every_row_and_stage():
    rows = predictions.predictions()
    whole = [row for row in rows if "part" not in row]
    assert len(whole) == 8 * 5 * (6 + 5)
    assert all(row["predicted_percent_of_floor"] < 100 for row in whole)
    assert all(max(row["floors_us"].values()) < row["predicted_us"] for row in rows)
    kernels = {(r["model"], r["implementation"]): r["kernel"] for r in whole}
    assert kernels["7B", shapes.RELU2] == "matmul"
    assert kernels["60M", shapes.TOP2] == "sparse"
    # By XLA, a row is the sum of its stages.
    us = stages.predicted_us(SEVEN_B, 512)
    parts = sum(us[stage] for stage in stages.WAYS["dense"])
    assert parts == pytest.approx(shapes.xla_us(SEVEN_B, 512, shapes.RELU2))
    # And ours but for padding, of which 7B has none.
    for way, name in (("kernel", shapes.RELU2), ("sparse", shapes.TOP2)):
        parts = sum(us[stage] for stage in stages.WAYS[way])
        assert parts == pytest.approx(shapes.kernels_us(SEVEN_B, 512, name))


def test_predict_command(tmp_path, capsys):
    saved, plot = tmp_path / "predicted.json", tmp_path / "gain.png"
    assert mlp.main(["--predict", "--json", str(saved), "--break-even", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "NOT MEASURED" in printed and "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert sum(line.startswith(" 65B 32 ") for line in printed.splitlines()) == 5
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(saved.read_text())
    assert found["meta"]["complete"] and "predicted" in found["meta"]["device"]
    assert {"floors_us", "predicted_us"} <= set(found["rows"][0])


def test_break_even_command(tmp_path, capsys):
    plot = tmp_path / "gain.png"
    assert mlp.main(["--break-even", str(plot)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "predicted gain" in printed and "forward, predicted" not in printed
    line = [p for p in break_even.predicted() if (p.model, p.tokens) == ("7B", 8192)]
    first = break_even.first_gain(line)
    assert first is not None
    assert f"from {first} on at every one" in printed
    assert all(p.percent > 0 for p in line if p.rank >= first)
    assert [p.percent for p in line if p.rank == first - 64][0] <= 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_measured_gains_are_drawn(tmp_path):
    points = [break_even.Point("7B", 1024, 512, -3.0)]
    meta = {"device": "a device", "dtype": "bfloat16", "revision": "abc"}
    path = tmp_path / "gain.png"
    break_even.plot(make_console(), path, points, meta, is_measured=True)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argv",
    [
        ["--stages", "--backward"],
        ["--predict", "--stages"],
        ["--predict", "--list"],
        ["--predict", "--only", "7B"],
        ["--predict", "--models", "7B"],
        ["--break-even", "gain.png", "--batches", "1"],
    ],
)
def test_options_that_do_not_go_together(argv, capsys):
    with pytest.raises(SystemExit):
        mlp.parse(argv)
    assert argv[0] in capsys.readouterr().err


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
    missing = peers.importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util,
        "find_spec",
        lambda name: name == "tokamax" or missing(name),
    )
    return module


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tokamax_row(tokamax, backward):
    argv = ["--models", "60M", *["--backward"] * backward]
    cases = mlp.make_cases(mlp.parse(argv))
    cases = [c for c in cases if c.labels["framework"] == "tokamax"]
    assert [c.labels["implementation"] for c in cases] == ["swiglu"]
    (row,) = run(cases, Options(warmup=1, iterations=1))
    assert (row["status"], row["reason"]) == ("ok", None)

    def broken(x, weights, **options):
        raise NotImplementedError("no tiles for this")

    tokamax.gated_linear_unit = broken
    (row,) = run(cases, Options(warmup=1, iterations=1))
    assert row["status"] == "failed" and "no tiles for this" in row["reason"]


def test_peers_that_are_left_out_have_a_reason():
    args = Namespace(peers=True, backward=False, dtype=jnp.dtype("float32"))
    notes = peers.notes(args)
    for name in {"PyTorch", "tokamax"} & set(notes):
        assert notes[name].startswith("left out: it is not installed")
    assert peers.why_left_out(peers.TORCH_SPARSE, args)
    assert set(peers.notes(Namespace(peers=False)).values()) == {"left out: --no-peers"}


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
