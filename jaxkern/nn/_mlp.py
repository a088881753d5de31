"""MLP modules. Kernels are (in, out), and there are no biases."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .._core.activations import ActivationName, get_activation
from .._core.dispatch import Implementation
from .._mlp.flash_mlp import flash_mlp
from .._mlp.mlp import (
    Gradient,
    Sparsity,
    check_gradient,
    check_sparsity,
    low_rank_relu2,
    low_rank_swiglu,
    swiglu,
)
from .._sparsity.packed import pack_2_4, unpack_2_4
from ._common import (
    check_arguments,
    check_dtypes,
    check_input,
    check_means,
    default_kernel_init,
    make_kernel,
    relative_loss,
)
from ._linear import LowRankLinear
from ._packed_mlp import FACTORS, Packed24ReLU2

# The heads are no part of the fan-in.
per_head_kernel_init = nnx.initializers.lecun_normal(batch_axis=0)


class SwiGLU(nnx.Module):
    """`jaxkern.swiglu` with its three kernels.

    Kernels are annotated with the logical axes "embed" and "mlp" for
    `nnx.get_partition_spec`.

    Args:
        embed_dim: size of the last axis of the input and of the output.
        hidden_dim: size of the gated layer.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each kernel.
        implementation: as in `jaxkern.swiglu`.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer, or `implementation` is unknown.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        embed_dim, hidden_dim = check_arguments(
            "SwiGLU",
            implementation,
            embed_dim=embed_dim,
            hidden_dim=hidden_dim,
        )
        check_dtypes("SwiGLU", dtype, param_dtype, rngs)
        widen, narrow = (embed_dim, hidden_dim), (hidden_dim, embed_dim)
        self.w_gate = make_kernel(
            kernel_init, rngs, widen, param_dtype, ("embed", "mlp")
        )
        self.w_up = make_kernel(kernel_init, rngs, widen, param_dtype, ("embed", "mlp"))
        self.w_down = make_kernel(
            kernel_init, rngs, narrow, param_dtype, ("mlp", "embed")
        )
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x = check_input("SwiGLU", x, self.embed_dim)
        args = (x, self.w_gate[...], self.w_up[...], self.w_down[...])
        args = promote_dtype(args, dtype=self.dtype)
        return swiglu(*args, implementation=self.implementation)


class LowRankSwiGLU(nnx.Module):
    """`jaxkern.low_rank_swiglu` with three pairs of factors.

    Args:
        embed_dim: size of the last axis of the input and of the output.
        hidden_dim: size of the gated layer.
        rank: of all three weights.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each factor.
        implementation: as in `jaxkern.low_rank_swiglu`.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer, or `implementation` is unknown.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        rank: int,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        embed_dim, hidden_dim, rank = check_arguments(
            "LowRankSwiGLU",
            implementation,
            embed_dim=embed_dim,
            hidden_dim=hidden_dim,
            rank=rank,
        )
        linear = partial(
            LowRankLinear,
            rank=rank,
            kernel_init=kernel_init,
            implementation=implementation,
            **check_dtypes("LowRankSwiGLU", dtype, param_dtype, rngs),
        )
        widen, narrow = ("embed", "rank", "mlp"), ("mlp", "rank", "embed")
        self.gate = linear(embed_dim, hidden_dim, axis_names=widen)
        self.up = linear(embed_dim, hidden_dim, axis_names=widen)
        self.down = linear(hidden_dim, embed_dim, axis_names=narrow)
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.rank = rank
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x = check_input("LowRankSwiGLU", x, self.embed_dim)
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
            TypeError: `module` is no `SwiGLU`, or a subclass with another call.
            ValueError: the rank is below 1 or above a kernel's smaller side.
        """
        check_means("LowRankSwiGLU.from_full_rank", module, SwiGLU, "a SwiGLU")
        low_rank = cls(
            module.embed_dim,
            module.hidden_dim,
            rank=rank,
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
        embed_dim: size of the last axis of the input and of the output.
        hidden_dim: size of the activated layer; 1.5 times that of a SwiGLU is
            usual, since there is no gate.
        rank: of both weights.
        sparsity: of the activations, as in `jaxkern.low_rank_relu2`.
        gradient: of the sparsity, as there.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each factor.
        implementation: as in `jaxkern.low_rank_relu2`.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer, `sparsity`, `gradient` or
            `implementation` is unknown, or `gradient` does not go with `sparsity`.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        rank: int,
        sparsity: Sparsity | None = None,
        gradient: Gradient | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        embed_dim, hidden_dim, rank = check_arguments(
            "LowRankReLU2",
            implementation,
            embed_dim=embed_dim,
            hidden_dim=hidden_dim,
            rank=rank,
        )
        linear = partial(
            LowRankLinear,
            rank=rank,
            kernel_init=kernel_init,
            implementation=implementation,
            **check_dtypes("LowRankReLU2", dtype, param_dtype, rngs),
        )
        check_sparsity("LowRankReLU2", sparsity)
        check_gradient("LowRankReLU2", sparsity, gradient)
        upward, downward = ("embed", "rank", "mlp"), ("mlp", "rank", "embed")
        self.up = linear(embed_dim, hidden_dim, axis_names=upward)
        self.down = linear(hidden_dim, embed_dim, axis_names=downward)
        self.sparsity: Sparsity | None = sparsity
        self.gradient: Gradient | None = gradient
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.rank = rank
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x = check_input("LowRankReLU2", x, self.embed_dim)
        factors = (*self.up.weight, *self.down.weight)
        x, *f = promote_dtype((x, *factors), dtype=self.dtype)
        return low_rank_relu2(
            x,
            (f[0], f[1]),
            (f[2], f[3]),
            sparsity=self.sparsity,
            gradient=self.gradient,
            implementation=self.implementation,
        )

    def prune_2_4(self) -> tuple[Packed24ReLU2, dict[str, float]]:
        r"""This MLP with two of each four weights, packed once, for inference.

        Of each four weights of a factor that are summed, the two of largest magnitude
        stay, in `dtype`, or `param_dtype` if that is None. Not under `jit`.

        Returns:
            The pruned module, and $\|W - \hat W\|_F / \|W\|_F$ of each factor, 0
            where that is zero.

        Raises:
            TypeError: this is a subclass with another call.
            ValueError: the activations are 2:4-sparse too, which no tensor core takes.
        """
        check_means("prune_2_4", self, LowRankReLU2, "a LowRankReLU2", "self")
        if self.sparsity is not None:
            raise ValueError(
                "prune_2_4: sparsity must be None, since one operand of a matmul can "
                f"be sparse, got {self.sparsity!r}"
            )
        factors, errors = {}, {}
        weights = zip(FACTORS, (*self.up.weight, *self.down.weight), strict=True)
        for name, w in weights:
            w = w.astype(self.dtype or w.dtype)
            factors[name] = pack_2_4(w.mT)
            errors[name] = relative_loss(w, unpack_2_4(factors[name]).mT)
        options = {"dtype": self.dtype, "implementation": self.implementation}
        return Packed24ReLU2(factors, **options), errors


class FlashMLP(nnx.Module):
    """`jaxkern.flash_mlp` with the kernels of each head.

    Kernels are annotated with the logical axes "heads", "embed" and "mlp" for
    `nnx.get_partition_spec`.

    Args:
        num_heads: how many MLPs.
        head_dim: size of the last axis of the input and of the output.
        hidden_dim: size of the activated layer.
        gated: whether there is a `w_gate`; with "silu", each head is a SwiGLU.
        activation: as in `jaxkern.flash_mlp`.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for every kernel, head by head. The original study's, N(0, 1 /
            hidden) for the first and N(0, 1 / dim) for the second, is
            `nnx.initializers.variance_scaling(1.0, "fan_out", "normal", batch_axis=0)`.
        implementation: as in `jaxkern.flash_mlp`.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer, or a name is unknown.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        hidden_dim: int,
        gated: bool = False,
        activation: ActivationName = "silu",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = per_head_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        num_heads, head_dim, hidden_dim = check_arguments(
            "FlashMLP",
            implementation,
            num_heads=num_heads,
            head_dim=head_dim,
            hidden_dim=hidden_dim,
        )
        check_dtypes("FlashMLP", dtype, param_dtype, rngs)
        get_activation("FlashMLP", activation)

        def kernel(d_in, d_out, *names):
            shape = num_heads, d_in, d_out
            return make_kernel(kernel_init, rngs, shape, param_dtype, ("heads", *names))

        self.w1 = kernel(head_dim, hidden_dim, "embed", "mlp")
        self.w2 = kernel(hidden_dim, head_dim, "mlp", "embed")
        self.w_gate = kernel(head_dim, hidden_dim, "embed", "mlp") if gated else None
        self.head_dim = head_dim
        self.activation: ActivationName = activation
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(
        self, x: Float[Array, "heads batch dim"]
    ) -> Float[Array, "heads batch dim"]:
        x = check_input("FlashMLP", x, self.head_dim)
        gates = () if self.w_gate is None else (self.w_gate[...],)
        weights = self.w1[...], self.w2[...], *gates
        x, w1, w2, *gates = promote_dtype((x, *weights), dtype=self.dtype)
        return flash_mlp(
            x,
            w1,
            w2,
            w_gate=gates[0] if gates else None,
            activation=self.activation,
            implementation=self.implementation,
        )
