"""2:4 along the tokens of each feature, for gradients of weights that sum over tokens.

Sparse tensor cores need the zeros along the axis that a matmul sums over: the features
for the output of a layer, the tokens for the gradient of its weight. So a matrix that
is 2:4 for the one must be selected again for the other.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._core.activations import ACTIVATIONS
from .._core.precision import matmul, relu2, widen
from .._core.sharding import on_automatic_axes, vary_alike
from .._sparsity.select import GROUP, sparsify_2_4

# The percentage of features that stay dense, as in arXiv 2503.16672. They are active
# for most tokens, so a selection would drop most of what they hold.
DENSE_PERCENT = 5


def densest(x: Float[Array, "*batch features"]) -> Bool[Array, " features"]:
    """Return the 5 % of the features, rounded up, that have the fewest zeros.

    Among features with equally many zeros the first ones are chosen.
    """
    *tokens, features = range(x.ndim)
    count = jnp.count_nonzero(x, axis=tuple(tokens))
    dense = -(-x.shape[features] * DENSE_PERCENT // 100)
    _, chosen = lax.top_k(count, dense)
    return jnp.zeros(count.shape, bool).at[chosen].set(True)


def sparsify_along_tokens(
    x: Float[Array, "*batch features"], dense: Bool[Array, " features"]
) -> Float[Array, "*batch features"]:
    """Keep the two largest of each four tokens, in each feature that is not `dense`.

    Token i of n is in a group with the tokens n/4, n/2 and 3n/4 after it, since
    neighbours in a text are alike. In a whole batch these are tokens at the same place
    in other texts.
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
    r"""Return $y = \mathcal{S}(a) W_{down}$ with $a = \max(z, 0)^2$ and $z = x W_{up}$.

    $\mathcal{S}$ is `sparsify_2_4`. $\mathcal{F}$ is `sparsify_along_tokens`, where the
    `densest` features of $a$ are dense. The backward is

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


# On explicit mesh axes the four tokens of a group may lie on different devices.
@on_automatic_axes(lambda x: x)
def _sparsify_but_densest_of(hidden: jax.Array, x: jax.Array) -> jax.Array:
    return sparsify_along_tokens(x, densest(hidden))


# In one program, XLA removes the gradients that no one uses. Without this `jit`, an
# eager call would compute all of them.
@jax.jit
def _backward(saved, d_y):
    x, w_up, w_down, z = saved
    hidden, slope = relu2(z), ACTIVATIONS["relu2"].derivative(widen(z))
    sparse = _sparsify_but_densest_of(hidden, hidden)
    # `jax.vjp` of `matmul` gives each gradient the sharding of its argument.
    d_hidden, d_w_down = jax.vjp(matmul, sparse, w_down)[1](d_y)
    d_z = (widen(d_hidden) * slope).astype(z.dtype)
    pull = jax.vjp(matmul, x, w_up)[1]
    d_w_up = pull(_sparsify_but_densest_of(hidden, d_z))[1]
    return pull(d_z)[0], d_w_up, d_w_down


_relu2_between.defvjp(_forward, _backward)
