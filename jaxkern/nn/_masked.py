"""Layers whose weights stay fixed while each sample learns a mask over them."""

from functools import reduce
from operator import mul

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import check_floating, check_integer
from .._core.dispatch import Implementation
from .._core.sharding import on_automatic_axes
from .._masked.bernoulli import straight_through
from .._masked.estimators import Estimator
from .._masked.forms import Method
from .._masked.masked import masked_matmul
from ._common import (
    bind,
    check_arguments,
    check_dtypes,
    default_kernel_init,
    make_kernel,
)


class MaskLogits(nnx.Variable[jax.Array]):
    r"""The logits of a mask: a weight is off where its logit is at most 0.

    $$m = 1[\ell > 0]$$

    It is not an `nnx.Param`, so filters tell masks from weights. The default filter of
    flax, `nnx.Param`, selects only the weights; `MaskLogits` selects only the masks.

    Examples:
        A step of an optimizer that trains only the masks:

        ```python
        import jax.numpy as jnp
        import optax
        from flax import nnx
        from jaxkern import nn

        model = nn.MaskedLinear(8, 16, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nn.MaskLogits)
        masks = nnx.DiffState(0, nn.MaskLogits)
        gradients = nnx.grad(lambda m: m(jnp.ones((2, 8))).sum(), argnums=masks)(model)
        before = model.kernel[...]
        optimizer.update(model, gradients)
        assert (model.kernel[...] == before).all()
        assert (model.mask_logits[...] != 1).any()
        ```
    """


def mask_sparsity(module: nnx.Module) -> dict[str, Float[Array, "*masks"]]:
    r"""Return the fraction of weights that are off, for each mask and in total.

    $$\mathrm{sparsity} = \frac{|\{i : \ell_i \le 0\}|}{|\{i\}|}$$

    This holds whatever the estimator is. The total counts all masked weights of a
    sample, shared masks included. If numbers of masks differ, it is given for the
    samples that have a mask of each kind.

    Args:
        module: A module with `MaskLogits` at any depth.

    Returns:
        The fractions by the path of their logits, and "total". Each has the shape
        (num_masks,), or () where all samples share a mask. A module without masks has
        an empty dictionary.

    Examples:
        ```python
        from flax import nnx
        from jaxkern import nn

        layer = nn.MaskedLinear(8, 16, rngs=nnx.Rngs(0))
        layer.mask_logits[...] = layer.mask_logits[...].at[:2].set(-1.0)
        print(nn.mask_sparsity(layer)["mask_logits"])
        ```
        ```text
        0.25
        ```
    """
    logits = {
        ".".join(map(str, path)): variable[...]
        for path, variable in nnx.to_flat_state(nnx.state(module, MaskLogits))
    }
    if not logits:
        return {}
    return _fractions(logits)


@on_automatic_axes(lambda: P())
def _fractions(logits: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the fraction of logits that are at most 0, for each and in total."""
    # Means of one axis at a time: a count in float32 would end at 2^24.
    fractions = {name: (x <= 0).mean(-1).mean(-1) for name, x in logits.items()}
    least = min((len(x) for x in fractions.values() if x.ndim), default=None)
    parts = [x[:least] if x.ndim else x for x in fractions.values()]
    sizes = [float(x.shape[-2] * x.shape[-1]) for x in logits.values()]
    parts = jnp.stack(jnp.broadcast_arrays(*parts))
    total = jnp.average(parts, 0, weights=jnp.array(sizes, parts.dtype))
    return fractions | {"total": total}


def make_logits(kernel: nnx.Param, num_masks: int | None, initial: float) -> MaskLogits:
    """Make logits like the kernel, with its logical axes behind the axis of samples."""
    names = kernel.get_metadata("out_sharding")
    shape = kernel.shape
    if num_masks is not None:
        shape, names = (num_masks, *shape), ("batch", *names)
    return MaskLogits(
        jnp.full(shape, initial, kernel.dtype), out_sharding=names, eager_sharding=False
    )


def check_samples(
    module: str, x: jax.Array, features: int, num_masks: int | None
) -> jax.Array:
    """Check the shape of `x`, and that there is a mask for each sample."""
    (x,) = check_floating(module, x=x)
    if x.ndim < 2 or x.shape[-1] != features:
        raise ValueError(
            f"{module}: x must have shape (batch, ..., {features}), got {x.shape}"
        )
    if num_masks is not None and len(x) > num_masks:
        raise ValueError(
            f"{module}: x must have at most {num_masks} samples, as there are masks, "
            f"got {len(x)}"
        )
    return x


def first_logits(logits: MaskLogits, num_masks: int | None, samples: int) -> jax.Array:
    """Return the logits of the first samples, or the logits that all share."""
    return logits[...] if num_masks is None else logits[:samples]


def flatten(x: jax.Array) -> jax.Array:
    """Flatten to (batch, seq, features)."""
    return x.reshape(len(x), reduce(mul, x.shape[1:-1], 1), x.shape[-1])


class MaskedLinear(nnx.Module):
    r"""A linear layer whose weight each sample masks in its own way.

    $$y_b = x_b (W \odot m_b) + c, \qquad m_b = \mathrm{estimator}(\ell_b)$$

    It calls `jaxkern.masked_matmul`. The bias $c$ is not masked. The call maps x
    (batch, ..., in_features) to (batch, ..., out_features); a batch with fewer samples
    than masks uses the first masks. Weights are named as in `nnx.Linear`, so a trained
    layer becomes masked by `nnx.update(masked, nnx.state(linear, nnx.Param))`. The
    logits are the `MaskLogits` `mask_logits`, (num_masks, in_features, out_features).

    Logical axes for `nnx.get_partition_spec` are `axis_names`, and "batch" for the
    masks.

    Args:
        in_features: The size of the last axis of the input.
        out_features: The size of the last axis of the output.
        num_masks: The number of samples that have a mask of their own; None for one
            mask that all samples of a batch share.
        estimator: As in `jaxkern.masked_matmul`.
        method: As in `jaxkern.masked_matmul`.
        initial_logit: The first logit of every weight.
        use_bias: Add a bias.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters and the logits.
        kernel_init: The initializer of the kernel.
        axis_names: The logical axes of the kernel.
        implementation: As in `jaxkern.masked_matmul`.
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

        layer = nn.MaskedLinear(8, 16, num_masks=2, use_bias=False, rngs=nnx.Rngs(0))
        layer.mask_logits[...] = layer.mask_logits[...].at[1].set(-1.0)
        y = layer(jnp.ones((2, 8)))
        assert (y[0] != 0).all() and (y[1] == 0).all()
        ```

    References:
        The estimators of masks: https://arxiv.org/abs/1308.3432.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_masks: int | None = None,
        estimator: Estimator = straight_through,
        method: Method | None = None,
        initial_logit: float = 1.0,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        axis_names: tuple[str | None, str | None] = ("embed", "mlp"),
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        num_masks = check_num_masks("MaskedLinear", num_masks)
        in_features, out_features = shape = check_arguments(
            "MaskedLinear",
            implementation,
            in_features=in_features,
            out_features=out_features,
        )
        check_dtypes("MaskedLinear", dtype, param_dtype, rngs)
        self.kernel = make_kernel(kernel_init, rngs, shape, param_dtype, axis_names)
        zeros = nnx.initializers.zeros_init()
        self.bias: nnx.Param | None = (
            make_kernel(zeros, rngs, shape[1:], param_dtype, axis_names[1:])
            if use_bias
            else None
        )
        self.mask_logits = make_logits(self.kernel, num_masks, initial_logit)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.num_masks = num_masks
        self.estimator: Estimator = bind(estimator)
        self.method: Method | None = method
        self.implementation: Implementation | None = implementation

    @on_automatic_axes(lambda x: P(*x[:-1], None))
    def __call__(
        self,
        x: Float[Array, "batch *seq d_in"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch *seq d_out"]:
        """Apply the masked layer.

        Args:
            x: The samples.
            key: A random key for estimators that draw.

        Returns:
            The features of each sample.

        Raises:
            TypeError: `x` is not a floating-point array.
            ValueError: Its shape does not fit, or it has more samples than masks.
        """
        x = check_samples("MaskedLinear", x, self.in_features, self.num_masks)
        x, kernel = promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = masked_matmul(
            flatten(x),
            kernel,
            first_logits(self.mask_logits, self.num_masks, len(x)),
            estimator=self.estimator,
            method=self.method,
            key=key,
            implementation=self.implementation,
        ).reshape(*x.shape[:-1], self.out_features)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), range(y.ndim - 1))

    def sparsity(self) -> dict[str, Float[Array, "*masks"]]:
        """Return the `mask_sparsity` of this module."""
        return mask_sparsity(self)


def check_num_masks(module: str, num_masks: int | None) -> int | None:
    """Return the number of masks as a Python integer, or None."""
    return None if num_masks is None else check_integer(module, "num_masks", num_masks)
