"""MLPs whose weights are products of two thin factors."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .._core.checks import check_integer
from .._core.dispatch import Implementation
from .._mlp.relu2 import (
    Gradient,
    Sparsity,
    check_gradient,
    check_sparsity,
    low_rank_relu2,
)
from .._mlp.swiglu import low_rank_swiglu
from .._sparsity.packed import pack_2_4, unpack_2_4
from ._common import (
    check_arguments,
    check_dtypes,
    check_input,
    check_means,
    default_kernel_init,
    relative_loss,
)
from ._dense_mlp import SwiGLU
from ._linear import LowRankLinear, check_full_rank
from ._packed_mlp import FACTORS, Packed24ReLU2


class LowRankSwiGLU(nnx.Module):
    r"""`SwiGLU` whose three weights are products of two thin factors.

    $$y = (\mathrm{silu}(x G_{in} G_{out}) \odot (x U_{in} U_{out})) D_{in} D_{out}$$

    It calls `jaxkern.low_rank_swiglu`. The call maps x (..., embed_dim) to the same
    shape. Logical axes for `nnx.get_partition_spec` are "embed", "rank" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        hidden_dim: The size of the gated layer.
        rank: The rank of all three weights, or the ranks of gate, up and down.
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
        rank: int | tuple[int, int, int],
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        op = "LowRankSwiGLU"
        embed_dim, hidden_dim = check_arguments(
            op, implementation, embed_dim=embed_dim, hidden_dim=hidden_dim
        )
        self.rank, (gate, up, down) = _check_ranks(op, rank, ("gate", "up", "down"))
        linear = partial(
            LowRankLinear,
            kernel_init=kernel_init,
            implementation=implementation,
            **check_dtypes(op, dtype, param_dtype, rngs),
        )
        widen, narrow = ("embed", "rank", "mlp"), ("mlp", "rank", "embed")
        self.gate = linear(embed_dim, hidden_dim, rank=gate, axis_names=widen)
        self.up = linear(embed_dim, hidden_dim, rank=up, axis_names=widen)
        self.down = linear(hidden_dim, embed_dim, rank=down, axis_names=narrow)
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
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
        rank: The rank of both weights, or the ranks of up and down.
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
        rank: int | tuple[int, int],
        sparsity: Sparsity | None = None,
        gradient: Gradient | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        op = "LowRankReLU2"
        embed_dim, hidden_dim = check_arguments(
            op, implementation, embed_dim=embed_dim, hidden_dim=hidden_dim
        )
        self.rank, (up, down) = _check_ranks(op, rank, ("up", "down"))
        linear = partial(
            LowRankLinear,
            kernel_init=kernel_init,
            implementation=implementation,
            **check_dtypes(op, dtype, param_dtype, rngs),
        )
        check_sparsity(op, sparsity)
        check_gradient(op, sparsity, gradient)
        upward, downward = ("embed", "rank", "mlp"), ("mlp", "rank", "embed")
        self.up = linear(embed_dim, hidden_dim, rank=up, axis_names=upward)
        self.down = linear(hidden_dim, embed_dim, rank=down, axis_names=downward)
        self.sparsity: Sparsity | None = sparsity
        self.gradient: Gradient | None = gradient
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
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


def _check_ranks(
    op: str, rank: Any, names: tuple[str, ...]
) -> tuple[Any, tuple[int, ...]]:
    """Return the rank or ranks as Python integers, and the rank of each weight."""
    if not isinstance(rank, tuple | list):
        rank = check_integer(op, "rank", rank)
        return rank, (rank,) * len(names)
    if len(rank) != len(names):
        raise ValueError(
            f"{op}: rank must be an integer or those of {', '.join(names)}, got {rank}"
        )
    named = zip(names, rank, strict=True)
    ranks = tuple(check_integer(op, f"rank of {name}", one) for name, one in named)
    return ranks, ranks
