"""The bilinear MLP, and the one whose weights each sample masks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.dispatch import Implementation, check_implementation
from .._core.sharding import on_automatic_axes
from .._masked.bernoulli import straight_through
from .._masked.estimators import Estimator
from .._masked.forms import Method
from .._masked.masked import masked_bilinear
from ._common import (
    axis_metadata,
    bind,
    check_arguments,
    check_dtypes,
    check_means,
    default_kernel_init,
)
from ._masked import (
    MaskLogits,
    check_num_masks,
    check_samples,
    first_logits,
    flatten,
    make_logits,
    mask_sparsity,
)


def _arrays(name: str, linear: nnx.Linear) -> tuple[jax.Array, jax.Array]:
    """Return the kernel and the bias of a linear layer."""
    check_means("MaskedBilinear", linear, nnx.Linear, "an nnx.Linear", name)
    assert linear.bias is not None
    return linear.kernel[...], linear.bias[...]


class Bilinear(nnx.Module):
    r"""The bilinear MLP: a product of two linear layers in place of an activation.

    $$y = ((x W_1 + b_1) \odot (x W_2 + b_2)) W_3 + b_3$$

    The call maps x (..., embed_dim) to the same shape. Logical axes for
    `nnx.get_partition_spec` are "embed" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the product.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each kernel.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        mlp = nn.Bilinear(8, 16, rngs=nnx.Rngs(0))
        print(mlp(jnp.ones((2, 3, 8))).shape)
        ```
        ```text
        (2, 3, 8)
        ```

    References:
        Bilinear MLPs, section 2: https://arxiv.org/abs/2410.08417.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        op = type(self).__name__
        embed_dim, hidden_dim = check_arguments(
            op, None, embed_dim=embed_dim, hidden_dim=hidden_dim
        )
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)

        def linear(d_in: int, d_out: int, *names: str) -> nnx.Linear:
            return nnx.Linear(
                d_in,
                d_out,
                kernel_init=kernel_init,
                kernel_metadata=axis_metadata(*names),
                bias_metadata=axis_metadata(names[1]),
                **dtypes,
            )

        self.left = linear(embed_dim, hidden_dim, "embed", "mlp")
        self.right = linear(embed_dim, hidden_dim, "embed", "mlp")
        self.down = linear(hidden_dim, embed_dim, "mlp", "embed")
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.dtype = dtype

    @on_automatic_axes(lambda x: x)
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        return self.down(self.left(x) * self.right(x))


class MaskedBilinear(Bilinear):
    r"""The bilinear MLP whose three weights each sample masks in its own way.

    $$y_b = ((x_b (W_1 \odot m_{1b}) + b_1) \odot (x_b (W_2 \odot m_{2b}) + b_2))
      (W_3 \odot m_{3b}) + b_3$$

    It calls `jaxkern.masked_bilinear`. The biases are not masked. The call maps x
    (batch, ..., embed_dim) to the same shape; a batch with fewer samples than masks
    uses the first masks. Weights are named as in `Bilinear`, so a trained MLP becomes
    masked by `nnx.update(masked, nnx.state(bilinear, nnx.Param))`. The logits are the
    `MaskLogits` `left_logits`, `right_logits` and `down_logits`.

    Logical axes for `nnx.get_partition_spec` are "embed", "mlp", and "batch" for masks.

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the product.
        num_masks: The number of samples that have masks of their own; None for masks
            that all samples of a batch share.
        estimator: As in `jaxkern.masked_bilinear`.
        method: As in `jaxkern.masked_bilinear`.
        initial_logit: The first logit of every weight.
        implementation: As in `jaxkern.masked_bilinear`.
        options: `dtype`, `param_dtype`, `kernel_init` and `rngs`, as in `Bilinear`.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer, or `implementation` is unknown.

    Examples:
        With all logits above 0, as they start, nothing is masked:

        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        mlp = nn.Bilinear(8, 16, rngs=nnx.Rngs(0))
        masked = nn.MaskedBilinear(8, 16, num_masks=2, rngs=nnx.Rngs(1))
        nnx.update(masked, nnx.state(mlp, nnx.Param))
        x = jnp.ones((2, 3, 8))
        assert jnp.allclose(masked(x), mlp(x), atol=1e-5)
        ```

    References:
        Bilinear MLPs, section 2: https://arxiv.org/abs/2410.08417.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        num_masks: int | None = None,
        estimator: Estimator = straight_through,
        method: Method | None = None,
        initial_logit: float = 1.0,
        implementation: Implementation | None = None,
        **options: Any,
    ):
        num_masks = check_num_masks("MaskedBilinear", num_masks)
        check_implementation("MaskedBilinear", implementation)
        super().__init__(embed_dim, hidden_dim, **options)
        masks = num_masks, initial_logit
        self.left_logits = make_logits(self.left.kernel, *masks)
        self.right_logits = make_logits(self.right.kernel, *masks)
        self.down_logits = make_logits(self.down.kernel, *masks)
        self.num_masks = num_masks
        self.estimator: Estimator = bind(estimator)
        self.method: Method | None = method
        self.implementation: Implementation | None = implementation

    @on_automatic_axes(lambda x: x)
    def __call__(
        self,
        x: Float[Array, "batch *seq embed"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch *seq embed"]:
        """Apply the masked MLP.

        Args:
            x: The samples.
            key: A random key for estimators that draw.

        Returns:
            The features of each sample.

        Raises:
            TypeError: `x` is not a floating-point array, or a layer was replaced by one
                with another call, such as an `nnx.LoRALinear`.
            ValueError: The shape of `x` does not fit, or it has more samples than
                masks.
        """
        x = check_samples("MaskedBilinear", x, self.embed_dim, self.num_masks)
        layers = {"left": self.left, "right": self.right, "down": self.down}
        parameters = [array for layer in layers.items() for array in _arrays(*layer)]
        x, *p = promote_dtype((x, *parameters), dtype=self.dtype)

        def first(logits: MaskLogits) -> jax.Array:
            return first_logits(logits, self.num_masks, len(x))

        y = masked_bilinear(
            flatten(x),
            (p[0], p[2], p[4]),
            (
                first(self.left_logits),
                first(self.right_logits),
                first(self.down_logits),
            ),
            biases=(p[1], p[3], p[5]),
            estimator=self.estimator,
            method=self.method,
            key=key,
            implementation=self.implementation,
        )
        return y.reshape(x.shape)

    def sparsity(self) -> dict[str, Float[Array, "*masks"]]:
        """Return the `mask_sparsity` of this module."""
        return mask_sparsity(self)
