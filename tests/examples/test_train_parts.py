"""The parts of `train_lm.py`: its text, its data sets and its optimizer."""

import json
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples import _documents, _log, _optimizer, _options, _tokenizers, train_lm
from jaxkern import nn

SMALL = ["--steps", "6", "--batch", "8", "--context-length", "8"]
SMALL += ["--embed-dim", "8", "--num-layers", "1", "--num-heads", "2"]
WORDS = {"[UNK]": 0, "a": 1, "b": 2, "c": 3, "</s>": 4}


def parse(*argv):
    return _options.parse([*SMALL, *argv], None, train_lm.MLPS)


@pytest.fixture
def files(tmp_path):
    """Return a folder of three documents, a hidden one, an empty one and a folder."""
    (tmp_path / "more").mkdir()
    (tmp_path / ".git").mkdir()
    contents = {"b": b"bb" * 60, "more/c": b"c" * 100, "a": b"aaa", "empty": b""}
    for name, content in (contents | {".git/x": b"x", ".x": b"x"}).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def make_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel(WORDS, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def test_documents_of_files_and_folders(files):
    text = _documents.read_text([files / "more" / "c", files])
    assert text.tokens.tobytes() == b"c" * 100 + b"aaa" + b"b" * 120 + b"c" * 100
    np.testing.assert_array_equal(text.starts, [0, 100, 103, 223])
    np.testing.assert_array_equal(
        text.documents_at(np.array([0, 99, 100, 102, 103, 322])), [1, 1, 2, 2, 3, 4]
    )
    train, held_out = text.split(8)
    assert held_out.tokens.tobytes() == b"c" * 17
    np.testing.assert_array_equal(train.starts, text.starts)
    np.testing.assert_array_equal(held_out.starts, [0])
    # The same bytes in other documents are another text.
    other = _documents.hash_of(text._replace(starts=np.array([0, 99, 103, 223])))
    assert _documents.hash_of(text) != other


def test_rows_say_of_which_document_a_token_is(files):
    text = _documents.read_text([files])
    windows = _documents.Windows(text, parse("--batch", "40"), nn.make_mesh(data=8))
    batch = {name: np.asarray(x[0]) for name, x in windows.batch(0).items()}
    np.testing.assert_array_equal(batch["segment_ids"], batch["tokens"] - 96)
    assert (np.diff(batch["segment_ids"]) > 0).any()


def test_tokenizer(tmp_path):
    path = make_tokenizer(tmp_path)
    (tmp_path / "text").write_text("a b  c d a")
    args = parse("--tokenizer", str(path))
    tokenizer = train_lm.read_tokenizer(args)
    text = _documents.read_text([tmp_path / "text"], tokenizer)
    np.testing.assert_array_equal(text.tokens, [1, 2, 3, 0, 1, 4])
    assert tokenizer.vocab_size == 5 and tokenizer.decode([1, 3]) == "a c"
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(SystemExit, match="--tokenizer must be a tokenizer.json, got"):
        train_lm.read_tokenizer(parse("--tokenizer", str(tmp_path / "text.json")))


def write_data(folder, kind):
    if kind == "tokens":
        np.save(folder / "data.npy", np.arange(2000) % 256)
        return folder / "data.npy"
    pytest.importorskip("grain")
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "data.array_record"), "group_size:1")
    for i in range(40):
        writer.write(bytes([i]) * (3 + i % 7))
    writer.close()
    return folder / "data.array_record"


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_data_set_goes_on_from_its_state(tmp_path, kind):
    pytest.importorskip("grain")
    argv = "--data", str(write_data(tmp_path, kind)), "--accumulate", "2"
    args, mesh = parse(*argv), nn.make_mesh(fsdp=4, context=2)

    def read():
        return train_lm.read_data(args, mesh, train_lm.read_tokenizer(args))

    one, other = read(), read()
    batches = [one.batch(i) for i in range(2)]
    state = json.loads(json.dumps(one.state()))
    batches += [one.batch(i) for i in range(2, 5)]
    other.restore(state)
    for i in range(2, 5):
        jax.tree.map(np.testing.assert_array_equal, other.batch(i), batches[i])
    assert {x.shape for x in batches[0].values()} == {(2, 8, 9)}
    seen = np.concatenate([np.asarray(b["tokens"]).reshape(-1, 9) for b in batches])
    assert len(np.unique(seen[:, 0])) > 9
    (held_out,) = one.held_out_batches(1)
    if kind == "tokens":
        assert ((np.diff(seen) == 1) | (np.diff(seen) == -255)).all()
        assert set(batches[0]) == {"tokens"}
        return
    # A document repeats its number; the last two are held out.
    ids = np.concatenate([np.asarray(b["segment_ids"]).reshape(-1, 9) for b in batches])
    np.testing.assert_array_equal(np.diff(ids) == 0, np.diff(seen) == 0)
    assert seen.max() < 38 and np.asarray(held_out["tokens"]).min() >= 38


def test_documents_in_a_file_of_tokens_end_with_their_last_token(tmp_path):
    pytest.importorskip("grain")
    argv = "--tokenizer", str(make_tokenizer(tmp_path))
    np.save(tmp_path / "data.npy", np.tile([1, 2, 3, 4, 2], 100).astype(np.uint16))
    args = parse("--data", str(tmp_path / "data.npy"), *argv)
    mesh, tokenizer = nn.make_mesh(data=8), train_lm.read_tokenizer(args)
    batch = train_lm.read_data(args, mesh, tokenizer).batch(0)
    tokens, ids = (np.asarray(batch[k][0]) for k in ("tokens", "segment_ids"))
    np.testing.assert_array_equal(np.diff(ids), tokens[:, :-1] == 4)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.arange(2000), "must have tokens from 0 to 255, got "),
        (np.full(2000, -1), "must have tokens from 0 to 255, got -1"),
        (
            np.zeros((2, 99), int),
            r"must hold integers \(tokens,\), got \(2, 99\)",
        ),
        (np.zeros(99), r"must hold integers \(tokens,\), got \(99,\) float64"),
        (np.zeros(16, int), "must have at least 2 rows, got 1"),
        (np.zeros(3, int), "must have at least 2 rows, got 0"),
        (None, "--data must be files of tokens or ArrayRecords: "),
    ],
)
def test_wrong_data_is_refused(tmp_path, array, message):
    pytest.importorskip("grain")
    path = tmp_path / ("data" if array is None else "data.npy")
    path.write_bytes(b"text")
    if array is not None:
        np.save(path, array)
    args = parse("--data", str(path))
    mesh, tokenizer = nn.make_mesh(data=8), train_lm.read_tokenizer(args)
    with pytest.raises(SystemExit, match=message):
        train_lm.read_data(args, mesh, tokenizer).batch(0)


def adam_in_float64(args, weights, gradients):
    """Return the weights after AdamW, of a matrix that decays and a norm that doesn't.

    Loshchilov and Hutter, algorithm 2: https://arxiv.org/abs/1711.05101.
    """
    decay = {"kernel": args.weight_decay, "norm": 0.0}
    mean = {k: 0.0 for k in weights}
    square = {k: 0.0 for k in weights}
    for i, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        if i < args.warm_up:
            rate = args.learning_rate * i / args.warm_up
        else:
            part = (i - args.warm_up) / (args.steps - args.warm_up)
            rate = args.learning_rate * (0.1 + 0.9 * (1 + np.cos(np.pi * part)) / 2)
        for k, g in gradient.items():
            g = g / max(1, norm / args.clip)
            mean[k] = 0.9 * mean[k] + 0.1 * g
            square[k] = 0.95 * square[k] + 0.05 * g**2
            m, v = mean[k] / (1 - 0.9 ** (i + 1)), square[k] / (1 - 0.95 ** (i + 1))
            step = m / (np.sqrt(v) + 1e-8) + decay[k] * weights[k]
            weights = weights | {k: weights[k] - rate * step}
    return weights


def test_optimizer_is_adam_with_decay_of_matrices_and_sums_of_batches():
    argv = "--learning-rate", "0.1", "--warm-up", "2", "--clip", "3"
    args = parse(*argv, "--weight-decay", "0.5", "--accumulate", "2")
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(3, 2)), "norm": rng.normal(size=3)}
    shapes = {k: w.shape for k, w in weights.items()}
    parts = [
        {k: rng.normal(size=shape, scale=2) for k, shape in shapes.items()}
        for _ in range(8)
    ]
    optimizer = _optimizer.make_optimizer(args)
    got: Any = jax.tree.map(jnp.float32, weights)
    state, norms = optimizer.init(got), []
    update = jax.jit(optimizer.update)
    for part in parts:
        part = jax.tree.map(jnp.float32, part)
        updates, state = update(part, state, got)
        got = optax.apply_updates(got, updates)
        norms.append(float(optax.tree.get(state, "gradient_norm")))
    pairs = zip(parts[::2], parts[1::2], strict=True)
    sums = [{k: (a[k] + b[k]) / 2 for k in a} for a, b in pairs]
    expected = adam_in_float64(args, weights, sums)
    for k in weights:
        np.testing.assert_allclose(got[k], expected[k], rtol=1e-5)
    # It is that before clipping, of which the test has both kinds.
    found = [np.sqrt(sum((g**2).sum() for g in x.values())) for x in sums]
    np.testing.assert_allclose(norms[1::2], found, rtol=1e-5)
    assert min(found) < args.clip < max(found)


def test_no_token_sees_or_predicts_another_document_and_each_weighs_the_same():
    args = parse("--context-length", "9", "--accumulate", "2", "--warm-up", "0")
    mesh, tokenizer = nn.make_mesh(data=8), _tokenizers.Bytes()
    specs = _documents.make_specs(args, mesh, packed=True)
    programs = train_lm.make_programs(args, mesh, specs, tokenizer)
    rows = np.random.default_rng(0).integers(0, 256, (2, 8, 10), np.int32)
    # Two documents a row in the first part, and five in the second: 8 and 5 targets.
    ids = np.stack([np.arange(10) // 5, np.arange(10) // 2])[:, None]
    ids = np.broadcast_to(ids, rows.shape).astype(np.int32)
    put = partial(jax.device_put, device=specs["tokens"].sharding)
    batch = jax.tree.map(put, {"tokens": rows, "segment_ids": ids})
    state = programs.init()
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(2)]
    packed, short = (float(programs.loss(state["weights"], part)) for part in parts)
    model = nnx.merge(programs.graph, state["weights"])
    alone = jnp.asarray(rows[0].reshape(16, 5))
    expected = nnx.jit(lambda model, x: model.loss(x[:, :-1], x[:, 1:]))(model, alone)
    assert packed == pytest.approx(float(expected), rel=1e-5)
    _, found = programs.step(state, batch)
    mean = (8 * packed + 5 * short) / 13
    assert float(found["loss"]) == pytest.approx(mean, rel=1e-5)
    assert abs(packed - short) > 1e-3 * packed


def test_weights_that_decay_and_their_dtypes():
    args, mesh = parse("--dtype", "bfloat16"), nn.make_mesh(data=8)
    specs = _documents.make_specs(args, mesh, packed=False)
    programs = train_lm.make_programs(args, mesh, specs, _tokenizers.Bytes())
    state = programs.shapes
    flags = _optimizer.decays(state["weights"])
    layers, attention = flags["layers"], flags["layers"]["attention"]
    assert flags["head"] and all(layers["mlp"].values())
    assert all(attention[k]["kernel"] for k in ("query", "key", "value", "out"))
    assert not flags["embedding"] and not flags["norm"]["scale"]
    assert not layers["attention_norm"]["scale"] and not layers["mlp_norm"]["scale"]
    others = {"key": {"bias": 0}, "key_norm": {"scale": 0}, "mlp": {"b_up": 0}}
    assert not any(jax.tree.leaves(_optimizer.decays(others)))
    dtypes = {x.dtype for x in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}

    def features(weights, tokens):
        return nnx.merge(programs.graph, weights).features(tokens)

    tokens = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    assert jax.eval_shape(features, state["weights"], tokens).dtype == jnp.bfloat16


def test_the_log_has_no_number_that_json_has_not(tmp_path):
    log = _log.Log(tmp_path, tensorboard=False)
    log.append([{"step": 1, "loss": math.inf}, {"step": 2, "loss": 0.5}])
    lines = log.path.read_text().splitlines()
    assert lines == ['{"step": 1, "loss": null}', '{"step": 2, "loss": 0.5}']
    assert math.isnan(log.read()[0]["loss"]) and log.read()[1]["loss"] == 0.5
