"""The gated MLP with full-rank weights."""

import math
from functools import partial

import jax
from jaxtyping import Array, Float

from .._core.activations import ACTIVATIONS
from .._core.checks import check_batched, check_floating, check_shape
from .._core.dispatch import Implementation, check_implementation, run
from .._core.precision import matmul, widen
from . import thresholds

# The backward computes the activations again from the matmuls' results: that is cheap,
# and keeping their float32 intermediates costs up to 16 bytes an element.
recompute = partial(jax.checkpoint, prevent_cse=False)


@recompute
def silu_gate(
    gate: Float[Array, "*batch hidden"], up: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    silu = ACTIVATIONS["silu"].value(widen(gate))
    return (silu * widen(up)).astype(gate.dtype)


def given(x: jax.Array) -> str:
    """Return what a refused shape says about the input that it must fit."""
    return f" for x of shape {x.shape}"


def rows_of(x: jax.Array) -> jax.Array:
    """Return `x` with all batch axes in one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


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
        unsupported=partial(_unsupported, x),
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


def _unsupported(x: jax.Array) -> str | None:
    # Mosaic is imported on first use of a kernel.
    from .hopper import fused

    return fused.unsupported(x)
