"""The multi-head MLP as a layer: features to heads, an MLP for each head, and back."""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .._core.activations import ActivationName
from .._core.dispatch import Implementation
from .._core.sharding import on_automatic_axes
from ._common import (
    axis_metadata,
    check_arguments,
    check_dtypes,
    check_input,
    default_kernel_init,
)
from ._dense_mlp import FlashMLP, per_head_kernel_init


class MultiHeadMLP(nnx.Module):
    r"""A small MLP for each head, between a projection to heads and a projection back.

    $$y = \mathrm{concat}_h(\mathrm{mlp}_h(x W_{\mathrm{in}}^h)) W_{\mathrm{out}}$$

    The MLPs are a `FlashMLP`, which calls `jaxkern.flash_mlp`. All heads together have
    as many parameters, and cost as much, as one MLP with `hidden_dim` over all
    features. The call maps x (..., embed_dim) to the same shape. Logical axes for
    `nnx.get_partition_spec` are "embed", "heads" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the activated layer of each head.
        num_heads: The number of heads, a divisor of `embed_dim`.
        gated: As in `FlashMLP`.
        activation: As in `jaxkern.flash_mlp`.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of the two projections. The heads have the default
            of `FlashMLP`.
        implementation: As in `jaxkern.flash_mlp`.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer, `num_heads` does not divide
            `embed_dim`, or a name is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        mlp = nn.MultiHeadMLP(8, 16, num_heads=2, rngs=nnx.Rngs(0))
        print(mlp(jnp.ones((2, 3, 8))).shape)
        ```
        ```text
        (2, 3, 8)
        ```

    References:
        MH-MoE, section 2, without its experts: https://arxiv.org/abs/2404.15045.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        num_heads: int,
        gated: bool = False,
        activation: ActivationName = "silu",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        op = "MultiHeadMLP"
        embed_dim, hidden_dim, num_heads = check_arguments(
            op,
            implementation,
            embed_dim=embed_dim,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
        )
        if embed_dim % num_heads:
            raise ValueError(
                f"{op}: num_heads must divide embed_dim={embed_dim}, got {num_heads}"
            )
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)
        heads = num_heads, embed_dim // num_heads
        self.w_in = nnx.LinearGeneral(
            embed_dim,
            heads,
            use_bias=False,
            kernel_init=kernel_init,
            kernel_metadata=axis_metadata("embed", "heads", None),
            **dtypes,
        )
        self.heads = FlashMLP(
            *heads,
            hidden_dim=hidden_dim,
            gated=gated,
            activation=activation,
            kernel_init=per_head_kernel_init,
            implementation=implementation,
            **dtypes,
        )
        self.w_out = nnx.LinearGeneral(
            heads,
            embed_dim,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=kernel_init,
            kernel_metadata=axis_metadata("heads", None, "embed"),
            **dtypes,
        )
        self.embed_dim = embed_dim

    @on_automatic_axes(lambda x: x)
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x = check_input("MultiHeadMLP", x, self.embed_dim)
        by_token = self.w_in(x)
        *batch, heads, dim = by_token.shape
        by_head = jnp.moveaxis(by_token.reshape(-1, heads, dim), 1, 0)
        by_token = jnp.moveaxis(self.heads(by_head), 0, 1)
        return self.w_out(by_token.reshape(*batch, heads, dim))
