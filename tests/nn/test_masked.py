from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_near, mesh, normal, untyped
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import (
    binary_concrete,
    masked_bilinear,
    masked_matmul,
    reinmax,
)
from jaxkern.nn import (
    Bilinear,
    MaskedBilinear,
    MaskedLinear,
    MaskLogits,
    mask_sparsity,
)

D_IN, HIDDEN, BATCH = 6, 10, 3
KEY = jax.random.key(5)


def linear(**options: Any) -> Any:
    return MaskedLinear(D_IN, HIDDEN, rngs=nnx.Rngs(0), **options)


def linear_of(d_in, d_out) -> Any:
    """Return a layer whose masks are all off."""
    zeros = nnx.initializers.zeros_init()
    options: Any = {"initial_logit": 0.0, "kernel_init": zeros, "use_bias": False}
    return MaskedLinear(d_in, d_out, rngs=nnx.Rngs(0), **options)


def bilinear(**options: Any) -> Any:
    return MaskedBilinear(D_IN, HIDDEN, rngs=nnx.Rngs(0), **options)


MODULES: Any = {"MaskedLinear": linear, "MaskedBilinear": bilinear}
modules = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
LOGITS = ("left_logits", "right_logits", "down_logits")


def randomize(module) -> Any:
    """Draw logits of both signs, and biases that are not 0."""
    leaves, tree = jax.tree.flatten(nnx.state(module))
    noise = [normal(i, x.shape, x.dtype) for i, x in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(tree, noise))
    return module


def by_op(module, x, key=None):
    samples = slice(None) if module.num_masks is None else slice(len(x))
    options: Any = {"estimator": module.estimator, "method": "loop", "key": key}
    if isinstance(module, MaskedLinear):
        logits = module.mask_logits[...][samples]
        assert module.bias is not None
        y = masked_matmul(x, module.kernel[...], logits, **options)
        return y + module.bias[...][None, None]
    layers = module.left, module.right, module.down
    return masked_bilinear(
        x,
        tuple(layer.kernel[...] for layer in layers),
        tuple(getattr(module, name)[...][samples] for name in LOGITS),
        biases=tuple(layer.bias[...] for layer in layers),
        **options,
    )


@modules
@pytest.mark.parametrize(
    "num_masks, method, estimator",
    [(None, "fused", reinmax), (BATCH, "einsum", reinmax), (7, None, "reinmax")],
    ids=["shared", "each", "more"],
)
def test_calls_its_op_with_the_first_masks(build, num_masks, method, estimator):
    module = build(num_masks=num_masks, estimator=estimator, method=method)
    randomize(module)
    x = normal(50, (BATCH, 4, D_IN))
    for key in (None, KEY):
        got = nnx.jit(lambda module, x, key=key: module(x, key=key))(module, x)
        assert_near(got, by_op(module, x, key))


@modules
def test_axes_between_batch_and_features(build):
    module = randomize(build(num_masks=BATCH))
    x = normal(50, (BATCH, 4, 5, D_IN))
    flat = module(x.reshape(BATCH, 20, D_IN))
    np.testing.assert_array_equal(module(x), flat.reshape(*x.shape[:-1], -1))
    np.testing.assert_array_equal(module(x[:, 0, 0]), module(x[:, :1, :1])[:, 0, 0])


@modules
def test_masks_that_are_not_used_get_no_gradient(build):
    module = randomize(build(num_masks=BATCH + 2))
    x = normal(50, (BATCH, 4, D_IN))
    where = nnx.DiffState(0, MaskLogits)
    gradients = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=where)(module)
    for leaf in jax.tree.leaves(gradients):
        assert (leaf[BATCH:] == 0).all() and leaf[:BATCH].any()


@pytest.mark.usefixtures("promoting")
@modules
def test_training_masks_leaves_the_weights_as_they_are(build):
    module = build(num_masks=BATCH)
    before = jax.tree.map(jnp.copy, nnx.state(module))
    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=MaskLogits)
    x, target = normal(50, (BATCH, 4, D_IN)), normal(51, (BATCH, 4, 1))

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            return ((module(x) - target) ** 2).mean()

        where = nnx.DiffState(0, MaskLogits)
        value, gradients = nnx.value_and_grad(loss, argnums=where)(module)
        optimizer.update(module, gradients)
        return value

    losses = [float(step(module, optimizer)) for _ in range(30)]
    assert min(losses) < losses[0]
    weights, logits = nnx.split_state(nnx.state(module), nnx.Param, ...)
    was, logits_were = nnx.split_state(before, nnx.Param, ...)
    jax.tree.map(np.testing.assert_array_equal, weights, was)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), logits, logits_were))
    assert 0 < float(module.sparsity()["total"].mean()) < 1


@modules
def test_flax_default_trains_weights_only(build):
    gradients = nnx.grad(lambda m: m(normal(50, (BATCH, 4, D_IN))).sum())(build())
    assert not jax.tree.leaves(nnx.state(gradients, MaskLogits))
    assert jax.tree.leaves(gradients)


def test_a_trained_layer_becomes_masked():
    x = normal(50, (BATCH, 4, D_IN))
    trained = randomize(nnx.Linear(D_IN, HIDDEN, rngs=nnx.Rngs(1)))
    masked = linear(num_masks=BATCH)
    nnx.update(masked, nnx.state(trained, nnx.Param))
    assert_near(masked(x), trained(x))
    trained = randomize(Bilinear(D_IN, HIDDEN, rngs=nnx.Rngs(1)))
    masked = bilinear(num_masks=BATCH)
    nnx.update(masked, nnx.state(trained, nnx.Param))
    assert_near(masked(x), trained(x))
    k, b = (
        {n: getattr(getattr(trained, n), which)[...] for n in ("left", "right", "down")}
        for which in ("kernel", "bias")
    )
    gated = (x @ k["left"] + b["left"][None, None]) * (
        x @ k["right"] + b["right"][None, None]
    )
    assert_near(trained(x), gated @ k["down"] + b["down"][None, None])


def test_masks_do_not_change_the_initial_weights():
    masked, without = bilinear(num_masks=2), Bilinear(D_IN, HIDDEN, rngs=nnx.Rngs(0))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(masked, nnx.Param),
        nnx.state(without, nnx.Param),
    )


def test_sparsity_by_logits_and_in_total():
    module = bilinear(num_masks=2, initial_logit=-1.0)
    module.left_logits[...] = jnp.ones((2, D_IN, HIDDEN)).at[1, 0, :3].set(0.0)
    module.down_logits[...] = jnp.ones((2, HIDDEN, D_IN))
    size = D_IN * HIDDEN
    expected = {
        "left_logits": [0, 3 / size],
        "right_logits": [1, 1],
        "down_logits": [0, 0],
        "total": [1 / 3, 1 / 3 + 1 / size],
    }
    got = module.sparsity()
    assert got.keys() == expected.keys()
    for name, fractions in expected.items():
        np.testing.assert_allclose(got[name], fractions, rtol=1e-6)
    assert linear().sparsity()["total"].shape == ()
    assert mask_sparsity(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == {}
    nested = nnx.List([linear(), nnx.Dict(a=linear(initial_logit=0.0))])
    totals = mask_sparsity(nested)
    names = ["0.mask_logits", "1.a.mask_logits", "total"]
    assert {name: float(totals[name]) for name in names} == dict(
        zip(names, (0.0, 1.0, 0.5), strict=True)
    )
    # Modules with three masks and with two, beside those whose mask all samples share.
    nested.append(linear(num_masks=3, initial_logit=0.0))
    np.testing.assert_allclose(mask_sparsity(nested)["total"], [2 / 3] * 3, rtol=1e-6)
    nested.append(linear(num_masks=2))
    np.testing.assert_allclose(mask_sparsity(nested)["total"], [1 / 2] * 2, rtol=1e-6)


def test_sparsity_of_more_weights_than_float32_counts():
    assert mask_sparsity(linear_of(2**13, 2**12))["total"] == 1
    sizes = jax.eval_shape(lambda: mask_sparsity(linear_of(2**16, 2**16)))
    assert sizes["total"].shape == ()


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize(
    "build, dtype, param_dtype",
    [
        (linear, None, jnp.float32),
        (linear, None, jnp.bfloat16),
        (linear, jnp.bfloat16, jnp.float32),
        (bilinear, None, jnp.bfloat16),
        (bilinear, jnp.bfloat16, jnp.float32),
    ],
)
def test_dtypes(build, dtype, param_dtype):
    module = build(num_masks=BATCH, dtype=dtype, param_dtype=param_dtype)
    leaves = jax.tree.leaves(nnx.state(module))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(param_dtype)}
    assert module(normal(0, (BATCH, D_IN), jnp.bfloat16)).dtype == (
        dtype or param_dtype
    )


def test_without_a_bias():
    module = linear(use_bias=False)
    x = normal(0, (BATCH, D_IN))
    assert module.bias is None
    assert_near(module(x), x @ module.kernel[...])


def test_partition_specs():
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(bilinear(num_masks=2))))
    wide, narrow = ("embed", "mlp"), ("mlp", "embed")
    assert specs == {
        "left": {"kernel": P(*wide), "bias": P("mlp")},
        "right": {"kernel": P(*wide), "bias": P("mlp")},
        "down": {"kernel": P(*narrow), "bias": P("embed")},
        "left_logits": P("batch", *wide),
        "right_logits": P("batch", *wide),
        "down_logits": P("batch", *narrow),
    }
    specs = nnx.to_pure_dict(
        nnx.get_partition_spec(nnx.state(linear(axis_names=("a", None))))
    )
    assert specs == {
        "kernel": P("a", None),
        "bias": P(
            None,
        ),
        "mask_logits": P("a", None),
    }


@pytest.mark.parametrize("method", ["fused", "bmm"])
def test_sharded_by_its_own_metadata_equals_one_device(method):
    module = randomize(bilinear(num_masks=4, method=method))
    x = normal(50, (4, 3, D_IN))
    devices = mesh(data=4, model=2)
    graph, state = nnx.split(module)
    rules = [("batch", "data"), ("embed", None), ("mlp", "model")]
    with nnx.logical_axis_rules(rules):
        placed = jax.device_put(state, nnx.get_named_sharding(state, devices))
    part = placed["left_logits"][...].addressable_shards[0].data
    assert part.shape == (1, D_IN, HIDDEN // 2)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    got = run(placed, jax.device_put(x, NamedSharding(devices, P("data"))))
    assert_near(got, run(state, x))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: linear(num_masks=2)(jnp.ones((3, D_IN))),
            ValueError,
            "MaskedLinear: x must have at most 2 samples, as there are masks, got 3",
        ),
        (
            lambda: bilinear(num_masks=2)(jnp.ones((3, 1, D_IN))),
            ValueError,
            "MaskedBilinear: x must have at most 2 samples, .* got 3",
        ),
        (
            lambda: linear()(jnp.ones(D_IN)),
            ValueError,
            r"MaskedLinear: x must have shape \(batch, ..., 6\), got \(6,\)",
        ),
        (lambda: linear()(3), TypeError, "MaskedLinear: x must be an array, got int"),
        (lambda: linear(num_masks=0), ValueError, "num_masks must be an integer of at"),
        (
            lambda: linear(implementation="cuda"),
            ValueError,
            "MaskedLinear: implementation must be one of",
        ),
        (
            lambda: bilinear(method="scan")(jnp.ones((1, D_IN))),
            ValueError,
            "masked_bilinear: method must be one of None, 'loop'",
        ),
        (
            lambda: bilinear(estimator=binary_concrete)(jnp.ones((1, D_IN))),
            TypeError,
            "key",
        ),
        (
            lambda: linear(estimator=jnp.sign)(jnp.ones((1, D_IN)), key=KEY),
            TypeError,
            "key",
        ),
        (
            lambda: MaskedBilinear(0, HIDDEN, rngs=nnx.Rngs(0)),
            ValueError,
            "MaskedBilinear: embed_dim must be",
        ),
        (
            lambda: untyped.nn.Bilinear(D_IN, 2.0, rngs=nnx.Rngs(0)),
            ValueError,
            "^Bilinear: hidden_dim must be",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@modules
def test_transforms(build):
    module = build(num_masks=BATCH, estimator=partial(reinmax, temperature=1.5))
    graph, state = nnx.split(randomize(module))
    x = normal(50, (2, BATCH, 4, D_IN))

    def loss(state, x):
        return (nnx.merge(graph, state)(x, key=KEY) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    each = [gradient(state, part) for part in x]
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    assert_near(jax.vmap(gradient, (None, 0))(state, x), expected)
    assert_near(jax.jit(jax.grad(jax.checkpoint(loss)))(state, x[0]), each[0])
    _, scanned = jax.lax.scan(lambda _, part: (None, gradient(state, part)), None, x)
    assert_near(scanned, expected)
