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
from ._linear import LowRankLinear, check_full_rank
from ._packed_mlp import FACTORS, Packed24ReLU2

# Without the batch axis, the number of heads would be part of the fan-in.
per_head_kernel_init = nnx.initializers.lecun_normal(batch_axis=0)


class SwiGLU(nnx.Module):
    r"""The gated MLP of LLaMA, without biases.

    $$y = (\mathrm{silu}(x W_{gate}) \odot (x W_{up})) W_{down}$$

    It calls `jaxkern.swiglu`. The call maps x (..., embed_dim) to the same shape.
    Logical axes for `nnx.get_partition_spec` are "embed" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the gated layer.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each kernel.
        implementation: As in `jaxkern.swiglu`.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer, or `implementation` is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        mlp = nn.SwiGLU(8, 16, rngs=nnx.Rngs(0))
        print(mlp(jnp.ones((2, 3, 8))).shape)
        ```
        ```text
        (2, 3, 8)
        ```

    References:
        GLU Variants Improve Transformer, eq. 6: https://arxiv.org/abs/2002.05202.
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
    r"""`SwiGLU` whose three weights are products of two thin factors.

    $$y = (\mathrm{silu}(x G_{in} G_{out}) \odot (x U_{in} U_{out})) D_{in} D_{out}$$

    It calls `jaxkern.low_rank_swiglu`. The call maps x (..., embed_dim) to the same
    shape. Logical axes for `nnx.get_partition_spec` are "embed", "rank" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the gated layer.
        rank: The rank of all three weights.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each factor.
        implementation: As in `jaxkern.low_rank_swiglu`.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer, or `implementation` is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        trained = nn.SwiGLU(8, 16, rngs=nnx.Rngs(0))
        mlp, errors = nn.LowRankSwiGLU.from_full_rank(trained, rank=4)
        print(mlp(jnp.ones((2, 3, 8))).shape, list(errors))
        ```
        ```text
        (2, 3, 8) ['gate', 'up', 'down']
        ```

    References:
        GLU Variants Improve Transformer, eq. 6: https://arxiv.org/abs/2002.05202.
        Low rank: LoRA, section 4.1, https://arxiv.org/abs/2106.09685.
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
        """Return the closest module of this rank to a full-rank one.

        Args:
            module: The full-rank module.
            rank: The rank of the new module.

        Returns:
            The module, and for "gate", "up" and "down" the relative error (Frobenius)
            of the weight, see `LowRankLinear.approximate`.

        Raises:
            TypeError: `module` is not a `SwiGLU`, or a subclass with another call.
            ValueError: The rank is below 1 or above a kernel's smaller side, or a
                kernel is not finite.
        """
        op = "LowRankSwiGLU.from_full_rank"
        check_means(op, module, SwiGLU, "a SwiGLU")
        names = {name: f"w_{name}" for name in ("gate", "up", "down")}
        kernels = {name: getattr(module, names[name])[...] for name in names}
        check_full_rank(op, rank, **{f"module.{names[x]}": kernels[x] for x in names})
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
        errors = {x: getattr(low_rank, x).approximate(kernels[x]) for x in names}
        return low_rank, errors


class LowRankReLU2(nnx.Module):
    r"""An MLP of squared ReLU whose two weights are products of two thin factors.

    $$y = s(\max(x U_{in} U_{out}, 0)^2)\, D_{in} D_{out}$$

    where $s$ keeps two of each four features if there is a `sparsity`. It calls
    `jaxkern.low_rank_relu2`. The call maps x (..., embed_dim) to the same shape.
    Logical axes for `nnx.get_partition_spec` are "embed", "rank" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the activated layer. It is usually 1.5 times that of a
            SwiGLU, since there is no gate.
        rank: The rank of both weights.
        sparsity: The sparsity of the activations, as in `jaxkern.low_rank_relu2`.
        gradient: The gradient of the sparsity, as in `jaxkern.low_rank_relu2`.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each factor.
        implementation: As in `jaxkern.low_rank_relu2`.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer, `sparsity`, `gradient` or
            `implementation` is unknown, or `gradient` does not go with `sparsity`.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        mlp = nn.LowRankReLU2(8, 16, rank=4, sparsity="2:4", rngs=nnx.Rngs(0))
        print(mlp(jnp.ones((2, 3, 8))).shape)
        ```
        ```text
        (2, 3, 8)
        ```

    References:
        Squared ReLU: Primer, https://arxiv.org/abs/2109.08668.
        2:4 activations: https://arxiv.org/abs/2503.16672.
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
        r"""Return this MLP with 2:4-sparse weights, packed once, for inference.

        Of each four weights of a factor that are summed, the two of largest magnitude
        stay. They are stored in `dtype`, or in `param_dtype` if that is None. Do not
        call this under `jit`.

        Returns:
            The pruned module, and $\|W - \hat W\|_F / \|W\|_F$ of each factor $W$, 0
                where $W = 0$.

        Raises:
            TypeError: This is a subclass with another call.
            ValueError: The activations are 2:4-sparse too, which no tensor core
                supports.
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
    r"""One small MLP for each head.

    $$y_h = \mathrm{act}(x_h W_{1h})\, W_{2h}, \qquad \text{or gated:} \quad
    y_h = (\mathrm{act}(x_h W_{gh}) \odot (x_h W_{1h}))\, W_{2h}$$

    It calls `jaxkern.flash_mlp`. The call maps x (num_heads, batch, head_dim) to the
    same shape. Logical axes for `nnx.get_partition_spec` are "heads", "embed" and
    "mlp".

    Args:
        num_heads: The number of MLPs.
        head_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the activated layer.
        gated: Add the kernel `w_gate`. With "silu", each head is then a SwiGLU.
        activation: As in `jaxkern.flash_mlp`.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each kernel, head by head. The original code of
            flashMLP draws N(0, 1 / hidden) for the first and N(0, 1 / dim) for the
            second kernel: `nnx.initializers.variance_scaling(1.0, "fan_out", "normal",
            batch_axis=0)`.
        implementation: As in `jaxkern.flash_mlp`.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer, or a name is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        mlp = nn.FlashMLP(2, 4, hidden_dim=16, rngs=nnx.Rngs(0))
        print(mlp(jnp.ones((2, 3, 4))).shape)
        ```
        ```text
        (2, 3, 4)
        ```

    References:
        MH-MoE, section 2, without its experts: https://arxiv.org/abs/2404.15045.
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
