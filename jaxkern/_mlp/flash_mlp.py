"""The multi-head MLP: one small MLP for each head."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.activations import ACTIVATIONS, ActivationName, get_activation
from .._core.checks import check_floating, check_shape, given
from .._core.dispatch import Implementation, check_implementation, run
from .._core.gradients import recompute
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
    r"""Compute an MLP without biases for each head, gated if there is a `w_gate`.

    $$y_h = \mathrm{act}(x_h W_{1h}) W_{2h}$$

    $$y_h = (\mathrm{act}(x_h W_{\mathrm{gate},h}) \odot x_h W_{1h}) W_{2h}$$

    Matmuls accumulate in float32. The activation, and the product with it, are computed
    in float32 and rounded to the dtype of `x`.

    Implementations:

    - "xla" multiplies in batched matmuls, in any size and dtype. The hidden layer goes
      through memory.
    - "mosaic_gpu" keeps the hidden layer on the chip, forward and backward, on an H100
      or H200, in bfloat16 and float16, for `dim` up to 256, or 192 with a gate. Nothing
      is padded by copies if `batch` is a multiple of 8, `dim` of 16 and `hidden` of 64.
      Silu and sigmoid use the hardware's approximate tanh, and a token that holds an
      infinity becomes NaN. Gradients are deterministic and in reverse mode only:
      `jax.jvp` needs "xla". Under `vmap` the new axis joins the heads, and an argument
      that lacks it is copied.
    - `None` uses the kernel if it supports the inputs, on one device or inside
      `jax.shard_map`, from $2^{23}$ hidden numbers (heads x batch x hidden) on, and if
      heads x batch and heads x hidden are at least 2048 for `dim` up to 64, 4096 up to
      96, and 8192 (16384 with a gate) up to 128. On an H200 it was measured to be
      faster for dims 64 and 128, forward and backward; the other sizes are judged by
      these.

    Args:
        x: The inputs of each head.
        w1: The first weight of each head.
        w2: The second weight of each head.
        w_gate: The weight of the gate of each head; None for an MLP without a gate.
        activation: "silu", "gelu" (tanh form), "relu", "relu2", "leaky_relu" (slope
            0.01), "sigmoid" or "identity".
        implementation: See above.

    Returns:
        The outputs of each head, in the dtype of `x`.

    Raises:
        TypeError: An argument is not a floating-point array, or the dtypes differ.
        ValueError: The shapes do not fit, or a name is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        Two heads, of which the second has weights that are 2 and not 1:

        ```python
        import jax.numpy as jnp
        import jaxkern

        heads = jnp.array([1.0, 2.0])[:, None, None]
        x, w1, w2 = jnp.ones((2, 3, 4)), heads * jnp.ones((4, 8)), jnp.ones((2, 8, 4))
        print(jaxkern.flash_mlp(x, w1, w2, activation="relu")[:, 0])
        ```
        ```text
        [[32. 32. 32. 32.]
         [64. 64. 64. 64.]]
        ```

    References:
        MH-MoE, whose feed-forward this is, without experts:
            https://arxiv.org/abs/2404.15045.
    """
    op = "flash_mlp"
    check_implementation(op, implementation)
    get_activation(op, activation)
    gate = {} if w_gate is None else {"w_gate": w_gate}
    x, w1, w2, *gates = check_floating(op, x=x, w1=w1, w2=w2, **gate)
    if x.ndim != 3:
        raise ValueError(f"{op}: x must have shape (heads, batch, dim), got {x.shape}")
    heads, batch, dim = x.shape
    hidden = w1.shape[-1] if w1.ndim == 3 else 0
    check_shape(
        op, "w1", w1, (heads, dim, hidden if w1.ndim == 3 else "hidden"), given(x)
    )
    check_shape(op, "w2", w2, (heads, hidden, dim), given(x))
    if w_gate is not None:
        check_shape(op, "w_gate", w_gate, w1.shape, ", that of w1")
    ups = *gates, w1
    gated = w_gate is not None
    return run(
        op,
        implementation,
        x,
        ups,
        w2,
        xla=partial(_reference, activation=activation),
        kernel=partial(_in_kernel, activation=activation),
        unsupported=partial(_unsupported, x, w1, gated=gated),
        faster=thresholds.flash_mlp_is_faster(heads, batch, dim, hidden, gated=gated),
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
    hidden = recompute(activate)
    return jnp.matmul(hidden(*(jnp.matmul(x, w) for w in ups)), w2)
