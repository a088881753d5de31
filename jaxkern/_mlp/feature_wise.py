"""2:4 along the tokens of each feature, for gradients of weights that sum over tokens.

Sparse tensor cores want zeros along the axis that a matmul sums over. For a layer's
result that is its features, for the gradient of its weight the tokens: so a matrix that
is 2:4 for the one must be made so again for the other.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._core.activations import ACTIVATIONS
from .._core.precision import matmul, relu2, widen
from .._core.sharding import on_automatic_axes, vary_alike
from .._sparsity.select import GROUP, sparsify_2_4

# Few features are active for most tokens, and would lose most.
DENSE_PERCENT = 5


def densest(x: Float[Array, "*batch features"]) -> Bool[Array, " features"]:
    """The 5 % of the features, rounded up, with the fewest zeros; first come first."""
    *tokens, features = range(x.ndim)
    count = jnp.count_nonzero(x, axis=tuple(tokens))
    dense = -(-x.shape[features] * DENSE_PERCENT // 100)
    _, chosen = lax.top_k(count, dense)
    return jnp.zeros(count.shape, bool).at[chosen].set(True)


def sparsify_along_tokens(
    x: Float[Array, "*batch features"], dense: Bool[Array, " features"]
) -> Float[Array, "*batch features"]:
    """Of each feature that is not `dense`, the two largest of each four tokens.

    Token i of n is in a group with those n/4, n/2 and 3n/4 further on, since neighbours
    in a text are alike. Of a whole batch these are at the same place of other texts.
    """
    tokens = x.reshape(-1, x.shape[-1])
    count = len(tokens)
    whole = jnp.pad(tokens, ((0, -count % GROUP), (0, 0)))
    groups = whole.reshape(GROUP, len(whole) // GROUP, x.shape[-1])
    kept = jnp.moveaxis(sparsify_2_4(jnp.moveaxis(groups, 0, -1)), -1, 0)
    kept = kept.reshape(whole.shape)[:count]
    return jnp.where(dense, tokens, kept).reshape(x.shape)


def relu2_between(
    x: Float[Array, "*batch rank_up"],
    w_up: Float[Array, "rank_up hidden"],
    w_down: Float[Array, "hidden rank_down"],
) -> Float[Array, "*batch rank_down"]:
    r"""$y = \mathcal{S}(a) W_{down}$ with $a = \max(z, 0)^2$ and $z = x W_{up}$.

    $\mathcal{S}$ is `sparsify_2_4`. With $\mathcal{F}$, `sparsify_along_tokens` but for
    the `densest` features of $a$, the backward is

    $$da = dy\,W_{down}^T,\quad dz = 2\,da \odot \max(z, 0),\quad dx = dz\,W_{up}^T$$
    $$dW_{down} = \mathcal{F}(a)^T dy,\quad dW_{up} = x^T \mathcal{F}(dz)$$
    """
    return _relu2_between(*vary_alike(x, w_up, w_down))


@jax.custom_vjp
def _relu2_between(x: jax.Array, w_up: jax.Array, w_down: jax.Array) -> jax.Array:
    return _forward(x, w_up, w_down)[0]


def _forward(x, w_up, w_down):
    z = matmul(x, w_up)
    y = matmul(sparsify_2_4(relu2(z)), w_down)
    return y, (x, w_up, w_down, z)


# A group's tokens may lie anywhere on a mesh.
@on_automatic_axes(lambda x: x)
def _sparsify_but_densest_of(hidden: jax.Array, x: jax.Array) -> jax.Array:
    return sparsify_along_tokens(x, densest(hidden))


# As one program, so that what is not asked of a pull-back is not computed.
@jax.jit
def _backward(saved, d_y):
    x, w_up, w_down, z = saved
    hidden, slope = relu2(z), ACTIVATIONS["relu2"].derivative(widen(z))
    sparse = _sparsify_but_densest_of(hidden, hidden)
    # The transposes of matmul itself: they know where everything lies on a mesh.
    d_hidden, d_w_down = jax.vjp(matmul, sparse, w_down)[1](d_y)
    d_z = (widen(d_hidden) * slope).astype(z.dtype)
    pull = jax.vjp(matmul, x, w_up)[1]
    d_w_up = pull(_sparsify_but_densest_of(hidden, d_z))[1]
    return pull(d_z)[0], d_w_up, d_w_down


_relu2_between.defvjp(_forward, _backward)
