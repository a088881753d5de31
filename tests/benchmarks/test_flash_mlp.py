import json
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _flash_mlp_definitions as definitions
from benchmarks import _torch, flash_mlp, frame
from benchmarks._flash_mlp_definitions import Shape
from benchmarks._harness import KERNEL, Options, labels, run
from benchmarks.flash_mlp import PASSES
from jaxkern.testing import plain

TINY = Shape(2, 24, 16, 40)
LARGE = Shape(32, 4096, 64, 512)


@pytest.fixture
def tiny(monkeypatch):
    line = dict.fromkeys(next(iter(definitions.PUBLISHED.values())), "0.5")
    monkeypatch.setattr(definitions, "PUBLISHED", {TINY: line})
    monkeypatch.setattr(flash_mlp, "CPU_SWEEP", [TINY, Shape(2, 24, 16, 80)])


def parse(*argv):
    return frame.parse(flash_mlp.BENCHMARK, argv)


def cases(*argv):
    return parse("--no-peers", "--full", *argv).cases


def measured(*argv):
    return run(cases(*argv), Options(warmup=1, iterations=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_right_or_say_why_not(tiny, dtype):
    rows = measured("--dtype", dtype)
    status = {(r["by"], r["status"]) for r in rows}
    ok = {(name, "ok") for name in ("jaxkern xla", "naive jnp", "plain jnp")}
    assert status == ok | {(KERNEL, "skipped")} and len(rows) == 8
    reason = "flash_mlp: mosaic_gpu needs an H100"
    assert rows[0]["reason"].startswith(reason)


def test_wrong_rows_are_refused(tiny, monkeypatch):
    ours, matmul = flash_mlp.jaxkern.flash_mlp, definitions.matmul

    def wrong(x, w1, w2, implementation):
        return ours(x, w1, w2).at[1, 7].multiply(1.1)

    def wrong_run(call, *args):
        return call(lambda y: y.at[1, 7].multiply(1.1), matmul(*args[-2:]))

    monkeypatch.setattr(flash_mlp.jaxkern, "flash_mlp", wrong)
    monkeypatch.setattr(definitions, "op_by_op", wrong_run)
    rows = measured("--dtype", "bfloat16", "--only", "xla|forward naive")
    assert [r["reason"].split(":")[0] for r in rows[::2]] == ["WrongValues"] * 2
    assert rows[1]["by"] == "naive jnp" and rows[1]["status"] == "failed"


def test_published_shapes_and_floors():
    assert len(definitions.PUBLISHED) == 5
    assert definitions.count_flops(LARGE, "forward") == 4 * 32 * 4096 * 64 * 512
    floors = definitions.floors_us(LARGE, "forward")
    assert floors["tensor"] == pytest.approx(17.4, rel=0.01)
    assert floors["mufu"] == pytest.approx(17.4, rel=0.02)
    # x and y of 16 MiB each, and the weights of 4 MiB.
    assert floors["bytes"] == pytest.approx(36 * 2**20 / 4.8e6, rel=0.01)


def test_memory_of_the_published_eager_form():
    """At the published size naive jnp allocates what eager did, in float32 twice."""
    shape = Shape(8, 512, 64, 512)
    element, token, weight = (
        4 * n for n in (8 * 512 * 512, 8 * 512 * 64, 8 * 64 * 512)
    )
    formulas = {
        "forward": 2 * element + token,
        "forward+backward": 3 * element + token + weight,
    }
    for which, expected in formulas.items():
        key = shape, jnp.dtype("float32"), 0, which != "forward"
        inputs = definitions.arguments(*key)
        check = partial(definitions.check, key, inputs)
        got = definitions.naive(inputs, check, which != "forward").figures()
        # XLA adds some pointers to its plan.
        assert expected <= got["allocated_bytes"] <= expected + 1024
        _, published = definitions.published_of(shape, which, "published eager")
        # That peak has a copy of the cotangent in it.
        copied = 0 if which == "forward" else token
        assert published == (expected + copied) / 2 / 2**20


def test_a_recorded_forward_counts_what_is_kept_but_not_its_arguments():
    @jax.custom_vjp
    def keeps_arguments(x, w1, w2):
        return x

    def saved(x, w1, w2):
        return x, (x, w1, w2)

    keeps_arguments.defvjp(saved, lambda kept, dy: kept)
    inputs = definitions.arguments(TINY, jnp.dtype("float32"), 0, False)
    y, hidden = 4 * 2 * 24 * 16, 4 * 2 * 24 * 40
    figures = definitions.recorded(keeps_arguments, inputs)
    assert y <= figures["allocated_bytes"] <= y + 64
    figures = definitions.recorded(plain.flash_mlp, inputs)
    assert figures["allocated_bytes"] >= y + 2 * hidden


def test_a_cpu_cuts_the_batch_and_says_so(capsys):
    assert flash_mlp.main(["--list", "--no-peers"]) == 0
    reduced = capsys.readouterr().out.splitlines()
    assert flash_mlp.main(["--list", "--no-peers", "--full"]) == 0
    full = capsys.readouterr().out.splitlines()
    assert len(reduced) == len(full) == 5 * 2 * 4
    assert full[1] == "(8, 512, 64, 512) forward jaxkern xla"
    assert reduced[1] == "(8, 64, 64, 512) forward jaxkern xla"
    shapes = [flash_mlp.shape_of(dict(c.labels)) for c in cases()]
    assert list(dict.fromkeys(shapes)) == list(definitions.PUBLISHED)


@pytest.mark.parametrize(
    "flags, count, last",
    [
        ([], 6 * 3, "(2, 256, 256, 2048) forward+backward plain jnp"),
        (["--full"], 6 * 5, "(16, 2048, 256, 8192) forward+backward plain jnp"),
    ],
    ids=["reduced", "full"],
)
def test_sweep_grid(capsys, flags, count, last):
    assert flash_mlp.main(["--list", "--sweep", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count * 2 * 4 and lines[-1] == last


@pytest.mark.parametrize("full", [True, False], ids=["full", "reduced"])
def test_command(tiny, tmp_path, capsys, full):
    path, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    argv = ["--no-peers", "--iterations", "2", "--json", str(path)]
    argv += ["--plot", str(picture), *["--full"] * full]
    assert flash_mlp.main(argv) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[10:])) <= 80
    words = " ".join(printed.split())
    assert "special functions (mufu): predicted, not measured" in words
    assert "and 1 more row)" in words
    # At a reduced size nothing of ours stands beside a published figure.
    assert ("published eager" in printed) == ("published fused" in printed) == full
    assert ("1/8 of the published batch" in printed) == (not full)
    assert str(TINY if full else Shape(2, 3, 16, 40)) in printed
    saved = json.loads(path.read_text())
    assert saved["meta"]["complete"] and len(saved["rows"]) == 8
    assert {r["published_ms"] for r in saved["rows"]} == {0.5 if full else None}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sweep_command(tiny, tmp_path, capsys):
    picture = tmp_path / "sweep.png"
    argv = ["--sweep", "--iterations", "2", "--plot", str(picture)]
    assert flash_mlp.main(argv) == 0
    printed = capsys.readouterr().out
    assert "forward, 2 heads x 24, GFLOP/s" in printed and " hidden 80" in printed
    assert "fewer heads, batch and hidden" in printed and "MiB" not in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failing_row_loses_no_other(tiny, monkeypatch, tmp_path, capsys):
    def broken(call, *args):
        raise RuntimeError("out of tiles")

    path = tmp_path / "rows.json"
    monkeypatch.setattr(definitions, "op_by_op", broken)
    argv = ["--no-peers", "--full", "--iterations", "1", "--json", str(path)]
    argv += ["--plot", str(tmp_path / "rows.png")]
    assert flash_mlp.main(argv) == 1
    printed = capsys.readouterr().out
    assert f"failed: RuntimeError: out of tiles ({TINY} forward naive jnp)" in printed
    status = [row["status"] for row in json.loads(path.read_text())["rows"]]
    assert status == ["skipped", "ok", "failed", "ok", "skipped", "ok", "ok", "ok"]


def test_an_interrupt_before_the_first_row_draws_nothing(monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(flash_mlp, "build", interrupt)
    for more in ([], ["--sweep"]):
        assert flash_mlp.main(["--plot", str(tmp_path / "a.png"), *more]) == 130
        printed = capsys.readouterr().out
        assert "Nothing to draw" in printed and "Interrupted after 0 of" in printed


def rows_of_a_gpu(args):
    """A row for each case, with figures as wide as they get."""
    rows = []
    for case in args.cases:
        row = {**case.labels, "status": "ok", "reason": None, "error": 1e-3}
        row |= {"time_ms": 1234.5, "std_ms": 123.4, "includes_compile": False}
        row |= {"tflops": 612.3, "allocated_bytes": 2**40, "flops": 1e15}
        if row["by"] in flash_mlp.JAX:
            row |= {"device_ms": 0.01234}
        rows.append(row)
    rows[0] |= {"status": "failed", "reason": "WrongValues: error"}
    return rows


@pytest.mark.parametrize("sweep", [False, True], ids=["published", "sweep"])
def test_no_figure_of_a_gpu_is_cut_off(monkeypatch, tmp_path, printed, sweep):
    monkeypatch.setattr(_torch, "why_left_out", lambda peer, args: None)
    peer = tmp_path / "mine.py"
    peer.write_text("")
    argv = ["--sweep"] if sweep else ["--peer", str(peer)]
    rows = rows_of_a_gpu(parse("--full", *argv))
    text = printed(flash_mlp.BENCHMARK, rows, tmp_path / "rows.png")
    if sweep:
        assert "kernel/xla" in text
    else:
        # The published savings of memory, in the study's own numbers.
        lines = text.splitlines()
        cells = [line.split()[2:] for line in lines if "published fused" in line]
        assert ["0.500", "94.1", "2.50", "81.5"] in cells


def test_savings_are_over_the_eager_row(printed):
    def rows_of(**sizes):
        return [
            labels("flash_mlp", "", name.replace("_", " "), which, "float32")
            | {"grid": "published", "shape": str(TINY), **vars(TINY)}
            | {"status": "ok", "time_ms": 1.0, "flops": 1e9, "includes_compile": False}
            | {"allocated_bytes": size * 2**20}
            for which in PASSES
            for name, size in sizes.items()
        ]

    rows = rows_of(xla=1, naive_jnp=4, torch_eager=8)
    text = printed(flash_mlp.BENCHMARK, rows)
    assert "saved over torch eager" in text and "87.5" in text
    text = printed(flash_mlp.BENCHMARK, rows_of(xla=1, naive_jnp=4))
    assert "saved over naive jnp" in text and "75.0" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--peer", "mine.txt"], "must be PATH.py or PATH.py:NAME, got 'mine.txt'"),
        (["--peer", "mine.py:2x"], "must name a function after the colon, got '2x'"),
        (["--peer", "mine.py:"], "must name a function after the colon, got ''"),
        (["--peer", "no/mine.py"], "there is no file 'no/mine.py'"),
        (["--sweep", "--peer", __file__], "--sweep has JAX's rows only"),
        (["--only", "("], "must be a regular expression, got '('"),
        (["--only", "triton"], "must be found in a row of --list, got 'triton'"),
    ],
    ids=lambda a: " ".join(a[:2]) if isinstance(a, list) else "",
)
def test_options_are_refused_before_anything_runs(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, reason",
    [
        ("def other(): pass", "has no function 'flash_mlp'"),
        ("flash_mlp = 3", "has no function 'flash_mlp'"),
        (
            "import no_such_thing",
            "ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("def flash_mlp(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(2)", "cannot be imported: SystemExit: 2"),
    ],
)
def test_a_peer_that_cannot_be_loaded_fails_its_rows_only(
    tiny, tmp_path, source, reason
):
    path = tmp_path / "mine.py"
    path.write_text(source)
    rows = measured("--peer", str(path), "--only", " (xla|peer)$")
    status = [(r["by"], r["status"]) for r in rows]
    assert status.count(("peer", "failed")) == 2 and ("jaxkern xla", "ok") in status
    found = [r["reason"] for r in rows if r["by"] == "peer"]
    assert all(r.startswith("ImportError: ") and reason in r for r in found)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize("which", PASSES)
def test_torch_rows(torch, tiny, which):
    args = parse("--full")
    program = flash_mlp.build(_torch.FRAMEWORKS[0], TINY, which, args)
    checked = program.check(program.run)
    assert checked.error <= checked.bound
    # On a CPU PyTorch does not tell what it allocates.
    assert program.figures() == {}


PEERS = {
    "right": ("F.silu(x @ w1) @ w2", ["ok", "ok"]),
    "wrong": ("F.gelu(x @ w1) @ w2", ["failed", "failed"]),
    "no backward": ("(F.silu(x @ w1) @ w2).detach()", ["ok", "failed"]),
    "two results": ("(x, x)", ["failed", "failed"]),
}


@pytest.mark.parametrize("body, status", PEERS.values(), ids=PEERS)
def test_a_peer_is_checked_forward_and_backward(torch, tiny, tmp_path, body, status):
    path = tmp_path / "mine.py"
    source = f"""
        import torch.nn.functional as F
        def mine(x, w1, w2):
            return {body}
    """
    path.write_text(textwrap.dedent(source))
    rows = measured("--peer", f"{path}:mine", "--only", " peer$")
    assert [r["status"] for r in rows] == status
    assert all("time_ms" in r for r in rows if r["status"] == "ok")


def test_the_reference_is_computed_once_a_shape_and_pass(tiny, monkeypatch):
    seen = []
    arguments = definitions.arguments
    definitions.results.cache_clear()
    monkeypatch.setattr(
        definitions, "arguments", lambda *key: seen.append(key) or arguments(*key)
    )
    key = TINY, jnp.dtype("float32"), 0, True
    got = definitions.results(*key)
    assert definitions.results(*key) is got and len(seen) == 1
    exact = got[1][0]
    assert exact.dtype == np.float64 and exact.shape == (2, 24, 16)
