import shutil
import sys

import numpy as np
import pytest

from examples import train_lm

SMALL = ["--steps", "6", "--every", "2", "--batch", "2", "--context", "8"]
SMALL += ["--d-model", "8", "--layers", "1", "--heads", "2"]


def run(*argv):
    train_lm.train(train_lm.parse([*SMALL, *argv]))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 107, 4000).tolist()))
    return str(path)


def test_goes_on_exactly_and_past_a_damaged_checkpoint(tmp_path, text, capsys):
    folder = tmp_path / "run"
    run("--text", text, "--folder", str(folder))
    losses = (folder / "losses.csv").read_text()
    assert len(losses.splitlines()) == 6
    printed = capsys.readouterr().out
    assert "step     6" in printed and "held-out loss" in printed
    # As after a kill between the last step's losses and its checkpoint.
    shutil.rmtree(folder / "checkpoints" / "6")
    for file in (folder / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    run("--text", text, "--folder", str(folder))
    printed = capsys.readouterr().out
    assert "checkpoint 4 cannot be read" in printed and "from step 2" in printed
    assert len(list((folder / "unreadable").iterdir())) == 1
    assert (folder / "losses.csv").read_text() == losses
    with pytest.raises(SystemExit, match="other settings: d_model 8, now 16"):
        run("--text", text, "--folder", str(folder), "--d-model", "16")


def test_nothing_is_lost_where_no_checkpoint_can_be_read(tmp_path, text):
    folder = tmp_path / "run"
    run("--text", text, "--folder", str(folder))
    losses = (folder / "losses.csv").read_text()
    for file in (folder / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    before = sorted((folder / "checkpoints").rglob("*"))
    with pytest.raises(SystemExit, match="no checkpoint in .* can be read"):
        run("--text", text, "--folder", str(folder))
    assert (folder / "losses.csv").read_text() == losses
    assert sorted((folder / "checkpoints").rglob("*")) == before


def test_text():
    text = train_lm.read_bytes(None)
    assert len(text) > 1e6 and b"def " in text[:100_000].tobytes()
    train, held_out = train_lm.split(text, 128)
    assert len(train) + len(held_out) == len(text)
    entropy = train_lm.unigram_loss(train, train)
    p = np.bincount(train) / len(train)
    assert entropy == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=1e-3)


def test_batches_depend_on_their_place_only():
    args = train_lm.parse(SMALL)
    text = np.arange(200, dtype=np.uint8)
    batch = train_lm.make_batch(text, args, 3)
    np.testing.assert_array_equal(batch, train_lm.make_batch(text, args, 3))
    assert not np.array_equal(batch, train_lm.make_batch(text, args, 4))
    assert batch.shape == (2, 9) and (np.diff(batch) == 1).all()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--text", sys.executable + "x"], "--text must be a file"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--mlp", "relu"], "invalid choice"),
    ],
)
def test_refusals(argv, message, capsys):
    with pytest.raises(SystemExit):
        train_lm.parse(argv)
    assert message in capsys.readouterr().err


def test_refuses_before_it_trains(tmp_path, text):
    short = tmp_path / "short"
    short.write_bytes(b"short")
    with pytest.raises(SystemExit, match="must have at least 180 bytes .* got 5"):
        run("--text", str(short))
    with pytest.raises(SystemExit, match="--folder must be a folder to write to"):
        run("--text", text, "--folder", text)
