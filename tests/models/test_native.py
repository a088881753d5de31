"""Models in our own form: what is saved is read again, and what is wrong is named."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal

from jaxkern import RotaryScaling, models, nn
from jaxkern.compress import compress

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 12, (4, 6)))
# Each kind of MLP, in layers of several kinds, and options of other families.
LONG = RotaryScaling("yarn", factor=2.0, original_context_length=4)
KINDS = {
    "stacked SwiGLU": ({"param_dtype": jnp.bfloat16}, []),
    "low-rank": ({}, [{"method": "svd", "energy": 0.7, "layers": [1]}]),
    "dense and 2:4": (
        {"activation": "gelu", "mlp_bias": True, "rope_scaling": LONG},
        [
            {"method": "magnitude", "layers": [0]},
            {"method": ("svd", "magnitude"), "rank": 3, "layers": [1]},
        ],
    ),
    "2:4 activations": (
        {"activation": "relu2", "gated_mlp": False, "tie_embeddings": True},
        [
            {"method": "activations", "layers": [0]},
            {"method": "svd", "rank": 3, "layers": [1]},
            {"method": "activations", "layers": [1]},
        ],
    ),
    "low-rank with biases": (
        {"mlp_bias": True, "norm": "layer"},
        [{"method": "svd", "rank": 3}],
    ),
}


def make(**options):
    def empty():
        return nn.TransformerLM(
            12,
            6,
            embed_dim=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            rngs=nnx.Rngs(0),
            **options,
        )

    graph, state = nnx.split(nnx.eval_shape(empty))
    draw = iter(range(1000))
    return nnx.merge(
        graph, jax.tree.map(lambda x: normal(next(draw), x.shape, x.dtype), state)
    )


def flat(model):
    return {
        ".".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(model))
    }


@pytest.mark.parametrize("name", KINDS)
def test_models_come_back_bit_for_bit(name, tmp_path):
    options, steps = KINDS[name]
    model = make(**options)
    for step in steps:
        model, _ = compress(model, **step)
    models.save_native(model, tmp_path / "new")
    again = models.load_native(tmp_path / "new")
    assert again.config == model.config and again.dtype == model.dtype
    if not steps:
        np.testing.assert_array_equal(
            again.layers[1].mlp.w_up[...], model.layers.mlp.w_up[1]
        )
        return
    ours, theirs = flat(model), flat(again)
    assert ours.keys() == theirs.keys()
    for key, x in ours.items():
        np.testing.assert_array_equal(x[...], theirs[key][...])
        assert x[...].dtype == theirs[key][...].dtype
        assert type(x) is type(theirs[key])
    for one, other in zip(model.layers, again.layers, strict=True):
        x = normal(0, (3, 8))
        np.testing.assert_array_equal(one.mlp(x), other.mlp(x))


def test_on_a_mesh_and_in_another_dtype(tmp_path):
    model, _ = compress(make(), method="svd", rank=4)
    models.save_native(model, tmp_path)
    mesh = nn.make_mesh(data=4, fsdp=2)
    again = models.load_native(tmp_path, dtype=jnp.bfloat16, mesh=mesh)
    w_in = again.layers[0].mlp.up.w_in[...]
    assert w_in.sharding.spec[0] == "fsdp" and w_in.dtype == jnp.bfloat16
    assert again.dtype == jnp.bfloat16 == again.layers[0].mlp.dtype
    assert again.mesh is mesh
    np.testing.assert_array_equal(
        w_in, model.layers[0].mlp.up.w_in[...].astype(jnp.bfloat16)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    models.save_native(make(), folder)
    return folder


def change(**values):
    def apply(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    "spoil, message",
    [
        (change(model_type="llama"), "model_type in .* must be 'jaxkern', got 'llama'"),
        (change(mlps=[]), ".*as save_native writes it, .*0 mlps of 2 layers"),
        (
            change(mlps=[{"class": "Other"}] * 2),
            ".*as save_native writes it, .*'Other'",
        ),
        (
            change(mlps=[{"class": "SwiGLU", "embed_dim": 8, "hidden_dim": 20}] * 2),
            r"the shape of layers.0.mlp.w_\w+ in .* must be .*20.*, got .*16",
        ),
        (
            change(mlps=[{"class": "MLP", "embed_dim": 8, "hidden_dim": 16}] * 2),
            "the shape of layers.0.mlp.w_gate in .* must be none, got .8, 16.",
        ),
    ],
)
def test_load_native_refuses(spoil, message, saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"^load_native: {message}"):
        models.load_native(tmp_path)


def attend(query, key, value):
    return query


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "model, error, message",
    [
        (lambda: 3, TypeError, "model must be a TransformerLM, got int"),
        (partial(make, attention_fn=attend), ValueError, "attention_fn must be None"),
        (
            partial(make, mlp=partial(nn.MultiHeadMLP, num_heads=2)),
            TypeError,
            "the mlp of layer 0 must be one of SwiGLU, .*, got MultiHeadMLP",
        ),
    ],
)
def test_save_native_refuses(model, error, message, tmp_path):
    with pytest.raises(error, match=f"^save_native: {message}"):
        models.save_native(model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_model_is_kept(saved):
    with pytest.raises(FileExistsError, match="save_native: folder must have no model"):
        models.save_native(make(), saved)
