from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_definitions as definitions
from flax import nnx
from helpers import assert_near, normal, relative_error, to_float64
from helpers import mesh as make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import (
    BlockMask,
    Dilation,
    attention,
    block_sparse_attention,
    dilated_attention,
    ring_attention,
    ring_permutation,
    rotary_embedding,
)
from jaxkern.nn import (
    LowRankReLU2,
    LowRankSwiGLU,
    MultiHeadMLP,
    TransformerLM,
)
from jaxkern.testing.plain.transformer import from_state

VOCAB, CONTEXT, SEQ = 50, 16, 12
SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 40,
}


def build(seed=0, **options) -> Any:
    sizes = SIZES | options
    return TransformerLM(VOCAB, CONTEXT, **sizes, rngs=nnx.Rngs(seed))


def batch(seed=0, shape=(2, SEQ), vocab=VOCAB) -> Any:
    ids = jax.random.randint(jax.random.key(seed), (2, *shape), 0, vocab)
    return ids[0], ids[1]


def randomize(module) -> Any:
    """Add noise, so that scales of norms are not 1."""
    leaves, tree = jax.tree.flatten(nnx.state(module, nnx.Param))
    noise = [x + 0.1 * normal(i, x.shape, x.dtype) for i, x in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(tree, noise))
    return module


def pure(state) -> Any:
    return nnx.to_pure_dict(state)


def compiled(model, **options) -> Any:
    """Return a program from tokens, targets and `where` to loss and gradients."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, targets, where):
        def loss(state):
            model = nnx.merge(graph, state)
            return model.loss(tokens, targets, where=where, **options)

        loss, gradients = jax.value_and_grad(loss)(state)
        return loss, pure(gradients)

    return lambda tokens, targets, where=None: run(state, tokens, targets, where)


@nnx.jit
def call(model, tokens, *positions, **options):
    return model(tokens, *positions, **options)


@cache
def plain_loss_and_gradients() -> Any:
    return compiled(build())(*batch())


PUBLISHED: dict[str, tuple[dict[str, int], int]] = {
    name: (dict(zip(SIZES, sizes, strict=True)), count)
    for name, sizes, count in [
        ("small", (768, 12, 12, 3072), 128_625_408),
        ("medium", (1024, 24, 16, 4096), 423_183_360),
        ("large", (1280, 36, 20, 5120), 969_411_840),
        ("xl", (1600, 48, 25, 6400), 1_998_235_200),
        ("2.7B", (2560, 32, 32, 10240), 3_406_809_600),
    ]
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    sizes, count = PUBLISHED[name]

    def make():
        options: Any = sizes | {"scan_layers": name != "small"}
        return TransformerLM(10_000, 256, rngs=nnx.Rngs(0), **options)

    state = nnx.state(nnx.eval_shape(make))
    assert sum(p.size for p in jax.tree.leaves(state)) == count


def test_values_and_gradients():
    model = randomize(build(num_kv_heads=2, rope_theta=100.0))
    tokens, targets = batch()
    loss, gradients = compiled(model, chunk=20)(tokens, targets)
    weights = from_state(to_float64(pure(nnx.state(model))))
    exact, logits, expected = definitions.loss_and_gradients(
        weights, np.asarray(tokens), np.asarray(targets), 100.0
    )
    assert abs(loss - exact) < 1e-6 * exact
    assert_near(call(model, tokens), logits, 3e-6)
    got = from_state(gradients)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert relative_error(a, b) < 3e-5, name
        used = abs(b).reshape(len(b), -1).sum(-1)
        assert (used > 0).all() or "embedding" in name, name


def chance(vocab, embed_dim):
    """Return the expected loss of an initial head, whose logits are normal."""
    return np.log(vocab) + embed_dim / (embed_dim + vocab)


def test_tied_embeddings():
    model = build(tie_embeddings=True)
    assert "head" not in pure(nnx.state(model))
    untied = build()
    nnx.update(untied, nnx.state(model))
    nnx.update(untied, {"head": model.embedding[...].T})
    loss, gradients = compiled(model)(*batch())
    expected, two = compiled(untied)(*batch())
    assert_near(loss, expected)
    assert_near(gradients["embedding"], two["embedding"] + two["head"].T)
    assert abs(loss - chance(VOCAB, 24)) < 0.1


@pytest.mark.parametrize(
    "options",
    [{}, {"attention_fn": partial(attention, is_causal=False)}],
    ids=["default", "told otherwise"],
)
def test_no_token_sees_a_later_one(options):
    model, (tokens, _) = build(**options), batch()
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % VOCAB)
    moved = abs(np.asarray(call(model, tokens) - call(model, changed))).max((0, 2))
    assert (moved[:7] == 0).all() and (moved[7:] > 1e-4).all()


def test_positions():
    """Only distances between positions count, and given positions are used."""
    model, (tokens, _) = build(), batch()
    at = jnp.arange(SEQ)
    expected = model(tokens)
    np.testing.assert_array_equal(model(tokens, at), expected)
    assert_near(call(model, tokens, jnp.stack([at + 9, at + 1000])), expected)
    twice = call(model, tokens, jnp.stack([at, at]) * 2)
    assert relative_error(twice, expected) > 0.01


def test_initial_values():
    @jax.jit
    def make():
        options: Any = {"num_kv_heads": 2, "rngs": nnx.Rngs(0)}
        return nnx.state(
            TransformerLM(
                1000,
                16,
                embed_dim=128,
                num_layers=2,
                num_heads=4,
                hidden_dim=512,
                **options,
            )
        )

    state, cut = pure(make()), 0.98658  # std of a normal cut at 3
    layers = state["layers"]
    for name, kernel, d_in, d_out in [
        ("query", layers["attention"]["query"]["kernel"], 128, 128),
        ("key", layers["attention"]["key"]["kernel"], 128, 64),
        ("value", layers["attention"]["value"]["kernel"], 128, 64),
        ("out", layers["attention"]["out"]["kernel"], 128, 128),
        ("gate", layers["mlp"]["w_gate"], 128, 512),
        ("up", layers["mlp"]["w_up"], 128, 512),
        ("down", layers["mlp"]["w_down"], 512, 128),
        ("head", state["head"], 128, 1000),
        ("embedding", state["embedding"], 1, 1),
    ]:
        std = (2 / (d_in + d_out)) ** 0.5
        assert float(kernel.std()) == pytest.approx(cut * std, rel=0.02), name
        assert 2.7 * std < float(abs(kernel).max()) <= 3 * std, name
        if name not in ("head", "embedding"):
            assert not np.array_equal(kernel[0], kernel[1])
    for scale in (layers["attention_norm"], layers["mlp_norm"], state["norm"]):
        assert (scale["scale"] == 1).all()


def test_initial_loss_is_that_of_chance():
    model = TransformerLM(
        1000,
        64,
        embed_dim=96,
        num_layers=2,
        num_heads=4,
        hidden_dim=256,
        rngs=nnx.Rngs(0),
    )
    tokens, targets = batch(shape=(4, 64), vocab=1000)
    loss = float(nnx.jit(TransformerLM.loss)(model, tokens, targets))
    assert abs(loss - chance(1000, 96)) < 0.03
    assert abs(loss - np.log(1000)) < 0.15


def unstack(state):
    """Convert the state of a scanned model to that of an unrolled one."""
    layers, count = state["layers"], SIZES["num_layers"]
    each = {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}
    return state | {"layers": each}


@pytest.mark.parametrize(
    "options",
    [
        {"scan_layers": False},
        {"remat": True},
    ],
    ids=["unrolled", "remat"],
)
def test_scan_and_remat_change_nothing(options):
    loss, gradients = plain_loss_and_gradients()
    model, parameters = build(**options), pure(nnx.state(build()))
    got_loss, got = compiled(model)(*batch())
    if not options.get("scan_layers", True):
        gradients, parameters = unstack(gradients), unstack(parameters)
    assert_near(pure(nnx.state(model)), parameters, 1e-6)
    assert_near(got_loss, loss, 1e-6)
    assert_near(got, gradients)


def test_remat_saves_memory():
    tokens, targets = batch(shape=(8, 64))

    def temp_bytes(remat):
        model = TransformerLM(
            VOCAB,
            64,
            embed_dim=32,
            num_layers=6,
            num_heads=4,
            hidden_dim=128,
            remat=remat,
            rngs=nnx.Rngs(0),
        )
        graph, state = nnx.split(model)

        def loss(state):
            return nnx.merge(graph, state).loss(tokens, targets)

        stats = jax.jit(jax.grad(loss)).lower(state).compile().memory_analysis()
        assert stats is not None
        return stats.temp_size_in_bytes

    assert temp_bytes(True) < 0.5 * temp_bytes(False)


def test_one_program_however_many_layers():
    def size(layers):
        options: Any = SIZES | {"num_layers": layers}
        model = TransformerLM(VOCAB, CONTEXT, rngs=nnx.Rngs(0), **options)
        graph, state = nnx.split(model)

        def loss(state):
            return nnx.merge(graph, state).loss(*batch())

        return len(jax.jit(jax.grad(loss)).lower(state).as_text())

    assert size(12) < 1.05 * size(2)


def test_tokens_that_do_not_count():
    """Some have the target that is ignored, and others are not where the mean is."""
    model, (tokens, targets) = build(), batch()
    counts = jnp.arange(SEQ)[None] < jnp.array([[SEQ], [5]])
    where = counts.at[1, 9:].set(True)
    options: Any = {"z_loss": 0.1, "label_smoothing": 0.3, "softcap": 2.0}
    graph, state = nnx.split(model)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(state, tokens, targets, where):
        model = nnx.merge(graph, state)
        return model.loss(
            tokens, targets, where=where, ignore_index=-100, return_lse=True, **options
        )

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def plain(state):
        z = 2 * jnp.tanh(nnx.merge(graph, state)(tokens) / 2)
        lse = jax.nn.logsumexp(z, axis=-1)
        target = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
        losses = lse - 0.7 * target - 0.3 * z.mean(-1) + 0.1 * lse**2
        lse = jnp.where(counts, lse, 0)
        return jnp.where(counts, losses, 0).sum() / (SEQ + 5), lse

    got = run(state, tokens, jnp.where(counts, targets, -100), where)
    assert_near(got, plain(state))
    changed = run(state, tokens.at[1, 5:].set(0), targets, counts)
    assert_near(pure(got[1])["layers"], pure(changed[1])["layers"])
    (nothing, lse), gradients = run(state, tokens, targets, where & False)
    assert nothing == 0 and not np.any(lse) and not np.any(pure(gradients)["head"])


IGNORED = jnp.zeros((2, SEQ), int).at[1, 5:].set(-100)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"targets": [[0, 1]]}, TypeError, "targets must be an array, got list"),
        ({"targets": jnp.zeros((2, SEQ - 1), int)}, ValueError, "targets must have"),
        ({"ignore_index": 1.0}, ValueError, "ignore_index must be an integer, got 1.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0, got -1.0"),
        (
            {"targets": IGNORED, "ignore_index": -1},
            ValueError,
            "targets must be from 0 to 49, got -100",
        ),
        (
            {"targets": IGNORED + VOCAB, "where": IGNORED == 0},
            ValueError,
            "targets must be from 0 to 49, got 50",
        ),
        (
            {"tokens": IGNORED, "targets": IGNORED, "ignore_index": -100},
            ValueError,
            "tokens must be from 0 to 49, got -100",
        ),
        (
            {"positions": jnp.arange(SEQ + 1)},
            ValueError,
            r"positions must have shape \(12,\) or \(2, 12\), got \(13,\)",
        ),
    ],
)
def test_a_loss_refuses_before_it_computes(options, error, message):
    def never(query, key, value):
        raise AssertionError("the attention was called")

    tokens, targets = batch()
    model = build(attention_fn=never)
    with pytest.raises(error, match=f"TransformerLM.loss: {message}"):
        model.loss(**{"tokens": tokens, "targets": targets} | options)


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize(
    "dtype, param_dtype",
    [(jnp.bfloat16, jnp.float32), (None, jnp.bfloat16)],
    ids=["computation", "parameters"],
)
def test_bfloat16(dtype, param_dtype):
    model, (tokens, targets) = build(dtype=dtype, param_dtype=param_dtype), batch()
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {
        jnp.dtype(param_dtype)
    }
    assert jax.eval_shape(model.features, tokens).dtype == jnp.bfloat16
    assert jax.eval_shape(model, tokens).dtype == jnp.float32
    loss, gradients = compiled(model)(tokens, targets)
    assert loss.dtype == jnp.float32
    wide = to_float64(pure(nnx.state(model)))
    exact, _, expected = definitions.loss_and_gradients(
        from_state(wide), np.asarray(tokens), np.asarray(targets)
    )
    assert abs(loss - exact) < 0.02
    for got, want in zip(
        *map(jax.tree.leaves, (from_state(gradients), expected)), strict=True
    ):
        assert got.dtype == param_dtype
        difference = np.linalg.norm(to_float64(got) - want)
        assert difference <= 0.05 * np.linalg.norm(want)


block_mask = BlockMask.causal(SEQ, SEQ, block_size=4)
ATTENTION: dict[str, Any] = {
    "dilated": partial(dilated_attention, dilation=Dilation((4, 8), (1, 2))),
    "block-sparse": partial(block_sparse_attention, mask=block_mask),
    "a function": lambda q, k, v: v,
}
MLPS: dict[str, Any] = {
    "low-rank SwiGLU": partial(LowRankSwiGLU, rank=4),
    "low-rank ReLU2": partial(LowRankReLU2, rank=4),
    "2:4": partial(LowRankReLU2, rank=4, sparsity="2:4"),
    "multi-head": partial(MultiHeadMLP, num_heads=4, gated=True),
    "multi-head relu": partial(
        MultiHeadMLP, num_heads=2, gated=False, activation="relu"
    ),
}
FORMS = [("attention_fn", n, f) for n, f in ATTENTION.items()]
FORMS += [("mlp", n, f) for n, f in MLPS.items()]


@pytest.mark.parametrize("argument, name, form", FORMS, ids=[n for _, n, _ in FORMS])
def test_forms_of_attention_and_mlp(argument, name, form):
    model = build(**{argument: form}, num_layers=1)
    loss, gradients = compiled(model)(*batch())
    assert np.isfinite(loss)
    for path, g in jax.tree.leaves_with_path(gradients):
        unused = name == "a function" and ("query" in str(path) or "key" in str(path))
        assert np.isfinite(g).all() and (unused or np.any(g)), path


def test_block_sparse_attention_to_all_that_is_causal():
    got = compiled(build(attention_fn=ATTENTION["block-sparse"]))(*batch())
    assert_near(got, plain_loss_and_gradients())


def test_options_reach_the_attention():
    tokens, _ = batch()
    mask = jnp.arange(SEQ)[None] < jnp.array([[SEQ], [7]])
    for options, given in [
        ({}, {"mask": mask[:, None, None]}),
        ({"attention_fn": ATTENTION["dilated"]}, {"key_mask": mask}),
    ]:
        model = build(**options)
        got = call(model, tokens, **given)
        changed = call(model, tokens.at[1, 7:].set(0), **given)
        np.testing.assert_array_equal(got[1, :7], changed[1, :7])


def test_ring_attention_inside_shard_map():
    """Tokens are permuted and split among devices, and keep their positions."""
    mesh = make_mesh(context=4)
    ring = partial(ring_attention, axis_name="context", layout="striped")
    model, (tokens, targets) = build(attention_fn=ring, num_layers=1), batch()
    order, _ = ring_permutation(SEQ, 4, "striped")
    graph, state = nnx.split(model)

    def loss(state, tokens, targets, positions):
        model = nnx.merge(graph, state)
        return jax.lax.pmean(
            model.loss(tokens, targets, positions=positions), "context"
        )

    spec = P(None, "context")
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(P(), spec, spec, P("context")), out_specs=P()
    )
    got_loss, got = jax.jit(jax.value_and_grad(sharded))(
        state, tokens[:, order], targets[:, order], jnp.asarray(order)
    )
    expected_loss, expected = compiled(build(num_layers=1))(tokens, targets)
    assert_near(got_loss, expected_loss)
    assert_near(pure(got), expected, 2e-5)


def test_sharded_by_its_own_metadata_equals_one_device():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model, (tokens, targets) = build(num_kv_heads=2), batch(shape=(4, SEQ))
    graph, state = nnx.split(model)
    rules = [("embed", "fsdp"), ("layers", None)]
    rules += [(name, "tensor") for name in ("vocab", "heads", "kv_heads", "mlp")]
    with nnx.logical_axis_rules(rules):
        shardings = nnx.get_named_sharding(state, mesh)
    placed = jax.device_put(state, shardings)
    for path, leaf in jax.tree.leaves_with_path(pure(placed)):
        shards = 2 if "norm" in str(path) else 4
        assert leaf.addressable_shards[0].data.size * shards == leaf.size, path

    @jax.jit
    @jax.value_and_grad
    def run(state, tokens, targets):
        return nnx.merge(graph, state).loss(tokens, targets, chunk=20)

    place = partial(jax.device_put, device=NamedSharding(mesh, P(("data", "fsdp"))))
    got_loss, got = run(placed, place(tokens), place(targets))
    expected_loss, expected = compiled(model)(tokens, targets)
    assert_near(got_loss, expected_loss)
    assert_near(pure(got), expected, 2e-5)


def test_the_rotation_is_the_interleaved_one():
    """A spy sees the query and key that the attention gets."""
    seen = {}

    def spy(query, key, value):
        seen["qk"] = query, key
        return value

    model, (tokens, _) = (
        build(attention_fn=spy, num_layers=1, scan_layers=False),
        batch(),
    )
    model(tokens)
    (layer,) = model.layers
    normed = layer.attention_norm(model.embedding[...][tokens])
    for got, project in zip(
        seen["qk"], (layer.attention.query, layer.attention.key), strict=True
    ):
        assert_near(got, rotary_embedding(project(normed), pairs="interleaved"))
