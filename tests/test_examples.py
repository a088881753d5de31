import runpy

import pytest

from examples import compress_mlp, long_context


def test_quickstart(capsys):
    runpy.run_path("examples/quickstart.py")
    lines = capsys.readouterr().out.splitlines()
    names = ["SwiGLU", "LowRankSwiGLU", "LowRankReLU2"]
    assert [line.split()[0] for line in lines[:3]] == names
    # 3hm, 3r(h + m) and 2r(h + 1.5m) of the 60M configuration.
    sizes = [2113536, 724992, 659456]
    assert [int(line.split()[1]) for line in lines[:3]] == sizes


def test_compress_mlp(monkeypatch, capsys):
    for name, value in {"STEPS": 60, "TUNING_STEPS": 30, "BATCH": 128}.items():
        monkeypatch.setattr(compress_mlp, name, value)
    monkeypatch.setattr(compress_mlp, "HELD_OUT", 5000)
    compress_mlp.main()
    rows = capsys.readouterr().out.splitlines()[2:5]
    losses = [float(row[28:].split()[2]) for row in rows]
    trained, cut, tuned = losses
    # Below the text's 3.4 nats a character without any context.
    assert trained < 3.2
    assert tuned < cut and trained < cut
    assert rows[1].split()[-2] == "-"
    assert float(rows[2][28:].split()[0]) == pytest.approx(0.36)


def test_long_context(monkeypatch, capsys):
    for name, value in {"LONG": 8192, "SEQ": 128, "STEPS": 6}.items():
        monkeypatch.setattr(long_context, name, value)
    losses = long_context.main()
    assert losses[-1] < losses[0]
    lines = capsys.readouterr().out.splitlines()
    memory = [int(line.split()[-4]) for line in lines[:4]]
    assert [line.split()[0] for line in lines[:4]] == ["1", "2", "4", "8"]
    assert memory == sorted(memory, reverse=True)
    assert memory[3] < memory[0] / 2
