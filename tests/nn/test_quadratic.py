from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near, normal
from jax.sharding import PartitionSpec as P

from jaxkern import reinmax
from jaxkern.nn import MaskLogits, QuadraticTransformer
from jaxkern.testing.plain import in_float64, quadratic, with_gradients

VOCAB, EMBED, HEADS, LAYERS, BATCH, SEQ = 11, 12, 3, 2, 3, 7
IDS = jax.random.randint(jax.random.key(9), (BATCH, SEQ), 0, VOCAB)
KEY = jax.random.key(5)
WEIGHTS = quadratic.WEIGHTS


def build(**options: Any) -> QuadraticTransformer:
    options = {"hidden_dim": 10, "rngs": nnx.Rngs(0)} | options
    return QuadraticTransformer(
        VOCAB, EMBED, num_heads=HEADS, num_layers=LAYERS, **options
    )


def randomize(module, scale=0.3) -> Any:
    leaves, tree = jax.tree.flatten(nnx.state(module))
    noise = [scale * normal(i, x.shape) for i, x in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(tree, noise))
    return module


@nnx.jit
def run(model, ids, **options):
    return model(ids, **options)


def rotate(x, pairs):
    """By complex numbers; the angles of "mismatched" differ within a pair."""
    seq, dim = x.shape[1], x.shape[-1]
    omega = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    angle = np.arange(seq)[:, None] * omega
    if pairs == "mismatched":
        a, b = np.split(np.tile(angle, 2).reshape(seq, -1, 2), 2, axis=-1)
        a, b = a[:, None, :, 0], b[:, None, :, 0]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = jnp.stack(
            [even * np.cos(a) - odd * np.sin(a), odd * np.cos(b) + even * np.sin(b)], -1
        )
        return turned.reshape(x.shape)
    parts = x.reshape(*x.shape[:-1], 2, dim // 2)
    if pairs == "interleaved":
        parts = x.reshape(*x.shape[:-1], dim // 2, 2).swapaxes(-1, -2)
    z = parts[..., 0, :] + 1j * parts[..., 1, :]
    z = z * np.exp(1j * angle)[:, None, :]
    parts = jnp.stack([z.real, z.imag], -2)
    if pairs == "interleaved":
        parts = parts.swapaxes(-1, -2)
    return parts.reshape(x.shape)


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize(
    "layers, pairs",
    [((0,), "interleaved"), ((0, 1), "halves"), ((1,), "mismatched")],
    ids=["first", "both halves", "second seed"],
)
def test_values_and_gradients(layers, pairs):
    model = randomize(
        build(masked_layers=layers, num_masks=BATCH + 1, rotary_pairs=pairs)
    )
    key_mask = jnp.ones((BATCH, SEQ), bool).at[1, 5:].set(False).at[2, 0].set(False)
    g = normal(99, (BATCH, SEQ, VOCAB))
    graph, parameters, logits = nnx.split(model, nnx.Param, MaskLogits)

    def ours(parameters, logits):
        return nnx.merge(graph, parameters, logits)(IDS, key_mask=key_mask)

    @jax.jit
    def pull(parameters, logits):
        value, vjp = jax.vjp(ours, parameters, logits)
        return value, vjp(g)

    value, (d_parameters, d_logits) = pull(parameters, logits)
    masks = {
        (i, name): jnp.asarray(logits["blocks"][i]["mlp"][f"{name}_logits"][...])[
            :BATCH
        ]
        > 0
        for i in layers
        for name in WEIGHTS
    }

    def plain(parameters, masks):
        rotary = partial(rotate, pairs=pairs)
        return quadratic.logits(parameters, masks, IDS, key_mask, rotary)

    masks = jax.tree.map(lambda x: x.astype(float), masks)
    arguments = g, nnx.to_pure_dict(parameters), masks
    exact, (d_wide, d_masks) = in_float64(with_gradients(plain), *arguments)
    assert_near(value, exact)
    assert_near(nnx.to_pure_dict(d_parameters), d_wide)
    for (i, name), d_mask in d_masks.items():
        got = d_logits["blocks"][i]["mlp"][f"{name}_logits"][...]
        # The estimator's derivative is 1; the last mask had no sample.
        assert_near(got[:BATCH], d_mask)
        assert (got[BATCH] == 0).all()


def test_the_published_number_of_parameters():
    model = nnx.eval_shape(
        lambda: QuadraticTransformer(
            4096,
            512,
            num_heads=8,
            num_layers=3,
            masked_layers=[0],
            num_masks=16,
            rngs=nnx.Rngs(0),
        )
    )
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 14_698_688
    logits = jax.tree.leaves(nnx.state(model, MaskLogits))
    assert [leaf.size for leaf in logits] == 3 * [16 * 2048 * 512]


def test_initial_weights():
    model = QuadraticTransformer(512, 64, num_heads=4, num_layers=1, rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        kind, values = path[-1], leaf[...]
        if kind == "bias":
            assert not values.any()
        elif kind == "scale":
            assert (values == 1).all()
        else:
            assert float(values.std()) == pytest.approx(0.02, rel=0.05)


def test_causal():
    model = randomize(build())
    changed = IDS.at[:, 4].set((IDS[:, 4] + 1) % VOCAB)
    before, after = run(model, IDS), run(model, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


def test_positions_count_only_by_their_difference():
    """Therefore padding in front, which no query sees, changes nothing."""
    model = randomize(build())
    padded = jnp.concatenate([IDS[:, :3], IDS], axis=1)
    key_mask = jnp.arange(SEQ + 3) >= 3
    got = run(model, padded, key_mask=jnp.broadcast_to(key_mask, padded.shape))
    assert_near(got[:, 3:], run(model, IDS))


def test_the_head_is_the_embedding():
    model = randomize(build())
    state = nnx.state(model, nnx.Param)
    matrices = [x.shape for x in jax.tree.leaves(state) if VOCAB in x.shape]
    assert matrices == [(VOCAB, EMBED)]
    before = run(model, IDS)
    unused = int(np.setdiff1d(np.arange(VOCAB), IDS[0])[0])
    model.embed.embedding[...] = model.embed.embedding[...].at[unused].multiply(2)
    after = run(model, IDS)
    assert_near(after[0, :, unused], 2 * before[0, :, unused])


def test_a_trained_model_gets_masks():
    trained = randomize(build())
    masked = build(masked_layers=[1], num_masks=BATCH, rngs=nnx.Rngs(3))
    nnx.update(masked, nnx.state(trained, nnx.Param))
    assert_near(run(masked, IDS), run(trained, IDS))
    assert trained.sparsity() == {}
    names = {f"blocks.1.mlp.{name}_logits" for name in WEIGHTS}
    assert masked.sparsity().keys() == {*names, "total"}


def test_a_model_has_the_same_initial_weights_with_masks():
    masked = build(masked_layers=[0], num_masks=4)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(masked, nnx.Param),
        nnx.state(build(), nnx.Param),
    )


def test_methods_agree():
    options: dict[str, Any] = {
        "masked_layers": [0, 1],
        "num_masks": BATCH,
        "estimator": partial(reinmax, temperature=1.5),
    }
    fused, other = build(**options, method="fused"), build(**options, method="bmm")
    for model in (fused, other):
        randomize(model)
    assert_near(run(other, IDS, key=KEY), run(fused, IDS, key=KEY))


def test_each_masked_layer_draws_its_own():
    keys = []

    def estimator(logits, *, key=None):
        if key is not None:
            jax.debug.callback(keys.append, jax.random.key_data(key))
        return logits

    model = build(masked_layers=[0, 1], estimator=estimator)
    run(model, IDS, key=KEY).block_until_ready()
    jax.effects_barrier()
    drawn = {tuple(map(int, key)) for key in keys}
    assert len(keys) == len(drawn) == 6


@pytest.mark.usefixtures("promoting")
def test_dtypes():
    model = build(dtype=jnp.bfloat16, masked_layers=[0])
    assert nnx.eval_shape(run, model, IDS).dtype == jnp.bfloat16
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_partition_specs():
    model = build(masked_layers=[0], num_masks=2)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
    assert specs["embed"]["embedding"] == P("vocab", "embed")
    assert specs["blocks"][0]["mlp"]["down_logits"] == P("batch", "mlp", "embed")
    attention = specs["blocks"][1]["attention"]
    assert attention["query"] == {
        "kernel": P("embed", "heads", None),
        "bias": P("heads", None),
    }
    assert attention["out"] == {"kernel": P("heads", None, "embed")}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"masked_layers": [2]}, ValueError, r"must be in \[0, 2\), got 2"),
        ({"masked_layers": [-1]}, ValueError, r"must be in \[0, 2\), got -1"),
        ({"num_masks": 3}, ValueError, "num_masks must be None without masked_layers"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim must be an integer"),
        ({"embed_dim": 9}, ValueError, "embed_dim must be a multiple of 2 num_heads"),
    ],
)
def test_refusals(options, error, message):
    arguments = {
        "vocab_size": VOCAB,
        "embed_dim": EMBED,
        "num_heads": HEADS,
        "num_layers": LAYERS,
        "rngs": nnx.Rngs(0),
    }
    with pytest.raises(error, match=f"QuadraticTransformer: .*{message}"):
        QuadraticTransformer(**arguments | options)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "ids, options, error, message",
    [
        (IDS.astype(float), {}, TypeError, "ids must be an integer array, got fl"),
        (IDS[0], {}, ValueError, r"ids must have shape \(batch, seq\), got \(7,\)"),
        (IDS, {"key": KEY}, ValueError, "key must be None without masked layers"),
        (
            IDS,
            {"key_mask": jnp.ones((1, SEQ), bool)},
            ValueError,
            r"key_mask must have shape \(3, 7\), got \(1, 7\)",
        ),
    ],
)
def test_refused_calls(ids, options, error, message):
    with pytest.raises(error, match=message):
        build()(ids, **options)


def test_more_samples_than_masks():
    model = build(masked_layers=[0], num_masks=BATCH - 1)
    with pytest.raises(ValueError, match="at most 2 samples, as there are masks, got"):
        model(IDS)
    assert run(model, IDS[:1]).shape == (1, SEQ, VOCAB)
