import errno
import os
import runpy
from functools import partial
from pathlib import Path

import pytest

from benchmarks import _report
from examples import (
    _program,
    compress_llama,
    learn_masks,
    long_context,
    train_2_4,
    train_lm,
)
from jaxkern.nn import QuadraticTransformer


def test_quickstart(capsys):
    runpy.run_path("examples/quickstart.py")
    lines = capsys.readouterr().out.splitlines()
    names = ["SwiGLU", "LowRankSwiGLU", "LowRankReLU2"]
    assert [line.split()[0] for line in lines[:3]] == names
    # 3hm, 3r(h + m) and 2r(h + 1.5m) of the 60M configuration.
    sizes = [2113536, 724992, 659456]
    assert [int(line.split()[1]) for line in lines[:3]] == sizes


def test_compress_llama(monkeypatch, tmp_path, capsys):
    for name, value in {"EMBED": 16, "HIDDEN": 32, "LAYERS": 1, "HEADS": 2}.items():
        monkeypatch.setattr(compress_llama, name, value)
    methods = {name: compress_llama.METHODS[name] for name in ("SVD-LLM", "2:4 Wanda")}
    monkeypatch.setattr(compress_llama, "METHODS", methods)
    monkeypatch.setattr(compress_llama, "SHARES", (0.5,))
    argv = ["--steps", "150", "--tuning-steps", "20", "--context-length", "16"]
    picture = tmp_path / "loss.png"
    given, low, sparse = compress_llama.main([*argv, "--plot", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:18].strip() for line in lines[3:6]] == ["given", *methods]
    # A model that knows nothing has a loss of log(128) = 4.9 nats.
    assert given.before < 3.8
    for row in (low, sparse):
        assert row.tuned < row.before
    # A half of three weights of 16 by 32; rounded ranks may leave some of it.
    mlps = 3 * 16 * 32
    assert given.parameters - sparse.parameters == mlps // 2
    assert 0 <= given.parameters - low.parameters - mlps // 2 < 2 * (16 + 32)
    assert any(line.startswith("the smallest loss") for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("optimized")
def test_train_2_4(monkeypatch, tmp_path, capsys):
    for name, value in {"BATCH": 64, "HIDDEN": 258, "RANK": 32}.items():
        monkeypatch.setattr(train_2_4, name, value)
    monkeypatch.setattr("_characters.HELD_OUT", 5000)
    picture = tmp_path / "loss.png"
    runs = train_2_4.main(["--steps", "60", "--plot", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines[2:6]] == [*train_2_4.MLPS]
    assert max(map(len, lines)) <= 80
    assert "emulated" in lines[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Weights and batches are the same, so first losses, before any update, are equal.
    exact, *others = [run.losses for name, run in runs.items() if name != "dense"]
    for losses in others:
        assert losses[0] == exact[0] and losses[1:] != exact[1:]
    for run in runs.values():
        assert run.held_out < 3.2 < run.losses[0]
        before, after = run.zeros
        assert before < after and after >= 0.5
        assert run.seconds == sorted(run.seconds)
    assert lines[2].endswith(" -")
    assert lines[3].endswith(f"{100 * runs['2:4 exact'].zeros[1]:.1f} %")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (
            ["--plot", "loss.txt"],
            "--plot must end in .png, .svg or .pdf, got 'loss.txt'",
        ),
    ],
)
def test_train_2_4_refuses(argv, message, capsys):
    with pytest.raises(SystemExit):
        train_2_4.main(argv)
    assert message in capsys.readouterr().err


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


def test_learn_masks(monkeypatch, tmp_path, capsys):
    sizes = {"VOCAB": 8, "HALF": 4, "SAMPLES": 2, "PRICES": (0.1, 100.0)}
    for name, value in sizes.items():
        monkeypatch.setattr(learn_masks, name, value)
    names = ("straight_through", "reinmax")
    chosen = {name: learn_masks.ESTIMATORS[name] for name in names}
    monkeypatch.setattr(learn_masks, "ESTIMATORS", chosen)
    model = partial(QuadraticTransformer, 8, 16, num_heads=2, num_layers=1)
    monkeypatch.setattr(learn_masks, "model_of", model)
    picture = tmp_path / "frontier.png"
    argv = ["--steps", "20", "--mask-steps", "60", "--plot", str(picture)]
    frontier = learn_masks.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [n for n in names for _ in "12"]
    for (cheap, _), (dear, _) in frontier.values():
        assert 0 <= cheap < dear <= 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "example, arguments, message",
    [
        (compress_llama, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (compress_llama, ["--plot", "no/p.png"], "--plot must be in a folder to write"),
        (compress_llama, ["--folder", "no"], "--folder must have a tokenizer.json"),
        (compress_llama, ["--text", "no"], "--text must be a file to read, got 'no'"),
        (compress_llama, ["--save", "."], "--save must be a new folder, got '.'"),
        (learn_masks, ["--steps", "1"], "--steps must be at least 2, got 1"),
        (learn_masks, ["--mask-steps", "0"], "--mask-steps must be at least 1, got 0"),
        (learn_masks, ["--plot", "p.txt"], "--plot must end in .png, .svg or .pdf"),
        (learn_masks, ["--plot", "no/p.png"], "--plot must be in a folder to write"),
        (train_2_4, ["--plot", "no/p.png"], "--plot must be in a folder to write"),
    ],
)
def test_wrong_options_are_refused_before_any_work(example, arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    out, err = capsys.readouterr()
    assert message in err and not out


@pytest.mark.parametrize("example", [learn_masks, train_2_4, train_lm])
def test_a_plot_onto_no_file_is_refused_before_any_work(example, tmp_path, capsys):
    folder, link = tmp_path / "folder.png", tmp_path / "link.png"
    folder.mkdir()
    link.symlink_to(folder)
    for path in (folder, link, Path("/dev/null")):
        with pytest.raises(SystemExit):
            example.main(["--plot", str(path)])
        out, err = capsys.readouterr()
        assert "--plot must " in err and not out


@pytest.mark.parametrize("home", [_program, _report], ids=["examples", "benchmarks"])
def test_what_cannot_be_written_leaves_the_file_whole(home, tmp_path, capsys):
    """Examples and benchmarks do the same; a process writes a part file of its own."""
    path, parts = tmp_path / "a.png", []
    path.write_bytes(b"good")

    class Figure:
        def savefig(self, part, dpi, format):
            parts.append(part)
            part.write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit, match="not drawn: .* No space left on device"):
        home.save_figure(Figure(), path)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]
    assert str(os.getpid()) in parts[0].name
    with home.replacing(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
