"""An MLP of any linear layers, which compression leaves behind."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float

from .._core.activations import ActivationName, get_activation
from .._core.checks import check_dtype, check_floating, check_shape, raise_unknown
from .._core.precision import add
from .._sparsity.select import sparsify_2_4
from ._common import check_input, check_means
from ._dense_mlp import activate
from ._linear import LowRankLinear
from ._packed_mlp import Packed24Linear

LINEARS = nnx.Linear, LowRankLinear, Packed24Linear
Linear = nnx.Linear | LowRankLinear | Packed24Linear


class CompressedMLP(nnx.Module):
    r"""An MLP whose weights are dense, low-rank or 2:4-sparse, each for itself.

    $$y = s(\mathrm{act}(U(x)))\, D, \qquad \text{or gated:} \quad
    y = s(\mathrm{act}(G(x)) \odot U(x))\, D$$

    where each of $G$, $U$ and $D$ is a chain of linear layers, with a bias behind it if
    one is given, and $s$ keeps two of each four features if there is a `sparsity`.
    `jaxkern.compress` makes it where no other module has such weights. The call maps x
    (..., embed_dim) to the same shape.

    Args:
        up: The layers of $U$, one after another: `nnx.Linear` without a bias,
            `LowRankLinear` or `Packed24Linear`.
        down: The layers of $D$.
        gate: The layers of $G$; none for an MLP without a gate.
        biases: Some of "gate", "up" and "down", each with its bias. GPT-2 and StarCoder
            2 have them.
        activation: As in `jaxkern.flash_mlp`.
        sparsity: "2:4" keeps the two largest magnitudes of each four activations of a
            token, as is done to squared ReLU.
        dtype: The dtype in which biases are added and which the activated layer has;
            None promotes the dtypes of products and biases.

    Raises:
        TypeError: A layer is none of the three, or a bias is not a floating-point
            array.
        ValueError: A chain is empty, sizes do not fit, a layer or a name has no place,
            or `activation` or `sparsity` is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        up = nn.LowRankLinear(8, 16, rank=2, rngs=nnx.Rngs(0))
        down = nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(1))
        mlp = nn.CompressedMLP([up], [down], activation="relu2", sparsity="2:4")
        print(mlp(jnp.ones((2, 3, 8))).shape)
        ```
        ```text
        (2, 3, 8)
        ```

    References:
        2:4 activations: https://arxiv.org/abs/2503.16672.
    """

    def __init__(
        self,
        up: Sequence[Linear],
        down: Sequence[Linear],
        *,
        gate: Sequence[Linear] = (),
        biases: Mapping[str, Float[Array, " features"]] | None = None,
        activation: ActivationName = "silu",
        sparsity: Literal["2:4"] | None = None,
        dtype: Dtype | None = None,
    ):
        op = "CompressedMLP"
        get_activation(op, activation)
        if sparsity not in (None, "2:4"):
            raise_unknown(op, "sparsity", sparsity, (None, "2:4"))
        if dtype is not None:
            check_dtype(op, "dtype", dtype)
        self.embed_dim, self.hidden_dim = _check_chain(op, "up", up)
        ends = {"up": self.hidden_dim, "down": self.embed_dim}
        chains = [("down", down, (self.hidden_dim, self.embed_dim))]
        if gate:
            ends["gate"] = self.hidden_dim
            chains.append(("gate", gate, (self.embed_dim, self.hidden_dim)))
        for name, chain, expected in chains:
            if (sizes := _check_chain(op, name, chain)) != expected:
                raise ValueError(
                    f"{op}: {name} must map {expected[0]} features to {expected[1]}, "
                    f"as up has them, got {sizes[0]} and {sizes[1]}"
                )
        self.gate, self.up, self.down = map(nnx.List, (gate, up, down))
        given = dict(biases or {})
        for name, bias in given.items():
            if name not in ends:
                raise_unknown(op, "a name of biases", name, (*ends,))
            (given[name],) = check_floating(op, **{f"bias of {name}": bias})
            check_shape(op, f"bias of {name}", bias, (ends[name],))
        self.biases = nnx.Dict({name: nnx.Param(b) for name, b in given.items()})
        self.activation: ActivationName = activation
        self.sparsity: Literal["2:4"] | None = sparsity
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x = check_input("CompressedMLP", x, self.embed_dim)
        return self._product("down", self.down, self.hidden(x))

    def hidden(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch hidden"]:
        """Return the activated layer, as `down` gets it."""
        up = self._product("up", self.up, x)
        gates = [self._product("gate", self.gate, x)] if self.gate else []
        hidden = activate(self.activation, up, *gates)
        return sparsify_2_4(hidden) if self.sparsity else hidden

    def _product(self, name: str, chain: Any, x: jax.Array) -> jax.Array:
        for layer in chain:
            x = layer(x)
        if name not in self.biases:
            return x
        x, bias = promote_dtype((x, self.biases[name][...]), dtype=self.dtype)
        return add(x, bias)


def _check_chain(op: str, name: str, chain: Sequence[Linear]) -> tuple[int, int]:
    """Check the layers of a weight, and return its sizes."""
    if not chain:
        raise ValueError(f"{op}: {name} must have a layer, got none")
    for i, layer in enumerate(chain):
        place = f"{name}[{i}]"
        kind = next((kind for kind in LINEARS if isinstance(layer, kind)), nnx.Linear)
        wanted = "an nnx.Linear, a LowRankLinear or a Packed24Linear"
        check_means(op, layer, kind, wanted, place)
        if isinstance(layer, nnx.Linear) and layer.bias is not None:
            raise ValueError(f"{op}: {place} must have no bias, got one")
        if i and layer.in_features != chain[i - 1].out_features:
            raise ValueError(
                f"{op}: {place} must take the {chain[i - 1].out_features} features of "
                f"the layer before it, got {layer.in_features}"
            )
    return int(chain[0].in_features), int(chain[-1].out_features)
