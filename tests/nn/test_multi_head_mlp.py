from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import assert_near, normal, untyped

from jaxkern.nn import FlashMLP, MultiHeadMLP


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_multi_head_mlp(gated):
    module = MultiHeadMLP(24, 10, num_heads=4, gated=gated, rngs=nnx.Rngs(0))
    heads: Any = FlashMLP(4, 6, hidden_dim=10, gated=gated, rngs=nnx.Rngs(1))
    nnx.update(heads, nnx.state(module.heads))
    x = normal(0, (2, 3, 24))
    by_head = jnp.einsum("btd,dhe->hbte", x, module.w_in.kernel[...])
    by_head = heads(by_head.reshape(4, 6, 6)).reshape(4, 2, 3, 6)
    expected = jnp.einsum("hbte,hed->btd", by_head, module.w_out.kernel[...])
    assert_near(nnx.jit(lambda m, x: m(x))(module, x), expected)
    assert module(x[0, 0]).shape == (24,)
    size = sum(p.size for p in jax.tree.leaves(nnx.state(module.heads)))
    assert size == (3 if gated else 2) * 24 * 10


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "hidden_dim, num_heads, message",
    [
        (40, 5, "MultiHeadMLP: num_heads must divide embed_dim=24, got 5"),
        (0, 4, "hidden_dim must be an integer of at least 1, got 0"),
    ],
)
def test_refusals(hidden_dim, num_heads, message):
    with pytest.raises(ValueError, match=message):
        untyped.nn.MultiHeadMLP(24, hidden_dim, num_heads=num_heads, rngs=nnx.Rngs(0))
