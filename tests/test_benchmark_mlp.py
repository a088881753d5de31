import json
from argparse import Namespace
from dataclasses import replace

import jax.numpy as jnp
import pytest

from benchmarks import _mlp_torch, mlp
from benchmarks._harness import Options, run
from benchmarks._mlp_report import index_published
from benchmarks._report import published

TINY = mlp.Model(hidden=32, intermediate=46, rank=8, iterations=2)


@pytest.fixture
def tiny(monkeypatch):
    """One model whose 69 ReLU² features are no multiple of 4."""
    monkeypatch.setattr(mlp, "MODELS", {"60M": TINY})
    monkeypatch.setattr(mlp, "SEQ", 80)


def arguments(*argv):
    return mlp.parse(["--models", "60M", "--no-peers", "--iterations", "2", *argv])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_implementation_passes_its_check(tiny, dtype, backward):
    flags = ["--dtype", dtype, *["--backward"] * backward]
    rows = run(mlp.make_cases(arguments(*flags)), Options(iterations=1))
    assert [
        (r["implementation"], r["reason"]) for r in rows if r["status"] != "ok"
    ] == []
    assert len(rows) == (6 if backward else 9)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", mlp.IMPLEMENTATIONS)
def test_a_wrong_implementation_is_refused(tiny, monkeypatch, name, backward):
    impl = mlp.IMPLEMENTATIONS[name]
    if backward and impl.weights == "activations":
        return

    def wrong(x, *weights):
        value = impl.ours(x, *weights)
        # Right but for the last token, as a forgotten edge tile would be.
        return value.at[-1].multiply(1.1)

    broken = {name: replace(impl, ours=wrong)}
    monkeypatch.setattr(mlp, "IMPLEMENTATIONS", broken)
    (row,) = run(mlp.make_cases(arguments(*["--backward"] * backward)), Options())
    assert row["status"] == "failed" and row["reason"].startswith("WrongValues")


def test_grid():
    full = mlp.make_cases(mlp.parse(["--full", "--no-peers"]))
    assert len(full) == 8 * 5 * len(mlp.IMPLEMENTATIONS)
    # Every published time stands beside a row: 160 variants and 40 masks.
    assert sum(case.published_ms is not None for case in full) == 160 + 40
    default = mlp.make_cases(mlp.parse(["--no-peers"]))
    cells = {(c.labels["model"], c.labels["tokens"]) for c in default}
    assert cells == {("60M", 512), ("130M", 512), ("350M", 512)}


def test_flops_and_widths_of_the_published_models():
    one_b = mlp.MODELS["1B"]
    assert one_b.relu2 == 8191
    assert mlp.count_flops(one_b, 1, "swiglu") == 6 * 2048 * 5461
    assert mlp.count_flops(one_b, 1, "low_rank_relu2") == 4 * 512 * (2048 + 8191)
    static = mlp.count_flops(one_b, 1, "low_rank_relu2 2:4-static")
    assert static == 4 * 512 * (2048 + 4096)


def test_published_speed_ups():
    figures = index_published(published("mlp"))
    assert figures["60M", 1, "swiglu"] / figures["60M", 1, "low_rank_relu2"] == 1.35
    assert figures["65B", 32, "static mask alone"] == 2.779


def test_command(tiny, tmp_path, capsys):
    out, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    argv = ["--models", "60M", "--batches", "1,4", "--no-peers", "--iterations", "2"]
    assert mlp.main([*argv, "--json", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines()[6:])) <= 80
    assert "low-rank ReLU²" in printed.out and "(1.35)" in printed.out
    assert len(printed.err.splitlines()) == 18
    saved = json.loads(out.read_text())
    assert saved["meta"]["complete"] and saved["meta"]["seed"] == 0
    assert {row["status"] for row in saved["rows"]} == {"ok"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_command_with_a_failing_and_a_skipped_row(tiny, monkeypatch, capsys):
    def broken(x, up, down):
        raise RuntimeError("out of tiles")

    impl = mlp.IMPLEMENTATIONS["low_rank_relu2"]
    monkeypatch.setitem(
        mlp.IMPLEMENTATIONS, "low_rank_relu2", replace(impl, ours=broken)
    )
    assert mlp.main(["--models", "60M", "--no-peers", "--iterations", "1"]) == 1
    printed = capsys.readouterr().out
    assert "failed: 60M 1x80 low_rank_relu2: RuntimeError: out of tiles" in printed
    assert "static mask alone" in printed


def test_list_measures_nothing(capsys):
    assert mlp.main(["--list", "--no-peers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 27 and lines[0] == "60M 1x512 swiglu"


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--models", "60M,70B"],
            "must be among 60M, 130M, 350M, 1B, 7B, 13B, 33B, 65B",
        ),
        (["--batches", "3"], "must be among 1, 4, 8, 16, 32, got '3'"),
    ],
)
def test_unknown_names_list_the_valid_ones(argv, message, capsys):
    with pytest.raises(SystemExit):
        mlp.parse(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", _mlp_torch.MODULES)
def test_torch_rows(tiny, name, backward):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    args = Namespace(dtype=jnp.dtype("float32"), seed=0, backward=backward)
    program = mlp.build(name, TINY, 80, args, "torch eager")
    checked = program.check(program.run)
    assert checked.error <= checked.bound
