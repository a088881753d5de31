import collections
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import free_port, run_together

import jaxkern
from examples import _checkpoints, _documents, _options, _tokenizers, train_lm
from jaxkern import nn

SMALL = ["--steps", "6", "--every", "2", "--batch", "8", "--context-length", "8"]
SMALL += ["--embed-dim", "8", "--num-layers", "1", "--num-heads", "2"]


def run(*argv):
    train_lm.main([*SMALL, *argv])


def parse(*argv):
    return _options.parse([*SMALL, *argv], None, train_lm.MLPS)


def read_log(folder):
    """Return the log of a run without its times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record.pop("tokens_per_second") > 0 for record in records)
    return records


def read_losses(folder):
    return [record["loss"] for record in read_log(folder)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 107, 4000).tolist()))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run("--text", text, "--folder", str(folder), "--save", str(folder / "model"))
    return folder


@pytest.fixture
def folder(tmp_path, finished):
    """Return a copy of the folder of a finished run, which a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def test_goes_on_exactly_and_past_a_damaged_checkpoint(folder, text, capsys):
    log = read_log(folder)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    # This is left by a kill between the last step's losses and its checkpoint.
    shutil.rmtree(folder / "checkpoints" / "6")
    for file in (folder / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    (folder / "checkpoints" / "62").mkdir()
    run("--text", text, "--folder", str(folder))
    printed = capsys.readouterr().out
    for damaged in (62, 4):
        assert f"checkpoint {damaged} cannot be read" in printed
    assert "going on from step 2" in printed
    assert "step     6" in printed and "held-out loss" in printed
    assert len(list((folder / "unreadable").iterdir())) == 2
    assert read_log(folder) == log
    with pytest.raises(SystemExit, match="other settings: embed_dim 8, now 16"):
        run("--text", text, "--folder", str(folder), "--embed-dim", "16")


def test_killed_in_mid_run_it_ends_as_if_it_was_not(tmp_path, text):
    steps = "--steps", "60", "--every", "15", "--text", text
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = str(Path(train_lm.__file__))
    command = [sys.executable, script, *SMALL, *steps, "--folder", str(killed)]
    settings = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=os.environ | settings)
    log = killed / "log.jsonl"
    try:
        while not log.exists() or len(log.read_text().splitlines()) < 20:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    before = len(log.read_text().splitlines())
    run(*steps, "--folder", str(killed))
    run(*steps, "--folder", str(whole))
    assert 20 <= before < 60
    assert read_log(killed) == read_log(whole)


@pytest.mark.parametrize("saved", [False, True], ids=["before", "after"])
def test_a_kill_beside_the_write_of_a_checkpoint_loses_no_line(
    tmp_path, text, finished, monkeypatch, saved
):
    def die(manager, step, args):
        if saved or step < 4:
            save(manager, step, args=args)
        if step == 4:
            raise SystemExit("killed")

    save, folder = ocp.CheckpointManager.save, tmp_path / "run"
    argv = "--text", text, "--folder", str(folder)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(ocp.CheckpointManager, "save", die)
        run(*argv)
    run(*argv)
    assert read_log(folder) == read_log(finished)


def read_events(folder):
    """Return what TensorBoard shows, by name and step, read from its files."""
    # Its names are made when it is imported.
    from tensorboardX.proto import event_pb2

    events: Any = event_pb2
    found = {}
    for file in sorted(folder.iterdir()):
        rest = file.read_bytes()
        while rest:
            # A length of 8 bytes, its checksum of 4, the event, and its checksum.
            size = int.from_bytes(rest[:8], "little")
            event, rest = (
                events.Event.FromString(rest[12 : 12 + size]),
                rest[16 + size :],
            )
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def tune(model, *argv):
    common = "--init", str(model), "--context-length", "8", "--batch", "8"
    train_lm.main([*common, *argv])


def test_what_is_saved_can_be_tuned_and_saved(tmp_path, text, finished, capsys):
    pytest.importorskip("tokenizers")
    import tokenizers

    model = shutil.copytree(finished / "model", tmp_path / "model")
    letters = tokenizers.models.BPE({chr(i): i for i in range(256)}, [])
    tokenizers.Tokenizer(letters).save(str(model / "tokenizer.json"))
    tune(model, "--text", text, "--steps", "2", "--save", str(tmp_path / "tuned"))
    assert "3800 tokens to learn from" in capsys.readouterr().out
    found = [jaxkern.models.load(path) for path in (model, tmp_path / "tuned")]
    assert found[0].config == found[1].config
    # The rate is 0 in the first step, and Adam moves each weight by the rate at most.
    weights = [nnx.to_pure_dict(nnx.state(one)) for one in found]
    for before, after in zip(*map(jax.tree.leaves, weights), strict=True):
        assert 0 < abs(before - after).max() < 2.5e-5
    assert (tmp_path / "tuned" / "tokenizer.json").exists()


def test_a_loaded_model_is_whole_and_has_the_tokens_of_its_tokenizer(text, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit, match="load: .*config.json"):
        tune(tmp_path, "--text", text)
    args, tokenizer = parse(), _tokenizers.Bytes()
    with pytest.raises(ValueError, match="a tokenizer.json for its 300 tokens"):
        train_lm.check_vocabulary(args, 300, tokenizer)
    args.tokenizer = tmp_path
    with pytest.raises(ValueError, match="at most the 255 tokens of the model"):
        train_lm.check_vocabulary(args, 255, tokenizer)
    train_lm.check_vocabulary(args, 300, tokenizer)


def test_a_data_set_goes_on_where_it_was_killed_and_tensorboard_shows_it(
    tmp_path, capsys
):
    pytest.importorskip("grain")
    pytest.importorskip("tensorboardX")
    data, folder = tmp_path / "data.npy", tmp_path / "run"
    np.save(data, np.arange(2000) % 250)
    argv = "--data", str(data), "--folder", str(folder)
    run(*argv)
    log = read_log(folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    run(*argv, "--tensorboard")
    assert read_log(folder) == log
    printed = capsys.readouterr().out
    assert "237 rows to learn from" in printed and "going on from step 4" in printed
    # The steps before had no --tensorboard.
    events = read_events(folder / "tensorboard")
    assert len(events) == 2 * 4
    for record in log[4:]:
        step = record.pop("step")
        assert record == pytest.approx({k: events[k, step] for k in record})
    np.save(data, np.arange(2001) % 250)
    with pytest.raises(SystemExit, match="other settings: data_bytes 16128, now 16136"):
        run(*argv)


def test_a_folder_has_one_run_and_one_text(folder, text, monkeypatch):
    argv, files = ("--folder", str(folder)), [folder / "log.jsonl"]
    files.append(folder / "settings.json")
    before, log = [file.read_bytes() for file in files], read_log(folder)
    lock = _checkpoints.take(folder)
    holder = f"held by process {os.getpid()} on "
    with pytest.raises(SystemExit, match=f"must be of no other run, got .*{holder}"):
        run("--text", text, *argv)
    assert lock is not None
    lock.close()
    # The same name, other bytes.
    kept = Path(text).read_bytes()
    try:
        Path(text).write_bytes(kept[::-1])
        with pytest.raises(SystemExit, match="other settings: text_sha256 "):
            run("--text", text, *argv)
    finally:
        Path(text).write_bytes(kept)

    def fill(path, text):
        path.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(folder / "checkpoints" / "6")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill)
        for damage in (lambda: None, files[1].unlink):
            damage()
            with pytest.raises(SystemExit, match="a folder to write to: .* No space"):
                run("--text", text, *argv)
    assert files[0].read_bytes() == before[0] and not files[1].exists()
    assert not list(folder.glob("*.part"))
    # The disk needs no room for checkpoints that exist, so not for 4 more.
    files[1].write_bytes(before[1])
    free = sum(f.stat().st_size for f in (folder / "checkpoints" / "4").rglob("*"))
    disk = collections.namedtuple("disk", "free")(2 * free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    run("--text", text, *argv)
    assert read_log(folder) == log


def test_nothing_is_lost_where_no_checkpoint_can_be_read(folder, text):
    log = (folder / "log.jsonl").read_text()
    for file in (folder / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    before = sorted((folder / "checkpoints").rglob("*"))
    with pytest.raises(SystemExit, match="no checkpoint in .* can be read"):
        run("--text", text, "--folder", str(folder))
    assert (folder / "log.jsonl").read_text() == log
    assert sorted((folder / "checkpoints").rglob("*")) == before


def test_text():
    text = _documents.read_text(None)
    assert len(text.tokens) > 1e6 and b"def " in text.tokens[:100_000].tobytes()
    train, held_out = text.split(128)
    assert len(train.tokens) + len(held_out.tokens) == len(text.tokens)
    entropy = _documents.unigram_loss(train.tokens, train.tokens, 256)
    p = np.bincount(train.tokens) / len(train.tokens)
    assert entropy == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=1e-3)


def test_batches_depend_on_their_place_only():
    text = _documents.Text(np.arange(220, dtype=np.uint8), np.array([0]))
    meshes = nn.make_mesh(data=8), nn.make_mesh(fsdp=4, context=2)
    one, other = (_documents.Windows(text, parse(), mesh) for mesh in meshes)
    (batch,) = one.batch(3)["tokens"]
    np.testing.assert_array_equal(batch, other.batch(3)["tokens"][0])
    assert not np.array_equal(batch, one.batch(4)["tokens"][0])
    assert batch.shape == (8, 9) and (np.diff(batch) == 1).all()
    batch = one.batch(3)["tokens"]
    assert {shard.data.shape for shard in batch.addressable_shards} == {(1, 1, 9)}
    halves = _documents.Windows(
        text, parse("--batch", "4", "--accumulate", "2"), meshes[1]
    )
    np.testing.assert_array_equal(batch.reshape(2, 4, 9), halves.batch(3)["tokens"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--text", sys.executable + "x"], "--text must be a file to read"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--context-length", "1"], "--context-length must be at least 2"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--learning-rate", "nan"], "--learning-rate must be positive and finite"),
        (["--learning-rate", "0"], "must be positive and finite, got 0.0"),
        (["--distributed", "--processes", "0"], "--processes must be at least 1, got"),
        (["--distributed", "--processes", "2", "--process", "2"], "--process must be"),
        (["--mlp", "relu"], "invalid choice"),
        (["--accumulate", "0"], "--accumulate must be at least 1"),
        (["--warm-up", "6"], "--warm-up must be from 0 to below --steps, got 6"),
        (["--clip", "0"], "--clip must be positive, or inf for none, got 0.0"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0 and finite"),
        (["--prompt", ""], "--prompt must not be empty"),
        (["--data", __file__, "--text", __file__], "--data must be without --text"),
        (["--data", "a.npy", "b"], "--data must be .npy files or ArrayRecords"),
        (["--data", "/nowhere/x"], "--data must be a file to read, got '/nowhere/x'"),
        (["--tokenizer", "/nowhere/x"], "--tokenizer must be a file to read, got "),
        (["--init", "x"], "--init must be without --embed-dim: the model has its own"),
        (["--mlp", "2:4", "--save", "x"], "--save needs a model of --mlp swiglu"),
        (["--save", __file__], "--save must be a folder, got "),
        (["--tensorboard"], "--tensorboard needs --folder, which it writes to"),
        (["--plot", "loss.txt"], "--plot must end in .png, .svg or .pdf"),
        (["--plot", "/nowhere/x.png"], "--plot must be in a folder to write to"),
        (["--process", "0"], "--processes and --process need --distributed"),
        (["--compare", "--folder", "x"], "--compare must be without --folder"),
    ],
)
def test_refusals(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


def test_options_need_their_packages_and_text_has_files(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        parse("--text", str(tmp_path))
    assert f"--text must have a file in it, got '{tmp_path}'" in capsys.readouterr().err
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit):
        parse("--save", str(tmp_path))
    assert f"--save must have no model yet, got '{tmp_path}'" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    packages = {"data": "grain", "tokenizer": "tokenizers", "save": "safetensors"}
    for option, package in packages.items():
        with pytest.raises(SystemExit):
            parse(f"--{option}", "constraints.txt" if option != "save" else "new")
        expected = f"--{option} needs {package}: pip install {package}"
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--tensorboard", "--folder", str(tmp_path))
    assert "needs tensorboardX: pip install tensorb" in capsys.readouterr().err


def test_the_last_mlp_of_a_comparison_is_refused_before_the_first_trains(text, capsys):
    sizes = "--embed-dim", "2", "--num-heads", "1", "--mesh", "data=8"
    with pytest.raises(SystemExit, match="rank must be an integer of at least 1"):
        run("--text", text, "--compare", *sizes)
    assert capsys.readouterr().out == ""


def test_the_cursor_comes_back_after_an_interrupt(text, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_lm.Progress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--text", text)
    printed = capsys.readouterr().out
    hidden, shown = (printed.rfind(f"\x1b[?25{end}") for end in "lh")
    assert 0 < hidden < shown


def test_refuses_before_it_trains(tmp_path, text):
    short = tmp_path / "short"
    short.write_bytes(b"short")
    with pytest.raises(SystemExit, match="must have at least 180 bytes .* got 5"):
        run("--text", str(short))
    short.write_bytes(b"")
    with pytest.raises(SystemExit, match="must have at least 180 bytes .* got 0"):
        run("--text", str(short))
    for folder in (text, "/proc/run"):
        with pytest.raises(SystemExit, match="--folder must be a folder to write to"):
            run("--text", text, "--folder", folder)


def test_refuses_a_full_disk(tmp_path, text, monkeypatch):
    disk = collections.namedtuple("disk", "free")(10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(SystemExit, match="disk with 0.2 MB free.*, got 0.0 MB"):
        run("--text", text, "--folder", str(tmp_path))


@pytest.mark.parametrize(
    "mesh, argv, message",
    [
        ("fsdp=4", [], "must be the number of devices, 8, got data=1 .* = 4"),
        ("model=8", [], "axis must be one of data, fsdp, context, tensor, got 'model'"),
        ("fsdp=eight", [], "fsdp must be an integer of at least 1, got 'eight'"),
        ("fsdp=2,fsdp=4", [], "fsdp must be given once"),
        ("tensor=8", [], "num_heads must be a multiple of tensor=8, got 2"),
        ("fsdp=8", ["--batch", "6"], "batch must be a multiple of data x fsdp = 8, g"),
        ("context=8", [], "seq must be a multiple of 2 x context = 16, got 8"),
        ("fsdp=8", ["--embed-dim", "12"], "'embed' must be .* fsdp=8, got 12"),
    ],
)
def test_refuses_what_the_mesh_cannot_share(text, mesh, argv, message):
    with pytest.raises(SystemExit, match=message):
        run("--text", text, "--mesh", mesh, *argv)


def run_two(*argv):
    """Run two processes with two devices each, and return what they printed."""
    command = [sys.executable, train_lm.__file__, *SMALL, *argv, "--distributed"]
    command += ["--coordinator", f"localhost:{free_port()}", "--processes", "2"]
    commands = [[*command, "--process", str(i)] for i in range(2)]
    return run_together(commands, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2")


def test_two_processes_train_the_same_curve(tmp_path, text):
    ours, theirs = tmp_path / "one", tmp_path / "two"
    run("--text", text, "--folder", str(ours), "--mesh", "data=2,context=4")
    argv = "--text", text, "--folder", str(theirs), "--mesh", "fsdp=2,tensor=2"
    first, second = run_two(*argv)
    assert "step     6" in first and "held-out loss" in first
    assert "step" not in second and "held-out" not in second
    losses = read_losses(theirs)
    np.testing.assert_allclose(losses, read_losses(ours), rtol=1e-5)
    # Both processes read what both wrote, and one process on another mesh reads it too.
    shutil.rmtree(theirs / "checkpoints" / "6")
    assert "going on from step 4" in run_two(*argv)[0]
    np.testing.assert_array_equal(read_losses(theirs), losses)
    shutil.rmtree(theirs / "checkpoints" / "6")
    run("--text", text, "--folder", str(theirs), "--mesh", "fsdp=4,tensor=2")
    np.testing.assert_allclose(read_losses(theirs), losses, rtol=1e-5)


def test_comparison(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    picture = tmp_path / "loss.png"
    run("--text", text, "--compare", "--plot", str(picture), "--mesh", "data=8")
    printed = capsys.readouterr().out
    assert "6/6" in printed and "tokens/s" in printed
    rows = [line.split() for line in printed.splitlines()[-3:]]
    assert [row[0] for row in rows] == [*train_lm.MLPS]
    # 3hm; 3r(h + m) with r = h/4; 2r(h + m) with r = h/2; the rest is the same.
    rest = int(rows[0][1]) - 3 * 8 * 32
    assert [int(row[1]) - rest for row in rows[1:]] == [3 * 2 * 40, 2 * 4 * 40]
    assert all(float(row[4]) < 6 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
