import json
from argparse import Namespace
from dataclasses import replace

import jax.numpy as jnp
import pytest

from benchmarks import _mlp_model as shapes
from benchmarks import _mlp_peers as peers
from benchmarks import _mlp_programs as programs
from benchmarks import frame, mlp
from benchmarks._harness import KERNEL, PLAIN, XLA, Options, labels, run

TINY = shapes.Model(hidden=32, intermediate=46, rank=8, iterations=2)


@pytest.fixture
def tiny(monkeypatch, unchecked_types):
    """One model whose 69 ReLU² features are no multiple of 4.

    Unchecked, since JAX fills a Packed24 with what is no array to compile for it.
    """
    monkeypatch.setattr(shapes, "MODELS", {"60M": TINY})
    monkeypatch.setattr(shapes, "SEQ", 80)


def cases(*argv):
    return frame.parse(mlp.BENCHMARK, ["--models", "60M", *argv]).cases


def measured(*argv):
    return run(cases(*argv), Options(iterations=1))


@pytest.mark.parametrize(
    "dtype, backward", [("float32", False), ("bfloat16", True), ("float16", False)]
)
def test_every_implementation_passes_its_check(tiny, dtype, backward):
    flags = ["--dtype", dtype, *["--backward"] * backward]
    rows = measured("--no-peers", *flags)
    assert {r["status"] for r in rows if r["by"] == XLA} == {"ok"}
    kernels = [r for r in rows if r["by"] == KERNEL]
    assert {r["status"] for r in kernels} == {"skipped"}
    reason = "mosaic_gpu needs an H100"
    assert all(reason in r["reason"] for r in kernels)
    assert (len(rows), len(kernels)) == ((11, 5) if backward else (16, 6))


def test_peers_stand_beside_ours_and_pass_the_same_check(tiny):
    plain = measured("--only", PLAIN)
    assert [mlp.name_of(r) for r in plain] == MLPS
    assert {r["status"] for r in plain} == {"ok"}
    assert all(r["published_ms"] is None for r in plain)


def test_the_check_takes_tokens_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr(programs, "CHUNK", 32)
    for flags in (["--only", "swiglu"], ["--backward", "--only", "relu2$"]):
        rows = measured("--no-peers", *flags)
        assert {r["status"] for r in rows} == {"ok", "skipped"}


TRAINED = "full", "swiglu", "relu2"
MLPS = [name for name, i in mlp.IMPLEMENTATIONS.items() if i.weights in TRAINED]


@pytest.mark.parametrize(
    "name, backward, dtype",
    [
        *[(name, False, "bfloat16") for name in mlp.IMPLEMENTATIONS],
        *[(name, True, "bfloat16") for name in MLPS],
        *[("swiglu", backward, "float32") for backward in (False, True)],
    ],
)
def test_a_wrong_implementation_is_refused(tiny, monkeypatch, name, backward, dtype):
    impl = mlp.IMPLEMENTATIONS[name]

    def wrong(x, *weights, **options):
        value = impl.ours(x, *weights, **options)
        # Right but for one token of 80, as with a tile that is read too early.
        return value.at[17].multiply(1.25)

    broken = {name: replace(impl, ours=wrong)}
    for module in (mlp, programs):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", broken)
    flags = ["--dtype", dtype, *["--backward"] * backward]
    row = run(cases("--no-peers", *flags)[:1], Options())[0]
    assert row["status"] == "failed" and row["reason"].startswith("WrongValues")
    assert row["error"] > row["error_bound"] and "time_ms" not in row


def test_grid():
    full = frame.parse(mlp.BENCHMARK, ["--full", "--no-peers"]).cases
    assert len(full) == 8 * 5 * (len(mlp.IMPLEMENTATIONS) + 6)
    # Every published time stands beside a row: 160 variants and 40 masks.
    assert sum(case.published_ms is not None for case in full) == 160 + 40
    default = frame.parse(mlp.BENCHMARK, ["--no-peers"]).cases
    cells = {(c.labels["model"], c.labels["tokens"]) for c in default}
    assert cells == {("60M", 512), ("130M", 512), ("350M", 512)}


def test_flops_and_widths_of_the_published_models():
    one_b = shapes.MODELS["1B"]
    assert one_b.relu2 == 8191
    assert shapes.count_flops(one_b, 1, "swiglu") == 6 * 2048 * 5461
    assert shapes.count_flops(one_b, 1, "low_rank_relu2") == 4 * 512 * (2048 + 8191)
    static = shapes.count_flops(one_b, 1, "low_rank_relu2 2:4-static")
    assert static == 4 * 512 * (2048 + 4096)


def test_published_speed_ups():
    figures = mlp.published_ms()
    assert figures["60M", 1, "swiglu"] / figures["60M", 1, "low_rank_relu2"] == 1.35
    assert figures["65B", 32, "sparsify_2_4 static"] == 2.779


def test_command(tiny, tmp_path, capsys):
    out, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    argv = ["--models", "60M", "--batches", "1", "--no-peers", "--iterations", "2"]
    assert mlp.main([*argv, "--json", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()[9:]
    assert max(map(len, lines)) <= 80
    assert "low-rank ReLU²" in printed.out and "(1.35)" in printed.out
    assert len(printed.err.splitlines()) == 10 + 6
    saved = json.loads(out.read_text())
    assert saved["meta"]["complete"] and saved["meta"]["seed"] == 0
    ours = [row for row in saved["rows"] if row["by"] == XLA]
    assert {row["status"] for row in ours} == {"ok"}
    assert all(set(row["floors_us"]) == {"tensor", "bytes"} for row in ours)
    skipped = "mosaic_gpu needs an H100 or H200, but the default device is cpu"
    kernels = [row for row in saved["rows"] if row["status"] == "skipped"]
    assert {r["reason"] for r in kernels} == {f"{r['op']}: {skipped}" for r in kernels}
    assert "60M 1x80 jaxkern mosaic_gpu\n" in printed.out
    assert skipped in " ".join(printed.out.split())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_command_with_a_failing_and_a_skipped_row(tiny, monkeypatch, capsys):
    def broken(x, up, down, **options):
        raise RuntimeError("out of tiles")

    impl = mlp.IMPLEMENTATIONS["low_rank_relu2"]
    monkeypatch.setitem(
        mlp.IMPLEMENTATIONS, "low_rank_relu2", replace(impl, ours=broken)
    )
    assert mlp.main(["--models", "60M", "--no-peers", "--iterations", "1"]) == 1
    printed = capsys.readouterr().out
    reason = "failed: RuntimeError: out of tiles (60M 1x80 jaxkern xla low_rank_relu2"
    assert reason in printed
    assert "static mask alone" in printed


def fake_row(name, by, **fields):
    op, _, variant = name.partition(" ")
    sizes = {"shape": "350M 32x512", "model": "350M", "batch": 32, "tokens": 16384}
    row = labels(op, variant, by, "forward", "bfloat16", **sizes) | {"status": "ok"}
    row |= {"mean_ms": 1234.5, "std_ms": 123.4, "time_ms": 1234.5, "compile_s": 12.34}
    row |= {"error": 1e-3, "error_bound": 2e-3, "published_ms": 246.231}
    row |= {"floors_us": {"tensor": 987654.3, "bytes": 1.0}}
    row |= {"temp_bytes": 12345678901, "tflops": 612.3, "includes_compile": False}
    if mlp.IMPLEMENTATIONS[name].published is None:
        row["published_ms"] = None
    return row | {"reason": None} | fields


@pytest.mark.parametrize(
    "fields",
    [{"device_ms": 1234.5, "percent_of_peak": 77.7}, {}, {"includes_compile": True}],
    ids=["gpu", "cpu", "warm-up 0"],
)
def test_no_figure_is_cut_off_at_80_columns(fields, printed):
    rows = [
        fake_row(name, by, **fields)
        for by in (XLA, KERNEL, PLAIN, "torch compile")
        for name in mlp.IMPLEMENTATIONS
    ]
    rows[1] |= {"status": "failed", "reason": "WrongValues: error"}
    text = printed(mlp.BENCHMARK, rows)
    assert "350M 32x512 torch compile" in text and "failed" in text
    assert ("floor in %" in text and " 80.0 " in text) == ("device_ms" in fields)
    assert ("Speed-up over full-rank" in text) == (not rows[0]["includes_compile"])


def test_an_interrupt_before_the_first_row_draws_nothing(monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "build", interrupt)
    assert mlp.main(["--plot", str(tmp_path / "a.png"), "--models", "60M"]) == 130
    printed = capsys.readouterr().out
    assert "Nothing to draw" in printed and "Interrupted after 0 of" in printed


def test_list_measures_nothing(capsys):
    assert mlp.main(["--list", "--no-peers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * (10 + 6) and lines[0] == "60M 1x512 jaxkern xla swiglu"
    assert lines[10] == "60M 1x512 jaxkern mosaic_gpu low_rank_swiglu"


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
        frame.parse(mlp.BENCHMARK, argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", peers.MODULES)
def test_torch_rows(tiny, name, backward):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    args = Namespace(dtype=jnp.dtype("float32"), seed=0, backward=backward)
    program = programs.build(name, TINY, 80, args, "torch eager")
    checked = program.check(program.run)
    assert checked.error <= checked.bound
