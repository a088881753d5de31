import json
import re
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import _harness, frame, transformer
from benchmarks import _transformer_memory as memory
from benchmarks import _transformer_programs as programs
from benchmarks._harness import PLAIN, XLA, Check, Options, run
from benchmarks._report import published

TINY = transformer.Size(embed_dim=24, hidden_dim=40, layers=2, heads=4)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(transformer, "SIZES", {"small": TINY})
    monkeypatch.setattr(transformer, "CONTEXTS", (16,))
    monkeypatch.setattr(_harness, "CPU_PEAK_SIZE", 64)
    monkeypatch.setattr(programs, "VOCAB", 50)
    monkeypatch.setattr(programs, "CHECKED_LAYERS", 1)
    forget()
    yield
    forget()


@pytest.fixture
def unchecked(tiny, monkeypatch):
    """For what other tests check: compiling the references takes longest."""
    monkeypatch.setattr(programs, "_check", lambda *args: Check(0.0, 1.0))


def forget():
    programs._kept.clear()
    programs._plain_value.cache_clear()
    programs._references.cache_clear()
    programs._count.cache_clear()


def measure(*argv):
    return run(cases("--iterations", "2", *argv), Options(0, 2, "per-call"))


def cases(*argv):
    return frame.parse(transformer.BENCHMARK, argv).cases


def problems(rows):
    return [
        (transformer.BENCHMARK.name_of(r), r["reason"]) for r in rows if r["reason"]
    ]


def test_passes_and_warm_ups(unchecked):
    only = "forward warm|forward.backward warm-up 1|step warm-up 1"
    rows = measure("--optimizer", "--no-peers", "--warmup", "1,0", "--only", only)
    assert problems(rows) == []
    assert [(r["pass"], r["warmup"]) for r in rows] == [
        ("forward", 0),
        ("forward", 1),
        ("forward+backward", 1),
        ("optimizer step", 1),
    ]
    for row in rows:
        assert row["includes_compile"] == (row["warmup"] == 0)
        assert row["compile_s"] > 0 and row["samples"] == 2 and row["std_ms"] > 0
    _, forward, backward, step = (r["output_bytes"] for r in rows)
    # The loss; with gradients; with new weights and both moments.
    parameters = 2 * 50 * 24 + 2 * (4 * 24**2 + 3 * 24 * 40) + 5 * 24
    assert forward == 4
    assert 4 * parameters <= backward < 4 * parameters + 1000
    assert 12 * parameters <= step < 12 * parameters + 1000


def test_peers_pass_the_same_check(tiny):
    rows = measure("--full", "--warmup", "1", "--only", "backward")
    assert problems(rows) == []
    by = [(r["by"], r["layers"]) for r in rows]
    assert by == [(XLA, "unrolled"), (XLA, "scanned"), (PLAIN, "unrolled")]
    assert rows[0]["error"] <= rows[0]["error_bound"]


BACKWARD = ["--no-peers", "--warmup", "1", "--only", "backward"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--dtype", "bfloat16", "--remat"],
        ["--attention", "dilated", "--mlp", "2:4"],
    ],
    ids=lambda argv: argv[1],
)
def test_other_forms(tiny, argv):
    rows = measure(*argv, *BACKWARD, "--layers", "scanned")
    assert problems(rows) == [] and len(rows) == 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_wrong_values_are_not_timed(tiny, monkeypatch, what):
    ours = programs._our_loss

    def wrong(graph, state, tokens, targets):
        loss = ours(graph, state, tokens, targets)
        if what == "loss":
            return 1.001 * loss
        embedding = state["embedding"][...]
        # The value stays, and one token's gradient does not.
        return loss + (embedding - programs.jax.lax.stop_gradient(embedding))[3].sum()

    monkeypatch.setattr(programs, "_our_loss", wrong)
    (row,) = measure(*BACKWARD)
    assert row["status"] == "failed"
    assert row["reason"].startswith("WrongValues") and "time_ms" not in row


def test_what_does_not_fit_is_skipped_before_it_is_tried(tiny, monkeypatch):
    def build(*args):
        raise AssertionError("tried")

    monkeypatch.setattr(transformer, "build", build)
    huge = replace(TINY, embed_dim=24 * 2**12, hidden_dim=2**20)
    monkeypatch.setattr(transformer, "SIZES", {"small": huge})
    rows = measure("--no-peers")
    assert {r["status"] for r in rows} == {"skipped"}
    assert "GB of memory" in rows[0]["reason"]


def test_grid():
    full = cases("--full", "--no-peers")
    assert len(full) == 60
    lines = published("transformer")
    assert sorted(str(c.published_ms) for c in full) == sorted(
        str(float(line["mean_time_ms"])) for line in lines
    )
    assert all(case.iterations == 10 for case in full)
    assert {case.warmup for case in full} == {0, 1, 5}
    sizes = {(c.labels["size"], c.labels["seq"]) for c in cases()}
    assert sizes == {("small", 128)}


def test_flops_and_memory_of_the_published_models():
    full = cases("--full", "--no-peers")
    for case in full:
        size = transformer.SIZES[str(case.labels["size"])]
        context, d = int(case.labels["seq"]), size.embed_dim
        forward = 2 * 4 * context * (16 * size.layers * d**2 + 10_000 * d)
        forward += 4 * 4 * size.layers * context**2 * d
        passes = 1 if case.labels["pass"] == "forward" else 3
        assert case.flops == passes * forward
    needed = {
        c.labels["size"]: c.needed_bytes
        for c in full
        if c.labels["pass"] == "forward+backward" and c.labels["seq"] == 256
    }
    assert 1.5e9 < needed["small"] < 4e9
    assert 2 * 13.6e9 < needed["2.7B"] < 50e9


def test_command(unchecked, tmp_path, capsys):
    out, trace = tmp_path / "rows.json", tmp_path / "traces"
    picture = tmp_path / "rows.png"
    argv = ["--iterations", "2", "--json", str(out), "--trace", str(trace)]
    argv += ["--plot", str(picture), "--no-peers", "--only", "backward"]
    assert transformer.main(argv) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines()[12:])) <= 80
    saved = json.loads(out.read_text())
    assert saved["meta"]["complete"] and saved["meta"]["matmul_peak_tflops"] > 0
    assert {row["status"] for row in saved["rows"]} == {"ok"}
    assert all("percent_of_peak" in row for row in saved["rows"])
    assert len(list(trace.iterdir())) == len(saved["rows"]) == 2


def fake_rows() -> list[Any]:
    """The whole grid, with the published times as ours."""
    rows = []
    for case in cases("--full"):
        row: Any = {**case.labels, "published_ms": case.published_ms, "status": "ok"}
        row |= {"mean_ms": 1234.5, "std_ms": 123.4, "time_ms": 1234.5, "reason": None}
        mean, std = transformer.published_ms(row)
        if mean is not None and row["layers"] == "unrolled":
            row |= {"mean_ms": mean, "std_ms": std}
        row |= {"error": 1e-3, "compile_s": 12.34, "percent_of_peak": 77.7}
        row |= {"argument_bytes": 12e9, "output_bytes": 12e9, "temp_bytes": 345e8}
        rows.append(row | {"includes_compile": case.warmup == 0})
    return rows


def test_report_of_the_whole_grid(printed, tmp_path):
    rows = fake_rows()
    rows[1] |= {"status": "failed", "reason": "WrongValues: error"}
    text = printed(transformer.BENCHMARK, rows, tmp_path / "rows.png")
    for title in (
        "Milliseconds: mean",
        "2.7B: mean ± std (published mean)",
        "Passes over the forward",
        "Effect of warm-ups",
        "Mean ms of fwd+bwd at context 256 (published)",
        "Summary of 59 rows",
    ):
        assert title in text


def test_summary_is_the_published_one(printed):
    rows = [
        row for row in fake_rows() if (row["by"], row["layers"]) == (XLA, "unrolled")
    ]
    text = printed(transformer.BENCHMARK, rows)
    summary = text[text.index("Summary of 60 rows") :]
    figures = {line.split()[0]: line.split()[1:] for line in summary.splitlines()[4:11]}
    assert figures["mean"][:2] == ["239.9", "82.51"]
    assert figures["std"][0] == "179.4" and figures["max"][:2] == ["823.1", "302.4"]
    pivot = text[text.index("Mean ms of forward at context 128") :]
    small = next(line for line in pivot.splitlines() if line.startswith(" small"))
    assert small.split()[1:] == "105.1 (105.1) 38.00 (38.00) 37.73 (37.73)".split()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sizes", "tiny"], "must be among small, medium, large, xl, 2.7B"),
        (["--warmup", "one"], "must be integers like 0,1,5, got 'one'"),
        (["--contexts", "100"], "must be among 128, 256, 512, 1024, 2048"),
        (["--trace", "/dev/null/x"], "must be a folder to write to"),
        (["--only", "70B"], "--only must be found in a row of --list, got '70B'"),
        (["--mlp", "relu"], "invalid choice: 'relu'"),
    ],
)
def test_refusals(argv, message, capsys):
    with pytest.raises(SystemExit):
        cases(*argv)
    assert message in capsys.readouterr().err


def test_rows_on_a_mesh_pass_the_same_check(tiny):
    argv = ["--mesh", "fsdp=2,tensor=2,context=2", "--optimizer", "--only", "step"]
    rows = measure(*argv, "--layers", "scanned", "--warmup", "1")
    assert problems(rows) == [] and len(rows) == 1
    parameters = 2 * 50 * 24 + 2 * (4 * 24**2 + 3 * 24 * 40) + 5 * 24
    # Norms are shared by two, the other weights by four.
    assert rows[0]["argument_bytes"] < 12 * (parameters / 4 + 5 * 24 / 2) + 500


@pytest.mark.parametrize(
    "mesh, argv, message",
    [
        ("fsdp=4", [], "number of devices, 8, got data=1 .* = 4"),
        ("seq=8", [], "axis must be one of data, fsdp, context, tensor, got 'seq'"),
        (
            "fsdp=2,tensor=4",
            ["--sizes", "xl"],
            "num_heads .* multiple of tensor=4, got",
        ),
        ("fsdp=8", [], "batch must be a multiple of data x fsdp = 8, got 4"),
        ("context=8", ["--attention", "dilated"], "attention_fn must be None for cont"),
    ],
)
def test_refuses_meshes(mesh, argv, message, capsys):
    with pytest.raises(SystemExit):
        cases("--mesh", mesh, *argv)
    assert re.search(f"--mesh: .*{message}", capsys.readouterr().err)


def test_memory_on_paper(monkeypatch, printed, capsys):
    small = memory.SIZES["70B"] | {"embed_dim": 64, "hidden_dim": 128, "num_layers": 2}
    small |= {"num_heads": 8, "vocab_size": 64, "context_length": 64}
    monkeypatch.setattr(memory, "SIZES", {"70B": small})
    meshes = [("70B", 8, "fsdp=4,tensor=2"), ("70B", 8, "fsdp=5")]
    monkeypatch.setattr(memory, "MESHES", meshes)
    found, failed = run(memory.cases(), Options())
    # All but the five norms, which only "fsdp" splits.
    layer = 4 * 64 * 64 + 3 * 64 * 128
    split = 4 * (2 * layer + 2 * 64 * 64) // 8 + 4 * 5 * 64 // 4
    assert found["parameters_bytes"] == split
    assert found["moments_bytes"] == 2 * split + 4
    assert split < found["temporaries_bytes"] < 1e7
    lines = printed(transformer.BENCHMARK, [found, failed]).splitlines()
    assert lines[5].split()[-2] == "H100" and lines[6].split()[2] == "failed"
    assert failed["reason"].startswith("ValueError: make_mesh")
    for option, *value in ["--batch", "2"], ["--no-peers"], ["--warmup", "1"]:
        with pytest.raises(SystemExit):
            cases("--memory", option, *value)
        assert f"leave out {option}" in capsys.readouterr().err


def test_list_measures_nothing(capsys):
    assert transformer.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 6
        and lines[0] == "small 128 forward warm-up 0 jaxkern xla unrolled"
    )
