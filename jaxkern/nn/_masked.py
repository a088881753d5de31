"""Layers whose weights stay while each sample learns a mask over them."""

from functools import reduce
from operator import mul
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import check_floating, check_integer
from .._core.dispatch import Implementation, check_implementation
from .._core.sharding import on_automatic_axes
from .._masked.estimators import Estimator, straight_through
from .._masked.masked import Method, masked_bilinear, masked_matmul
from ._common import (
    axis_metadata,
    bind,
    check_arguments,
    check_dtypes,
    check_means,
    default_kernel_init,
    make_kernel,
)


class MaskLogits(nnx.Variable[jax.Array]):
    """What a mask is made of: the weight is off where its logit is at most 0.

    No `nnx.Param`, so that a filter tells masks from weights. Only the masks learn with

        gradients = nnx.grad(loss, argnums=nnx.DiffState(0, MaskLogits))(model)
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=MaskLogits)

    and only the weights with flax's default, `nnx.Param`.
    """


def mask_sparsity(module: nnx.Module) -> dict[str, Float[Array, "*masks"]]:
    """The fraction of weights that are off, by the path of their logits, and in total.

    Off are those whose logit is at most 0, whatever the estimator. Each fraction has
    the shape (num_masks,), or () where all samples share a mask. The total is over all
    masked weights of a sample, those under shared masks included; where numbers of
    masks differ, it is of the samples that all have one for. Empty for a module without
    masks.
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
    # One axis at a time: float32 counts no further than 2^24.
    fractions = {name: (x <= 0).mean(-1).mean(-1) for name, x in logits.items()}
    least = min((len(x) for x in fractions.values() if x.ndim), default=None)
    parts = [x[:least] if x.ndim else x for x in fractions.values()]
    sizes = [float(x.shape[-2] * x.shape[-1]) for x in logits.values()]
    parts = jnp.stack(jnp.broadcast_arrays(*parts))
    total = jnp.average(parts, 0, weights=jnp.array(sizes, parts.dtype))
    return fractions | {"total": total}


def _make_logits(
    kernel: nnx.Param, num_masks: int | None, initial: float
) -> MaskLogits:
    """Like the kernel, with its logical axes behind that of the samples."""
    names = kernel.get_metadata("out_sharding")
    shape = kernel.shape
    if num_masks is not None:
        shape, names = (num_masks, *shape), ("batch", *names)
    return MaskLogits(
        jnp.full(shape, initial, kernel.dtype), out_sharding=names, eager_sharding=False
    )


def _check_samples(
    module: str, x: jax.Array, features: int, num_masks: int | None
) -> jax.Array:
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


def _first(logits: MaskLogits, num_masks: int | None, samples: int) -> jax.Array:
    return logits[...] if num_masks is None else logits[:samples]


def _flatten(x: jax.Array) -> jax.Array:
    """Flatten to (batch, seq, features)."""
    return x.reshape(len(x), reduce(mul, x.shape[1:-1], 1), x.shape[-1])


def _arrays(name: str, linear: nnx.Linear) -> tuple[jax.Array, jax.Array]:
    check_means("MaskedBilinear", linear, nnx.Linear, "an nnx.Linear", name)
    assert linear.bias is not None
    return linear.kernel[...], linear.bias[...]


class MaskedLinear(nnx.Module):
    """A linear layer under a mask for each sample: `jaxkern.masked_matmul` and a bias.

    The weights are named as in `nnx.Linear`, so a trained one becomes masked by
    `nnx.update(masked, nnx.state(linear, nnx.Param))`; the logits are the `MaskLogits`
    `mask_logits`, (num_masks, in_features, out_features). A batch of fewer samples uses
    the first masks. The bias is not masked.

    Logical axes for `nnx.get_partition_spec`: `axis_names`, and "batch" for the masks.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        num_masks: how many samples have a mask of their own; None for one mask that
            all samples of a batch share.
        estimator: as in `jaxkern.masked_matmul`.
        method: as in `jaxkern.masked_matmul`.
        initial_logit: of all weights.
        use_bias: add a bias.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters and logits.
        kernel_init: for the kernel.
        axis_names: logical axes of the kernel.
        implementation: as in `jaxkern.masked_matmul`.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer, or `implementation` is unknown.
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
        num_masks = _check_masks("MaskedLinear", num_masks)
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
        self.mask_logits = _make_logits(self.kernel, num_masks, initial_logit)
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
        """The masked product; `key` is for estimators that draw.

        Raises:
            TypeError: `x` is no floating-point array.
            ValueError: its shape does not fit, or it has more samples than masks.
        """
        x = _check_samples("MaskedLinear", x, self.in_features, self.num_masks)
        x, kernel = promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = masked_matmul(
            _flatten(x),
            kernel,
            _first(self.mask_logits, self.num_masks, len(x)),
            estimator=self.estimator,
            method=self.method,
            key=key,
            implementation=self.implementation,
        ).reshape(*x.shape[:-1], self.out_features)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), range(y.ndim - 1))

    def sparsity(self) -> dict[str, Float[Array, "*masks"]]:
        """As `mask_sparsity`."""
        return mask_sparsity(self)


def _check_masks(module: str, num_masks: int | None) -> int | None:
    return None if num_masks is None else check_integer(module, "num_masks", num_masks)


class Bilinear(nnx.Module):
    r"""The bilinear MLP $(x W_1 + b_1) \odot (x W_2 + b_2)$, times $W_3$, plus $b_3$.

    Logical axes for `nnx.get_partition_spec`: "embed" and "mlp".

    Args:
        embed_dim: size of the last axis of the input and of the output.
        hidden_dim: size between.
        dtype: of the computation; None promotes from input and parameters.
        param_dtype: of the parameters.
        kernel_init: for each kernel.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer.

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
    """`Bilinear` under masks for each sample: `jaxkern.masked_bilinear`.

    The weights are those of `Bilinear`, so a trained one becomes masked by
    `nnx.update(masked, nnx.state(bilinear, nnx.Param))`; the logits are the
    `MaskLogits` `left_logits`, `right_logits` and `down_logits`. A batch of fewer
    samples uses the first masks. The biases are not masked.

    Logical axes for `nnx.get_partition_spec`: "embed", "mlp", and "batch" for masks.

    Args:
        embed_dim: size of the last axis of the input and of the output.
        hidden_dim: size between.
        num_masks: how many samples have masks of their own; None for masks that all
            samples of a batch share.
        estimator: as in `jaxkern.masked_bilinear`.
        method: as in `jaxkern.masked_bilinear`.
        initial_logit: of all weights.
        implementation: as in `jaxkern.masked_bilinear`.
        options: `dtype`, `param_dtype`, `kernel_init` and `rngs`, as in `Bilinear`.

    Raises:
        TypeError: a dtype is none of ours, or `rngs` no `nnx.Rngs`.
        ValueError: a size is not a positive integer, or `implementation` is unknown.
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
        num_masks = _check_masks("MaskedBilinear", num_masks)
        check_implementation("MaskedBilinear", implementation)
        super().__init__(embed_dim, hidden_dim, **options)
        masks = num_masks, initial_logit
        self.left_logits = _make_logits(self.left.kernel, *masks)
        self.right_logits = _make_logits(self.right.kernel, *masks)
        self.down_logits = _make_logits(self.down.kernel, *masks)
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
        """The masked MLP; `key` is for estimators that draw.

        Raises:
            TypeError: `x` is no floating-point array, or a layer was replaced by one
                with another call, such as an `nnx.LoRALinear`.
            ValueError: its shape does not fit, or it has more samples than masks.
        """
        x = _check_samples("MaskedBilinear", x, self.embed_dim, self.num_masks)
        layers = {"left": self.left, "right": self.right, "down": self.down}
        parameters = [array for layer in layers.items() for array in _arrays(*layer)]
        x, *p = promote_dtype((x, *parameters), dtype=self.dtype)

        def first(logits: MaskLogits) -> jax.Array:
            return _first(logits, self.num_masks, len(x))

        y = masked_bilinear(
            _flatten(x),
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
        """As `mask_sparsity`."""
        return mask_sparsity(self)
