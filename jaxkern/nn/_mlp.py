"""MLP modules. Kernels are (in, out), and there are no biases."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .._checks import Implementation
from .._mlp import (
    Sparsity,
    check_sparsity,
    low_rank_matmul,
    low_rank_relu2,
    low_rank_swiglu,
    swiglu,
)

# Of each factor's fan-in: the product of two factors then has the variance of a
# full-rank kernel with the same initializer.
default_kernel_init = nnx.initializers.lecun_normal()


def _check_sizes(module: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{module}: {name} must be at least 1, got {size!r}")


def _kernel(
    init: Initializer,
    rngs: nnx.Rngs,
    shape: tuple[int, int],
    dtype: Dtype,
    axis_names: tuple[str | None, str | None],
) -> nnx.Param[jax.Array]:
    # The names are for the user's own mesh and rules, so building a module needs none.
    return nnx.Param(
        init(rngs.params(), shape, dtype),
        out_sharding=axis_names,
        eager_sharding=False,
    )


class SwiGLU(nnx.Module):
    """`jaxkern.swiglu` with its three kernels.

    Kernels are annotated with the logical axes "embed" and "mlp" for
    `nnx.get_partition_spec`.

    Args:
        in_features: size of the last axis of the input and of the output.
        hidden_features: size of the gated layer.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each kernel.
        implementation: as in `jaxkern.swiglu`.

    Raises:
        ValueError: a size is not a positive integer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        _check_sizes("SwiGLU", in_features=in_features, hidden_features=hidden_features)
        widen, narrow = (in_features, hidden_features), (hidden_features, in_features)
        self.w_gate = _kernel(kernel_init, rngs, widen, param_dtype, ("embed", "mlp"))
        self.w_up = _kernel(kernel_init, rngs, widen, param_dtype, ("embed", "mlp"))
        self.w_down = _kernel(kernel_init, rngs, narrow, param_dtype, ("mlp", "embed"))
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        args = (x, self.w_gate[...], self.w_up[...], self.w_down[...])
        args = promote_dtype(args, dtype=self.dtype)
        return swiglu(*args, implementation=self.implementation)


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
        ValueError: a size is not a positive integer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
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
        _check_sizes(
            "LowRankLinear",
            in_features=in_features,
            out_features=out_features,
            rank=rank,
        )
        shape, names = (in_features, rank), axis_names[:2]
        self.w_in = _kernel(kernel_init, rngs, shape, param_dtype, names)
        shape, names = (rank, out_features), axis_names[1:]
        self.w_out = _kernel(kernel_init, rngs, shape, param_dtype, names)
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
        x, w_in, w_out = promote_dtype((x, *self.weight), dtype=self.dtype)
        return low_rank_matmul(x, (w_in, w_out), implementation=self.implementation)

    def approximate(self, kernel: Float[Array, "d_in d_out"]) -> float:
        r"""Set the factors to the best ones for `kernel`, by SVD.

        With $W = U S V^T$ cut to the rank, $W_{in} = U \sqrt S$ and
        $W_{out} = \sqrt S V^T$.

        Returns:
            The relative error $\|W - W_{in} W_{out}\|_F / \|W\|_F$, the least there is
            at this rank.

        Raises:
            ValueError: the kernel's shape is not the layer's, or the rank is above its
                smaller side.

        References:
            Eckart and Young (1936), https://doi.org/10.1007/BF02288367.
        """
        expected = (self.in_features, self.out_features)
        if kernel.shape != expected:
            raise ValueError(
                f"LowRankLinear.approximate: kernel must have shape {expected}, "
                f"got {kernel.shape}"
            )
        if self.rank > min(expected):
            raise ValueError(
                "LowRankLinear.approximate: rank must be at most "
                f"min(in_features, out_features) = {min(expected)}, got {self.rank}"
            )
        left, values, right = jnp.linalg.svd(
            kernel.astype(jnp.float32), full_matrices=False
        )
        root = jnp.sqrt(values[: self.rank])
        w_in, w_out = left[:, : self.rank] * root, root[:, None] * right[: self.rank]
        self.w_in[...] = w_in.astype(self.param_dtype)
        self.w_out[...] = w_out.astype(self.param_dtype)
        lost = jnp.linalg.norm(values[self.rank :])
        return float(lost / jnp.maximum(jnp.linalg.norm(values), 1e-30))


class LowRankSwiGLU(nnx.Module):
    """`jaxkern.low_rank_swiglu` with three pairs of factors.

    Args:
        in_features: size of the last axis of the input and of the output.
        hidden_features: size of the gated layer.
        rank: of all three weights.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each factor.
        implementation: as in `jaxkern.low_rank_swiglu`.

    Raises:
        ValueError: a size is not a positive integer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        rank: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        linear = partial(
            LowRankLinear,
            rank=rank,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        widen, narrow = ("embed", "rank", "mlp"), ("mlp", "rank", "embed")
        self.gate = linear(in_features, hidden_features, axis_names=widen)
        self.up = linear(in_features, hidden_features, axis_names=widen)
        self.down = linear(hidden_features, in_features, axis_names=narrow)
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        factors = (*self.gate.weight, *self.up.weight, *self.down.weight)
        x, *f = promote_dtype((x, *factors), dtype=self.dtype)
        gate, up, down = (f[0], f[1]), (f[2], f[3]), (f[4], f[5])
        return low_rank_swiglu(x, gate, up, down, implementation=self.implementation)

    @classmethod
    def from_full_rank(
        cls, module: SwiGLU, rank: int
    ) -> tuple["LowRankSwiGLU", dict[str, float]]:
        """The closest module of this rank to a full-rank one.

        Returns:
            The module, and for "gate", "up" and "down" the relative error (Frobenius)
            of the weight: see `LowRankLinear.approximate`.

        Raises:
            ValueError: the rank is below 1 or above a kernel's smaller side.
        """
        low_rank = cls(
            module.in_features,
            module.hidden_features,
            rank,
            dtype=module.dtype,
            param_dtype=module.param_dtype,
            kernel_init=nnx.initializers.zeros_init(),
            implementation=module.implementation,
            rngs=nnx.Rngs(0),
        )
        errors = {
            "gate": low_rank.gate.approximate(module.w_gate[...]),
            "up": low_rank.up.approximate(module.w_up[...]),
            "down": low_rank.down.approximate(module.w_down[...]),
        }
        return low_rank, errors


class LowRankReLU2(nnx.Module):
    """`jaxkern.low_rank_relu2` with two pairs of factors.

    Args:
        in_features: size of the last axis of the input and of the output.
        hidden_features: size of the activated layer; 1.5 times that of a SwiGLU is
            usual, since there is no gate.
        rank: of both weights.
        sparsity: of the activations, as in `jaxkern.low_rank_relu2`.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each factor.
        implementation: as in `jaxkern.low_rank_relu2`.

    Raises:
        ValueError: a size is not a positive integer, or `sparsity` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        rank: int,
        *,
        sparsity: Sparsity | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        linear = partial(
            LowRankLinear,
            rank=rank,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        check_sparsity("LowRankReLU2", sparsity)
        widen, narrow = ("embed", "rank", "mlp"), ("mlp", "rank", "embed")
        self.up = linear(in_features, hidden_features, axis_names=widen)
        self.down = linear(hidden_features, in_features, axis_names=narrow)
        self.sparsity: Sparsity | None = sparsity
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        factors = (*self.up.weight, *self.down.weight)
        x, *f = promote_dtype((x, *factors), dtype=self.dtype)
        return low_rank_relu2(
            x,
            (f[0], f[1]),
            (f[2], f[3]),
            sparsity=self.sparsity,
            implementation=self.implementation,
        )
