"""MLPs with full-rank weights, (in, out), and one that has an MLP for each head."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .._core.activations import ActivationName, get_activation
from .._core.checks import check_flag
from .._core.dispatch import Implementation
from .._core.gradients import recompute
from .._core.precision import add, matmul, widen
from .._mlp.flash_mlp import flash_mlp
from .._mlp.swiglu import swiglu
from ._common import (
    check_arguments,
    check_dtypes,
    check_input,
    default_kernel_init,
    make_kernel,
)

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


class MLP(nnx.Module):
    r"""An MLP with any activation, gated or not, with or without biases.

    $$y = \mathrm{act}(x W_{up})\, W_{down}, \qquad \text{or gated:} \quad
    y = (\mathrm{act}(x W_{gate}) \odot (x W_{up}))\, W_{down}$$

    where each product has its bias if `use_bias` is True. It runs in XLA; `SwiGLU` is
    the gated one with "silu" and no biases, and has a kernel. The call maps x
    (..., embed_dim) to the same shape. Logical axes for `nnx.get_partition_spec` are
    "embed" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the activated layer.
        gated: Multiply the activated layer by a second product with the input, as all
            models since LLaMA do. False for GPT-2, GPT-NeoX, StarCoder 2 and Phi-2.
        activation: As in `jaxkern.flash_mlp`: "gelu" is the tanh form, which Gemma has
            in its gate and GPT-2 without one.
        use_bias: Add a bias to each product, as GPT-2 and StarCoder 2 do.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each kernel. Biases start at 0.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, a flag is neither True nor
            False, or `rngs` is not an `nnx.Rngs`.
        ValueError: A size is not a positive integer, or `activation` is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        mlp = nn.MLP(8, 16, gated=True, activation="gelu", rngs=nnx.Rngs(0))
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
        gated: bool = False,
        activation: ActivationName = "silu",
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        op = "MLP"
        embed_dim, hidden_dim = check_arguments(
            op, None, embed_dim=embed_dim, hidden_dim=hidden_dim
        )
        check_dtypes(op, dtype, param_dtype, rngs)
        check_flag(op, gated=gated, use_bias=use_bias)
        get_activation(op, activation)

        def kernel(d_in, d_out, *names):
            return make_kernel(kernel_init, rngs, (d_in, d_out), param_dtype, names)

        def bias(size, name):
            zeros = nnx.initializers.zeros_init()
            return make_kernel(zeros, rngs, (size,), param_dtype, (name,))

        widening = embed_dim, hidden_dim, "embed", "mlp"
        self.w_gate = kernel(*widening) if gated else None
        self.w_up = kernel(*widening)
        self.w_down = kernel(hidden_dim, embed_dim, "mlp", "embed")
        self.b_gate = bias(hidden_dim, "mlp") if gated and use_bias else None
        self.b_up = bias(hidden_dim, "mlp") if use_bias else None
        self.b_down = bias(embed_dim, "embed") if use_bias else None
        self.embed_dim = embed_dim
        self.activation: ActivationName = activation
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x = check_input("MLP", x, self.embed_dim)
        up = self._product(x, self.w_up, self.b_up)
        gates = ()
        if self.w_gate is not None:
            gates = (self._product(x, self.w_gate, self.b_gate),)
        hidden = activate(self.activation, up, *gates)
        return self._product(hidden, self.w_down, self.b_down)

    def _product(self, x, kernel, bias):
        given = (x, kernel[...], *([] if bias is None else [bias[...]]))
        x, w, *bias = promote_dtype(given, dtype=self.dtype)
        y = matmul(x, w)
        return add(y, bias[0]) if bias else y


@partial(recompute, static_argnums=0)
def activate(activation, up, gate=None):
    """Return the activated layer, computed in float32 and rounded once."""
    act = get_activation("MLP", activation).value
    wide = act(widen(up)) if gate is None else act(widen(gate)) * widen(up)
    return wide.astype(up.dtype)
