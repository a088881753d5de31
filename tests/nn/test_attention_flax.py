"""`MultiHeadAttention` beside flax's, and flax's modules with our `attention_fn`."""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import assert_as_close, assert_near, normal, randomize, to_float64
from helpers import mesh as make_mesh
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern import nn
from jaxkern.nn._attention_state import Sown

EMBED, HEADS, SEQ, RATE = 16, 4, 6, 0.4
X, Z = normal(0, (2, SEQ, EMBED)), normal(1, (2, 5, 12))
KEY = jax.random.key(7)


def definition(args, cotangent, *, mask, kept):
    """Attention with factors of its weights, and all gradients, in float64 by hand."""
    query, key, value, bias, g = to_float64((*args, cotangent))
    scale, group = query.shape[-1] ** -0.5, query.shape[2] // key.shape[2]
    wide_key, wide_value = (np.repeat(x, group, 2) for x in (key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, wide_key) * scale + bias
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    used = weights * kept
    out = np.einsum("bhqk,bkhd->bqhd", used, wide_value)
    d_weights = np.einsum("bqhd,bkhd->bhqk", g, wide_value) * kept
    mean = (weights * d_weights).sum(-1, keepdims=True)
    d_logits = weights * (d_weights - mean)
    d_query = np.einsum("bhqk,bkhd->bqhd", d_logits, wide_key) * scale
    d_key = np.einsum("bhqk,bqhd->bkhd", d_logits, query) * scale
    d_value = np.einsum("bhqk,bqhd->bkhd", used, g)
    d_key, d_value = (
        x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in (d_key, d_value)
    )
    return out, (d_query, d_key, d_value, d_logits.sum(0, keepdims=True))


@pytest.mark.parametrize("broadcast", [True, False], ids=["shared", "own"])
def test_function_with_bias_and_dropout(broadcast):
    """It errs at most twice as much as flax's function, which drops the same weights.

    The sown weights are those before dropout.
    """
    shapes = (2, SEQ, HEADS, 8), (2, 5, 2, 8), (2, 5, 2, 8), (1, HEADS, SEQ, 5)
    args = tuple(normal(i, shape) for i, shape in enumerate(shapes))
    g = normal(9, shapes[0])
    mask = np.random.default_rng(0).random((2, 1, SEQ, 5)) < 0.7
    mask[..., 0] = True
    options: dict[str, Any] = {"dropout_rate": RATE, "broadcast_dropout": broadcast}
    options |= {"dropout_rng": KEY, "is_causal": True}

    def run(function, *args):
        def call(query, key, value, bias):
            sown = Sown([])
            out = function(query, key, value, bias, mask, module=sown, **options)
            return out, sown.weights[0]

        out, vjp, weights = jax.vjp(call, *args, has_aux=True)
        return (out, vjp(g)), weights

    seen = mask & np.tri(SEQ, 5, dtype=bool)
    mask = jnp.asarray(mask, jnp.float32)  # as flax makes masks
    shape = (1, 1, SEQ, 5) if broadcast else (2, HEADS, SEQ, 5)
    kept = np.asarray(jax.random.bernoulli(KEY, 1 - RATE, shape)) / (1 - RATE)
    assert 0 < kept.mean() and (kept == 0).any()
    got, weights = jax.jit(partial(run, nn.attention_fn))(*args)
    plain, expected = jax.jit(partial(run, nnx.dot_product_attention))(*args)
    assert_as_close(got, plain, definition(args, g, mask=seen, kept=kept))
    assert_near(weights, expected)


def test_function_without_options_is_ours():
    """Any number of batch axes, and queries that see no key."""
    shape = (2, 3, SEQ, HEADS, 8)
    query, key, value = (normal(i, shape) for i in range(3))
    mask = np.random.default_rng(0).random((3, 1, SEQ, SEQ)) < 0.5
    mask[1, :, 2] = False

    def flat(x):
        return x.reshape(6, *x.shape[2:])

    mask = jnp.asarray(mask)
    wide = jnp.broadcast_to(mask, (2, *mask.shape))
    expected = jaxkern.attention(flat(query), flat(key), flat(value), mask=flat(wide))
    got = nn.attention_fn(query, key, value, mask=mask, deterministic=True)
    np.testing.assert_array_equal(got, expected.reshape(shape))
    assert not got[:, 1, 2].any()
    precise = nn.attention_fn(query, key, value, mask=mask, precision="highest")
    assert_near(precise, got)
    assert not precise[:, 1, 2].any()
    alone = nn.attention_fn(query[0, 0], key[0, 0], value[0, 0], mask=mask[0])
    assert_near(alone, got[0, 0])
    low = partial(nn.attention_fn, mask=mask, dtype=jnp.bfloat16, scale=0.1)
    assert jax.eval_shape(low, query, key, value).dtype == jnp.bfloat16


CASES: dict[str, dict[str, Any]] = {
    "no bias, two heads a key, qk norm": {
        "use_bias": False,
        "num_kv_heads": 2,
        "normalize_qk": True,
    },
    "sizes and dropout": {
        "out_features": 10,
        "in_kv_features": 12,
        "dropout_rate": RATE,
        "deterministic": False,
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_module_with_flaxs_weights(options):
    """Output, all gradients and the sown weights are those of flax's module.

    flax's module with our function stands beside them.
    """
    make: Any = partial(nnx.MultiHeadAttention, HEADS, EMBED, decode=False)
    rngs = {"params": 0, "dropout": 5}
    theirs = randomize(make(rngs=nnx.Rngs(**rngs), **options))
    borrowed = make(rngs=nnx.Rngs(**rngs), attention_fn=nn.attention_fn, **options)
    nnx.update(borrowed, nnx.state(theirs, nnx.Param))
    given = {k: v for k, v in options.items() if k != "normalize_qk"}
    if options.get("normalize_qk"):
        norm = partial(nnx.LayerNorm, use_bias=False)
        given |= {"qk_norm": "head", "norm": norm}
    ours: Any = nn.MultiHeadAttention(EMBED, HEADS, rngs=nnx.Rngs(**rngs), **given)
    names = {"query": "query", "key": "key", "value": "value", "out": "out"}
    if options.get("normalize_qk"):
        names |= {"query_norm": "query_ln", "key_norm": "key_ln"}
    for name, other in names.items():
        nnx.update(getattr(ours, name), nnx.state(getattr(theirs, other)))
    z = Z if "in_kv_features" in options else normal(1, (2, 5, EMBED))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (2, 1, SEQ, 5))
    mask = mask.at[..., 0].set(True)

    @nnx.jit
    def run(module):
        def call(module):
            y, sown = nnx.capture(module, nnx.Intermediate)(
                X, z, -z, mask=mask, sow_weights=True
            )
            return (y**2).sum(), (y, sown["attention_weights"][0])

        gradients, aux = nnx.grad(call, has_aux=True)(module)
        return aux, nnx.state(gradients)

    results = []
    drops = "dropout_rate" in options
    for module in (theirs, borrowed, ours) if drops else (theirs, ours):
        result, gradients = run(module)
        path = names if module is ours else names.values()
        # The gradient of the key's bias is 0, up to rounding.
        together, _ = ravel_pytree([gradients[name] for name in path])
        results.append((result, together))
    for result in results[1:]:
        assert_near(result, results[0])
    if drops:
        # Each call draws other weights to drop.
        assert not np.array_equal(run(ours)[0][0], results[-1][0][0])
        ours.eval()
        drawn = [ours(X, z, rngs=nnx.Rngs(1), deterministic=False) for _ in range(2)]
        np.testing.assert_array_equal(*drawn)
        assert ours.deterministic and not np.array_equal(ours(X, z), drawn[0])


@pytest.mark.parametrize("rate", [0.0, RATE])
def test_linen_with_our_function(rate):
    make = partial(linen.MultiHeadDotProductAttention, HEADS, dropout_rate=rate)
    theirs, ours = make(), make(attention_fn=nn.attention_fn)
    variables = ours.init(jax.random.key(0), X, deterministic=True)
    mask = linen.make_causal_mask(jnp.ones((2, SEQ)))

    def run(layer):
        def loss(variables):
            y, kept = layer.apply(
                variables,
                X,
                mask=mask,
                deterministic=False,
                sow_weights=rate > 0,
                rngs={"dropout": KEY},
                mutable=["intermediates"],
            )
            return (y**2).sum(), (y, kept)

        # With dropout, gradients are as in flax's NNX module, see above.
        if rate:
            return jax.jit(loss)(variables)[1]
        (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            variables
        )
        return results, ravel_pytree(gradients)[0]

    assert_near(run(ours), run(theirs))


def test_equinox_with_our_function():
    eqx = pytest.importorskip("equinox")
    theirs = eqx.nn.MultiheadAttention(HEADS, EMBED, key=jax.random.key(0))

    def ours(layer, x, mask):
        """Equinox's module has no such argument, but its projections."""
        query, key, value = (
            jax.vmap(project)(x).reshape(SEQ, HEADS, -1)
            for project in (layer.query_proj, layer.key_proj, layer.value_proj)
        )
        heads = nn.attention_fn(query, key, value, mask=mask)
        return jax.vmap(layer.output_proj)(heads.reshape(SEQ, -1))

    mask = np.tri(SEQ, dtype=bool)

    def run(call):
        @eqx.filter_jit
        @partial(eqx.filter_value_and_grad, has_aux=True)
        def of_batch(layer):
            y = jax.vmap(lambda x: call(layer, x))(X)
            return (y**2).sum(), y

        return of_batch(theirs)

    got = run(partial(ours, mask=mask))
    assert_near(got, run(lambda layer, x: layer(x, x, x, mask=mask)))


def causal(**options) -> Any:
    options = {"is_causal": True, "num_kv_heads": 2} | options
    return randomize(nn.MultiHeadAttention(EMBED, HEADS, rngs=nnx.Rngs(0), **options))


@nnx.jit
def decode(module, x, **options):
    return module(x, decode=True, **options)


def test_decoding_equals_the_causal_call():
    """Tokens come one by one, or several at once, and as in flax's module."""
    module = causal()
    theirs: Any = nnx.MultiHeadAttention(
        HEADS, EMBED, num_kv_heads=2, decode=True, rngs=nnx.Rngs(1)
    )
    for name in ("query", "key", "value", "out"):
        nnx.update(getattr(theirs, name), nnx.state(getattr(module, name)))
    expected = module(X)
    for make in (module.init_cache, theirs.init_cache):
        make((2, SEQ + 2, EMBED))
    first = [decode(module, X[:, i : i + 1]) for i in range(3)]
    flaxs = [nnx.jit(lambda m, x: m(x))(theirs, X[:, i : i + 1]) for i in range(3)]
    assert_near(jnp.concatenate(first, 1), expected[:, :3])
    assert_near(jnp.concatenate(flaxs, 1), expected[:, :3])
    for name in ("cached_key", "cached_value", "cache_index"):
        assert_near(getattr(module, name)[...], getattr(theirs, name)[...])
    rest = decode(module, X[:, 3:])
    assert_near(rest, expected[:, 3:])
    assert int(module.cache_index[...]) == SEQ
    # A mask of the call hides cached tokens too.
    module.init_cache((2, SEQ, EMBED), jnp.bfloat16)
    hidden = jnp.ones((1, 1, 1, SEQ), bool).at[..., 1].set(False)
    masked = decode(module, X, mask=hidden)
    assert module.cached_key.dtype == jnp.bfloat16 and masked.dtype == jnp.float32
    assert_near(masked, module(X, mask=hidden), 0.02)


def test_views_decode_and_drop():
    module = causal(dropout_rate=RATE)
    view: Any = nnx.view(
        module, decode=True, deterministic=True, batch_size=2, max_length=SEQ
    )
    assert module.decode is None and view.decode and view.deterministic
    assert_near(view(X), module(X, deterministic=True))
    assert int(view.cache_index[...]) == SEQ and module.cache_index is None


def test_state_changes_on_explicit_axes():
    """The weights, the cache and the random keys of the module itself change."""
    mesh = make_mesh("explicit", data=2)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    alone, module = (causal(dropout_rate=RATE, deterministic=False) for _ in "ab")
    results = []

    @nnx.jit
    def step(layer, x):
        run = nnx.capture(layer, nnx.Intermediate)
        return run(x, decode=True, sow_weights=True)

    for layer, given in [(alone, X), (module, x)]:
        layer.init_cache(X.shape)
        with jax.set_mesh(mesh) if layer is module else contextlib.nullcontext():
            y, sown = step(layer, given)
        cache = layer.cached_key[...], layer.cache_index[...], layer.rngs.count[...]
        assert layer.cache_index[...] == SEQ and layer.rngs.count[...] == 1
        kept = y, sown["attention_weights"][0], cache
        results.append(jax.tree.map(np.asarray, kept))
    assert_near(*results)


def test_sinks_go_with_a_cache():
    module = causal(attention_sinks=True)
    module.sinks.set_value(jnp.linspace(-1.0, 1.0, HEADS))
    expected = module(X)
    assert not np.allclose(expected, causal()(X))
    module.init_cache(X.shape)
    parts = [module(X[:, i : i + 3], decode=True) for i in range(0, SEQ, 3)]
    assert_near(jnp.concatenate(parts, 1), expected)


def test_a_bound_mask_hides_cached_tokens():
    mask = jnp.ones((1, 1, 1, SEQ), bool).at[..., 1].set(False)
    bound = partial(jaxkern.attention, mask=mask)
    module, other = causal(attention_fn=bound), causal()
    module.init_cache(X.shape)
    assert_near(module(X, decode=True), other(X, mask=mask))
