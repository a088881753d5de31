from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near, normal, randomize, untyped
from helpers import mesh as make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import Dilation, attention, dilated_attention
from jaxkern.nn import MultiHeadAttention
from jaxkern.testing import plain

EMBED, HEADS, SEQ = 24, 4, 10
PATTERNS: dict[str, Any] = {"dilation": Dilation((4, 8, 16), (1, 2, 4))}
dilated: Any = partial(dilated_attention, **PATTERNS)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"use_bias": False},
    "two heads a key": {"num_kv_heads": 2, "is_causal": True},
    "wide heads": {"head_dim": 10, "is_causal": True},
    "normed heads": {"qk_norm": "head", "sub_layer_norm": True},
    "normed embedding": {"qk_norm": "embed", "num_kv_heads": 1, "norm": nnx.RMSNorm},
    "dilated": {"attention_fn": dilated, "sub_layer_norm": True},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def build(seed=0, **options) -> Any:
    return MultiHeadAttention(EMBED, HEADS, rngs=nnx.Rngs(seed), **options)


@nnx.jit
def call(module, *args, **options):
    return module(*args, **options)


def flat_parameters(module):
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): p[...] for path, p in state}


def test_is_projections_around_the_function():
    module = randomize(build(attention_fn=dilated, num_kv_heads=2, is_causal=True))
    x = normal(0, (2, SEQ, EMBED))
    key_mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, SEQ))

    def core(query, key, value):
        return dilated(query, key, value, is_causal=True, key_mask=key_mask)

    expected = plain.multihead(jax.jit(core), x, x, x, nnx.state(module))
    assert_near(call(module, x, key_mask=key_mask), expected)


@pytest.mark.parametrize("across", [False, True], ids=["head", "embed"])
def test_each_norm_has_its_own_weights_and_its_own_place(across):
    module = build(qk_norm="embed" if across else "head", sub_layer_norm=True)
    randomize(module)
    calls = {}
    module.attention_fn = lambda *qkv: calls.setdefault("heads", attention(*qkv))
    x = normal(0, (2, SEQ, EMBED))
    got = module(x)
    flat = (2, SEQ, EMBED)

    def normed(norm, y, across):
        return norm(y.reshape(flat)).reshape(y.shape) if across else norm(y)

    q = normed(module.query_norm, module.query(x), across)
    k = normed(module.key_norm, module.key(x), across)
    heads = attention(q, k, module.value(x))
    assert_near(calls["heads"], heads)
    assert_near(got, module.out(normed(module.sub_norm, heads, True)))
    scales = [n.scale for n in (module.query_norm, module.key_norm, module.sub_norm)]
    dim = EMBED if across else EMBED // HEADS
    assert [s.shape for s in scales] == [(dim,), (dim,), (EMBED,)]
    assert len({id(s) for s in scales}) == 3


@variants
def test_every_parameter_has_a_gradient(options):
    module = randomize(build(**options))
    x, g = normal(0, (2, SEQ, EMBED)), normal(1, (2, SEQ, EMBED))

    @nnx.jit
    @nnx.grad
    def gradients(module):
        return (module(x) * g).sum()

    for name, gradient in flat_parameters(gradients(module)).items():
        assert np.isfinite(gradient).all(), name
        # A bias that all keys have does not change the softmax.
        if name != ("key_norm.bias" if "qk_norm" in options else "key.bias"):
            assert (abs(gradient).reshape(len(gradient), -1).sum(-1) > 1e-4).all(), name


def test_shapes_and_partition_specs():
    module = build(num_kv_heads=2, head_dim=5)
    shapes = {name: p.shape for name, p in flat_parameters(module).items()}
    assert shapes == {
        "query.kernel": (24, 4, 5),
        "query.bias": (4, 5),
        "key.kernel": (24, 2, 5),
        "key.bias": (2, 5),
        "value.kernel": (24, 2, 5),
        "value.bias": (2, 5),
        "out.kernel": (4, 5, 24),
        "out.bias": (24,),
    }
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module)))
    assert specs == {
        "query": {"kernel": P("embed", "heads", None), "bias": P("heads", None)},
        "key": {"kernel": P("embed", "kv_heads", None), "bias": P("kv_heads", None)},
        "value": {"kernel": P("embed", "kv_heads", None), "bias": P("kv_heads", None)},
        "out": {"kernel": P("heads", None, "embed"), "bias": P("embed")},
    }


@pytest.mark.parametrize("name", ["plain", "dilated"])
def test_sharded_by_its_own_metadata_equals_one_device(name):
    module, x = build(**VARIANTS[name]), normal(0, (2, SEQ, EMBED))
    mesh = make_mesh(data=2, model=4)
    graph, state = nnx.split(module)
    rules = [("embed", None), ("heads", "model"), ("kv_heads", "model")]
    with nnx.logical_axis_rules(rules):
        shardings = nnx.get_named_sharding(state, mesh)
    placed = jax.device_put(state, shardings)
    assert placed["out"]["kernel"][...].addressable_shards[0].data.shape[0] == 1
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    got = run(placed, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_near(got, run(state, x))


def test_gain_scales_value_and_output_only():
    options: dict[str, Any] = {"num_kv_heads": 16, "head_dim": 32}
    module = MultiHeadAttention(512, 16, gain=2.0, rngs=nnx.Rngs(0), **options)
    xavier = (2 / (512 + 512)) ** 0.5
    for name, gain in [("query", 1), ("key", 1), ("value", 2), ("out", 2)]:
        layer = getattr(module, name)
        assert float(layer.kernel[...].std()) == pytest.approx(gain * xavier, rel=0.02)
        assert not np.asarray(layer.bias[...]).any()
    plain = MultiHeadAttention(512, 16, rngs=nnx.Rngs(0), **options)
    np.testing.assert_array_equal(module.value.kernel, 2 * plain.value.kernel[...])


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes(dtype, param_dtype):
    options = VARIANTS["normed heads"]
    module = build(dtype=dtype, param_dtype=param_dtype, gain=2.0, **options)
    assert {p.dtype for p in flat_parameters(module).values()} == {
        jnp.dtype(param_dtype)
    }
    y = jax.eval_shape(module, normal(0, (2, SEQ, EMBED), jnp.bfloat16))
    assert y.dtype == (dtype or param_dtype)


def test_options_of_the_function_come_bound_or_with_the_call():
    x = normal(0, (2, SEQ, EMBED))
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (1, 1, SEQ, SEQ))
    bound = build(attention_fn=partial(attention, mask=mask))
    expected = build()(x, mask=mask)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(bound, x), bound(x))
    np.testing.assert_array_equal(bound(x), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        build()(x, window=3)
    # A function without the argument is_causal is not given it.
    assert build(attention_fn=lambda q, k, v: v)(x).shape == x.shape


def test_inside_shard_map():
    """As with `ring_attention`, the module sees a shard and its function the axis."""
    mesh = make_mesh(seq=4)

    def gather_keys(query, key, value):
        key, value = (
            jax.lax.all_gather(a, "seq", axis=1, tiled=True) for a in (key, value)
        )
        return attention(query, key, value)

    graph, state = nnx.split(build(attention_fn=gather_keys))
    x, spec = normal(0, (2, 12, EMBED)), P(None, "seq")
    run = jax.shard_map(
        lambda state, x: nnx.merge(graph, state)(x),
        mesh=mesh,
        in_specs=(P(), spec),
        out_specs=spec,
    )
    assert_near(jax.jit(run)(state, x), build()(x))


@pytest.mark.usefixtures("promoting")
def test_in_linen():
    layer: Any = nnx.bridge.to_linen(
        MultiHeadAttention, EMBED, HEADS, attention_fn=dilated
    )
    x = normal(0, (2, SEQ, EMBED))
    key_mask = jnp.arange(SEQ)[None] < jnp.array([[SEQ], [3]])
    variables = layer.init(jax.random.key(0), x)
    apply = jax.jit(lambda *args, **options: layer.apply(*args, **options))
    y = apply(variables, x, key_mask=key_mask)
    assert y.shape == x.shape and not np.array_equal(y, apply(variables, x))


def mha(*sizes, **options):
    sizes = sizes or (EMBED, HEADS)
    return lambda: untyped.nn.MultiHeadAttention(*sizes, rngs=nnx.Rngs(0), **options)


X = jnp.ones((2, SEQ, EMBED))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            mha(EMBED, 5),
            ValueError,
            "MultiHeadAttention: num_heads must divide embed_dim=24 unless head_dim",
        ),
        (
            mha(EMBED, 0),
            ValueError,
            "num_heads must be an integer of at least 1, got 0",
        ),
        (
            mha(num_kv_heads=3),
            ValueError,
            "num_kv_heads must divide num_heads=4, got 3",
        ),
        (
            mha(head_dim=2.0),
            ValueError,
            "head_dim must be an integer of at least 1, got 2.0",
        ),
        (
            mha(qk_norm="layer"),
            ValueError,
            "qk_norm must be one of None, 'head', 'embed', got 'layer'",
        ),
        (mha(gain=0.0), ValueError, "gain must be positive, got 0.0"),
        (mha(norm=None), TypeError, "norm must be callable, got NoneType"),
        (mha(attention_fn="ring"), TypeError, "attention_fn must be callable, got str"),
        (
            lambda: build()(X[..., 1:]),
            ValueError,
            r"query must have shape \(batch, seq, 24\), got \(2, 10, 23\)",
        ),
        (
            lambda: build()(X, X[0]),
            ValueError,
            r"key must have shape \(batch, seq, 24\), got \(10, 24\)",
        ),
        (
            lambda: build()(X, X.astype(int)),
            TypeError,
            "key must have a floating-point dtype",
        ),
        (
            lambda: build()(X, value=X),
            ValueError,
            "key must be given with value, got value alone",
        ),
        (
            lambda: build(attention_fn=partial(attention, return_lse=True))(X),
            TypeError,
            "attention_fn must return one array, got tuple",
        ),
        (
            lambda: build(attention_fn=lambda q, k, v: v[:, :1])(X),
            ValueError,
            r"attention_fn must return the query's shape \(2, 10, 4, 6\), got \(2, 1, ",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
