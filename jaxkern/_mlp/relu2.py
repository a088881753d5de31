"""The ReLU² MLP with low-rank weights, and the 2:4 selection of its features."""

import math
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._core.checks import check_batched, given, raise_unknown
from .._core.dispatch import Implementation, check_implementation, run
from .._core.gradients import recompute
from .._core.precision import matmul, relu2
from .._sparsity.packed import Packed24
from .._sparsity.select import GROUP, KEPT, sparsify_2_4
from . import feature_wise, thresholds
from .low_rank import (
    Pair,
    check_low_rank,
    check_pairs,
    multiply_low_rank,
    rows_of,
    unsupported,
)
from .packed_mlp import is_packed, packed_low_rank_relu2

Sparsity = Literal["2:4", "2:4-soft", "2:4-static"]
Gradient = Literal["exact", "straight_through", "feature_wise"]


@partial(recompute, static_argnums=(1, 2))
def _sparse_relu2(
    z: Float[Array, "*batch hidden"],
    sparsity: Sparsity | None,
    gradient: Literal["exact", "straight_through"] | None,
) -> Float[Array, "*batch hidden"]:
    hidden = relu2(z)
    match sparsity:
        case "2:4":
            return sparsify_2_4(hidden, method="top2", gradient=gradient)
        case "2:4-soft":
            return sparsify_2_4(hidden, method="soft", gradient=gradient)
        case _:
            return hidden


def _drop_static(up: Pair, down: Pair) -> tuple[Pair, Pair]:
    """Return the factors without the features at positions 2 and 3 of each group."""

    # Strided slices need no gather. They reorder the features, which does not matter.
    def kept(w: jax.Array, axis: int) -> jax.Array:
        parts = [
            lax.slice_in_dim(w, min(i, w.shape[axis]), None, GROUP, axis)
            for i in range(KEPT)
        ]
        return jnp.concatenate(parts, axis)

    return (up[0], kept(up[1], axis=1)), (kept(down[0], axis=0), down[1])


def check_sparsity(op: str, sparsity: object) -> None:
    valid = (None, *get_args(Sparsity))
    if sparsity not in valid:
        raise_unknown(op, "sparsity", sparsity, valid)


# For each sparsity the valid values of `gradient`, and why there are no more.
GRADIENTS = {
    None: ((None,), ", which drops nothing"),
    "2:4": ((None, *get_args(Gradient)), ""),
    "2:4-soft": ((None, "exact", "straight_through"), ""),
    "2:4-static": ((None, "exact"), ", which never computes what it drops"),
}


def check_gradient(op: str, sparsity: Sparsity | None, gradient: object) -> None:
    valid, reason = GRADIENTS[sparsity]
    if gradient not in (None, *get_args(Gradient)):
        raise_unknown(op, "gradient", gradient, (None, *get_args(Gradient)))
    if gradient not in valid:
        raise ValueError(
            f"{op}: gradient must be {' or '.join(map(repr, valid))} for "
            f"sparsity={sparsity!r}{reason}, got {gradient!r}"
        )


def low_rank_relu2(
    x: Float[Array, "*batch d_in"],
    up: tuple[Float[Array, "d_in rank_up"], Float[Array, "rank_up hidden"]]
    | tuple[Packed24, Packed24],
    down: tuple[Float[Array, "hidden rank_down"], Float[Array, "rank_down d_out"]]
    | tuple[Packed24, Packed24],
    *,
    sparsity: Sparsity | None = None,
    gradient: Gradient | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""Compute the ReLU² MLP with two low-rank weights, each a pair (w_in, w_out).

    $$y = \mathcal{S}(\max(x U_{in} U_{out}, 0)^2) D_{in} D_{out}$$

    The products of factors are never formed. Precision is as in `swiglu`; in float16
    the square overflows from 256 on.

    `sparsity` says which hidden features of each token $\mathcal{S}$ keeps:

    - None: all of them.
    - "2:4": two of each four, by `sparsify_2_4` with "top2".
    - "2:4-soft": two of each four, by `sparsify_2_4` with "soft" and a scale $\beta$
      for each token.
    - "2:4-static": features 0 and 1 of each four. The other features are never computed
      and have zero gradients. Each call copies the kept halves of `up[1]` and
      `down[0]`.

    `gradient` says how the backward passes $\mathcal{S}$. With $z = x U_{in} U_{out}$,
    $a = \max(z, 0)^2$, the mask $M$ of the features that are kept, and the gradient
    $da'$ of $\mathcal{S}(a)$:

    - "exact": the derivative, which for "2:4" is $da = M \odot da'$. It is the default
      but for "2:4-soft".
    - "straight_through", for "2:4" and "2:4-soft": $da = da'$. It is the default for
      "2:4-soft". For "2:4" its bias in $dz = 2\,da \odot \max(z, 0)$ is
      $2 (1 - M) \odot da' \odot \max(z, 0)$, which is 0 in groups with at most two
      positive entries.
    - "feature_wise", for "2:4": straight through, and the hidden features are selected
      again for the gradients of the inner factors, along the tokens that these sum
      over. This is the training recipe of arXiv 2503.16672.

    With $h = \mathcal{S}(a) D_{in}$ the inner factors' gradients of "feature_wise" are

    $$dD_{in} = \mathcal{F}(a)^T dh, \quad dU_{out} = (x U_{in})^T \mathcal{F}(dz)$$

    so that hidden features enter every matmul but $dz\,U_{out}^T$ 2:4-sparse along the
    axis that it sums over. For each feature, $\mathcal{F}$ keeps the two largest of
    each four tokens. It keeps all tokens of the 5 % of the features (rounded up) in
    which $a$ has the fewest zeros. In place of the paper's fixed permutation, the
    tokens of a group are a quarter of all tokens apart, counted over the batch axes in
    order. Dense matmuls emulate it, so it saves no time. It has no `jvp`, and under
    `shard_map` and `vmap` each part chooses among its own tokens and features.

    For inference the weights themselves can be 2:4-sparse along the axis that a matmul
    sums over. Then each of the four factors is `pack_2_4` of its transpose, which takes
    9/16 of the bytes in 16 bits, and `sparsity` and `gradient` must be None.

    If you shard the hidden features by hand, give each shard a multiple of four, since
    each begins a group anew, and give "2:4-soft" whole tokens.

    Implementations:

    - "xla" runs on every device. The matmul after a selection stays dense, and packed
      factors are unpacked in every call.
    - "mosaic_gpu" applies the activation and the selection inside the matmuls, on an
      H100 or H200, in bfloat16 and float16; for "2:4-soft" with the straight-through
      gradient only. Selected features are multiplied on sparse tensor cores. Without a
      selection, equal ranks up to 32 run the kernel of `flash_mlp`, and the hidden
      features never reach memory. Nothing is padded by copies if the number of tokens
      is a multiple of 8 and ranks and hidden sizes are multiples of 64. The limits of
      derivatives and of `vmap` are those of `swiglu`. Packed factors are multiplied on
      sparse tensor cores too; nothing is padded if tokens are a multiple of 64 and
      other sizes of 128. Their backward is XLA's and computes the forward again.
    - `None` uses the kernels if they support the inputs, from so many tokens on (where
      something is padded): 512 (2048); for "2:4-static" 512 (4096), for "2:4-soft"
      1024, for "2:4" 2048 (4096) with ranks up to 1024 and 8192 with larger ones, which
      straight-through gradients leave to XLA; 4096 with packed factors. On an H200 they
      were measured to be faster, forward and backward, for 16384 tokens: dense with
      ranks 256, 512 and 1024, the others with rank 1024; packed factors forward,
      against XLA with dense weights. Other sizes are predicted.

    Args:
        x: The tokens, with any leading axes.
        up: The factors $(U_{in}, U_{out})$, arrays or `Packed24`.
        down: The factors $(D_{in}, D_{out})$, of the same kind.
        sparsity: The selection $\mathcal{S}$, see above.
        gradient: The backward of the selection, see above; None for its default.
        implementation: See above.

    Returns:
        The outputs, in the dtype of `x`.

    Raises:
        TypeError: An argument is not a floating-point array, a weight is not a pair,
            only some factors are packed, or the dtypes differ.
        ValueError: The shapes do not fit, `sparsity`, `gradient` or `implementation` is
            unknown, `gradient` does not go with `sparsity`, or one of these is given
            with packed factors.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Warns:
        UserWarning: A rank is so large that the full-rank weight is no larger.

    Examples:
        With dense factors, and with factors that are pruned to 2:4 and packed:

        ```python
        import jax.numpy as jnp
        import jaxkern

        x = jnp.ones((3, 8))
        up = jnp.ones((8, 4)), jnp.ones((4, 12))
        down = jnp.ones((12, 4)), jnp.ones((4, 8))
        print(jaxkern.low_rank_relu2(x, up, down)[0, 0])

        up, down = (tuple(jaxkern.pack_2_4(w.T) for w in pair) for pair in (up, down))
        print(jaxkern.low_rank_relu2(x, up, down)[0, 0])
        ```
        ```text
        49152.0
        768.0
        ```

    References:
        ReLU²: Primer, https://arxiv.org/abs/2109.08668.
        2:4 activations: https://arxiv.org/abs/2503.16672.
        2:4 weights: https://arxiv.org/abs/2104.08378.
    """
    op = "low_rank_relu2"
    check_implementation(op, implementation)
    check_sparsity(op, sparsity)
    check_gradient(op, sparsity, gradient)
    if is_packed(up, down):
        for name, option in [("sparsity", sparsity), ("gradient", gradient)]:
            if option is not None:
                raise ValueError(
                    f"{op}: {name} must be None with Packed24 factors, since one "
                    f"operand of a matmul can be sparse, got {option!r}"
                )
        return packed_low_rank_relu2(op, x, up, down, implementation)
    return _dense_low_rank_relu2(op, x, up, down, sparsity, gradient, implementation)


def _dense_low_rank_relu2(
    op: str,
    x: jax.Array,
    up: Any,
    down: Any,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
    implementation: Implementation | None,
) -> jax.Array:
    """Compute `low_rank_relu2` with factors that are arrays."""
    x, up, down = check_pairs(op, x, up=up, down=down)
    check_batched(op, "x", x)
    check_low_rank(op, "up", up, x.shape[-1], "hidden", given(x))
    check_low_rank(op, "down", down, up[1].shape[1], "d_out")
    if sparsity == "2:4-static":
        up, down = _drop_static(up, down)
    *batch, d_in = x.shape
    hidden_size, ranks = up[1].shape[1], (up[1].shape[0], down[0].shape[1])
    name = sparsity or op
    if (sparsity, gradient) == ("2:4", "straight_through"):
        name = "2:4 straight_through"
    faster = thresholds.kernel_is_faster(name, math.prod(batch), ranks, hidden_size)
    options = {"sparsity": sparsity, "gradient": gradient}
    return run(
        op,
        implementation,
        x,
        up,
        down,
        xla=partial(_low_rank_relu2, **options),
        kernel=partial(_low_rank_relu2_in_kernels, **options),
        unsupported=partial(unsupported, x, ranks, sparsity, gradient),
        faster=faster,
    )


@partial(jax.jit, static_argnames=("sparsity", "gradient"))
def _low_rank_relu2(
    x: jax.Array,
    up: Pair,
    down: Pair,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
) -> jax.Array:
    if gradient == "feature_wise":
        core = feature_wise.relu2_between(matmul(x, up[0]), up[1], down[0])
        return matmul(core, down[1])
    hidden = _sparse_relu2(multiply_low_rank(x, up), sparsity, gradient)
    return multiply_low_rank(hidden, down)


def _low_rank_relu2_in_kernels(
    x: jax.Array,
    up: Pair,
    down: Pair,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
) -> jax.Array:
    core = matmul(rows_of(x), up[0])
    core = _relu2_in_kernels(core, up[1], down[0], sparsity, gradient)
    return matmul(core, down[1]).reshape(*x.shape[:-1], down[1].shape[1])


def _relu2_in_kernels(
    core: jax.Array,
    up: jax.Array,
    down: jax.Array,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
) -> jax.Array:
    """Compute the part between the first and the last factor."""
    from .hopper import flash, fused, sparse

    match sparsity:
        case "2:4":
            exact = gradient != "straight_through"
            return sparse.sparse_relu2_mlp(core, up, down, shrink=False, exact=exact)
        case "2:4-soft":
            return sparse.sparse_relu2_mlp(core, up, down, shrink=True, exact=False)
        case None | "2:4-static":
            pass
    # The factors no longer hold the features that "2:4-static" drops.
    match thresholds.dense_kernel((up.shape[0], down.shape[1])):
        case "flash_mlp":
            return flash.mlp(core[None], (up[None],), down[None], "relu2")[0]
        case "matmul":
            return fused.relu2_mlp(core, up, down)
