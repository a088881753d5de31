import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from benchmarks import _attention_definitions as definitions
from benchmarks import _attention_model as model
from benchmarks import _attention_programs as programs
from benchmarks import _torch, attention, frame
from benchmarks._attention_model import (
    PUBLISHED,
    Blocks,
    Dense,
    Dilated,
    Shape,
    Task,
)
from benchmarks._attention_programs import Entry
from benchmarks._harness import PLAIN, XLA, Options, Skip, labels, run
from benchmarks.attention import PASSES
from jaxkern.testing.plain import with_gradients

SMALL = Shape(1, 256, 4)
QUARTERS = Dilated((64, 128, 256), (1, 2, 4))


@pytest.fixture
def small(monkeypatch):
    """The grids with few tokens: published rows of one shape, and two lengths."""
    shapes = {SMALL: "ok", Shape(1, 256, 2): "failed"}
    monkeypatch.setattr(
        model,
        "PUBLISHED",
        {
            (name, shape): model.Published(shape, *figures)
            for name in model.IMPLEMENTATIONS
            for shape, status in shapes.items()
            for figures in [(0.5, 20.0, 5e5) if status == "ok" else (None,) * 3]
        },
    )
    monkeypatch.setattr(attention, "SEQS", (128, 256))
    monkeypatch.setattr(attention, "DENSITIES_SEQ", 256)
    monkeypatch.setattr(attention, "RING_SEQ", 256)


def cases(*argv):
    return parse(*argv).cases


def parse(*argv):
    return frame.parse(attention.BENCHMARK, argv)


def measured(*argv):
    return run(cases(*argv), Options(warmup=1, iterations=1))


def test_the_published_rows_are_there_with_their_figures():
    rows = [c for c in cases("--grid", "published", "--no-peers")]
    assert len(rows) == 56 and len(PUBLISHED) == 56
    assert len({(c.labels["op"], c.labels["variant"]) for c in rows}) == 7
    shapes = {(c.labels["batch"], c.labels["seq"], c.labels["num_heads"]) for c in rows}
    assert shapes == {(b, n, h) for b in (1, 2) for n in (512, 1024) for h in (8, 16)}
    assert {c.labels["head_dim"] for c in rows} == {64}
    published = {attention.BENCHMARK.name_of(c.labels): c.published_ms for c in rows}
    assert len(published) == 56

    def name(row, more=""):
        return f"published {row}_attention dense{more} jaxkern xla forward"

    assert published[name("(2, 1024, 16, 64) ring", " on 1")] == 12.91
    assert published[name("(1, 512, 8, 64) dilated")] == 0.32
    failed = [name for name, ms in published.items() if ms is None]
    assert len(failed) == 12
    assert all("multi-head" in name and "16, 64)" in name for name in failed)


def test_published_memory_without_what_was_resident():
    line = PUBLISHED["ring_v2_collective", Shape(2, 1024, 16)]
    assert line.tokens_per_s == 158596
    # 12.04 MiB of weights, and six inputs of 8 MiB.
    assert line.net_mib == pytest.approx(349.04 - 12.04 - 48)
    assert PUBLISHED["multihead_standard", Shape(1, 512, 16)].net_mib is None


def test_flops_by_hand():
    shape = Shape(2, 1024, 8)
    dense = 4 * 2 * 8 * 64 * 1024**2

    def ratio(pattern, which="forward"):
        return Task(shape, pattern).flops(which) / dense

    assert ratio(Dense()) == 1 and ratio(Dense(), "forward+backward") == 3.5
    assert ratio(Dense(is_causal=True)) == 1025 / 2048
    # w / n / r^2 of each pattern.
    quarters = Dilated((256, 512, 1024), (1, 2, 4))
    assert ratio(quarters) == 1 / 4 + 1 / 8 + 1 / 16
    assert ratio(Dilated((512, 1024), (1, 2))) == 1 / 2 + 1 / 4
    # Causal: 4 triangles of 256 rows, 2 of 256, 1 of 256.
    causal = Dilated((256, 512, 1024), (1, 2, 4), is_causal=True)
    assert ratio(causal) == 7 * 256 * 257 / 2 / 1024**2
    # A segment longer than the sequence is the sequence.
    assert ratio(Dilated((256, 4096), (1, 4))) == 1 / 4 + 1 / 16
    # Three diagonals of 8 blocks; half the blocks and half of the diagonal.
    assert ratio(Blocks("near")) == 22 / 64 and ratio(Blocks("causal")) == 36 / 64
    # Four projections, each a matmul; and twice as much backward.
    module = Task(shape, Dense(), "norms")
    projections = 4 * 2 * 2 * 1024 * 512**2
    assert module.flops("forward") == dense + projections
    assert module.flops("forward+backward") == 3.5 * dense + 3 * projections


@pytest.mark.parametrize("which", ["near", "causal", 5, 10, 25, 50, 100])
def test_masks_have_the_blocks_that_are_counted(which):
    pattern, seq = Blocks(which), 4096
    mask = pattern.mask(seq)
    if isinstance(which, int):
        assert mask.density == pattern.grid(seq).mean()
        assert mask.density == pytest.approx(which / 100, abs=0.0005)
    rows = np.array([0, 127, 128, 2000, 4095])
    counts = pattern.counts(Shape(1, seq, 2), rows)
    np.testing.assert_array_equal(counts[0], mask.to_dense()[0, 0][rows])


def test_published_densities():
    assert Blocks("near").mask(512).density == 0.625
    assert Blocks("near").mask(1024).density == 0.34375


def test_counts_of_patterns():
    rows = np.arange(8)
    counts = Dilated((4, 8), (1, 2)).counts(Shape(1, 8, 2), rows)
    near = np.kron(np.eye(2, dtype=int), np.ones((4, 4), int))
    even = np.outer(rows % 2 == 0, rows % 2 == 0)
    odd = np.outer(rows % 2, rows % 2)
    np.testing.assert_array_equal(counts, [near + even, near + odd])
    causal = Dilated((4, 8), (1, 2), is_causal=True).counts(Shape(1, 8, 2), rows)
    np.testing.assert_array_equal(causal, counts * np.tri(8, dtype=int))


ONE_OF_EACH = {
    "published": r"published \(1, 256, 4, 64\)",
    "published backward": r"4, 64\) (ring.* dense|attention.*norms|block.*multi)",
    "real": r"real \(1, 256, 4, 64\) (att.*jax|bl.* 5%|.*(quarters|fixed)|"
    "(bl|att).*causal)",
    "real backward": r"real \(1, 256, 4, 64\) "
    "(dil.*(quarters causal|plain)|ring.*causal on 2)",
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_kind_of_row_is_right(small, name):
    backward = ["--backward"] if name.endswith("backward") else []
    rows = measured("--only", ONE_OF_EACH[name], *backward)
    assert len(rows) >= 3
    assert [r["reason"] for r in rows if r["status"] != "ok"] == []
    assert {r["pass"] for r in rows} == {PASSES[bool(backward)]}
    assert max(r["error"] for r in rows) < 1e-5


def test_bfloat16_rows_are_right(small):
    rows = measured(
        "--dtype",
        "bfloat16",
        "--only",
        "256, 4.*(dilated_attention dense|near|real.* ring.* dense)",
    )
    assert [r["reason"] for r in rows if r["status"] != "ok"] == [] and len(rows) >= 3


def wrong(query, key, value, **options):
    right = definitions.attend(query, key, value)
    return right.at[0, -1, 0].multiply(1.01)


@pytest.mark.parametrize("backward", [[], ["--backward"]], ids=["", "backward"])
def test_wrong_rows_are_refused(small, monkeypatch, backward):
    monkeypatch.setattr(jaxkern, "attention", wrong)
    only = r"real \(1, 256, 4, 64\) attention dense (jaxkern|plain)"
    ours, plain = measured("--only", only, *backward)
    assert ours["reason"].startswith("WrongValues") and plain["status"] == "ok"


def test_errors_of_gradients_are_against_their_usual_size():
    exact = {"query": np.array([[0.0, 0], [3, 4]]), "bias": np.full(2, 1e-15)}
    usual = 5 / np.sqrt(2)
    noise = {"query": exact["query"] + [[1e-6, 0], [0, 0]], "bias": np.zeros(2)}
    error = definitions.gradient_error(noise, exact)
    assert error == pytest.approx(1e-6 / usual)
    noise["bias"] = np.array([1e-3, 0])
    error = definitions.gradient_error(noise, exact)
    assert error == pytest.approx(1e-3 / usual)
    noise["bias"][1] = np.nan
    assert np.isnan(definitions.gradient_error(noise, exact))


def test_some_queries_of_a_long_sequence_are_checked(monkeypatch):
    monkeypatch.setattr(definitions, "ALL_ROWS", 64)
    monkeypatch.setattr(definitions, "SOME_ROWS", 16)
    rows = definitions.rows_of(Shape(1, 256, 1))
    assert len(set(rows)) == 16 and rows[0] == 0 and rows[-1] == 255
    key = Task(SMALL, QUARTERS), jnp.dtype("float32"), 0, True
    args = definitions.make_arguments(*key)
    fn = programs.core(Entry("real", "dilated_attention", key[0], XLA))
    checked = definitions.check(key, jax.jit(with_gradients(fn)))
    assert checked.error <= checked.bound

    def skewed(*args):
        return fn(*args).at[0, 255].add(1e-3)

    assert args[0].shape == (1, 256, 4, 64)
    checked = definitions.check(key, jax.jit(with_gradients(skewed)))
    assert checked.error > checked.bound


def test_command(small, tmp_path, capsys):
    path, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    argv = ["--iterations", "2", "--json", str(path), "--plot", str(picture)]
    only = (
        r"published .*(ring.* dense|attention dense.*norms|attention dense plain)"
        r"|real .* attention dense jaxkern"
    )
    assert attention.main([*argv, "--devices", "2", "--only", only]) == 0
    printed = capsys.readouterr().out
    header, tables = printed.split("\n\n", 1)
    assert max(map(len, tables.splitlines())) <= 80
    assert "a block of 128 and its two neighbours: 100.0 % at 256" in header
    assert " ring_attention dense on 2\n" in printed and "n = 256" in printed
    assert printed.count("  failed") == 3
    saved = json.loads(path.read_text())
    assert saved["meta"]["complete"] and len(saved["rows"]) == 8 + 2
    assert {row["status"] for row in saved["rows"]} == {"ok"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failing_row_loses_no_other(small, monkeypatch, tmp_path, capsys):
    def broken(*args, **options):
        raise RuntimeError("out of tiles")

    monkeypatch.setattr(jaxkern, "block_sparse_attention", broken)
    only = r"published \(1, 256, 4, 64\) (attention dense (ja|pl)|block)"
    path = tmp_path / "rows.json"
    argv = ["--iterations", "1", "--json", str(path), "--only", only]
    assert attention.main(argv) == 1
    reason = "failed: RuntimeError: out of tiles (published (1, 256, 4, 64) block_sp"
    printed = capsys.readouterr().out
    printed = " ".join(printed.split())
    assert reason in printed and "and 1 more row)" in printed
    rows = json.loads(path.read_text())["rows"]
    assert {r["op"] for r in rows if r["status"] == "failed"} == {
        "block_sparse_attention"
    }
    assert [r["status"] for r in rows if r["op"] == "attention"] == ["ok", "ok"]


def figures(case):
    """A row as wide as it gets."""
    row = {**case.labels, "flops": case.flops, "status": "ok", "reason": None}
    row |= {"time_ms": 12345.6, "std_ms": 1234.5, "includes_compile": True}
    row |= {"temp_bytes": 2**36, "output_bytes": 0, "tflops": 612.3, "error": 1e-3}
    row |= {"device_ms": 12345.6}
    return row


def test_no_figure_is_cut_off(monkeypatch, printed):
    every = (*programs.PEERS, programs.FLEX)
    monkeypatch.setattr(_torch, "why_left_out", lambda peer, args: None)
    rows = [figures(case) for case in cases("--full")]
    assert {*every} <= {row["by"] for row in rows}
    rows[0] |= {"status": "skipped", "reason": "needs 1.0 GB"}
    assert "skipped" in printed(attention.BENCHMARK, rows)


def test_rows_slower_than_plain_jnp_are_named():
    def row(op, variant, time_ms, by=XLA):
        sizes = {"grid": "real", "shape": "(1, 8, 4)", "devices": 4}
        what = labels(op, variant, by, "forward", "float32", **sizes)
        return what | {"time_ms": time_ms, "status": "ok"}

    rows = [
        row("attention", "dense", 2.0, PLAIN),
        row("attention", "causal", 1.0, PLAIN),
        row("dilated_attention", "quarters", 4.0, PLAIN),
        row("attention", "causal", 1.5),
        row("ring_attention", "dense", 1.5),
        row("block_sparse_attention", "5%", 3.0),
        row("dilated_attention", "quarters", 3.0),
    ]
    assert attention.slower_than_plain(rows) == {
        "attention causal (1, 8, 4)": 1.5,
        "block_sparse_attention 5% (1, 8, 4)": 1.5,
    }


def test_rows_that_need_too_much_are_skipped_with_the_bytes(monkeypatch):
    monkeypatch.setattr("benchmarks._harness.available_bytes", lambda: 1e9)
    rows = measured("--full", "--only", "65536, 4, 64. attention dense plain jnp")
    assert [row["status"] for row in rows] == ["skipped"]
    # Three copies of 4 heads x 65536^2 logits of 4 bytes, and of the arguments.
    assert rows[0]["reason"].startswith("needs 207.0 GB of memory, 1.0 GB are free")


def test_full_grid_reaches_65536(capsys):
    assert attention.main(["--list", "--full", "--grid", "real"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "real (1, 512, 4, 64) attention dense jaxkern xla forward"
    assert any(line.startswith("real (1, 65536, 4, 64) dilated") for line in lines)
    rings = [line for line in lines if "ring_attention" in line]
    assert [line.split()[6] for line in rings] == ["dense"] * 4 + ["causal"] * 4
    assert [line.split()[8] for line in rings] == ["1", "2", "4", "8"] * 2
    densities = [line.split()[6] for line in lines if "%" in line]
    assert densities == ["5%", "10%", "25%", "50%", "100%"]


def test_exponent_of_a_power():
    assert attention.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_an_interrupt_before_the_first_row_draws_nothing(monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "build", interrupt)
    assert attention.main(["--plot", str(tmp_path / "a.png")]) == 130
    printed = capsys.readouterr().out
    assert "Nothing to draw" in printed and "Interrupted after 0 of" in printed


def test_why_peers_are_left_out():
    args = parse()
    assert _torch.why_left_out("plain jnp", args) is None
    assert _torch.why_left_out("cudnn", args) == "it needs an NVIDIA GPU"
    args = parse("--no-peers")
    assert _torch.why_left_out("plain jnp", args) == "--no-peers"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--grid", "mine"], "invalid choice: 'mine'"),
        (["--devices", "3"], "--devices must divide 512 tokens, got 3"),
        (["--devices", "0"], "must be an integer from 1"),
        (["--only", "("], "must be a regular expression, got '('"),
        (["--only", "triton"], "must be found in a row of --list, got 'triton'"),
        (["--grid", "published", "--plot", "a.png"], "--plot draws the real grid"),
        (["--grid", "published", "--full"], "leave out --full"),
        (["--grid", "real", "--devices", "2"], "leave out --devices"),
        (["--plot", "a.txt"], "must end in .png, .svg or .pdf"),
    ],
    ids=lambda a: " ".join(a[:2]) if isinstance(a, list) else "",
)
def test_options_are_refused_before_anything_runs(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_torch_rows(is_causal, backward):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    args = parse(*["--backward"] if backward else [])
    task = Task(SMALL, Dense(is_causal))
    program = programs.build(Entry("real", "attention", task, "torch sdpa"), args)
    checked = program.check(program.run)
    assert checked.error <= checked.bound


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexattention_runs_our_lists_of_blocks():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    task = Task(SMALL, Blocks("causal"))
    entry = Entry("real", "block_sparse_attention", task, programs.FLEX)
    with pytest.raises(Skip, match="FlexAttention has no backward on a CPU"):
        programs.build(entry, parse("--backward"))
    module = programs._flex(entry.task, on_cpu=True)
    program = _torch.program(
        module,
        "torch eager",
        definitions.make_arguments(entry.task, jnp.dtype("float32"), 0, False),
        lambda run: definitions.check(
            (entry.task, jnp.dtype("float32"), 0, False), run
        ),
        False,
    )
    checked = program.check(program.run)
    assert checked.error <= checked.bound
