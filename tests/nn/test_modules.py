"""Properties that every module has."""

import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import assert_near

import jaxkern
from jaxkern import nn

DILATION = jaxkern.Dilation((8, 16), (1, 2))
LM: dict[str, Any] = {
    "vocab_size": 20,
    "context_length": 8,
    "embed_dim": 16,
    "num_layers": 2,
}
LM |= {"num_heads": 2, "hidden_dim": 12}
FEATURES, IDS = (8, 16), (8,)

# Each module, its sizes, its other options, and the shape of one sample of its input.
MODULES: dict[str, tuple[Any, dict[str, int], Any, tuple[int, ...]]] = {
    "MultiHeadAttention": (
        nn.MultiHeadAttention,
        {"embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 6},
        lambda: {"is_causal": True, "qk_norm": "embed", "sub_layer_norm": True},
        FEATURES,
    ),
    "LongNet": (
        nn.LongNet,
        {"embed_dim": 16, "num_heads": 2, "num_layers": 1},
        lambda: {"dilation": jaxkern.Dilation([8, 16], [1, 2])},
        FEATURES,
    ),
    "LowRankLinear": (
        nn.LowRankLinear,
        {"in_features": 16, "out_features": 12, "rank": 4},
        dict,
        FEATURES,
    ),
    "SwiGLU": (nn.SwiGLU, {"embed_dim": 16, "hidden_dim": 12}, dict, FEATURES),
    "LowRankSwiGLU": (
        nn.LowRankSwiGLU,
        {"embed_dim": 16, "hidden_dim": 12, "rank": 4},
        dict,
        FEATURES,
    ),
    "LowRankReLU2": (
        nn.LowRankReLU2,
        {"embed_dim": 16, "hidden_dim": 12, "rank": 4},
        lambda: {"sparsity": "2:4"},
        FEATURES,
    ),
    "MultiHeadMLP": (
        nn.MultiHeadMLP,
        {"embed_dim": 16, "hidden_dim": 12, "num_heads": 2},
        dict,
        FEATURES,
    ),
    "MaskedLinear": (
        nn.MaskedLinear,
        {"in_features": 16, "out_features": 12, "num_masks": 2},
        lambda: {"estimator": partial(jaxkern.straight_through, key=None)},
        FEATURES,
    ),
    "Bilinear": (
        nn.Bilinear,
        {"embed_dim": 16, "hidden_dim": 12},
        dict,
        FEATURES,
    ),
    "MaskedBilinear": (
        nn.MaskedBilinear,
        {"embed_dim": 16, "hidden_dim": 12, "num_masks": 2},
        lambda: {"estimator": partial(jaxkern.straight_through, key=None)},
        FEATURES,
    ),
    "QuadraticTransformer": (
        nn.QuadraticTransformer,
        {"vocab_size": 20, "embed_dim": 16, "num_heads": 2, "num_layers": 2},
        lambda: {"masked_layers": (1,), "estimator": partial(jaxkern.reinmax)},
        IDS,
    ),
    "TransformerLM": (nn.TransformerLM, LM, dict, IDS),
    "TransformerLM, others": (
        nn.TransformerLM,
        LM | {"num_kv_heads": 1},
        lambda: {
            "attention_fn": partial(jaxkern.dilated_attention, dilation=DILATION),
            "mlp": partial(nn.LowRankSwiGLU, rank=4),
            "scan_layers": False,
        },
        IDS,
    ),
    "FlashMLP": (
        nn.FlashMLP,
        {"num_heads": 2, "head_dim": 16, "hidden_dim": 12},
        lambda: {"gated": True},
        (),
    ),
}
EACH = pytest.mark.parametrize(
    "module, sizes, options, sample", MODULES.values(), ids=MODULES
)


def structure(make):
    """Return the graph and the abstract state of a module; nothing is computed."""
    return nnx.split(nnx.eval_shape(make))


@pytest.mark.usefixtures("unchecked_types")
@EACH
def test_equal_modules_have_equal_graphs(module, sizes, options, sample):
    """So a program of one runs the other, also if sizes are NumPy's integers."""
    graph, state = structure(lambda: module(**sizes, **options(), rngs=nnx.Rngs(0)))
    for kind in (int, np.int8, np.uint8):
        # Products of sizes exceed int8.
        given = {name: kind(size) for name, size in sizes.items()}
        other = structure(lambda g=given: module(**g, **options(), rngs=nnx.Rngs(1)))
        assert other[0] == graph and hash(other[0]) == hash(graph)
        assert jax.tree.map(lambda x: x.shape, other[1]) == jax.tree.map(
            lambda x: x.shape, state
        )


@pytest.mark.usefixtures("unchecked_types")
@EACH
def test_wrong_options_of_parameters(module, sizes, options, sample):
    name = module.__name__
    for given, message in [
        ({"rngs": 0}, "rngs must be an nnx.Rngs, got int"),
        ({"rngs": jax.random.key(0)}, "rngs must be an nnx.Rngs, got "),
        ({"dtype": jnp.int8}, "dtype must be a floating-point .*, got int8"),
        ({"dtype": "float31"}, "dtype must be a floating-point .*, got float31"),
        ({"param_dtype": jnp.float8_e4m3fn}, "param_dtype must be .*, got float8_e4m3"),
        ({"param_dtype": None}, "param_dtype must be .*, got None"),
        ({"param_dtype": bool}, "param_dtype must be .*, got bool"),
    ]:
        with pytest.raises(TypeError, match=f"^{name}: {message}"):
            module(**sizes, **options(), **{"rngs": nnx.Rngs(0)} | given)


@EACH
def test_no_samples(module, sizes, options, sample):
    graph, state = nnx.split(module(**sizes, **options(), rngs=nnx.Rngs(0)))
    shape = (0, *sample) if sample else (sizes["num_heads"], 0, sizes["head_dim"])
    x = jnp.zeros(shape, int if sample == IDS else float)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(state):
        y = nnx.merge(graph, state)(x)
        return y.sum(), y

    (_, y), slopes = run(state)
    assert y.size == 0 and y.shape[:-1] == shape[: y.ndim - 1]
    assert not any(np.any(slope) for slope in jax.tree.leaves(slopes))


def test_partials_are_equal_where_function_and_arguments_are():
    mask = np.ones((2, 2), bool)

    def attend(*args, **options):
        return args[0]

    def held(**options):
        make = partial(nn.MultiHeadAttention, 16, 2, rngs=nnx.Rngs(0))
        return make(attention_fn=partial(partial(attend, scale=2.0), **options))

    one = held(lengths=[4, {"a": 2}], mask=mask)
    assert nnx.graphdef(one) == nnx.graphdef(held(mask=mask, lengths=(4, {"a": 2})))
    for other in (
        held(lengths=(4, {"a": 3}), mask=mask),
        held(lengths=(4, {"a": 2}), mask=mask.copy()),
        held(lengths=(4, {"a": 2.0}), mask=mask),
        held(mask=mask),
    ):
        assert nnx.graphdef(one) != nnx.graphdef(other)
    # Users still see a partial, and pickle keeps it.
    assert isinstance(one.attention_fn, partial) and one.attention_fn.func is attend
    built = nn.MultiHeadAttention(16, 2, is_causal=True, rngs=nnx.Rngs(0)).attention_fn
    assert pickle.loads(pickle.dumps(built)) == built


def cache_of(seed=0):
    model = nn.TransformerLM(**LM, rngs=nnx.Rngs(seed))
    return model, model.make_cache(2, 5)


def test_a_cache_can_be_donated_kept_and_compared(tmp_path):
    model, cache = cache_of()
    graph, state = nnx.split(model)

    @partial(jax.jit, donate_argnums=2)
    def step(state, tokens, cache):
        return nnx.merge(graph, state).extend(tokens, cache)

    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    _, grown = step(state, tokens, cache)
    expected, _ = step(state, tokens[:, :2], jax.tree.map(jnp.copy, grown))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), grown, cache_of()[1])
    assert not same.keys and not same.values and not same.length
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", grown)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", grown)
    for copy in (pickle.loads(pickle.dumps(grown)), restored):
        assert isinstance(copy, nn.KVCache) and copy == grown and not copy != grown
        assert jax.tree.structure(copy) == jax.tree.structure(grown)
        assert_near(step(state, tokens[:, :2], copy)[0], expected)
    other = grown._replace(length=grown.length + 1)
    assert grown != other and grown != tuple(grown)
    with pytest.raises(TypeError, match="unhashable type: 'KVCache'"):
        hash(grown)


def test_a_program_of_a_cache_can_be_exported():
    model, cache = cache_of()
    run = jax.jit(lambda tokens, cache: model.extend(tokens, cache))
    tokens = jnp.ones((2, 3), int)
    exported = jax.export.export(run)(tokens, cache).serialize()
    got = jax.export.deserialize(exported).call(tokens, cache)
    assert_near(got, run(tokens, cache))
