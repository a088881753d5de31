"""The multi-head MLP: one small MLP for each head."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.activations import ACTIVATIONS, ActivationName, get_activation
from .._core.checks import check_floating, check_shape
from .._core.dispatch import Implementation, check_implementation, choose, run
from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from . import thresholds


def flash_mlp(
    x: Float[Array, "heads batch dim"],
    w1: Float[Array, "heads dim hidden"],
    w2: Float[Array, "heads hidden dim"],
    *,
    w_gate: Float[Array, "heads dim hidden"] | None = None,
    activation: ActivationName = "silu",
    implementation: Implementation | None = None,
) -> Float[Array, "heads batch dim"]:
    r"""An MLP without biases for each head, gated if there is a `w_gate`.

    $$y_h = \mathrm{act}(x_h W_{1h}) W_{2h}$$

    $$y_h = (\mathrm{act}(x_h W_{\mathrm{gate},h}) \odot x_h W_{1h}) W_{2h}$$

    Matmuls accumulate in float32, the activation and the product with it are computed
    in float32, their result is rounded to the dtype of `x`, and so is `y`.

    Implementations:

    - "xla": batched matmuls; the hidden layer goes through memory. Any size and dtype.
    - "mosaic_gpu": the hidden layer stays on the chip in both passes, so only the
      arguments are saved for the backward. On an H100 or H200, in bfloat16 and float16,
      with `dim` up to 256 (192 if gated). Where `batch` is no multiple of 8, `dim` of
      16 or `hidden` of 64, the arrays concerned are copied to pad them, in every call.
      Silu and sigmoid use the hardware's approximate tanh; a token that holds an
      infinity becomes NaN. Gradients are deterministic, and of reverse mode only:
      `jax.jvp` needs "xla". Under `vmap` the new axis joins the heads; an argument that
      lacks it is copied.

    None picks the kernel where it can run, on one device or inside `jax.shard_map`
    (XLA cannot split a kernel over devices), from 2^23 hidden features of all heads and
    tokens on, and from so many heads x batch and heads x hidden: 2048 with `dim` up to
    64, 4096 up to 96 and 8192 (16384 if gated) up to 128. Forward and backward it was
    measured to be faster on an H200 at dims 64 and 128; the rest is predicted. At
    (8, 512, 64, 512) it took less time of the device than XLA but more by wall clock,
    and is not picked.

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
    get_activation(op, activation)
    gate = {} if w_gate is None else {"w_gate": w_gate}
    x, w1, w2, *gates = check_floating(op, x=x, w1=w1, w2=w2, **gate)
    if x.ndim != 3:
        raise ValueError(f"{op}: x must have shape (heads, batch, dim), got {x.shape}")
    heads, batch, dim = x.shape
    given = f" for x of shape {x.shape}"
    hidden = w1.shape[-1] if w1.ndim == 3 else 0
    check_shape(op, "w1", w1, (heads, dim, hidden if w1.ndim == 3 else "hidden"), given)
    check_shape(op, "w2", w2, (heads, hidden, dim), given)
    if w_gate is not None:
        check_shape(op, "w_gate", w_gate, w1.shape, ", that of w1")
    ups = *gates, w1
    gated = w_gate is not None
    faster = thresholds.flash_mlp_is_faster(heads, batch, dim, hidden, gated=gated)
    unsupported = partial(_unsupported, x, w1, gated=gated)
    return run(
        choose(op, implementation, (x, *ups, w2), unsupported, faster),
        x,
        ups,
        w2,
        implementation=implementation,
        xla=partial(_reference, activation=activation),
        kernel=partial(_in_kernel, activation=activation),
    )


def _in_kernel(
    x: jax.Array,
    ups: tuple[jax.Array, ...],
    w2: jax.Array,
    activation: ActivationName,
) -> jax.Array:
    # Mosaic is imported on first use of a kernel.
    from .hopper import flash

    return flash.mlp(x, ups, w2, activation)


def _unsupported(x: jax.Array, w1: jax.Array, *, gated: bool) -> str | None:
    # Mosaic is imported on first use of a kernel.
    from .hopper import flash

    return flash.unsupported(x, w1, gated=gated)


@on_automatic_axes(lambda x: x)
@partial(jax.jit, static_argnames="activation")
def _reference(
    x: jax.Array,
    ups: tuple[jax.Array, ...],
    w2: jax.Array,
    activation: ActivationName,
) -> jax.Array:
    act = ACTIVATIONS[activation]

    def activate(z, *up):
        return math.prod(map(widen, up), start=act.value(widen(z))).astype(z.dtype)

    # The backward computes the activation again, from its input in the dtype of x.
    hidden = jax.checkpoint(activate, prevent_cse=False)
    return jnp.matmul(hidden(*(jnp.matmul(x, w) for w in ups)), w2)
