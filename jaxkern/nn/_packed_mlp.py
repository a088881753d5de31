"""MLPs with packed weights, for inference."""

from collections.abc import Mapping
from dataclasses import replace

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float

from .._core.checks import check_dtype
from .._core.dispatch import Implementation, check_implementation
from .._mlp.mlp import low_rank_relu2
from .._sparsity.packed import Packed24
from ._common import check_input

FACTORS = "up_in", "up_out", "down_in", "down_out"


class PackedWeight(nnx.Variable[jax.Array]):
    """A part of a packed weight; no `nnx.Param`, since it does not learn."""


class Packed24ReLU2(nnx.Module):
    r"""`LowRankReLU2` of 2:4-sparse weights, as `LowRankReLU2.prune_2_4` makes it.

    $$y = \max(x U_{in} U_{out}, 0)^2 D_{in} D_{out}$$

    on (..., embed), for inference: no weight of it is an `nnx.Param`.

    ```python
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxkern import nn
    >>> trained = nn.LowRankReLU2(16, 32, rank=8, rngs=nnx.Rngs(0))
    >>> pruned, lost = trained.prune_2_4()
    >>> print(pruned(jnp.ones((3, 16))).shape, sorted(lost))
    (3, 16) ['down_in', 'down_out', 'up_in', 'up_out']

    ```

    Args:
        factors: "up_in", "up_out", "down_in" and "down_out", each `pack_2_4` of the
            factor's transpose. They are kept in the dtype that they come in.
        dtype: of the computation; None promotes from input and factors.
        implementation: as in `jaxkern.low_rank_relu2`.

    Raises:
        TypeError: `dtype` is none of ours.
        ValueError: a factor is missing, or `implementation` is unknown.
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
