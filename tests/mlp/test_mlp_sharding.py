import jax
import jax.numpy as jnp
import pytest
from helpers import OPS, assert_near, mesh, normal, op_args, pair
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import low_rank_matmul, swiglu

SWIGLU, GATED, TOP2, SOFT = (
    "swiglu",
    "low_rank_swiglu",
    "low_rank_relu2 2:4",
    "low_rank_relu2 2:4-soft",
)
STATIC = "low_rank_relu2 2:4-static"

# "tensor" splits the hidden features: columns of the factors that widen, and rows of
# those that narrow.
WIDEN, NARROW = P(None, "tensor"), P("tensor", None)
SPECS = {
    "kernels": (WIDEN, WIDEN, NARROW),
    "gate": (P(), WIDEN),
    "up": (P(), WIDEN),
    "down": (NARROW, P()),
}


def value_and_grads(op):
    def loss(x, weights):
        y = op(x, weights)
        return (y**2).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("name", [GATED, SOFT])
def test_shard_map_over_batch_and_tensor_equals_one_device(name):
    op, both = OPS[name], mesh(data=2, tensor=4)
    x, weights = op_args()

    def local(x, weights):
        return jax.lax.psum(op(x, weights), "tensor")

    sharded = jax.shard_map(
        local, mesh=both, in_specs=(P("data"), SPECS), out_specs=P("data")
    )
    if name == SOFT:
        # S-STE's scale needs whole tokens, so the tokens are split, not their features.
        tokens = P(("data", "tensor"))
        sharded = jax.shard_map(op, mesh=both, in_specs=(tokens, P()), out_specs=tokens)
    got = value_and_grads(sharded)(x, weights)
    assert_near(got, value_and_grads(op)(x, weights))


@pytest.mark.parametrize("name", [TOP2, SOFT])
def test_groups_across_shards_equal_one_device(name):
    """Automatic sharding keeps the meaning where a shard holds 6 features of 24."""
    op, both = OPS[name], mesh(data=2, tensor=4)
    x, weights = op_args(hidden=24, rank=4)
    expected = value_and_grads(op)(x, weights)
    weights = jax.tree.map(
        lambda w, spec: jax.device_put(w, NamedSharding(both, spec)), weights, SPECS
    )
    assert_near(value_and_grads(op)(x, weights), expected)


@pytest.mark.parametrize(
    "name, kind",
    [(SWIGLU, "explicit"), (SOFT, "auto")],
)
def test_sharded_arguments_equal_one_device(name, kind):
    op, both = OPS[name], mesh(kind, data=2, tensor=4)
    x, weights = op_args()
    expected = value_and_grads(op)(x, weights)

    def place(x, spec):
        return jax.device_put(x, NamedSharding(both, spec))

    x, weights = place(x, P("data")), jax.tree.map(place, weights, SPECS)
    got = value_and_grads(op)(x, weights)
    assert_near(got, expected)
    assert got[0][1].sharding.spec[0] == "data"
    with jax.set_mesh(both):
        assert_near(op(x, weights), expected[0][1])
    # A batch split over the whole mesh leaves no axis for the columns.
    everywhere = jax.device_put(x, NamedSharding(both, P(("data", "tensor"))))
    whole = jax.tree.map(lambda w: place(w, P()), weights)
    assert_near(value_and_grads(op)(everywhere, whole), expected)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_the_hidden_layer_stays_sharded(kind):
    both = mesh(kind, data=2, tensor=4)
    x, weights = op_args()

    def place(x, spec):
        return jax.device_put(x, NamedSharding(both, spec))

    x, up = place(x, P("data")), jax.tree.map(place, weights["up"], SPECS["up"])
    hidden = jax.jit(low_rank_matmul)(x, up)
    assert hidden.sharding.shard_shape(hidden.shape) == (16 // 2, 64 // 4)
    kernels = jax.tree.map(place, weights["kernels"], SPECS["kernels"])
    program = jax.jit(swiglu).lower(x, *kernels).compile().as_text()
    assert program is not None
    assert "all-reduce" in program and "all-gather" not in program


def test_columns_give_way_to_the_batch_where_both_want_an_axis():
    both = mesh("explicit", data=2, tensor=4)
    x = jax.device_put(normal(0, (8, 24)), NamedSharding(both, P("tensor")))
    w_in, w_out = pair(1, 24, 4, 16, jnp.float32)
    columns = jax.device_put(w_out, NamedSharding(both, P(None, ("data", "tensor"))))
    y = low_rank_matmul(x, (jax.device_put(w_in, NamedSharding(both, P())), columns))
    assert_near(y, x @ w_in @ w_out)
    assert jax.typeof(y).sharding.spec == P("tensor", None)
