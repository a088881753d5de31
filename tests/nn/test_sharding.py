"""Language models on meshes: how parameters are split, and that results are equal."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_near
from helpers import mesh as explicit_or_automatic
from jax import P

from jaxkern import Dilation, dilated_attention
from jaxkern.nn import (
    LowRankReLU2,
    MultiHeadMLP,
    TransformerLM,
    get_sharding,
    make_mesh,
    parse_mesh_sizes,
)

VOCAB, CONTEXT, SEQ = 48, 16, 16
SIZES: dict[str, Any] = {
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
}
FORMS: dict[str, dict[str, Any]] = {
    "scanned": {},
    "unrolled": {"scan_layers": False},
    "two heads a key": {"num_kv_heads": 2},
    "tied, remat": {"tie_embeddings": True, "remat": True},
    "low rank": {"mlp": partial(LowRankReLU2, rank=8)},
    "dilated": {
        "attention_fn": partial(dilated_attention, dilation=Dilation((4, 8), (1, 2)))
    },
    # The options of Gemma 2.
    "two kinds": {
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "qk_norm": "head",
        "activation": "gelu",
        "head_dim": 6,
        "attention_softcap": 1.0,
        "window": 5,
        "full_attention_every": 2,
    },
    "biases": {
        "qk_norm": "embed",
        "norm_placement": "post",
        "qkv_bias": True,
        "mlp_bias": True,
        "attention_scale": 0.3,
    },
}

LOSS: dict[str, Any] = {"ignore_index": 7, "z_loss": 0.1, "label_smoothing": 0.1}
LOSS |= {"softcap": 5.0, "return_lse": True, "chunk": 20}


def build(form, mesh=None) -> Any:
    return TransformerLM(
        VOCAB, CONTEXT, **SIZES, **FORMS[form], mesh=mesh, rngs=nnx.Rngs(0)
    )


def batch(seq=SEQ):
    ids = jax.random.randint(jax.random.key(0), (2, 8, seq), 0, VOCAB)
    return ids[0], ids[1]


def pure(state) -> Any:
    return nnx.to_pure_dict(state)


def loss_and_gradients(graph, state, tokens, targets, where) -> Any:
    def loss(state):
        model = nnx.merge(graph, state)
        return model.loss(tokens, targets, where=where, **LOSS)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(state)


@cache
def expected(form):
    tokens, targets = batch()
    return loss_and_gradients(*nnx.split(build(form)), tokens, targets, tokens > 5)


@pytest.mark.parametrize(
    "sizes, form",
    [
        ("fsdp=4", "scanned"),
        ("tensor=2, data=2", "unrolled"),
        ("data=2,fsdp=2,tensor=2", "two heads a key"),
        ("fsdp=2,tensor=2", "low rank"),
        ("fsdp=2,tensor=2", "dilated"),
        ("context=4", "scanned"),
        ("context=2,fsdp=2,tensor=2", "tied, remat"),
        ("fsdp=2,tensor=2", "two kinds"),
        ("context=2,tensor=2", "biases"),
    ],
)
def test_a_mesh_changes_neither_loss_nor_gradients(sizes, form):
    devices = 8 if sizes.count("=") == 3 else 4
    mesh = make_mesh(**parse_mesh_sizes(sizes), devices=jax.devices()[:devices])
    graph, state = nnx.split(build(form, mesh))
    state = jax.device_put(state, get_sharding(state, mesh))
    place = jax.NamedSharding(mesh, P(("data", "fsdp"), "context"))
    tokens, targets = jax.device_put(batch(), place)
    got = loss_and_gradients(graph, state, tokens, targets, tokens > 5)
    loss, gradients = expected(form)
    assert_near(got[0], loss)
    assert_near(pure(got[1]), pure(gradients), 2e-5)


def test_masks():
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    tokens, _ = batch()
    mask = (jnp.arange(SEQ)[None] < jnp.arange(8, 16)[:, None])[:, None, None]

    @nnx.jit
    def of_each_and_of_all(model):
        return model(tokens, mask=mask), model(tokens, mask=mask[:1])

    model, shared = build("scanned"), build("scanned", mesh)
    assert_near(of_each_and_of_all(shared), of_each_and_of_all(model))
    with pytest.raises(ValueError, match="mask must be None for context=8, where tok"):
        build("scanned", make_mesh(context=8))(tokens, mask=mask)


def test_parameters_and_optimizer_state_are_sharded():
    """Each device makes its own part of every matrix."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    optimizer = optax.adamw(1e-3)

    def make():
        state = nnx.state(build("two heads a key"))
        return state, optimizer.init(state)

    places = get_sharding(jax.eval_shape(make), mesh)
    made = jax.jit(make, out_shardings=places)()
    assert_near(made[0], nnx.state(build("two heads a key")))
    shapes = {"w_gate": (2, 8, 16), "w_down": (2, 16, 8), "embedding": (24, 8)}
    shapes |= {"query": (2, 8, 2, 4), "key": (2, 8, 1, 4), "out": (2, 2, 4, 8)}
    shapes |= {"attention_norm": (2, 8), "head": (8, 24)}
    found = 0
    for path, leaf in jax.tree.leaves_with_path(made):
        name = jax.tree_util.keystr(path)
        local = {shard.data.shape for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 8, name
        for part, shape in shapes.items():
            if f"'{part}'" in name:
                assert local == {shape}, name
                found += 1
    assert found == 3 * len(shapes)


def test_axes_without_a_place():
    state = nnx.state(build("scanned"))
    mesh = explicit_or_automatic("explicit", fsdp=8)
    specs = [s.spec for s in jax.tree.leaves(get_sharding(state, mesh))]
    assert P(None, "fsdp") in specs and P(None, "fsdp", None) in specs
    # The first of two axes that have the same mesh axis gets it.
    heads = partial(MultiHeadMLP, num_heads=2, gated=True)
    model = TransformerLM(VOCAB, CONTEXT, **SIZES, mlp=heads, rngs=nnx.Rngs(0))
    places = pure(get_sharding(nnx.state(model), make_mesh(tensor=2, fsdp=4)))
    assert places["layers"]["mlp"]["heads"]["w1"].spec[:4].count("tensor") == 1
    rules = [(name, None) for name in ("layers", "embed", "vocab", "heads", "kv_heads")]
    whole = get_sharding(state, make_mesh(fsdp=8), [*rules, ("mlp", "fsdp")])
    assert pure(whole)["layers"]["mlp"]["w_up"].spec == P(None, None, "fsdp")


def test_explicit_axes():
    """`jax.make_mesh` makes explicit axes by default."""
    mesh = explicit_or_automatic("explicit", data=2, fsdp=2, tensor=2)
    graph, state = nnx.split(build("scanned"))
    placed = jax.device_put(state, get_sharding(state, mesh))
    batch_axes = P(("data", "fsdp"))
    tokens, targets = jax.device_put(batch(), jax.NamedSharding(mesh, batch_axes))
    got = loss_and_gradients(graph, placed, tokens, targets, tokens > 5)
    loss, gradients = expected("scanned")
    assert_near(got[0], loss)
    assert_near(pure(got[1]), pure(gradients), 2e-5)
    for a, b in zip(*map(jax.tree.leaves, (got[1], placed)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    logits = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    found = logits(placed, tokens)
    assert_near(found, logits(state, batch()[0]))
    assert jax.typeof(found).sharding.spec[0] == ("data", "fsdp")
    with jax.set_mesh(mesh):

        @jax.jit
        def find(state):
            model = nnx.merge(graph, state)
            return model.loss(tokens, targets, where=tokens > 5, **LOSS)

        found = find(placed)
    assert_near(found, loss)
    assert jax.typeof(found[1]).sharding.spec[0] == ("data", "fsdp")


@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
def test_generation(explicit):
    model, prompt = build("two heads a key"), batch(4)[0]
    wanted = model.generate(prompt, max_new_tokens=3)
    kind = "explicit" if explicit else "auto"
    mesh = explicit_or_automatic(kind, fsdp=2, tensor=2)
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, get_sharding(state, mesh)))
    prompt = jax.device_put(prompt, jax.NamedSharding(mesh, P("fsdp")))
    for options in ({"prompt_lengths": jnp.full(8, 4)}, {"cache": False}):
        got = model.generate(prompt, max_new_tokens=3, **options)
        np.testing.assert_array_equal(got, wanted)
    if explicit:
        streamed = np.stack([*model.stream(prompt, max_new_tokens=3)], 1)
        np.testing.assert_array_equal(streamed, wanted[:, 4:])


@pytest.mark.parametrize(
    "text, message",
    [
        ("fsdp=4,model=2", "axis must be one of data, fsdp, .*, got 'model'"),
        ("fsdp=4,fsdp=2", "fsdp must be given once, got 'fsdp=4,fsdp=2'"),
        ("fsdp=4.0,data=2", "fsdp must be an integer of at least 1, got '4.0'"),
        ("fsdp=8,data=0", "data must be an integer of at least 1, got '0'"),
        ("fsdp", "fsdp must be an integer of at least 1, got ''"),
        ("fsdp=8,", "axis must be one of data, fsdp, context, tensor, got ''"),
    ],
)
def test_sizes_that_are_no_mesh(text, message):
    with pytest.raises(ValueError, match=f"parse_mesh_sizes: .*{message}"):
        parse_mesh_sizes(text)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsdp": 4}, r"devices, 8, got data=1 \* fsdp=4 \* context=1 \* tensor=1 = 4"),
        (parse_mesh_sizes(" "), "must be the number of devices, 8, got .* = 1"),
        ({"data": 0}, "data must be an integer of at least 1, got 0"),
    ],
)
def test_refused_meshes(sizes, message):
    with pytest.raises(ValueError, match=f"make_mesh: .*{message}"):
        make_mesh(**sizes)


def test_refusals():
    """All errors are raised before anything is computed."""
    with pytest.raises(ValueError, match="num_heads must be a mult.* of tensor=8, got"):
        build("scanned", make_mesh(tensor=8))
    with pytest.raises(ValueError, match="num_kv_heads must be a m.* of tensor=4, got"):
        build("two heads a key", make_mesh(tensor=4, data=2))
    with pytest.raises(ValueError, match="attention_fn must be None for context=2"):
        build("dilated", make_mesh(context=2, data=4))
    with pytest.raises(ValueError, match="mesh must have the automatic axes data, fs"):
        build("scanned", explicit_or_automatic("explicit", fsdp=8))
    state = nnx.state(nnx.eval_shape(lambda: build("scanned")))
    with pytest.raises(ValueError, match="heads' must be .* tensor=8, got 4 of layers"):
        get_sharding(state, make_mesh(tensor=8))
    model = TransformerLM(
        50, 8, embed_dim=12, num_layers=1, num_heads=2, hidden_dim=8, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="'embed' .* got 12 of embedding .50, 12."):
        get_sharding(nnx.state(model), make_mesh(fsdp=8))
    with pytest.raises(ValueError, match="axis must be one of embed, got 'vocab'"):
        get_sharding(nnx.state(model), make_mesh(fsdp=8), [("embed", None)])
    model = build("scanned", make_mesh(context=4, data=2))
    with pytest.raises(ValueError, match="batch must be a multiple of data x fsdp = 2"):
        model(jnp.zeros((3, 16), int))
    with pytest.raises(
        ValueError, match="seq must be a multiple of 2 x context = 8, g"
    ):
        model(jnp.zeros((2, 12), int))
