from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import assert_near, mesh, normal, relative_error, untyped
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern.nn import FlashMLP, LowRankLinear, LowRankReLU2, LowRankSwiGLU, SwiGLU

EMBED, MLP, RANK = 24, 64, 8
PAIRS = ("gate", "up", "down")
MODULES = {
    "SwiGLU": lambda **k: SwiGLU(EMBED, MLP, rngs=nnx.Rngs(0), **k),
    "LowRankSwiGLU": lambda **k: LowRankSwiGLU(
        EMBED, MLP, rank=RANK, rngs=nnx.Rngs(0), **k
    ),
    "LowRankReLU2": lambda **k: LowRankReLU2(
        EMBED, MLP, rank=RANK, sparsity="2:4", rngs=nnx.Rngs(0), **k
    ),
    "LowRankLinear": lambda **k: LowRankLinear(
        EMBED, EMBED, rank=RANK, rngs=nnx.Rngs(0), **k
    ),
}


def parameter_count(module):
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def partition_specs(module):
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module)))


def test_modules_call_their_ops():
    x = normal(0, (5, EMBED))
    m = MODULES["SwiGLU"]()
    expected = jaxkern.swiglu(x, m.w_gate[...], m.w_up[...], m.w_down[...])
    np.testing.assert_array_equal(m(x), expected)
    m = MODULES["LowRankSwiGLU"]()
    expected = jaxkern.low_rank_swiglu(x, m.gate.weight, m.up.weight, m.down.weight)
    np.testing.assert_array_equal(m(x), expected)
    m = MODULES["LowRankReLU2"]()
    expected = jaxkern.low_rank_relu2(x, m.up.weight, m.down.weight, sparsity="2:4")
    np.testing.assert_array_equal(m(x), expected)
    m = MODULES["LowRankLinear"]()
    np.testing.assert_array_equal(m(x), jaxkern.low_rank_matmul(x, m.weight))


@pytest.mark.parametrize("gradient", ["straight_through", "feature_wise"])
def test_the_gradient_of_the_sparsity_is_passed_on(gradient):
    m = LowRankReLU2(
        EMBED, MLP, rank=RANK, sparsity="2:4", gradient=gradient, rngs=nnx.Rngs(0)
    )
    x, g = normal(0, (16, EMBED)), normal(1, (16, EMBED))

    def op(up, down):
        y = jaxkern.low_rank_relu2(x, up, down, sparsity="2:4", gradient=gradient)
        return (y * g).sum()

    d_up, d_down = jax.grad(op, argnums=(0, 1))(m.up.weight, m.down.weight)
    got = nnx.grad(lambda m: (m(x) * g).sum())(m)
    assert_near((got["up"]["w_in"][...], got["up"]["w_out"][...]), d_up)
    assert_near((got["down"]["w_in"][...], got["down"]["w_out"][...]), d_down)


def test_parameter_counts_are_the_published_ones():
    # The study's model of 60M parameters: hidden 512, intermediate 1376, rank 128.
    h, m, r, rngs = 512, 1376, 128, nnx.Rngs(0)
    assert parameter_count(SwiGLU(h, m, rngs=rngs)) == 3 * h * m
    assert parameter_count(LowRankSwiGLU(h, m, rank=r, rngs=rngs)) == 3 * r * (h + m)
    relu2 = LowRankReLU2(h, 3 * m // 2, rank=r, rngs=rngs)
    assert parameter_count(relu2) == 2 * r * (h + 3 * m // 2)


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize(
    "name, dtype, param_dtype",
    [
        *((name, BF16, F32) for name in MODULES),
        *(("SwiGLU", None, dtype) for dtype in (BF16, F32)),
        ("SwiGLU", BF16, BF16),
    ],
)
def test_dtypes(name, dtype, param_dtype):
    m = MODULES[name](dtype=dtype, param_dtype=param_dtype)
    parameters = jax.tree.leaves(nnx.state(m, nnx.Param))
    assert {p.dtype for p in parameters} == {jnp.dtype(param_dtype)}
    x = normal(0, (3, EMBED), jnp.bfloat16)
    expected = dtype or np.promote_types(x.dtype, param_dtype)
    assert m(x).dtype == expected


def test_init_keeps_the_variance_of_a_full_rank_layer():
    for build in MODULES.values():
        m = build(kernel_init=nnx.initializers.constant(0.5))
        for p in jax.tree.leaves(nnx.state(m, nnx.Param)):
            np.testing.assert_array_equal(p, 0.5)
    x = normal(0, (2000, 256))
    y = LowRankLinear(256, 256, rank=64, rngs=nnx.Rngs(1))(x)
    assert 0.8 < float(y.std()) < 1.2


def test_every_kernel_has_a_partition_spec():
    specs = {name: partition_specs(build()) for name, build in MODULES.items()}
    for of_module in specs.values():
        names = {name for spec in jax.tree.leaves(of_module) for name in spec}
        assert names <= {"embed", "mlp", "rank"} and len(names) >= 2
    assert specs["SwiGLU"]["w_gate"] == P("embed", "mlp")
    assert specs["SwiGLU"]["w_down"] == P("mlp", "embed")
    assert specs["LowRankSwiGLU"]["down"]["w_in"] == P("mlp", "rank")
    assert specs["LowRankSwiGLU"]["down"]["w_out"] == P("rank", "embed")


@pytest.mark.parametrize("name", ["SwiGLU", "LowRankReLU2", "LowRankLinear"])
def test_sharded_by_its_own_metadata_equals_one_device(name):
    module, x = MODULES[name](), normal(0, (8, EMBED))
    expected = module(x)
    both = mesh(data=2, model=4)
    graph, state = nnx.split(module)
    rules = [("embed", None), ("mlp", "model"), ("rank", None)]
    with nnx.logical_axis_rules(rules):
        shardings = nnx.get_named_sharding(state, both)
    state = jax.device_put(state, shardings)
    x = jax.device_put(x, jax.sharding.NamedSharding(both, P("data")))
    y = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    assert_near(y, expected)
    if name != "LowRankLinear":
        sizes = {
            p.addressable_shards[0].data.size / p.size for p in jax.tree.leaves(state)
        }
        assert 1 / 4 in sizes


def test_layers_stack():
    rngs = nnx.Rngs(0).split(3)
    metadata = {nnx.PARTITION_NAME: "layers"}

    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata=metadata)
    def build(rngs):
        return SwiGLU(EMBED, MLP, rngs=rngs)

    layers = build(rngs)
    assert layers.w_gate.shape == (3, EMBED, MLP)
    assert partition_specs(layers)["w_gate"] == P("layers", "embed", "mlp")

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return x + layer(x)

    x = normal(0, (5, EMBED))
    expected = x
    for i in range(3):
        kernels = (layers.w_gate[i], layers.w_up[i], layers.w_down[i])
        expected = expected + jaxkern.swiglu(expected, *kernels)
    assert_near(forward(x, layers), expected)


def test_from_full_rank_is_the_best_approximation():
    full = SwiGLU(EMBED, MLP, rngs=nnx.Rngs(0))
    low, errors = LowRankSwiGLU.from_full_rank(full, RANK)
    for name, layer in [("gate", low.gate), ("up", low.up), ("down", low.down)]:
        kernel = np.asarray(getattr(full, f"w_{name}")[...], np.float64)
        values = np.linalg.svd(kernel, compute_uv=False)
        best = np.linalg.norm(values[RANK:]) / np.linalg.norm(values)
        np.testing.assert_allclose(errors[name], best, rtol=1e-4)
        product = np.asarray(layer.w_in[...]) @ np.asarray(layer.w_out[...])
        made = np.linalg.norm(product - kernel) / np.linalg.norm(kernel)
        np.testing.assert_allclose(made, best, rtol=1e-4)


def linear(use_bias=False):
    return nnx.Linear(EMBED, MLP, use_bias=use_bias, rngs=nnx.Rngs(0))


def test_a_linear_layer_becomes_a_low_rank_one():
    full = linear()
    low, error = LowRankLinear.from_full_rank(full, EMBED - 8)
    x = normal(0, (5, EMBED))
    assert 0 < error < 0.5 and relative_error(low(x), full(x)) < 1.0
    exact, error = LowRankLinear.from_full_rank(full, EMBED)
    assert error < 1e-5
    with pytest.warns(UserWarning, match="no larger"):
        assert_near(exact(x), full(x))


def test_the_reported_error_is_that_of_the_rounded_factors():
    layer = LowRankLinear(
        EMBED, MLP, rank=1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    kernel = normal(0, (EMBED, 1)) @ normal(1, (1, MLP))
    error = layer.approximate(kernel)
    product = np.asarray(layer.w_in[...], np.float64) @ np.asarray(
        layer.w_out[...], np.float64
    )
    actual = np.linalg.norm(product - kernel) / np.linalg.norm(kernel)
    assert error == pytest.approx(actual, rel=1e-3) and error > 1e-4


@pytest.mark.usefixtures("unchecked_types")
def test_sizes_may_be_numpy_integers_and_are_kept():
    low = untyped.nn.LowRankSwiGLU(np.int64(EMBED), MLP, rank=RANK, rngs=nnx.Rngs(0))
    assert (low.embed_dim, low.hidden_dim, low.rank) == (EMBED, MLP, RANK)


def test_from_full_rank_is_exact_where_the_weights_have_that_rank():
    full = SwiGLU(EMBED, MLP, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    for name in ("w_gate", "w_up", "w_down"):
        param = getattr(full, name)
        d_in, d_out = param.shape
        param[...] = normal(1, (d_in, RANK)) @ normal(2, (RANK, d_out)) / d_in
    low, errors = LowRankSwiGLU.from_full_rank(full, RANK)
    assert max(errors.values()) < 1e-6
    x = normal(0, (5, EMBED))
    assert_near(low(x), full(x))


@pytest.mark.parametrize("scale", [1e-22, 1e20])
def test_reported_errors_are_free_of_scale(scale):
    """Squares of such weights underflow or overflow in float32."""
    kernel = normal(0, (EMBED, MLP), scale=EMBED**-0.5)
    layer = LowRankLinear(EMBED, MLP, rank=2, rngs=nnx.Rngs(0))
    expected = layer.approximate(kernel)
    assert layer.approximate(scale * kernel) == pytest.approx(expected, rel=1e-4)
    module = LowRankReLU2(EMBED, MLP, rank=RANK, rngs=nnx.Rngs(0))
    _, expected = module.prune_2_4()
    module.up.w_in[...] *= scale
    assert module.prune_2_4()[1] == pytest.approx(expected, rel=1e-4)


class Doubled(SwiGLU):
    def __call__(self, x):
        return 2 * super().__call__(x)


class DoubledReLU2(LowRankReLU2):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, wanted",
    [
        (
            lambda rngs: LowRankLinear.from_full_rank(
                nnx.LoRALinear(8, 8, lora_rank=2, use_bias=False, rngs=rngs), 2
            ),
            "an nnx.Linear, got LoRALinear",
        ),
        (
            lambda rngs: LowRankSwiGLU.from_full_rank(Doubled(8, 8, rngs=rngs), 2),
            "a SwiGLU, got Doubled",
        ),
        (
            lambda rngs: DoubledReLU2(8, 8, rank=2, rngs=rngs).prune_2_4(),
            "a LowRankReLU2, got DoubledReLU2",
        ),
    ],
    ids=["LoRA", "SwiGLU", "prune_2_4"],
)
def test_subclasses_with_another_call_are_refused(call, wanted):
    with pytest.raises(TypeError, match=f"must be {wanted}, whose call is another"):
        call(nnx.Rngs(0))


def test_a_sharded_kernel_is_factored_on_explicit_axes():
    kernel = normal(0, (8, 16))
    placed = jax.device_put(
        kernel, jax.NamedSharding(mesh("explicit", d=2, t=2), P("d", "t"))
    )
    layer = LowRankLinear(8, 16, rank=2, rngs=nnx.Rngs(0))
    expected = layer.approximate(kernel)
    assert layer.approximate(placed) == pytest.approx(expected, rel=1e-4)
    assert jax.typeof(layer.w_in[...]).sharding.spec == P("d", None)
    assert jax.typeof(layer.w_out[...]).sharding.spec == P(None, "t")


def test_from_full_rank_keeps_dtypes():
    full = SwiGLU(
        EMBED, MLP, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    low, _ = LowRankSwiGLU.from_full_rank(full, RANK)
    assert low.gate.w_in.dtype == jnp.bfloat16
    assert low(jnp.ones((2, EMBED))).dtype == jnp.bfloat16


def test_linen_users():
    module: Any = nnx.bridge.to_linen(LowRankSwiGLU, EMBED, MLP, rank=RANK)
    x = normal(0, (5, EMBED))
    variables = module.init(jax.random.key(0), x)
    parameters = linen.meta.unbox(variables)["params"]
    shapes = jax.tree.map(jnp.shape, parameters["gate"])
    assert shapes == {"w_in": (EMBED, RANK), "w_out": (RANK, MLP)}
    pairs = [(parameters[k]["w_in"], parameters[k]["w_out"]) for k in PAIRS]
    expected = jaxkern.low_rank_swiglu(x, *pairs)
    np.testing.assert_array_equal(module.apply(variables, x), expected)
    grads = jax.grad(lambda v: jnp.sum(module.apply(v, x)))(variables)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


X = jnp.ones((2, EMBED))


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: untyped.nn.LowRankLinear(8, 8, rank=0, rngs=nnx.Rngs(0)),
            ValueError,
            "LowRankLinear: rank must be an integer of at least 1, got 0",
        ),
        (
            lambda: untyped.nn.SwiGLU(8, -1, rngs=nnx.Rngs(0)),
            ValueError,
            "SwiGLU: hidden_dim must be an integer of at least 1, got -1",
        ),
        (
            lambda: untyped.nn.SwiGLU(8.0, 4, rngs=nnx.Rngs(0)),
            ValueError,
            "SwiGLU: embed_dim must be an integer of at least 1, got 8.0",
        ),
        (
            lambda: untyped.nn.LowRankSwiGLU.from_full_rank(
                MODULES["SwiGLU"](), EMBED + 1
            ),
            ValueError,
            "LowRankSwiGLU.from_full_rank: rank must be at most 24, the smaller side "
            "of module.w_gate, got 25",
        ),
        (
            lambda: untyped.nn.LowRankLinear.from_full_rank(linear(), 25),
            ValueError,
            "LowRankLinear.from_full_rank: rank must be at most 24, the smaller side "
            "of module.kernel, got 25",
        ),
        (
            lambda: MODULES["LowRankLinear"]().approximate(jnp.ones((3, 4))),
            ValueError,
            r"kernel must have shape \(24, 24\), got \(3, 4\)",
        ),
        (
            lambda: MODULES["SwiGLU"]()(jnp.ones((2, EMBED + 1))),
            ValueError,
            r"SwiGLU: x must have shape \(..., 24\), got \(2, 25\)",
        ),
        (
            lambda: untyped.nn.LowRankSwiGLU(8, 8, rank=0, rngs=nnx.Rngs(0)),
            ValueError,
            "LowRankSwiGLU: rank must be an integer of at least 1, got 0",
        ),
        (
            lambda: untyped.nn.LowRankReLU2(8, True, rank=2, rngs=nnx.Rngs(0)),
            ValueError,
            "LowRankReLU2: hidden_dim must be an integer of at least 1, got True",
        ),
        (
            lambda: untyped.nn.SwiGLU(8, 8, implementation="cuda", rngs=nnx.Rngs(0)),
            ValueError,
            "SwiGLU: implementation must be one of None, 'xla', 'mosaic_gpu', got",
        ),
        (
            lambda: untyped.nn.LowRankSwiGLU.from_full_rank(linear(), 2),
            TypeError,
            "LowRankSwiGLU.from_full_rank: module must be a SwiGLU, got Linear",
        ),
        (
            lambda: untyped.nn.LowRankLinear.from_full_rank(MODULES["SwiGLU"](), 2),
            TypeError,
            "LowRankLinear.from_full_rank: module must be an nnx.Linear, got SwiGLU",
        ),
        (
            lambda: untyped.nn.LowRankLinear.from_full_rank(linear(use_bias=True), 2),
            ValueError,
            "module must have no bias, got one",
        ),
        (
            lambda: MODULES["LowRankLinear"]().approximate(jnp.full((24, 24), jnp.nan)),
            ValueError,
            "kernel must be finite, got NaN or infinity",
        ),
        (
            lambda: MODULES["SwiGLU"](implementation="mosaic_gpu")(
                jnp.ones((2, EMBED))
            ),
            NotImplementedError,
            "swiglu: dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
        ),
        (
            lambda: untyped.nn.LowRankReLU2(
                8, 8, rank=2, gradient="exact", rngs=nnx.Rngs(0)
            ),
            ValueError,
            "LowRankReLU2: gradient must be None for sparsity=None, which drops "
            "nothing, got 'exact'",
        ),
        (
            lambda: untyped.nn.FlashMLP(
                3, 8, hidden_dim=8, activation="swish", rngs=nnx.Rngs(0)
            ),
            ValueError,
            "FlashMLP: activation must be one of 'silu', .* got 'swish'",
        ),
        (
            lambda: untyped.nn.LowRankReLU2(
                8, 8, rank=2, sparsity="1:4", rngs=nnx.Rngs(0)
            ),
            ValueError,
            "LowRankReLU2: sparsity must be one of None, '2:4'",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_flash_mlp_module():
    module = FlashMLP(3, EMBED, hidden_dim=MLP, activation="gelu", rngs=nnx.Rngs(0))
    x = normal(0, (3, 5, EMBED))
    w1, w2 = module.w1[...], module.w2[...]
    np.testing.assert_array_equal(
        module(x), jaxkern.flash_mlp(x, w1, w2, activation="gelu")
    )
    assert partition_specs(module)["w2"] == P("heads", "mlp", "embed")
    # Each head is drawn for its own fan-in.
    assert float(w1.std()) == pytest.approx(EMBED**-0.5, rel=0.05)
    assert float(w2.std()) == pytest.approx(MLP**-0.5, rel=0.05)
    with pytest.raises(ValueError, match=r"FlashMLP: x must have shape \(..., 24\)"):
        module(x[..., 1:])
