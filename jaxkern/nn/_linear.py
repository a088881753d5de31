"""The low-rank linear layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from .._core.checks import check_floating, check_shape
from .._core.dispatch import Implementation
from .._core.precision import matmul, widen
from .._core.sharding import on_automatic_axes
from .._mlp.mlp import low_rank_matmul
from ._common import (
    check_arguments,
    check_dtypes,
    check_input,
    check_means,
    default_kernel_init,
    make_kernel,
    relative_loss,
)


class LowRankLinear(nnx.Module):
    """`jaxkern.low_rank_matmul` with its two factors.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        rank: size between the two factors.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each factor.
        axis_names: logical axes for `nnx.get_partition_spec`: input, rank, output.
        implementation: as in `jaxkern.low_rank_matmul`.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer, or `implementation` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        axis_names: tuple[str | None, str | None, str | None] = (
            "embed",
            "rank",
            "mlp",
        ),
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        in_features, out_features, rank = check_arguments(
            "LowRankLinear",
            implementation,
            in_features=in_features,
            out_features=out_features,
            rank=rank,
        )
        check_dtypes("LowRankLinear", dtype, param_dtype, rngs)
        shape, names = (in_features, rank), axis_names[:2]
        self.w_in = make_kernel(kernel_init, rngs, shape, param_dtype, names)
        shape, names = (rank, out_features), axis_names[1:]
        self.w_out = make_kernel(kernel_init, rngs, shape, param_dtype, names)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: Implementation | None = implementation

    @property
    def weight(self) -> tuple[jax.Array, jax.Array]:
        """The factors as the ops take them."""
        return self.w_in[...], self.w_out[...]

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        x = check_input("LowRankLinear", x, self.in_features)
        x, w_in, w_out = promote_dtype((x, *self.weight), dtype=self.dtype)
        return low_rank_matmul(x, (w_in, w_out), implementation=self.implementation)

    @classmethod
    def from_full_rank(
        cls, module: nnx.Linear, rank: int
    ) -> tuple["LowRankLinear", float]:
        """The closest layer of this rank to a linear one without a bias.

        Returns:
            The layer, and the relative error of its weight: see `approximate`.

        Raises:
            TypeError: `module` is no `nnx.Linear`, or a subclass with another call, as
                `nnx.LoRALinear` is: add its product to the kernel before.
            ValueError: it has a bias, or the rank is out of range.
        """
        op = "LowRankLinear.from_full_rank"
        check_means(op, module, nnx.Linear, "an nnx.Linear")
        if module.bias is not None:
            raise ValueError(f"{op}: module must have no bias, got one")
        low_rank = cls(
            module.in_features,
            module.out_features,
            rank=rank,
            dtype=module.dtype,
            param_dtype=module.param_dtype,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )
        return low_rank, low_rank.approximate(module.kernel[...])

    def approximate(self, kernel: Float[Array, "d_in d_out"]) -> float:
        r"""Set the factors to the best ones for `kernel`, by SVD; not under `jit`.

        With $W = U S V^T$ cut to the rank, $W_{in} = U \sqrt S$ and
        $W_{out} = \sqrt S V^T$, rounded to the dtype of the parameters.

        Returns:
            The relative error $\|W - W_{in} W_{out}\|_F / \|W\|_F$. But for the
            rounding it is the least there is at this rank.

        Raises:
            TypeError: the kernel is no floating-point array.
            ValueError: its shape is not the layer's, it is not finite, or the rank is
                above its smaller side.

        References:
            Eckart and Young (1936), https://doi.org/10.1007/BF02288367.
        """
        op, expected = (
            "LowRankLinear.approximate",
            (self.in_features, self.out_features),
        )
        (kernel,) = check_floating(op, kernel=kernel)
        check_shape(op, "kernel", kernel, expected)
        if self.rank > min(expected):
            raise ValueError(
                f"{op}: rank must be at most min(in_features, out_features) = "
                f"{min(expected)}, got {self.rank}"
            )
        kernel = widen(kernel)
        if not jnp.isfinite(kernel).all():
            raise ValueError(f"{op}: kernel must be finite, got NaN or infinity in it")
        w_in, w_out = (w.astype(self.param_dtype) for w in _factors(kernel, self.rank))
        self.w_in.set_value(w_in)
        self.w_out.set_value(w_out)
        with jax.default_matmul_precision("highest"):
            return relative_loss(kernel, matmul(widen(w_in), widen(w_out)))


@on_automatic_axes(lambda kernel: (P(kernel[0], None), P(None, kernel[1])))
def _factors(
    kernel: Float[Array, "d_in d_out"], rank: int
) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
    """Of the largest singular values, each to the root."""
    left, values, right = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(values[:rank])
    return left[:, :rank] * root[None], root[:, None] * right[:rank]
