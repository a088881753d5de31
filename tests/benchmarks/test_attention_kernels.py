import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from benchmarks import _attention_definitions as definitions
from benchmarks import _attention_kernels as kernels
from benchmarks import _attention_kernels_report as report
from benchmarks import _attention_programs as programs
from benchmarks import attention
from benchmarks._attention_kernels import BACKWARD, BOTH, FORWARD
from benchmarks._attention_model import Dense, Masked, Shape, Task, known_mask
from benchmarks._harness import Options, Row, Skip, run
from benchmarks._report import make_console
from jaxkern._attention.hopper.schedule import make_schedule
from jaxkern.testing import plain

DENSE = Task(Shape(4, 4096, 16, 128), Dense())
CAUSAL = Task(Shape(4, 4096, 16, 128), Dense(is_causal=True))
MASKED = Shape(1, 16384, 16, 128)
TENTH = Task(MASKED, Masked(10, 16))
NO_HOPPER = "mosaic_gpu needs an H100 or H200, but the default device is cpu"


@pytest.fixture
def small(monkeypatch):
    shapes = Shape(1, 256, 4, 16), Shape(1, 256, 4, 16, group=2)
    monkeypatch.setattr(kernels, "SMALL_SHAPES", shapes)


def listed(capsys, *argv):
    assert attention.main(["--list", "--no-peers", *argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_row_of_a_gpu_is_listed(capsys):
    dense = [
        "(4, 4096, 16, 128)",
        "(2, 8192, 16, 128)",
        "(1, 16384, 16, 128)",
        "(4, 4096, 32, 64)",
        "(4, 4096, 8, 256)",
        "(32, 4096, 32/8, 128)",
    ]
    rows = [f"{shape} {name}" for shape in dense for name in ("dense", "causal")]
    masks = "5% 10% 25% 50% 100% window global+local documents".split()
    rows += [f"(1, 16384, 16, 128) {name}" for name in masks]
    ours = [f"kernels {row} {by}" for row in rows for by in ("mosaic_gpu", "xla")]
    assert len(ours) == 40
    forward = listed(capsys, "--kernels", "--full")
    assert forward == [f"{row} forward" for row in ours]
    both = listed(capsys, "--grid", "kernels", "--full", "--backward")
    assert sorted(both) == sorted([*forward, *(f"{x} forward+backward" for x in ours)])


def test_the_kernels_are_not_in_the_default(capsys):
    assert not any(line.startswith("kernels") for line in listed(capsys))
    small = listed(capsys, "--kernels")
    names = {line.split(") ")[1].rsplit(" ", 2)[0] for line in small}
    assert names == {"dense", "causal", "10%", "window", "global+local", "documents"}
    assert {line.split(" ", 1)[1].split(")")[0] for line in small} == {
        "(1, 512, 4, 64",
        "(1, 512, 4/2, 64",
    }


def test_peers_compute_what_they_can(monkeypatch):
    monkeypatch.setattr(programs, "why_left_out", lambda peer, args: None)
    args = argparse.Namespace(on_device=True, full=False)
    by_task = {}
    for entry in kernels.entries(args):
        by_task.setdefault(entry.task, []).append(entry.by)
    ours = ["mosaic_gpu", "xla"]
    assert by_task[CAUSAL] == [*ours, "jax.nn cudnn", "tokamax", "torch sdpa"]
    assert by_task[TENTH] == [*ours, "torch flex"]


def test_predicted_time_by_hand():
    # 64 heads x 32 tiles over 132 multiprocessors: 16 rounds of 32 blocks. A block is
    # 2 matmuls of 128 x 128 x 128 at 2048 multiply-adds a clock, more than its exp2.
    clocks = 16 * 32 * 2 * 128**3 / 2048
    forward = clocks / 1830 / 0.7 + 2
    assert kernels.predicted_ms(DENSE, FORWARD) == pytest.approx(forward / 1e3)
    # 3 and 4 matmuls; then out, its rounding and d_out from memory.
    launches = (3 + 4) / 2 * clocks / 1830 / 0.7 + 2 * 2
    delta = 3 * 2 * 4 * 4096 * 16 * 128 / (0.7 * 4.8e6) + 2
    backward = (launches + delta) / 1e3
    assert kernels.predicted_ms(DENSE, BACKWARD) == pytest.approx(backward)
    said = kernels.prediction(DENSE, FORWARD)
    rate = 4 * 4 * 16 * 4096**2 * 128 / forward / 1e6
    assert said["predicted_tflops"] == pytest.approx(rate)
    assert said["busy_percent"] == pytest.approx(100 * 2048 / (16 * 132))
    assert [x["limit"] for x in said["launches"]] == ["tensor"]
    assert said["floor_by"] == "tensor" and said["aim_tflops"] == 650


def test_above_dim_128_keys_and_values_have_a_launch_each():
    wide = list(kernels.launches(256, BOTH))
    assert [(name, matmuls) for name, matmuls, *_ in wide] == [
        ("forward", 2),
        ("backward_q", 3),
        ("backward_kv", 3),
        ("backward_kv", 2),
    ]
    assert [x[1] for x in kernels.launches(128, BACKWARD)] == [3, 4]


@pytest.mark.parametrize(
    "task",
    [
        Task(Shape(1, 4096, 8, 256), Dense(is_causal=True)),
        Task(Shape(3, 1024, 32, 64, group=4), Dense(is_causal=True)),
        Task(Shape(1, 2048, 16, 128), Masked(10, 16)),
        Task(Shape(1, 2048, 16, 128), Masked("global+local")),
    ],
    ids=["groups of heads", "shared keys", "10%", "global+local"],
)
@pytest.mark.parametrize("side", ["kv", "q"])
def test_the_busiest_is_that_of_the_kernels_schedule(task, side):
    s, mask = task.shape, kernels._mask_of(task)
    heads = s.group if side == "q" else 1
    lists = getattr(mask, side), getattr(mask, f"full_{side}")
    shape = s.batch, s.heads // heads, s.seq
    schedule = make_schedule(lists, shape, heads, (1, 128), 128, 16e6)
    lengths = np.asarray(schedule.rows[..., 0::2]).sum((1, 2, 3))
    blocks = np.asarray(schedule.blocks)
    wanted = max(lengths[first : first + count].sum() for first, count in blocks)
    found = kernels.row_lengths(task, side)
    assert sorted(found) == sorted(lengths)
    assert kernels.busiest(found) == wanted


def test_floors_by_hand():
    pairs = 4 * 16 * 4096**2
    floors = kernels.floors_ms(DENSE, FORWARD)
    peak = 132 * 2048 * 2 * 1.83e9
    assert floors["tensor"] == pytest.approx(1e3 * 4 * 128 * pairs / peak)
    assert floors["mufu"] == pytest.approx(1e3 * pairs / (132 * 16 * 1.83e9))
    array = 2 * 4 * 4096 * 16 * 128
    assert floors["bytes"] == pytest.approx(1e3 * 4 * array / 4.8e12)
    both = kernels.floors_ms(DENSE, BOTH)
    assert both["tensor"] == pytest.approx(3.5 * floors["tensor"])
    assert both["mufu"] == 2 * floors["mufu"] and both["bytes"] == 2 * floors["bytes"]
    shared = kernels.floors_ms(Task(Shape(4, 4096, 16, 128, group=4), Dense()), FORWARD)
    assert shared["bytes"] == pytest.approx(floors["bytes"] * (2 + 2 / 4) / 4)


def test_aims():
    assert kernels.aim_tflops(CAUSAL, BACKWARD) == 410
    both = 3.5 / (1 / 570 + 2.5 / 410)
    assert kernels.aim_tflops(CAUSAL, BOTH) == pytest.approx(both)
    wide = Task(Shape(4, 4096, 8, 256), Dense())
    aims = [kernels.aim_tflops(wide, which) for which in (FORWARD, BACKWARD, BOTH)]
    assert aims == [None, 210, None]
    assert kernels.aim_speedup(TENTH) == 8 and kernels.aim_speedup(DENSE) is None
    dense, tenth = (
        kernels.prediction(Task(MASKED, p), FORWARD) for p in (Dense(), TENTH.pattern)
    )
    assert tenth["aim_tflops"] == pytest.approx(0.85 * dense["predicted_tflops"])


@pytest.mark.parametrize("which", ["window", "global+local", "documents", 10, 100])
def test_masks_are_what_is_counted(which):
    pattern, shape = (
        Masked(which, 2 if isinstance(which, int) else 1),
        Shape(1, 1024, 2),
    )
    mask, rows = pattern.mask(1024), np.array([0, 5, 127, 128, 700, 1023])
    counts = pattern.counts(shape, rows)
    np.testing.assert_array_equal(counts, np.asarray(mask.to_dense())[0][:, rows])
    assert pattern.pairs(1024, 2) == mask.density * 1024**2
    if which == 10:
        assert not np.array_equal(*pattern.grid(1024))
        assert mask.density == round(64 / 10) / 64


def test_sizes_of_the_named_masks():
    q, k = 8000, np.arange(16384)
    window = Masked("window").visible(16384, q, k)
    assert window.nonzero()[0][[0, -1]].tolist() == [8000 - 1024, 8000 + 1024]
    documents = Masked("documents").visible(16384, q, k)
    assert documents.nonzero()[0][[0, -1]].tolist() == [6144, 8000]
    both = Masked("global+local").visible(16384, q, k)
    assert both.sum() == 128 + 2 * 512 + 1


def test_shared_key_heads_in_the_definition():
    args = definitions.make_arguments(
        Task(Shape(1, 32, 4, 8, group=2), Dense()), jnp.dtype("float32"), 0, True
    )
    assert [x.shape[2] for x in args] == [4, 4, 2, 2]
    _, query, key, value = args
    out, _ = plain.attention(query, key, value)
    for head in range(4):
        one = plain.attention(
            *(
                x[:, :, [h]]
                for x, h in zip(
                    (query, key, value), (head, head // 2, head // 2), strict=True
                )
            )
        )[0]
        np.testing.assert_allclose(out[:, :, head], one[:, :, 0], rtol=1e-5, atol=1e-6)


def test_fewer_queries_are_checked_of_many_heads():
    assert len(definitions.rows_of(Shape(1, 16384, 16, 128))) == 256
    assert len(definitions.rows_of(Shape(32, 4096, 32, 128, group=4))) == 64


def test_on_a_cpu_the_kernel_is_skipped_with_its_reason(small, tmp_path, capsys):
    path = tmp_path / "rows.json"
    argv = ["--kernels", "--no-peers", "--iterations", "1", "--json", str(path)]
    assert attention.main([*argv, "--only", "(dense|10%|documents)"]) == 0
    printed = capsys.readouterr().out
    header, tables = printed.split("\n\n", 1)
    assert "NOT MEASURED" in header and "forward: predicted, not measured" in tables
    assert "(32, 4096, 32/8, 128) causal" in tables and "global+local" in tables
    lines = [x for x in tables.splitlines() if not x.startswith("skipped: ")]
    assert "…" not in printed and max(map(len, lines)) <= 80
    saved = json.loads(path.read_text())
    rows = {(r["shape"], r["implementation"]): r for r in saved["rows"]}
    assert saved["meta"]["complete"] and len(rows) == 8
    assert len(saved["meta"]["predicted"]) == 40
    assert "backward: predicted, not measured" in saved["meta"]["notes"]["predicted"]
    for (_, name), row in rows.items():
        if row["by"] == "xla":
            assert row["status"] == "ok" and row["dense_tflops"] >= row["tflops"]
            assert ("mask_percent" in row) and row["floor_ms"] > 0
            continue
        op = "attention" if "dense" in name else "block_sparse_attention"
        assert row["status"] == "skipped" and row["reason"] == f"{op}: {NO_HOPPER}"
        assert row["predicted_ms"] > 0
    tenth = rows["(1, 256, 4, 16)", "10% xla"]
    dense = rows["(1, 256, 4, 16)", "dense xla"]
    assert tenth["mask_ms"] > 0 and tenth["flops"] == dense["flops"] / 4
    assert tenth["speedup"] == dense["time_ms"] / tenth["time_ms"]
    assert tenth["flops_dense"] == dense["flops"]


def test_gradients_of_shared_keys_and_of_masks(small):
    only = r"(4/2, 16\) causal|10%) xla forward\+backward"
    args = attention.parse(["--kernels", "--backward", "--only", only])
    rows = run(attention.make_cases(args), Options(warmup=1, iterations=1))
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    assert {row["pass"] for row in rows} == {BOTH} and rows[0]["kv_heads"] == 2


def test_a_failing_row_loses_no_other(small, monkeypatch, tmp_path, capsys):
    def broken(*args, **options):
        raise RuntimeError("out of tiles")

    monkeypatch.setattr(jaxkern, "block_sparse_attention", broken)
    path = tmp_path / "rows.json"
    argv = ["--kernels", "--no-peers", "--iterations", "1", "--json", str(path)]
    only = r"4, 16\) (dense|window) xla"
    assert attention.main([*argv, "--only", only]) == 1
    assert "failed: RuntimeError: out of tiles" in capsys.readouterr().out
    dense, window = json.loads(path.read_text())["rows"]
    assert dense["status"] == "ok" and dense["speedup"] == 1
    assert window["status"] == "failed" and window["speedup"] is None


def measured(entry, which, ms) -> Row:
    """A row as a GPU gives it."""
    row: Row = {"shape": entry.task.shape.sizes, "implementation": entry.name}
    row |= {"by": entry.by, "pass": which, "status": "ok", "reason": None}
    row |= {"time_ms": 1.1 * ms, "std_ms": 0.01 * ms, "includes_compile": True}
    row |= {"device_ms": ms, "rate_from": "device_ms", "percent_of_peak": 88.888}
    row["tflops"] = entry.task.flops(which) / ms / 1e9
    if isinstance(entry.task.pattern, Masked):
        row["mask_ms"] = 0.123
    return row


def test_figures_that_need_other_rows():
    dense, tenth = Task(MASKED, Dense()), TENTH
    entries = [
        programs.Entry("kernels", "dense mosaic_gpu", dense, "mosaic_gpu"),
        programs.Entry("kernels", "10% mosaic_gpu", tenth, "mosaic_gpu"),
        programs.Entry("kernels", "10% torch flex", tenth, "torch flex"),
    ]
    times = zip(entries, [(4.0, 14.0), (0.5, 2.0), (1.0, 3.0)], strict=True)
    rows = [
        measured(e, w, ms)
        for e, t in times
        for w, ms in zip((FORWARD, BOTH), t, strict=True)
    ]
    tasks = {(e.task.shape.sizes, e.name): e.task for e in entries}
    kernels.add_figures(rows, tasks, on_device=True)
    _, dense_both, ours, ours_both, flex, _ = rows
    assert (ours["speedup"], flex["speedup"]) == (8, 4)
    assert ours["percent_of_floor"] == pytest.approx(100 * ours["floor_ms"] / 0.5)
    assert ours["aim_tflops"] == pytest.approx(0.85 * rows[0]["tflops"])
    assert ours["dense_tflops"] == pytest.approx(dense.flops(FORWARD) / 0.5e9)
    assert ours["mask_percent"] == pytest.approx(24.6)
    assert dense_both["backward_ms"] == 10 and ours_both["backward_ms"] == 1.5
    rate = 2.5 * dense.flops(FORWARD) / 10e9
    assert dense_both["backward_tflops"] == pytest.approx(rate)
    assert dense_both["backward_aim_tflops"] == 480
    assert ours_both["backward_aim_tflops"] == pytest.approx(0.85 * rate)


def test_no_figure_is_cut_off(monkeypatch, capsys):
    monkeypatch.setattr(programs, "why_left_out", lambda peer, args: None)
    entries = kernels.entries(argparse.Namespace(on_device=True, full=False))
    rows = [
        measured(e, w, ms)
        for e in entries
        for w, ms in ((FORWARD, 1234.5), (BOTH, 12345.6))
    ]
    rows[0] |= {"status": "skipped", "reason": "no tiles"}
    tasks = {(e.task.shape.sizes, e.name): e.task for e in entries}
    for on_device in (True, False):
        kernels.add_figures(rows, tasks, on_device)
        report.print_rows(make_console(), rows, on_device)
    lines = capsys.readouterr().out.splitlines()
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 80
    assert any("jax.nn cudnn" in line for line in lines)


def test_long_rows_of_xla_are_only_measured_on_request(monkeypatch):
    monkeypatch.setattr(kernels, "XLA_MOST_BLOCKS", 1)
    args = attention.parse(["--kernels"])
    shape = Shape(1, 256, 4, 16)
    assert known_mask(Masked(50, 4), 256).density == 0.5
    entry = programs.Entry("kernels", "50% xla", Task(shape, Masked(50, 4)), "xla")
    with pytest.raises(Skip, match="xla computes 8 blocks one after the other, more"):
        kernels.build(entry, args)
    args.full = True
    program = kernels.build(entry, args)
    assert jax.eval_shape(program.run, *program.args).shape == (1, 256, 4, 16)


def test_the_kernels_cannot_be_drawn(capsys):
    with pytest.raises(SystemExit):
        attention.parse(["--kernels", "--plot", "a.png"])
    assert "leave out --grid kernels" in capsys.readouterr().err
