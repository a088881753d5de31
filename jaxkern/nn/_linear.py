"""The low-rank linear layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from .._core.checks import check_floating, check_integer, check_shape
from .._core.dispatch import Implementation
from .._core.precision import matmul, widen
from .._core.sharding import on_automatic_axes
from .._mlp.low_rank import low_rank_matmul
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
    """A linear layer without a bias whose weight is the product of two thin factors.

    $$y = (x W_{in}) W_{out}$$

    It owns $W_{in}$ (in_features, rank) and $W_{out}$ (rank, out_features) and calls
    `jaxkern.low_rank_matmul`. The call maps x (..., in_features) to (...,
    out_features).

    Args:
        in_features: The size of the last axis of the input.
        out_features: The size of the last axis of the output.
        rank: The size between the two factors.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each factor.
        axis_names: The logical axes of input, rank and output, for
            `nnx.get_partition_spec`.
        implementation: As in `jaxkern.low_rank_matmul`.
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

        layer = nn.LowRankLinear(8, 16, rank=4, rngs=nnx.Rngs(0))
        print(layer(jnp.ones((2, 3, 8))).shape)
        ```
        ```text
        (2, 3, 16)
        ```

    References:
        LoRA, section 4.1, without the frozen weight: https://arxiv.org/abs/2106.09685.
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
        """The two factors, as `jaxkern.low_rank_matmul` takes them."""
        return self.w_in[...], self.w_out[...]

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        x = check_input("LowRankLinear", x, self.in_features)
        x, w_in, w_out = promote_dtype((x, *self.weight), dtype=self.dtype)
        return low_rank_matmul(x, (w_in, w_out), implementation=self.implementation)

    @classmethod
    def from_full_rank(
        cls, module: nnx.Linear, rank: int
    ) -> tuple["LowRankLinear", float]:
        """Return the closest layer of this rank to a linear layer without a bias.

        Args:
            module: The linear layer.
            rank: The rank of the new layer.

        Returns:
            The layer, and the relative error of its weight, see `approximate`.

        Raises:
            TypeError: `module` is not an `nnx.Linear`, or a subclass with another call
                such as `nnx.LoRALinear`; add its product to the kernel before.
            ValueError: `module` has a bias, its kernel is not finite, or the rank is
                out of range.

        Examples:
            ```python
            from flax import nnx
            from jaxkern import nn

            linear = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
            layer, error = nn.LowRankLinear.from_full_rank(linear, rank=8)
            assert error < 1e-5  # nothing is lost at the full rank
            ```
        """
        op = "LowRankLinear.from_full_rank"
        check_means(op, module, nnx.Linear, "an nnx.Linear")
        if module.bias is not None:
            raise ValueError(f"{op}: module must have no bias, got one")
        check_full_rank(op, rank, **{"module.kernel": module.kernel[...]})
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
        r"""Set the factors to the best approximation of a kernel, by SVD.

        $$W = U S V^T, \qquad W_{in} = U_r \sqrt{S_r}, \qquad
        W_{out} = \sqrt{S_r}\, V_r^T$$

        The index $r$ keeps the largest singular values up to the rank. The factors are
        rounded to the dtype of the parameters. Do not call this under `jit`.

        Args:
            kernel: The full-rank weight $W$.

        Returns:
            The relative error $\|W - W_{in} W_{out}\|_F / \|W\|_F$. Except for the
            rounding it is the smallest possible at this rank.

        Raises:
            TypeError: The kernel is not a floating-point array.
            ValueError: Its shape is not the layer's, it is not finite, or the rank is
                above its smaller side.

        References:
            Eckart and Young (1936), https://doi.org/10.1007/BF02288367.
        """
        op = "LowRankLinear.approximate"
        (kernel,) = check_floating(op, kernel=kernel)
        check_shape(op, "kernel", kernel, (self.in_features, self.out_features))
        check_full_rank(op, self.rank, kernel=kernel)
        kernel = widen(kernel)
        factors = _closest(kernel, self.rank)
        w_in, w_out = (w.astype(self.param_dtype) for w in factors)
        self.w_in.set_value(w_in)
        self.w_out.set_value(w_out)
        with jax.default_matmul_precision("highest"):
            return relative_loss(kernel, matmul(widen(w_in), widen(w_out)))


def check_full_rank(op: str, rank: int, **kernels: jax.Array) -> None:
    """Check that kernels are finite, and have a smaller side of at least the rank."""
    rank = check_integer(op, "rank", rank)
    for name, kernel in kernels.items():
        if rank > min(kernel.shape):
            raise ValueError(
                f"{op}: rank must be at most {min(kernel.shape)}, the smaller side of "
                f"{name}, got {rank}"
            )
        if not jnp.isfinite(kernel).all():
            raise ValueError(f"{op}: {name} must be finite, got NaN or infinity in it")


@on_automatic_axes(lambda kernel: (P(kernel[0], None), P(None, kernel[1])))
def _closest(
    kernel: Float[Array, "d_in d_out"], rank: int
) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
    """Return the two factors for the largest singular values."""
    return project(kernel, right_singular_vectors(kernel)[1], rank)


def right_singular_vectors(
    kernel: Float[Array, "d_in d_out"], root: Float[Array, "d_in d_in"] | None = None
) -> tuple[Float[Array, " k"], Float[Array, "k d_out"]]:
    r"""Return singular values and right singular vectors of $R^T W$, largest first.

    $R$ is the `root`; None for the identity.
    """
    with jax.default_matmul_precision("highest"):
        whitened = kernel if root is None else root.mT @ kernel
    _, values, right = jnp.linalg.svd(whitened, full_matrices=False)
    return values, right


def project(
    kernel: Float[Array, "d_in d_out"], right: Float[Array, "k d_out"], rank: int
) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
    r"""Return two factors of equal norms whose product is $W V_r V_r^T$.

    With the right singular vectors of $R^T W$ it minimizes
    $\|R^T (W - W_{in} W_{out})\|_F$, for an $R$ without an inverse, too.
    """
    largest = jnp.abs(kernel).max()
    largest = jnp.where(largest > 0, largest, 1)
    right = right[:rank]
    # Without this division, squares of tiny weights would vanish in the norm.
    with jax.default_matmul_precision("highest"):
        left = (kernel / largest) @ right.mT
    root = jnp.sqrt(jnp.linalg.norm(left, axis=0))
    left = left / jnp.where(root > 0, root, 1)[None]
    unit = jnp.sqrt(largest)
    return unit * left, (unit * root)[:, None] * right
