import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from benchmarks import _attention_definitions as definitions
from benchmarks import _attention_kernels as kernels
from benchmarks import _torch, attention, frame
from benchmarks._attention_model import Blocks, Dense, Shape, Task, known_mask
from benchmarks._attention_programs import Entry
from benchmarks._harness import BOTH, FORWARD, KERNEL, XLA, Options, Skip, labels, run
from jaxkern.testing import plain

DENSE = Task(Shape(4, 4096, 16, 128), Dense())
CAUSAL = Task(Shape(4, 4096, 16, 128), Dense(is_causal=True))
MASKED = Shape(1, 16384, 16, 128)
TENTH = Task(MASKED, Blocks(10, 16))
NO_HOPPER = "mosaic_gpu needs an H100 or H200, but the default device is cpu"


@pytest.fixture
def small(monkeypatch):
    shapes = Shape(1, 256, 4, 16), Shape(1, 256, 4, 16, group=2)
    monkeypatch.setattr(kernels, "SMALL_SHAPES", shapes)


def parse(*argv):
    return frame.parse(attention.BENCHMARK, argv)


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

    def op(row):
        dense = row.endswith(("dense", "causal"))
        return "attention" if dense else "block_sparse_attention"

    rows = [f"{shape} {name}" for shape in dense for name in ("dense", "causal")]
    masks = "5% 10% 25% 50% 100% window global+local documents".split()
    rows += [f"(1, 16384, 16, 128) {name}" for name in masks]
    ours = [
        f"kernels {row.replace(') ', f') {op(row)} ')} {by}"
        for row in rows
        for by in (KERNEL, XLA)
    ]
    assert len(ours) == 40
    forward = listed(capsys, "--kernels", "--full")
    assert forward == [f"{row} forward" for row in ours]
    both = listed(capsys, "--grid", "kernels", "--full", "--backward")
    assert sorted(both) == sorted([*forward, *(f"{x} forward+backward" for x in ours)])


def test_the_kernels_are_not_in_the_default(capsys):
    assert not any(line.startswith("kernels") for line in listed(capsys))
    small = listed(capsys, "--kernels")
    names = {line.split(") ")[1].split()[1] for line in small}
    assert names == {"dense", "causal", "10%", "window", "global+local", "documents"}
    assert {line.split(" ", 1)[1].split(")")[0] for line in small} == {
        "(1, 512, 4, 64",
        "(1, 512, 4/2, 64",
    }


def test_peers_compute_what_they_can(monkeypatch):
    monkeypatch.setattr(_torch, "why_left_out", lambda peer, args: None)
    args = argparse.Namespace(on_device=True, full=False)
    by_task = {}
    for entry in kernels.entries(args):
        by_task.setdefault(entry.task, []).append(entry.by)
    ours = [KERNEL, XLA]
    assert by_task[CAUSAL] == [*ours, "cudnn", "tokamax", "torch sdpa"]
    assert by_task[TENTH] == [*ours, "torch flex"]


def test_floors_by_hand():
    pairs, shape = 4 * 16 * 4096**2, DENSE.shape
    forward = DENSE.flops(FORWARD)
    floors = kernels.floors_us(shape, FORWARD, forward)
    assert forward == 4 * 128 * pairs
    assert floors["tensor"] == pytest.approx(4 * 128 * pairs / 989e6)
    assert floors["mufu"] == pytest.approx(pairs / (132 * 16 * 1830))
    array = 2 * 4 * 4096 * 16 * 128
    assert floors["bytes"] == pytest.approx(4 * array / 4.8e6)
    both = kernels.floors_us(shape, BOTH, DENSE.flops(BOTH))
    assert both["tensor"] == pytest.approx(3.5 * floors["tensor"])
    assert both["mufu"] == pytest.approx(2 * floors["mufu"])
    assert both["bytes"] == 2 * floors["bytes"]
    shared = kernels.floors_us(Shape(4, 4096, 16, 128, group=4), FORWARD, forward)
    assert shared["bytes"] == pytest.approx(floors["bytes"] * (2 + 2 / 4) / 4)


@pytest.mark.parametrize("which", ["window", "global+local", "documents", 10, 100])
def test_masks_are_what_is_counted(which):
    pattern, shape = (
        Blocks(which, 2 if isinstance(which, int) else None),
        Shape(1, 1024, 2),
    )
    mask, rows = pattern.mask(1024), np.array([0, 5, 127, 128, 700, 1023])
    counts = pattern.counts(shape, rows)
    np.testing.assert_array_equal(counts, np.asarray(mask.to_dense())[0][:, rows])
    assert pattern.pairs(1024) == mask.density * 1024**2
    if which == 10:
        assert not np.array_equal(*pattern.grid(1024))
        assert mask.density == round(64 / 10) / 64


def test_sizes_of_the_named_masks():
    q, k = 8000, np.arange(16384)
    window = Blocks("window").visible(16384, q, k)
    assert window.nonzero()[0][[0, -1]].tolist() == [8000 - 1024, 8000 + 1024]
    documents = Blocks("documents").visible(16384, q, k)
    assert documents.nonzero()[0][[0, -1]].tolist() == [6144, 8000]
    both = Blocks("global+local").visible(16384, q, k)
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
    _, tables = printed.split("\n\n", 1)
    lines = [x for x in tables.splitlines() if not x.startswith("skipped: ")]
    assert max(map(len, lines)) <= 80
    saved = json.loads(path.read_text())
    rows = {(r["shape"], r["variant"], r["by"]): r for r in saved["rows"]}
    assert saved["meta"]["complete"] and len(rows) == 8
    for row in rows.values():
        if row["by"] == XLA:
            assert row["status"] == "ok"
            continue
        assert (
            row["status"] == "skipped" and row["reason"] == f"{row['op']}: {NO_HOPPER}"
        )
    tenth = rows["(1, 256, 4, 16)", "10%", XLA]
    dense = rows["(1, 256, 4, 16)", "dense", XLA]
    assert tenth["mask_ms"] > 0 and tenth["flops"] == dense["flops"] / 4
    times = dense["time_ms"] / tenth["time_ms"]
    assert kernels.speed_up(saved["rows"], tenth) == times


def test_gradients_of_shared_keys_and_of_masks(small):
    only = r"(4/2, 16\) attention causal|10%) jaxkern xla forward\+backward"
    argv = ["--kernels", "--backward", "--only", only]
    rows = run(parse(*argv).cases, Options(warmup=1, iterations=1))
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    assert {row["pass"] for row in rows} == {BOTH} and rows[0]["num_kv_heads"] == 2


def test_a_failing_row_loses_no_other(small, monkeypatch, tmp_path, capsys):
    def broken(*args, **options):
        raise RuntimeError("out of tiles")

    monkeypatch.setattr(jaxkern, "block_sparse_attention", broken)
    path = tmp_path / "rows.json"
    argv = ["--kernels", "--no-peers", "--iterations", "1", "--json", str(path)]
    only = r"4, 16\) .*(dense|window) jaxkern xla"
    assert attention.main([*argv, "--only", only]) == 1
    assert "failed: RuntimeError: out of tiles" in capsys.readouterr().out
    dense, window = json.loads(path.read_text())["rows"]
    assert dense["status"] == "ok" and window["status"] == "failed"
    assert kernels.speed_up([dense, window], window) is None


def measured(op, task, by, which, ms):
    """A row as a GPU gives it."""
    sizes = {"grid": "kernels", "shape": str(task.shape)} | task.shape.sizes
    row = labels(op, str(task.pattern), by, which, "bfloat16", **sizes)
    row |= {"status": "ok", "reason": None, "flops": task.flops(which)}
    row |= {"time_ms": 1.1 * ms, "std_ms": 0.01 * ms, "includes_compile": True}
    row |= {"device_ms": ms, "rate_from": "device_ms", "percent_of_peak": 88.888}
    row["tflops"] = task.flops(which) / ms / 1e9
    if isinstance(task.pattern, Blocks):
        row["mask_ms"] = 0.123
    return row


def test_figures_that_need_other_rows():
    dense, tenth = Task(MASKED, Dense()), TENTH
    blocks = "block_sparse_attention"
    entries = [
        ("attention", dense, KERNEL, (4.0, 14.0)),
        (blocks, tenth, KERNEL, (0.5, 2.0)),
        (blocks, tenth, "torch flex", (1.0, 3.0)),
    ]
    rows = [
        measured(op, task, by, which, ms)
        for op, task, by, times in entries
        for which, ms in zip((FORWARD, BOTH), times, strict=True)
    ]
    _, _, ours, _, flex, _ = rows
    assert kernels.speed_up(rows, ours) == 8 and kernels.speed_up(rows, flex) == 4
    floor = max(kernels.floors_us(MASKED, FORWARD, ours["flops"]).values())
    assert kernels.floor_percent(ours) == pytest.approx(100 * floor / 500)
    alone = kernels.backward_rows(rows)
    assert [row["time_ms"] for row in alone] == [10, 1.5, 2]
    assert alone[0]["tflops"] == pytest.approx(2.5 * dense.flops(FORWARD) / 10e9)


def test_no_figure_is_cut_off(monkeypatch, printed):
    monkeypatch.setattr(_torch, "why_left_out", lambda peer, args: None)
    entries = kernels.entries(argparse.Namespace(on_device=True, full=False))
    rows = [
        measured(e.op, e.task, e.by, w, ms)
        for e in entries
        for w, ms in ((FORWARD, 1234.5), (BOTH, 12345.6))
    ]
    rows[0] |= {"status": "skipped", "reason": "no tiles"}
    text = printed(attention.BENCHMARK, rows)
    assert "causal cudnn" in text and "backward alone" in text
    printed(attention.BENCHMARK, [row | {"device_ms": None} for row in rows])


def test_long_rows_of_xla_are_only_measured_on_request(monkeypatch):
    monkeypatch.setattr(kernels, "XLA_MOST_BLOCKS", 1)
    args = parse("--kernels")
    shape = Shape(1, 256, 4, 16)
    assert known_mask(Blocks(50, 4), 256).density == 0.5
    task = Task(shape, Blocks(50, 4))
    entry = Entry("kernels", "block_sparse_attention", task, XLA)
    with pytest.raises(Skip, match="xla computes 8 blocks one after the other, more"):
        kernels.build(entry, args)
    args.full = True
    program = kernels.build(entry, args)
    assert jax.eval_shape(program.run, *program.args).shape == (1, 256, 4, 16)


def test_the_kernels_cannot_be_drawn(capsys):
    with pytest.raises(SystemExit):
        parse("--kernels", "--plot", "a.png")
    assert "leave out --grid kernels" in capsys.readouterr().err
