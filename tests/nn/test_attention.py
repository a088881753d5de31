from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near, normal, untyped
from helpers import mesh as make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import Dilation, attention, dilated_attention
from jaxkern.nn import LongNet, MultiHeadAttention
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


def randomize(module) -> Any:
    """Add noise, so that biases are not 0 and scales of norms are not 1."""
    leaves, tree = jax.tree.flatten(nnx.state(module, nnx.Param))
    noise = [x + 0.1 * normal(i, x.shape) for i, x in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(tree, noise))
    return module


@nnx.jit
def call(module, *args, **options):
    return module(*args, **options)


def flat_parameters(module):
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): p[...] for path, p in state}


@pytest.mark.parametrize(
    "use_bias, kv_heads, normed",
    [(True, HEADS, False), (False, 2, False), (True, 2, True)],
    ids=["bias", "no bias, two heads a key", "qk norm"],
)
def test_equals_flax_with_the_same_weights(use_bias, kv_heads, normed):
    ours = build(
        use_bias=use_bias,
        num_kv_heads=kv_heads,
        qk_norm="head" if normed else None,
        norm=partial(nnx.LayerNorm, use_bias=False),
    )
    theirs = nnx.MultiHeadAttention(
        num_heads=HEADS,
        in_features=EMBED,
        num_kv_heads=kv_heads,
        use_bias=use_bias,
        normalize_qk=normed,
        decode=False,
        rngs=nnx.Rngs(1),
    )
    randomize(ours)
    for name in ("query", "key", "value", "out"):
        nnx.update(getattr(theirs, name), nnx.state(getattr(ours, name)))
    if normed:
        nnx.update(theirs.query_ln, nnx.state(ours.query_norm))
        nnx.update(theirs.key_ln, nnx.state(ours.key_norm))
    x, z = normal(0, (2, SEQ, EMBED)), normal(1, (2, 7, EMBED))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (2, 1, SEQ, 7))
    mask = mask.at[..., 0].set(True)

    @nnx.jit
    def of_itself_and_of_another(module):
        return module(x), module(x, z, -z, mask=mask)

    assert_near(of_itself_and_of_another(ours), of_itself_and_of_another(theirs))


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


def longnet(**options) -> Any:
    options = PATTERNS | options
    return randomize(LongNet(EMBED, HEADS, num_layers=2, rngs=nnx.Rngs(0), **options))


@pytest.mark.usefixtures("promoting")
def test_longnet():
    module, x = longnet(), normal(0, (2, SEQ, EMBED))
    assert len(module.blocks) == 2
    expected, attend = x, jax.jit(dilated)
    for block in module.blocks:
        heads = attend(
            *(
                layer(block.attention_norm(expected))
                for layer in (
                    block.attention.query,
                    block.attention.key,
                    block.attention.value,
                )
            )
        )
        heads = block.attention.sub_norm(heads.reshape(x.shape)).reshape(heads.shape)
        expected += block.attention.out(heads)
        hidden = jax.nn.gelu(block.up(block.mlp_norm(expected)))
        expected += block.down(block.hidden_norm(hidden))
    assert_near(call(module, x), module.norm(expected))
    low = jax.eval_shape(module, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    low = LongNet(
        EMBED, HEADS, num_layers=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **PATTERNS
    )
    y = call(low, x)
    assert y.dtype == jnp.bfloat16 and np.isfinite(y.astype(jnp.float32)).all()
    full = LongNet(EMBED, HEADS, num_layers=1, rngs=nnx.Rngs(0), **PATTERNS)
    assert_near(y, call(full, x), 0.05)


def test_longnet_starts_with_magnetos_gain():
    module = LongNet(256, 4, num_layers=3, rngs=nnx.Rngs(0))
    gain = np.log(6) ** 0.5
    attend = (2 / (256 + 256)) ** 0.5
    feed = (2 / (256 + 1024)) ** 0.5
    block = module.blocks[2]
    for layer, std in [
        (block.attention.query, attend),
        (block.attention.value, gain * attend),
        (block.attention.out, gain * attend),
        (block.up, gain * feed),
        (block.down, gain * feed),
    ]:
        assert float(layer.kernel[...].std()) == pytest.approx(std, rel=0.02)


def test_longnet_is_causal_only_on_request():
    x = normal(0, (1, SEQ, EMBED))
    changed = x.at[:, 6].set(normal(1, (EMBED,)))
    for is_causal in (True, False):
        module = longnet(is_causal=is_causal)
        moved = np.asarray(abs(call(module, x) - call(module, changed))).max((0, 2))
        assert moved[6] > 1e-4
        assert (moved[:6] == 0).all() if is_causal else (moved[:6] > 1e-6).any()


def test_longnet_does_not_see_padding():
    module, x = longnet(), normal(0, (2, SEQ, EMBED))
    key_mask = jnp.broadcast_to(jnp.arange(SEQ) < 7, (2, SEQ))
    got = call(module, x, key_mask)
    changed = call(module, x.at[:, 7:].set(9.0), key_mask)
    np.testing.assert_array_equal(got[:, :7], changed[:, :7])
    short = call(module, x[:, :7])
    assert_near(got[:, :7], short)


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
        (
            lambda: untyped.nn.LongNet(EMBED, HEADS, num_layers=0, rngs=nnx.Rngs(0)),
            ValueError,
            "LongNet: num_layers must be an integer of at least 1, got 0",
        ),
        (
            lambda: longnet()(X[..., 1:]),
            ValueError,
            r"LongNet: x must have shape \(..., 24\), got \(2, 10, 23\)",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
