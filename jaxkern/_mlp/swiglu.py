"""The gated MLP, with full-rank and with low-rank weights."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.activations import ACTIVATIONS
from .._core.checks import check_batched, check_floating, check_shape, given
from .._core.dispatch import Implementation, check_implementation, run
from .._core.gradients import recompute
from .._core.precision import matmul, widen
from . import thresholds
from .low_rank import (
    Pair,
    check_low_rank,
    check_pairs,
    multiply_low_rank,
    rows_of,
    unsupported,
)


@recompute
def silu_gate(
    gate: Float[Array, "*batch hidden"], up: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    silu = ACTIVATIONS["silu"].value(widen(gate))
    return (silu * widen(up)).astype(gate.dtype)


def swiglu(
    x: Float[Array, "*batch d_in"],
    w_gate: Float[Array, "d_in hidden"],
    w_up: Float[Array, "d_in hidden"],
    w_down: Float[Array, "hidden d_out"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""Compute LLaMA's gated MLP, without biases.

    $$y = (\mathrm{silu}(x W_{gate}) \odot (x W_{up})) W_{down}$$

    Matmuls accumulate in float32, the activation is computed in float32, and each
    result is rounded once to the dtype of `x`.

    Implementations:

    - "xla" runs on every device and supports every derivative.
    - "mosaic_gpu" applies the gate inside the matmuls, on an H100 or H200, in bfloat16
      and float16. Nothing is padded by copies if the number of tokens is a multiple of
      8 and all other sizes are multiples of 64. Silu uses the hardware's approximate
      tanh. Gradients are in reverse mode and of first order only: `jax.jvp` and `grad`
      of `grad` need "xla". Under `vmap` samples run one by one; put them in leading
      axes of `x` instead.
    - `None` uses the kernels if they support the inputs and all sizes are multiples of
      64: for `d_in` and `d_out` up to 1024 from 512 tokens on, and up to 4096 from 8192
      tokens on. On an H200, 8192 tokens of (4096, 11008, 4096) took 9906 us of the
      device, forward and backward, and XLA 10432 us at an earlier revision; the other
      sizes are predicted.

    Args:
        x: The tokens, with any leading axes.
        w_gate: The weight of the gate.
        w_up: The weight of the features that the gate multiplies.
        w_down: The weight of the output.
        implementation: See above.

    Returns:
        The outputs, in the dtype of `x`.

    Raises:
        TypeError: An argument is not a floating-point array, or the dtypes differ.
        ValueError: The shapes do not fit, or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        x, w = jnp.ones((2, 3, 4)), jnp.ones((4, 8))
        y = jaxkern.swiglu(x, 100 * w, w, w.T)
        print(y.shape, y[0, 0])
        ```
        ```text
        (2, 3, 4) [12800. 12800. 12800. 12800.]
        ```

    References:
        GLU Variants Improve Transformer, eq. 6: https://arxiv.org/abs/2002.05202.
    """
    op = "swiglu"
    check_implementation(op, implementation)
    x, w_gate, w_up, w_down = check_floating(
        op, x=x, w_gate=w_gate, w_up=w_up, w_down=w_down
    )
    check_batched(op, "x", x)
    check_shape(op, "w_gate", w_gate, (x.shape[-1], "hidden"), given(x))
    check_shape(op, "w_up", w_up, w_gate.shape)
    check_shape(op, "w_down", w_down, (w_gate.shape[1], "d_out"))
    *batch, d_in = x.shape
    hidden_size, d_out = w_down.shape
    faster = thresholds.kernel_is_faster(
        op, math.prod(batch), (d_in, d_out), hidden_size
    )
    return run(
        op,
        implementation,
        x,
        w_gate,
        w_up,
        w_down,
        xla=_swiglu,
        kernel=_swiglu_in_kernels,
        unsupported=partial(unsupported, x),
        faster=faster,
    )


# Without this `jit`, each eager call would compile the checkpointed gate again.
@jax.jit
def _swiglu(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    hidden = silu_gate(matmul(x, w_gate), matmul(x, w_up))
    return matmul(hidden, w_down)


def _swiglu_in_kernels(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    # Mosaic is imported on first use of a kernel.
    from .hopper import fused

    y = fused.gated_mlp(rows_of(x), w_gate, w_up, w_down)
    return y.reshape(*x.shape[:-1], y.shape[1])


def low_rank_swiglu(
    x: Float[Array, "*batch d_in"],
    gate: tuple[Float[Array, "d_in rank_gate"], Float[Array, "rank_gate hidden"]],
    up: tuple[Float[Array, "d_in rank_up"], Float[Array, "rank_up hidden"]],
    down: tuple[Float[Array, "hidden rank_down"], Float[Array, "rank_down d_out"]],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""Compute `swiglu` with three low-rank weights, each a pair (w_in, w_out).

    $$y = (\mathrm{silu}(x G_{in} G_{out}) \odot (x U_{in} U_{out})) D_{in} D_{out}$$

    The products of factors are never formed. Precision is as in `swiglu`.

    Implementations:

    - "xla" runs on every device and supports every derivative.
    - "mosaic_gpu" applies the gate inside the matmuls, on an H100 or H200, in bfloat16
      and float16, if gate and up have the same rank. With equal ranks up to 32 it runs
      the kernel of `flash_mlp`, and the hidden features never reach memory. Nothing but
      $G_{in}$ and $U_{in}$ is copied if the number of tokens is a multiple of 8 and
      ranks and hidden sizes are multiples of 64. The limits of derivatives and of
      `vmap` are those of `swiglu`.
    - `None` uses the kernels if they support the inputs: with ranks up to 512 from 512
      tokens on, with ranks up to 1024 from 4096 tokens on, and from 8192 tokens on
      where something is padded. On an H200 they were measured to be faster, forward and
      backward, for 16384 tokens with ranks 256, 512 and 1024; other sizes are
      predicted.

    Args:
        x: The tokens, with any leading axes.
        gate: The factors of the gate's weight.
        up: The factors of the weight of the features that the gate multiplies.
        down: The factors of the weight of the output.
        implementation: See above.

    Returns:
        The outputs, in the dtype of `x`.

    Raises:
        TypeError: An argument is not a floating-point array, a weight is not a pair, or
            the dtypes differ.
        ValueError: The shapes do not fit, or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Warns:
        UserWarning: A rank is so large that the full-rank weight is no larger.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        x = jnp.ones((2, 3, 8))
        up = jnp.ones((8, 2)), jnp.ones((2, 8))
        gate = jnp.ones((8, 2)), 100 * jnp.ones((2, 8))
        y = jaxkern.low_rank_swiglu(x, gate, up, up)
        print(y.shape, y[0, 0, 0])
        ```
        ```text
        (2, 3, 8) 409600.0
        ```

    References:
        GLU Variants Improve Transformer, eq. 6: https://arxiv.org/abs/2002.05202.
        Low rank: LoRA, section 4.1, https://arxiv.org/abs/2106.09685.
    """
    op = "low_rank_swiglu"
    check_implementation(op, implementation)
    x, gate, up, down = check_pairs(op, x, gate=gate, up=up, down=down)
    check_batched(op, "x", x)
    check_low_rank(op, "gate", gate, x.shape[-1], "hidden", given(x))
    hidden_size = gate[1].shape[1]
    check_low_rank(op, "up", up, x.shape[-1], hidden_size, given(x))
    check_low_rank(op, "down", down, hidden_size, "d_out")
    *batch, d_in = x.shape
    ranks = gate[1].shape[0], up[1].shape[0], down[0].shape[1]
    faster = thresholds.kernel_is_faster(op, math.prod(batch), ranks, hidden_size)
    return run(
        op,
        implementation,
        x,
        gate,
        up,
        down,
        xla=_low_rank_swiglu,
        kernel=_low_rank_swiglu_in_kernels,
        unsupported=partial(unsupported, x, ranks),
        faster=faster,
    )


@jax.jit
def _low_rank_swiglu(x: jax.Array, gate: Pair, up: Pair, down: Pair) -> jax.Array:
    hidden = silu_gate(multiply_low_rank(x, gate), multiply_low_rank(x, up))
    return multiply_low_rank(hidden, down)


def _low_rank_swiglu_in_kernels(
    x: jax.Array, gate: Pair, up: Pair, down: Pair
) -> jax.Array:
    # One matmul multiplies by the first factors of gate and up.
    core = matmul(rows_of(x), jnp.concatenate([gate[0], up[0]], axis=1))
    core = _gated_in_kernels(core, gate[1], up[1], down[0])
    return matmul(core, down[1]).reshape(*x.shape[:-1], down[1].shape[1])


def _gated_in_kernels(
    core: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """Compute the part between the first and the last factors.

    `core` has the two products of shape (tokens, rank) side by side.
    """
    from .hopper import flash, fused

    match thresholds.dense_kernel((gate.shape[0], down.shape[1])):
        case "flash_mlp":
            return flash.mlp(core[None], (gate[None], up[None]), down[None], "silu")[0]
        case "matmul":
            return fused.gated_mlp(core, gate, up, down)
