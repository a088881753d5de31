"""The multi-head MLP: one small MLP for each head."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _flash_mlp_mgpu
from ._activations import Activation, get_activation
from ._checks import (
    Implementation,
    check_floating,
    check_implementation,
    check_shape,
)
from ._matmul import widen
from ._mgpu import on_hopper


def flash_mlp(
    x: Float[Array, "heads batch dim"],
    w1: Float[Array, "heads dim hidden"],
    w2: Float[Array, "heads hidden dim"],
    *,
    activation: str = "silu",
    implementation: Implementation | None = None,
) -> Float[Array, "heads batch dim"]:
    r"""An MLP without biases for each head.

    $$y_h = \mathrm{act}(x_h W_{1h}) W_{2h}$$

    Matmuls accumulate in float32, the activation is computed in float32, its result is
    rounded to the dtype of `x`, and so is `y`.

    Implementations:

    - "xla": batched matmuls; the hidden layer goes through memory. Any size and dtype.
    - "mosaic_gpu": the hidden layer stays on the chip in both passes, so only `x`, `w1`
      and `w2` are saved for the backward. On an H100 or H200, in bfloat16 and float16,
      with `dim` a multiple of 16 from 16 to 256 and `hidden` a multiple of 8. Silu and
      sigmoid use the hardware's approximate tanh. Gradients are deterministic. Under
      `vmap` the new axis joins the heads; an argument that lacks it is copied.

    None picks "xla" until the kernel has been measured: it is compiled for sm_90a and
    checked in an emulator, but has not run on a GPU yet.

    Args:
        activation: "silu", "gelu" (tanh form), "relu", "relu2", "leaky_relu" (slope
            0.01), "sigmoid" or "identity".

    Raises:
        TypeError: an argument is no floating-point array, or the dtypes differ.
        ValueError: the shapes do not fit, or a name is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.

    References:
        MH-MoE, https://arxiv.org/abs/2404.15045, whose inner feed-forward this is.
    """
    op = "flash_mlp"
    check_implementation(op, implementation)
    act = get_activation(op, activation)
    check_floating(op, x=x, w1=w1, w2=w2)
    if x.ndim != 3:
        raise ValueError(f"{op}: x must have shape (heads, batch, dim), got {x.shape}")
    heads, _, dim = x.shape
    given = f" for x of shape {x.shape}"
    hidden = w1.shape[-1] if w1.ndim == 3 else 0
    check_shape(op, "w1", w1, (heads, dim, hidden if w1.ndim == 3 else "hidden"), given)
    check_shape(op, "w2", w2, (heads, hidden, dim), given)
    if implementation == "mosaic_gpu":
        reason = _flash_mlp_mgpu.unsupported(x, w1, w2, on_hopper=on_hopper())
        if reason:
            raise NotImplementedError(f"{op}: {reason}")
        return _flash_mlp_mgpu.mlp(x, w1, w2, activation)
    return _reference(x, w1, w2, act)


def _reference(
    x: jax.Array, w1: jax.Array, w2: jax.Array, act: Activation
) -> jax.Array:
    # The backward computes the activation again, from its input in the dtype of x.
    activate = jax.checkpoint(
        lambda z: act.value(widen(z)).astype(z.dtype), prevent_cse=False
    )
    return jnp.matmul(activate(jnp.matmul(x, w1)), w2)
