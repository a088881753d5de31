"""Modules with packed weights."""

import math
from collections.abc import Mapping
from dataclasses import replace

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float

from .._core.checks import check_dtype, check_shape
from .._core.dispatch import Implementation, check_implementation
from .._mlp.relu2 import low_rank_relu2
from .._sparsity.matmul import matmul_2_4
from .._sparsity.packed import Packed24, check_packed_24
from ._common import check_input

# The names of the factors, in the order in which they are multiplied.
FACTORS = "up_in", "up_out", "down_in", "down_out"


class PackedWeight(nnx.Variable[jax.Array]):
    """A part of a packed weight, which does not learn.

    It is not an `nnx.Param`, so optimizers and gradients with the default filter of
    flax leave it out. Its value is the `values` or `indices` of a `jaxkern.Packed24`.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        weight = nn.PackedWeight(jnp.ones(4))
        assert not isinstance(weight, nnx.Param)
        ```
    """


class Packed24Linear(nnx.Module):
    r"""A linear layer without a bias whose weight is 2:4-sparse and packed.

    $$y = x\, \mathrm{unpack}(P)^T$$

    It calls `jaxkern.matmul_2_4`. The call maps x (..., in_features) to (...,
    out_features). The kept values are an `nnx.Param` and learn; which are kept is a
    `PackedWeight` and stays. `jaxkern.compress` puts it into language models.

    Args:
        weight: `jaxkern.pack_2_4` of the transposed weight, whose shape is
            (out_features, in_features). The values keep their dtype.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            values.
        implementation: As in `jaxkern.matmul_2_4`.

    Raises:
        TypeError: `weight` is not a `Packed24`, or `dtype` is not a floating-point
            dtype.
        ValueError: The values are not a matrix, or `implementation` is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern
        from jaxkern import nn

        w = jnp.array([[3.0], [1.0], [2.0], [4.0]])
        layer = nn.Packed24Linear(jaxkern.pack_2_4(w.T))
        print(layer(jnp.eye(4)).T)
        ```
        ```text
        [[3. 0. 0. 4.]]
        ```

    References:
        Accelerating Sparse Deep Neural Networks: https://arxiv.org/abs/2104.08378.
    """

    def __init__(
        self,
        weight: Packed24,
        *,
        dtype: Dtype | None = None,
        implementation: Implementation | None = None,
    ):
        op = "Packed24Linear"
        check_implementation(op, implementation)
        if dtype is not None:
            check_dtype(op, "dtype", dtype)
        weight = check_packed_24(op, weight, "weight")
        check_shape(op, "values", weight.values, ("out_features", "kept"))
        self.values = nnx.Param(weight.values)
        self.indices = PackedWeight(weight.indices)
        self.in_features = weight.features
        self.out_features = weight.values.shape[0]
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    @property
    def weight(self) -> Packed24:
        """The packed transpose of the weight, as `jaxkern.matmul_2_4` takes it."""
        return Packed24(self.values[...], self.indices[...], self.in_features)

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        x = check_input("Packed24Linear", x, self.in_features)
        x, values = promote_dtype((x, self.values[...]), dtype=self.dtype)
        weight = replace(self.weight, values=values)
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        y = matmul_2_4(weight, rows.mT, implementation=self.implementation).mT
        return y.reshape(*x.shape[:-1], self.out_features)


class Packed24ReLU2(nnx.Module):
    r"""`LowRankReLU2` with 2:4-sparse weights, for inference.

    $$y = \max(x U_{in} U_{out}, 0)^2 D_{in} D_{out}$$

    `LowRankReLU2.prune_2_4` makes it, and it calls `jaxkern.low_rank_relu2`. The call
    maps x (..., embed_dim) to the same shape. Its weights are `PackedWeight`, not
    `nnx.Param`.

    Args:
        factors: "up_in", "up_out", "down_in" and "down_out", each `jaxkern.pack_2_4` of
            the factor's transpose. They keep their dtype.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            factors.
        implementation: As in `jaxkern.low_rank_relu2`.

    Raises:
        TypeError: `dtype` is not a floating-point dtype.
        ValueError: A factor is missing or unknown, or `implementation` is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        trained = nn.LowRankReLU2(8, 16, rank=4, rngs=nnx.Rngs(0))
        pruned, errors = trained.prune_2_4()
        print(pruned(jnp.ones((2, 3, 8))).shape, list(errors))
        ```
        ```text
        (2, 3, 8) ['up_in', 'up_out', 'down_in', 'down_out']
        ```

    References:
        Accelerating Sparse Deep Neural Networks: https://arxiv.org/abs/2104.08378.
    """

    def __init__(
        self,
        factors: Mapping[str, Packed24],
        *,
        dtype: Dtype | None = None,
        implementation: Implementation | None = None,
    ):
        check_implementation("Packed24ReLU2", implementation)
        if dtype is not None:
            check_dtype("Packed24ReLU2", "dtype", dtype)
        if set(factors) != set(FACTORS):
            raise ValueError(
                f"Packed24ReLU2: factors must be {', '.join(FACTORS)}, "
                f"got {', '.join(factors)}"
            )
        self.values = nnx.Dict(
            {name: PackedWeight(factors[name].values) for name in FACTORS}
        )
        self.indices = nnx.Dict(
            {name: PackedWeight(factors[name].indices) for name in FACTORS}
        )
        self.features = tuple(factors[name].features for name in FACTORS)
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    @property
    def factors(self) -> tuple[Packed24, ...]:
        """The packed factors "up_in", "up_out", "down_in" and "down_out"."""
        return tuple(
            Packed24(self.values[name][...], self.indices[name][...], features)
            for name, features in zip(FACTORS, self.features, strict=True)
        )

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x = check_input("Packed24ReLU2", x, self.features[0])
        factors = self.factors
        arrays = x, *(factor.values for factor in factors)
        x, *values = promote_dtype(arrays, dtype=self.dtype)
        pairs = zip(factors, values, strict=True)
        up_in, up_out, down_in, down_out = (replace(f, values=v) for f, v in pairs)
        return low_rank_relu2(
            x,
            (up_in, up_out),
            (down_in, down_out),
            implementation=self.implementation,
        )
