import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from benchmarks import _estimators_definitions as definitions
from benchmarks import _estimators_study as study
from benchmarks import estimators, frame
from benchmarks._harness import Options, run
from jaxkern.nn import _bilinear as nn_bilinear
from jaxkern.testing.plain import quadratic

OURS = jaxkern.masked_bilinear

TINY = {"VOCAB": 23, "EMBED": 16, "HEADS": 2, "LAYERS": 1, "HIDDEN": 12, "SEQ": 8}
CACHES = (
    definitions.base_model,
    definitions.layer_results,
    definitions.model_results,
    definitions.expected_layer,
    definitions.expected_model,
    definitions.make_passes,
    definitions.mask_logits,
)


def clear():
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture(scope="module")
def own_caches():
    clear()
    yield
    clear()


@pytest.fixture
def tiny(monkeypatch, own_caches):
    for name, value in TINY.items():
        monkeypatch.setattr(definitions, name, value)
    monkeypatch.setattr(estimators, "BATCHES", (1, 2))
    monkeypatch.setattr(estimators, "CPU_BATCHES", (1, 2))
    definitions.make_passes.cache_clear()


def cases(*argv):
    return frame.parse(estimators.BENCHMARK, argv).cases


def measured(*argv):
    return run(cases(*argv), Options(warmup=1, iterations=1))


def test_rows(capsys):
    assert estimators.main(["--list", "--full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 3 * 6 + 2 * (34 // 2 + 4 + 4) * 2
    # Rows that are checked come first.
    parts = [line.split()[0] for line in lines]
    assert parts == sorted(parts, reverse=True)
    published = [c for c in cases("--full") if c.published_ms is not None]
    assert len(published) == 2 * 34
    labels = published[0].labels
    assert labels["method"] == "current" and published[0].published_ms == 1.53
    assert estimators.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[2] for line in lines} == {"1", "2", "8"}


@pytest.mark.parametrize(
    "dtype, layer, count",
    [
        ("float32", "bilinear .* 2 jaxkern xla (bmm|fused)", 6),
        ("bfloat16", "bilinear reinmax 2 jaxkern xla fused", 1),
    ],
    ids=["float32", "bfloat16"],
)
def test_every_row_is_right(tiny, dtype, layer, count):
    model = "Transformer one_plus_sigmoid (1 .*current|2 .*xla fused)"
    rows = measured("--dtype", dtype, "--only", f"{layer}|{model}")
    assert {(r["status"], r["reason"]) for r in rows} == {("ok", None)}
    assert len(rows) == count + 2 * 2
    backward = [r for r in rows if r["pass"] == "backward"]
    assert all(r["kept_bytes"] > 0 for r in backward)


# A row may do wrong: the samples in another order, every sample the first one's mask, a
# gradient by another rule, a gradient that is lost.
def permuted(h, weights, logits, **options):
    return OURS(h, weights, jax.tree.map(lambda x: x[::-1], logits), **options)


def shared(h, weights, logits, **options):
    first = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), logits)
    return OURS(h, weights, first, **options)


def other_rule(h, weights, logits, estimator, **options):
    other = jaxkern.straight_through
    if estimator is other:
        other = partial(other, derivative="one_plus_sigmoid")
    return OURS(h, weights, logits, estimator=other, **options)


def stopped(h, weights, logits, **options):
    first = jax.lax.stop_gradient(logits[0])
    return OURS(h, weights, (first, logits[1], logits[2]), **options)


@pytest.mark.parametrize("wrong", [permuted, shared, other_rule, stopped])
def test_wrong_rows_are_refused(tiny, monkeypatch, wrong):
    monkeypatch.setattr(jaxkern, "masked_bilinear", wrong)
    monkeypatch.setattr(nn_bilinear, "masked_bilinear", wrong)
    parts = "bilinear straight_through|Transformer one_plus_sigmoid"
    rows = measured("--only", f"({parts}) 2 jaxkern xla fused")
    status = {r["pass"]: r["status"] for r in rows}
    forward = "failed" if wrong in (permuted, shared) else "ok"
    assert status == {
        "forward+backward": "failed",
        "forward": forward,
        "backward": "failed",
    }
    failed = [r for r in rows if r["status"] == "failed"]
    assert all(r["reason"].startswith("WrongValues") for r in failed)
    assert not any("mean_ms" in r for r in failed)


def test_definition_of_the_model_is_not_blind_to_masks(tiny):
    _, state = definitions.base_model(0)
    ids = definitions.token_ids(0, 2)
    logits = definitions.mask_logits(0, 2, TINY["EMBED"], TINY["HIDDEN"])
    masks = definitions.hard(logits, jnp.float32)
    named = {(0, n): m for n, m in zip(definitions.KERNELS, masks, strict=True)}
    masked, whole = (np.asarray(quadratic.logits(state, m, ids)) for m in (named, {}))
    assert np.abs(masked - whole).max() > 1e-4 * np.abs(whole).max()


def test_published_figures():
    assert len(estimators.PUBLISHED) == 34
    # As printed in the study, and as it comes of our parameters.
    for (_, _, batch), line in estimators.PUBLISHED.items():
        assert f"{estimators.parameters_mib(batch):.2f}" == line["memory_mb"]
    published = estimators.published_ms
    assert published("one_plus_sigmoid", "loop", 16) == pytest.approx(52.12)
    assert published("straight_through", "vmap", 2, "backward") == 1.77
    assert published("straight_through", "fused", 2) is None


def test_floors_of_the_published_layer():
    floors = estimators.floors_us((256, 512, 2048), 16)
    # Three products forward, six backward.
    flops = 2 * 16 * 256 * 9 * 2**20
    assert floors["tensor"] == pytest.approx(flops / 989e6)
    # Input and cotangent, output and its gradient; weights and logits, each twice.
    moved = 2 * (4 * 16 * 256 * 512) + 3 * 2**20 * 2 * (2 + 4 * 16)
    assert floors["bytes"] == pytest.approx(moved / 4.8e6)
    more = floors["stored masks"] - floors["bytes"]
    assert more == pytest.approx(3 * 2 * 16 * 3 * 2**20 / 4.8e6)


def test_rows_of_the_kernels_say_why_they_are_skipped(tiny):
    rows = measured(
        "--only", "straight_through 1 jaxkern mosaic_gpu", "--dtype", "bfloat16"
    )
    assert len(rows) == 3 and {row["status"] for row in rows} == {"skipped"}
    assert all("needs an H100 or H200" in row["reason"] for row in rows)


def test_command(tiny, tmp_path, capsys):
    path, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    argv = ["--iterations", "2", "--json", str(path), "--plot", str(picture)]
    argv += ["--only", "straight_through (1 .* current|2 .* xla (loop|fused))"]
    assert estimators.main(argv) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if "error of outputs" in line)
    assert max(map(len, lines[start:])) <= 80
    assert start < next(i for i, s in enumerate(lines) if "(published: ste)" in s)
    # The only layer that was measured has two samples.
    floors = next(
        i for i, s in enumerate(lines) if s.split()[:2] == ["samples", "tensor"]
    )
    assert lines[floors + 2].split()[0] == "2" and not lines[floors + 3]
    saved = json.loads(path.read_text())
    assert saved["meta"]["complete"] and len(saved["rows"]) == 2 + 2 * 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failing_row_loses_no_other(tiny, monkeypatch, tmp_path, capsys):
    def broken(*key):
        if key[1] == "bmm":
            raise RuntimeError("out of masks")
        return definitions.Passes(*key)

    monkeypatch.setattr(definitions, "make_passes", broken)
    path = tmp_path / "rows.json"
    argv = [
        "--iterations",
        "1",
        "--only",
        "Transformer straight_through 1 .*(bmm|vmap)",
    ]
    argv += ["--json", str(path), "--plot", str(tmp_path / "rows.png")]
    assert estimators.main(argv) == 1
    printed = capsys.readouterr().out
    assert (
        "failed: RuntimeError: out of masks (QuadraticTransformer straight_through 1"
        in printed
    )
    status = [row["status"] for row in json.loads(path.read_text())["rows"]]
    assert status == ["failed", "failed", "ok", "ok"]


def test_an_interrupt_before_the_first_row_draws_nothing(monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(estimators, "build_layer", interrupt)
    assert estimators.main(["--plot", str(tmp_path / "a.png")]) == 130
    printed = capsys.readouterr().out
    assert "Nothing to draw" in printed and "Interrupted after 0 of" in printed


@pytest.mark.parametrize(
    "mean, std, compiles",
    [
        (1.5, 0.059, False),
        (0.001, 0.00012, False),
        (0.1, None, True),
        (10000.0, 999.9, False),
        (99999.0, 99999.0, True),
    ],
)
def test_times_of_any_size_fit(mean, std, compiles, printed):
    row = {"status": "ok", "mean_ms": mean, "std_ms": std, "includes_compile": compiles}
    rows = [{**row, **case.labels} for case in cases("--full", "--only", "Transf")]
    rows[-1]["status"] = "skipped"
    text = printed(estimators.BENCHMARK, rows)
    shown = {1.5: "1.50±0.059", 0.001: "0.001±0.000", 0.1: "0.100 "}
    assert shown.get(mean, f"{mean:.0f}±") in text and "19.93±0.28" in text


def test_no_figure_of_a_gpu_is_cut_off(tmp_path, printed):
    rows = []
    for case in cases("--full"):
        row = {**case.labels, "status": "ok", "reason": None, "includes_compile": False}
        row |= {"error": 1.2e-3, "error_bound": 1.2e-3, "mean_ms": 12345.6}
        row |= {"std_ms": 1234.5, "temp_bytes": 2**40, "output_bytes": 2**40}
        rows.append(row)
    rows[0] |= {"status": "failed", "reason": "WrongValues: error", "error": 1.0}
    text = printed(estimators.BENCHMARK, rows, tmp_path / "rows.png")
    assert "failed" in text and "1.2e-03" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only", "("], "must be a regular expression, got '('"),
        (["--only", "triton"], "must be found in a row of --list, got 'triton'"),
        (["--no-peers"], "all rows are ours: leave out --no-peers"),
        (["--study", "--full"], "--study has no other size"),
        (["--study", "--dtype", "bfloat16"], "--study is in float32"),
        (["--study", "--iterations", "2"], "--study times nothing"),
    ],
    ids=lambda a: " ".join(a[:2]) if isinstance(a, list) else "",
)
def test_options_are_refused_before_anything_runs(argv, message, capsys):
    with pytest.raises(SystemExit):
        cases(*argv)
    assert message in capsys.readouterr().err


def test_exact_gradient_of_the_study_by_finite_differences():
    loss, logits = study.losses(0)["quartic"], study.logits_at(1.0)

    def mean(x):
        outcomes = np.indices((2,) * study.ENTRIES).reshape(study.ENTRIES, -1).T
        p = 1 / (1 + np.exp(-np.asarray(x, float)))
        chances = np.where(outcomes > 0, p, 1 - p).prod(-1)
        return sum(
            float(loss(jnp.asarray(b, float))) * c
            for b, c in zip(outcomes, chances, strict=True)
        )

    got, x = study.exact(loss, logits), np.asarray(logits, float)
    for i, step in enumerate(1e-3 * np.eye(study.ENTRIES)):
        slope = (mean(x + step) - mean(x - step)) / 2e-3
        assert got[i] == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_study(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "DRAWS", 2**12)
    monkeypatch.setattr(study, "SCALES", (1.0,))
    monkeypatch.setattr(study, "TEMPERATURES", (2.0,))
    path, picture = tmp_path / "rows.json", tmp_path / "study.png"
    argv = ["--study", "--json", str(path), "--plot", str(picture)]
    assert estimators.main(argv) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Bias ± std"))
    assert max(map(len, lines[start:])) <= 80
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) == 3 * (7 + 2)
    # The values by the closed forms.
    sigmoid = "straight_through, drawn, sigmoid"
    unbiased = {
        name: study.unbiased(saved["rows"], name)
        for name in ("linear", "quadratic", "quartic")
    }
    assert unbiased == {
        "linear": [sigmoid, "reinmax", "rloo, 4 draws"],
        "quadratic": ["reinmax", "rloo, 4 draws"],
        "quartic": ["rloo, 4 draws"],
    }
    assert "L quadratic in each entry:\n    reinmax; rloo, 4 draws.\n" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
