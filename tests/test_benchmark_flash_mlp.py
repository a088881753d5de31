import json

import pytest

from benchmarks import _torch, flash_mlp
from benchmarks._harness import Options, run

TINY = flash_mlp.Shape(2, 24, 16, 40)


@pytest.fixture
def tiny(monkeypatch):
    line = dict.fromkeys(next(iter(flash_mlp.PUBLISHED.values())), "0.5")
    monkeypatch.setattr(flash_mlp, "PUBLISHED", {TINY: line})


def cases(*argv):
    return flash_mlp.make_cases(flash_mlp.parse(["--no-peers", *argv]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_right_or_say_why_not(tiny, dtype):
    rows = run(cases("--dtype", dtype), Options(iterations=1))
    status = {(r["implementation"], r["status"]) for r in rows}
    expected = {("mosaic_gpu", "skipped"), ("xla", "ok"), ("plain jnp", "ok")}
    assert status == expected and len(rows) == 6
    reason = "dtype must be" if dtype == "float32" else "mosaic_gpu needs an H100"
    assert rows[0]["reason"].startswith(reason)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_rows_are_refused(tiny, monkeypatch, dtype):
    ours = flash_mlp.jaxkern.flash_mlp

    def wrong(x, w1, w2, implementation):
        return ours(x, w1, w2).at[1, 7].multiply(1.1)

    monkeypatch.setattr(flash_mlp.jaxkern, "flash_mlp", wrong)
    rows = run(cases("--dtype", dtype), Options(iterations=1))
    reasons = [r["reason"] for r in rows if r["implementation"] == "xla"]
    assert [r.split(":")[0] for r in reasons] == ["WrongValues"] * 2


def test_published_shapes_and_floors():
    assert len(flash_mlp.CASES) == 5
    shape = flash_mlp.Shape(32, 4096, 64, 512)
    assert flash_mlp.count_flops(shape, "forward") == 4 * 32 * 4096 * 64 * 512
    floors = flash_mlp.floors_ms(shape, "forward")
    assert floors["tensor"] == pytest.approx(0.0174, rel=0.01)
    assert floors["mufu"] == pytest.approx(0.0174, rel=0.02)
    # x and y of 16 MiB each, and the weights of 4 MiB.
    assert floors["bytes"] == pytest.approx(1e3 * 36 * 2**20 / 4.8e12, rel=0.01)


def test_command(tiny, tmp_path, capsys):
    path = tmp_path / "rows.json"
    argv = ["--no-peers", "--iterations", "2", "--json", str(path)]
    assert flash_mlp.main(argv) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and "Floors on one H200" in printed
    assert "and 1 more rows" in printed
    lines = [line for line in printed.splitlines() if not line.startswith("skipped")]
    assert max(map(len, lines[7:])) <= 80
    saved = json.loads(path.read_text())
    assert saved["meta"]["complete"] and len(saved["rows"]) == 6


def test_no_figure_is_cut_off_at_80_columns(capsys):
    rows = [
        {"shape": str(shape), "pass": which, "implementation": name, "status": "ok"}
        | {"time_ms": 1234.5, "std_ms": 12.34, "includes_compile": True}
        | {"temp_bytes": 2**31, "output_bytes": 2**31, "device_ms": 123.4}
        for shape in flash_mlp.CASES
        for which in flash_mlp.PASSES
        for name in flash_mlp.IMPLEMENTATIONS
    ]
    flash_mlp.print_rows(flash_mlp.make_console(), rows)
    flash_mlp.print_floors(flash_mlp.make_console())
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("which", flash_mlp.PASSES)
def test_torch_rows(tiny, which):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    args = flash_mlp.parse([])
    program = flash_mlp.build(_torch.FRAMEWORKS[0], TINY, which, args)
    checked = program.check(program.run)
    assert checked.error <= checked.bound
