"""`TransformerLM` with the options of today's model families, against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_definitions as definitions
from flax import nnx
from helpers import assert_near, normal, to_float64, untyped

from jaxkern import RotaryScaling
from jaxkern.nn import LowRankSwiGLU, TransformerLM
from jaxkern.nn import make_mesh as make_own_mesh

VOCAB, CONTEXT, SEQ = 50, 16, 12
LLAMA: dict[str, Any] = {
    "embed_dim": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim": 40,
    "rope_theta": 100.0,
    "rope_pairs": "halves",
}
QWEN = LLAMA | {"norm_epsilon": 1e-6}
GEMMA = QWEN | {
    "head_dim": 8,
    "norm": "rms_plus_one",
    "norm_placement": "both",
    "activation": "gelu",
    "tie_embeddings": True,
    "embedding_scale": 24**0.5,
    "attention_scale": 0.3,
}
# The options of each family, with lengths and caps so small that they matter here.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 3.1": LLAMA
    | {
        "rope_scaling": RotaryScaling("llama3", 8.0, original_context_length=16),
        "scan_layers": False,
    },
    "Mistral": LLAMA | {"head_dim": 8, "window": 5},
    "Qwen 2": QWEN
    | {
        "qkv_bias": True,
        "rope_scaling": RotaryScaling(
            "yarn", 4.0, original_context_length=64, beta_fast=8.0
        ),
        "remat": True,
    },
    "Qwen 3": QWEN | {"head_dim": 8, "qk_norm": "head", "tie_embeddings": True},
    "OLMo 2": QWEN
    | {
        "num_kv_heads": 4,
        "qk_norm": "embed",
        "norm_placement": "post",
        "scan_layers": False,
        "remat": True,
    },
    "Gemma 2": GEMMA
    | {
        "num_layers": 3,
        "attention_softcap": 1.0,
        "logit_softcap": 2.0,
        "window": 5,
        "full_attention_every": 2,
        "remat": True,
    },
    "Gemma 3": GEMMA
    | {
        "num_layers": 4,
        "qk_norm": "head",
        "window": 5,
        "full_attention_every": 2,
        "local_rope_theta": 20.0,
        "rope_scaling": RotaryScaling("linear", 8.0),
    },
    "Phi-3": LLAMA
    | {
        "head_dim": 8,
        "rotary_dim": 6,
        "window": 7,
        "rope_scaling": RotaryScaling(
            "longrope", 32.0, original_context_length=16, factors=[1.0, 2.0, 8.0]
        ),
    },
    "StarCoder 2": LLAMA
    | {
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "activation": "gelu",
        "gated_mlp": False,
        "scan_layers": False,
    },
    "gated with biases": LLAMA
    | {"num_layers": 1, "mlp_bias": True, "activation": "relu2"},
}


def build(**options) -> Any:
    """Return a model whose scales, biases and logits are not those it starts with."""
    model = TransformerLM(VOCAB, CONTEXT, **options, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(model, nnx.Param))
    noise = [x + 0.2 * normal(i, x.shape, x.dtype) for i, x in enumerate(leaves)]
    nnx.update(model, jax.tree.unflatten(tree, noise))
    return model


def batch(seq=SEQ) -> Any:
    ids = jax.random.randint(jax.random.key(0), (2, 2, seq), 0, VOCAB)
    return ids[0], ids[1]


def paths(tree) -> Any:
    return jax.tree.leaves_with_path(tree)


@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_gradients(name):
    options = FAMILIES[name]
    graph, state = nnx.split(build(**options))
    tokens, targets = batch()

    @jax.jit
    def run(state):
        def loss(state):
            model = nnx.merge(graph, state)
            return model.loss(tokens, targets, chunk=20), model(tokens)

        return jax.value_and_grad(loss, has_aux=True)(state)

    (loss, logits), gradients = run(state)
    weights = to_float64(nnx.to_pure_dict(state))
    given = np.asarray(tokens), np.asarray(targets)
    exact = definitions.frame_logits(weights, given[0], options)
    assert_near(logits, exact, 1e-5)
    assert abs(loss - definitions.frame_loss(weights, *given, options)) < 1e-5 * loss
    # Along a random direction, an error of the gradient shows in any of its elements.
    for (path, weight), gradient in zip(
        paths(weights), jax.tree.leaves(nnx.to_pure_dict(gradients)), strict=True
    ):
        direction = np.random.default_rng(0).standard_normal(weight.shape)
        plain, ends = weight.copy(), []
        for step in (1e-5, -1e-5):
            weight[...] = plain + step * direction
            ends.append(definitions.frame_loss(weights, *given, options))
        weight[...] = plain
        slope = (ends[0] - ends[1]) / 2e-5
        error = abs((to_float64(gradient) * direction).sum() - slope)
        where = jax.tree_util.keystr(path)
        assert error <= 3e-5 * np.linalg.norm(to_float64(gradient)) + 1e-8, where
        is_shift = "key" in where and "bias" in where
        assert np.linalg.norm(gradient) > 1e-4 or is_shift, where


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache(name):
    """It is greedy on NumPy's logits, and prompts of unequal length are as alone."""
    options = FAMILIES[name]
    model, (tokens, _) = build(**options), batch()
    prompt, lengths = tokens[:, :7], [7, 4]
    got = model.generate(prompt, max_new_tokens=5, prompt_lengths=jnp.array(lengths))
    weights = to_float64(nnx.to_pure_dict(nnx.state(model)))
    for row, length in zip(np.asarray(got), lengths, strict=True):
        row = row[None, : length + 5]
        likeliest = definitions.frame_logits(weights, row, options).argmax(-1)
        np.testing.assert_array_equal(row[0, length:], likeliest[0, length - 1 : -1])


def test_a_cache_in_parts_and_none():
    """Features in parts, and tokens without a cache, are those of the call."""
    model, (tokens, _) = build(**FAMILIES["Gemma 2"]), batch()
    expected, cache = model.features(tokens), model.make_cache(2, SEQ)
    got = []
    for part in jnp.split(tokens, [6], axis=1):
        features, cache = model.extend(part, cache)
        got.append(features)
    assert_near(jnp.concatenate(got, axis=1), expected)
    run: Any = model.generate
    plain = run(tokens[:, :4], max_new_tokens=4, cache=False)
    np.testing.assert_array_equal(run(tokens[:, :4], max_new_tokens=4), plain)


@pytest.mark.parametrize("name, seq", [("Mistral", 300), ("Gemma 2", 300)])
def test_long_sequences(name, seq):
    """Windows go by blocks, and caps by some queries at a time."""
    options: Any = FAMILIES[name] | {"num_layers": 2, "window": 70}
    model = TransformerLM(VOCAB, seq, **options, rngs=nnx.Rngs(0))
    tokens, targets = batch(seq)
    graph, state = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def run(state):
        return nnx.merge(graph, state).loss(tokens, targets)

    loss, gradients = run(state)
    weights = to_float64(nnx.to_pure_dict(state))
    given = np.asarray(tokens), np.asarray(targets)
    exact = definitions.frame_loss(weights, *given, options)
    assert abs(loss - exact) < 1e-5 * exact
    kernel = weights["layers"]["attention"]["query"]["kernel"]
    got = nnx.to_pure_dict(gradients)["layers"]["attention"]["query"]["kernel"]
    direction = np.random.default_rng(0).standard_normal(kernel.shape)
    ends = []
    for step in (1e-5, -2e-5):
        kernel += step * direction
        ends.append(definitions.frame_loss(weights, *given, options))
    slope = (ends[0] - ends[1]) / 2e-5
    error = abs((to_float64(got) * direction).sum() - slope)
    assert error < 1e-4 * np.linalg.norm(got) + 1e-8


@pytest.mark.usefixtures("promoting")
def test_bfloat16():
    options = FAMILIES["Gemma 2"] | {"dtype": jnp.bfloat16}
    model, (tokens, _) = build(**options), batch()
    logits = jax.jit(lambda tokens: model(tokens))(tokens)
    assert logits.dtype == jnp.float32
    weights = to_float64(nnx.to_pure_dict(nnx.state(model)))
    exact = definitions.frame_logits(weights, np.asarray(tokens), options)
    assert_near(logits, exact, 0.05)


def lm(**options):
    def call():
        return untyped.nn.TransformerLM(
            VOCAB, CONTEXT, **LLAMA | options, rngs=nnx.Rngs(0)
        )

    return call


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"head_dim": 0}, ValueError, "head_dim must be an integer of at least 1"),
        ({"head_dim": 7}, ValueError, "head_dim must be even, for rotary .*, got 7"),
        ({"rotary_dim": 8}, ValueError, "rotary_dim must be even and at most dim=6"),
        ({"norm": "batch"}, ValueError, "norm must be one of 'rms', .*, got 'batch'"),
        ({"norm_placement": "mid"}, ValueError, "norm_placement must be one of 'pre'"),
        ({"norm_epsilon": 0.0}, ValueError, "norm_epsilon must be positive, got 0.0"),
        ({"qk_norm": True}, ValueError, "qk_norm must be one of None, 'head'"),
        ({"rope_pairs": "all"}, ValueError, "rope_pairs must be one of 'interleaved'"),
        ({"activation": "elu"}, ValueError, "activation must be one of 'silu'"),
        ({"qkv_bias": 1}, TypeError, "qkv_bias must be True or False"),
        ({"rope_scaling": 8}, TypeError, "rope_scaling must be a RotaryScaling or N"),
        (
            {"rope_theta": 1.0, "rope_scaling": FAMILIES["Qwen 2"]["rope_scaling"]},
            ValueError,
            "rope_theta must be above 1 for a rope_scaling of kind 'yarn', got 1.0",
        ),
        ({"logit_softcap": "30"}, TypeError, "logit_softcap must be one number"),
        ({"window": 0}, ValueError, "window must be an integer of at least 1, got 0"),
        (
            {"full_attention_every": 2},
            ValueError,
            "full_attention_every must be None without a window, got 2",
        ),
        (
            {"window": 4, "full_attention_every": 1},
            ValueError,
            "full_attention_every must be an integer of at least 2, got 1",
        ),
        (
            {"window": 4, "local_rope_theta": 20.0},
            ValueError,
            "local_rope_theta must be None without full_attention_every, where .* 20.0",
        ),
        ({"scan_layers": 0}, TypeError, "scan_layers must be True or False"),
        ({"remat": "all"}, TypeError, "remat must be True or False"),
        ({"tie_embeddings": None}, TypeError, "tie_embeddings must be True or False"),
        (
            {"window": 4, "attention_fn": jax.nn.dot_product_attention},
            ValueError,
            "window must be None with an attention_fn, got 4",
        ),
        (
            {"mlp": LowRankSwiGLU, "mlp_bias": True},
            ValueError,
            "activation, gated_mlp and mlp_bias must be left out with an mlp of your",
        ),
        (
            {"attention_softcap": 50.0, "mesh": 2},
            ValueError,
            "attention_softcap must be None for context=2, where tokens go round in",
        ),
    ],
)
def test_refusals(options, error, message):
    if "mesh" in options:
        mesh = make_own_mesh(context=2, devices=jax.devices()[:2])
        options = options | {"mesh": mesh}
    with pytest.raises(error, match=message):
        lm(**options)()
