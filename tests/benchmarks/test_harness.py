import importlib.util
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _cli, _harness, frame
from benchmarks._harness import (
    Case,
    Check,
    Options,
    Program,
    Skip,
    _device_peak,
    _summary,
    check_against,
    measure,
    run,
)
from benchmarks._report import PUBLISHED, command, number, published, ratio
from jaxkern.testing import relative_error

X = jnp.arange(12.0).reshape(3, 4)


def double(x):
    return 2 * x


def check(fn):
    return Check(relative_error(fn(X), 2 * X), 1e-6)


def case(name, run=double, **fields):
    return Case({"name": name}, lambda: Program(run, (X,), check), **fields)


def refuse_to_build():
    raise ZeroDivisionError("no such weights\nsecond line")


def interrupt():
    raise KeyboardInterrupt


BENCHMARK = frame.Benchmark("test", "", lambda _: [], lambda rows, meta: (), ["name"])


def execute(cases, path, iterations=1):
    """The rows that were measured, and whether they are all there and saved."""
    meta = {"benchmark": "test", "matmul_peak_tflops": None}
    options = Options(iterations=iterations)
    results, complete = frame.measure(BENCHMARK, cases, options, meta, path)
    return results.rows, complete, results.end(complete)


def test_a_good_row():
    (row,) = run([case("a", flops=24.0, published_ms=0.5)], Options(iterations=7))
    assert row["status"] == "ok" and row["reason"] is None
    assert row["name"] == "a" and row["published_ms"] == 0.5
    assert row["iterations"] == row["samples"] == 7
    assert 0 < row["min_ms"] <= row["median_ms"] and row["std_ms"] >= 0
    assert row["tflops"] == pytest.approx(24.0 / row["time_ms"] / 1e9)
    assert row["time_ms"] == row["median_ms"]
    assert row["compile_s"] > 0 and not row["includes_compile"]
    assert row["argument_bytes"] == row["output_bytes"] == X.nbytes


@pytest.mark.parametrize(
    "wrong", [lambda x: 2.001 * x, lambda x: x * jnp.nan], ids=["off by 0.05 %", "nan"]
)
def test_a_wrong_kernel_is_refused_and_not_timed(wrong):
    calls = []

    def block(out):
        calls.append(out)
        return jax.block_until_ready(out)

    program = Program(wrong, (X,), check, block=block)
    rows = run([Case({"name": "bad"}, lambda: program), case("good")], Options())
    assert rows[0]["status"] == "failed" and "time_ms" not in rows[0]
    assert rows[0]["reason"].startswith("WrongValues: wrong values: relative error")
    assert calls == []
    assert rows[1]["status"] == "ok"


def test_what_a_row_raises_is_its_result_and_the_others_run():
    def wrong_shape(x):
        return x @ x

    cases = [
        case("first"),
        Case({"name": "unbuilt"}, refuse_to_build),
        case("untraceable", wrong_shape),
        case("too large", needed_bytes=1e18),
        case("last"),
    ]
    rows = run(cases, Options(iterations=1))
    assert [r["status"] for r in rows] == ["ok", "failed", "failed", "skipped", "ok"]
    assert rows[1]["reason"] == "ZeroDivisionError: no such weights"
    assert rows[2]["reason"].startswith("TypeError: dot_general")
    assert rows[3]["reason"].startswith("needs 1000000000.0 GB of memory, ")
    assert rows[0]["samples"] == 1 and rows[0]["std_ms"] is None


def test_skip_is_no_failure():
    def build():
        raise Skip("no PyTorch")

    (row,) = run([Case({"name": "peer"}, build)], Options())
    assert (row["status"], row["reason"]) == ("skipped", "no PyTorch")


def test_without_warm_up_the_clock_sees_the_compilation():
    traces = []

    def traced(x):
        traces.append(x)
        return 2 * x

    cold, warm = {}, {}
    options = Options(warmup=0, timing="per-call")
    measure(Program(traced, (X,), check), options, 3, cold)
    assert cold["includes_compile"] and len(traces) == 2
    assert cold["samples"] == 3
    measure(Program(double, (X,), check), Options(timing="per-call"), 3, warm)
    assert cold["time_ms"] == cold["mean_ms"] > 3 * warm["mean_ms"]


def test_without_warm_up_a_peer_compiles_anew_or_is_not_said_to():
    made = []

    def make():
        made.append(0)
        return lambda x: 2 * x

    options, lazy, eager = Options(warmup=0), {}, {}
    program = Program(double, (X,), check, jit=False, fresh=make)
    measure(program, options, 2, lazy)
    assert lazy["includes_compile"] and len(made) == 1
    measure(replace(program, fresh=None), options, 2, eager)
    assert not eager["includes_compile"]
    assert eager["time_ms"] == eager["median_ms"]
    assert "compile_s" not in eager


def test_figures_of_the_program_follow_its_check_and_join_the_row():
    order = []

    def checked(fn):
        order.append("check")
        return check(fn)

    def figures():
        order.append("figures")
        return {"allocated_bytes": 7}

    row = {}
    measure(Program(double, (X,), checked, figures=figures), Options(), 1, row)
    assert order == ["check", "figures"] and row["allocated_bytes"] == 7


def test_compile_time_is_not_that_of_a_cached_program():
    jax.jit(double)(X)
    (first,), (again,) = (run([case("a")], Options()) for _ in range(2))
    assert again["compile_s"] > first["compile_s"] / 10


def test_the_mean_is_that_of_the_calls():
    summary = _summary([(2, 0.102), (2, 0.002), (1, 0.001), (1, 0.001), (1, 0.001)])
    assert summary["mean_ms"] == pytest.approx(107 / 7)
    assert summary["median_ms"] == pytest.approx(1)
    assert (summary["iterations"], summary["samples"]) == (7, 5)


class FakeGPU:
    """An allocator whose peak rises by what a call takes."""

    def __init__(self, in_use, peak):
        self.in_use, self.peak = in_use, peak

    def memory_stats(self):
        return {"bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}

    def call(self, size):
        self.peak = max(self.peak, self.in_use + size)
        return X


@pytest.mark.parametrize("peak, reported", [(1000, 500), (1400, 500), (1500, None)])
def test_device_peak_is_over_what_was_allocated(monkeypatch, peak, reported):
    gpu = FakeGPU(1000, peak)
    monkeypatch.setattr(_harness.jax, "devices", lambda: [gpu])
    assert _device_peak(gpu.call, (500,)) == {"peak_bytes": reported}


def test_percent_of_peak_and_what_the_rate_is_from():
    (row,) = run([case("a", flops=1e9)], Options(), peak_tflops=2.0)
    assert row["rate_from"] == "time_ms"
    assert row["percent_of_peak"] == pytest.approx(50 * row["tflops"])


@pytest.mark.parametrize("timing, blocks", [("amortised", 10), ("per-call", 12)])
def test_every_stretch_waits_for_all_outputs(timing, blocks):
    seen = []

    def block(out):
        seen.append(len(out))
        return jax.block_until_ready(out)

    def both(x):
        return 2 * x, x.sum()

    program = Program(both, (X,), lambda fn: check(lambda x: fn(x)[0]), block=block)
    row = {}
    measure(program, Options(warmup=3, timing=timing), 12, row)
    assert seen == [2] * (3 + blocks)
    assert row["samples"] == blocks


def test_calls_of_the_check_can_be_warm_ups():
    blocked = []

    def block(out):
        blocked.append(0)
        return jax.block_until_ready(out)

    program = Program(double, (X,), check, block=block, warmed=1)
    for warmup in (3, 0):
        row = {}
        measure(program, Options(warmup=warmup, timing="per-call"), 2, row)
        assert row["includes_compile"] == (warmup == 0)
    assert len(blocked) == (3 - 1 + 2) + 2


def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys):
    path = tmp_path / "rows.json"
    cases = [case("one"), Case({"name": "two"}, interrupt), case("three")]
    rows, complete, _ = execute(cases, path)
    assert not complete and [row["name"] for row in rows] == ["one"]
    saved = json.loads(path.read_text())
    assert saved["meta"]["complete"] is False
    assert saved["rows"][0]["name"] == "one" and saved["rows"][0]["status"] == "ok"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("[1/3] one: ")


def test_the_file_is_whole_after_each_row(tmp_path):
    path = tmp_path / "rows.json"
    seen = []

    def look():
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return Program(double, (X,), check)

    cases = [Case({"name": str(i)}, look) for i in range(3)]
    assert execute(cases, path)[1:] == (True, True) and seen == [0, 1, 2]
    saved = json.loads(path.read_text())
    assert saved["meta"]["complete"] is True
    assert [row["status"] for row in saved["rows"]] == ["ok"] * 3
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_before_the_first_row_keeps_an_earlier_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("earlier")
    cases = [Case({"name": "one"}, interrupt)]
    assert execute(cases, path) == ([], False, True)
    assert path.read_text() == "earlier"


def test_rows_that_cannot_be_saved_are_still_returned(tmp_path, capsys):
    path = tmp_path / "gone" / "rows.json"
    rows, _, saved = execute([case("one")], path)
    assert not saved and rows[0]["status"] == "ok"
    assert "not saved: [Errno 2]" in capsys.readouterr().err


def test_a_link_to_a_file_is_followed(tmp_path):
    target, link = tmp_path / "rows.json", tmp_path / "link.json"
    target.write_text("")
    link.symlink_to(target)
    execute([case("one")], _cli.writable(str(link)))
    assert link.is_symlink() and json.loads(target.read_text())["rows"]


def test_the_bound_is_twice_the_plain_error_and_one_rounding():
    exact = np.ones(4)
    checked = check_against(exact * 1.01, exact * 1.01, exact, jnp.float32)
    assert checked.error == pytest.approx(0.01)
    assert checked.bound == pytest.approx(0.02, rel=1e-4)
    checked = check_against(exact, exact, exact, jnp.bfloat16)
    assert (checked.error, checked.bound) == (0, 2**-8)


def test_commands_can_be_run_again_and_do_not_tell_where():
    arguments = [
        "--only",
        "a (b|c)$",
        "--json",
        "/secret/rows.json",
        "--plot",
        "p/q.png",
        "--json=/secret/rows.json",
        "--trace=/secret/folder/",
    ]
    expected = (
        "python -m benchmarks.mlp --only 'a (b|c)$' --json rows.json --plot p/q.png "
        "--json=rows.json --trace=folder/"
    )
    assert command("mlp", arguments) == expected


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (0, "0.00"),
        (0.00612, "0.00612"),
        (1.25, "1.25"),
        (12345.6, "12346"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_ratio():
    assert [ratio(1.234, 0.5), ratio(1.0, None)] == ["1.23 (0.50)", "1.00"]
    assert ratio(None, 0.5) == "- (0.50)"


def test_published_figures_are_all_there():
    counts = {p.stem: len(published(p.stem)) for p in PUBLISHED.iterdir()}
    assert counts == {
        "attention": 56,
        "estimators": 34,
        "flash_mlp": 5,
        "mlp": 160,
        "transformer": 60,
    }


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        _cli.make_parser("benchmarks.x", "").parse_args(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--iterations", "-3"], "must be an integer from 1 to 4294967295, got '-3'"),
        (["--iterations", "0"], "must be an integer from 1 to 4294967295, got '0'"),
        (
            ["--iterations", "many"],
            "must be an integer from 1 to 4294967295, got 'many'",
        ),
        (["--warmup", "-1"], "must be an integer from 0 to 4294967295, got '-1'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--json", "no/such/rows.json"], "there is no folder 'no/such'"),
        (["--json", "tests"], "got 'tests': there is something that is no file"),
        (["--json", "/dev/null"], "there is something that is no file"),
        (["--seed", "9" * 30], "must be an integer from 0 to 4294967295"),
        (["--plot", "rows.txt"], "must end in .png, .svg or .pdf, got 'rows.txt'"),
        (["--warm", "1"], "unrecognized arguments: --warm 1"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_options_are_refused_before_anything_runs(argv, message, capsys):
    assert message in refusal(capsys, *argv)


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(_cli.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jaxkern-fused[bench]'" in refusal(capsys, "--plot", "rows.png")


def test_without_rich_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    spec = importlib.util.find_spec("benchmarks._report")
    assert spec and spec.loader
    with pytest.raises(SystemExit, match="pip install 'jaxkern-fused"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_an_unwritable_file_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(_cli.os, "access", lambda path, mode: False)
    assert "it may not be written" in refusal(capsys, "--json", "rows.json")
