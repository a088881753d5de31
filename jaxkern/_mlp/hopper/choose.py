"""MLPs in kernels: which of them, and the matmuls before and after.

- `flash_mlp`'s, for equal ranks that it takes: hidden features never reach memory. Of
  one head its weights' gradients have few tiles to share, so many tokens are faster by
- matmuls with fused activations, for any ranks (`_matmul_mgpu`);
- the same with 2:4 selection and a product on sparse tensor cores (`_sparsity_mgpu`).
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from ..._core import dispatch
from ..._core.dispatch import Implementation
from ..._core.precision import matmul
from ..._mosaic import matmul as matmul_frame
from . import cost, flash, fused, sparse
from .cost import Kernel, Layer

Pair = tuple[jax.Array, jax.Array]


def choose(
    op: str,
    x: jax.Array,
    ups: Sequence[Pair],
    down: Pair,
    sparsity: str | None,
    gradient: str | None,
    implementation: Implementation | None,
) -> Kernel | None:
    """What runs this, or None where that is XLA: by shapes, dtype and device alone.

    Raises:
        NotImplementedError: a kernel was asked for and none can; it says why.
    """
    ranks = [pair[1].shape[0] for pair in ups] + [down[0].shape[1]]
    hidden, tokens = down[0].shape[0], math.prod(x.shape[:-1])
    core = jax.ShapeDtypeStruct((1, tokens, len(ups) * ranks[0]), x.dtype)
    seconds = [jax.ShapeDtypeStruct((1, *pair[1].shape), x.dtype) for pair in ups]
    unfit = _unfit(ranks, sparsity, gradient)
    kernel = "matmul" if unfit else kernel_of(core, seconds, ranks, sparsity)
    sizes = tokens, *ranks, hidden

    def faster() -> bool:
        layer = _layer(tokens, ranks, hidden)
        which = sparsity == "2:4-soft", gradient == "straight_through"
        return cost.beats_xla(layer, kernel, *which)

    def unsupported() -> str | None:
        return unfit or matmul_frame.unsupported(sizes, x.dtype)

    arrays = x, *(w for pair in (*ups, down) for w in pair)
    wins = implementation is None and unfit is None and faster()
    runs = dispatch.choose(op, implementation, arrays, unsupported, wins)
    return kernel if runs == "mosaic_gpu" else None


def kernel_of(
    core: jax.ShapeDtypeStruct,
    seconds: Sequence[jax.ShapeDtypeStruct],
    ranks: Sequence[int],
    sparsity: str | None,
) -> Kernel:
    """Which kernel takes these shapes, on a device that has it: the fastest.

    core: the input of the factors `seconds`, both with an axis of one head.
    """
    if sparsity in ("2:4", "2:4-soft"):
        return "sparse"
    if flash.unsupported(core, seconds) or len({*ranks}) > 1:
        return "matmul"
    layer = _layer(core.shape[1], ranks, seconds[0].shape[2])
    return cost.fastest(layer, ["flash_mlp", "matmul"])


def _layer(tokens: int, ranks: Sequence[int], hidden: int) -> Layer:
    ups = len(ranks) - 1
    return Layer(tokens, ranks[0], hidden, ranks[-1], ups, ups)


def _unfit(
    ranks: Sequence[int], sparsity: str | None, gradient: str | None
) -> str | None:
    """Why no kernel takes these options, or None."""
    if ranks[0] != ranks[-2]:
        return (
            "ranks of gate and up must be equal for mosaic_gpu, "
            f"got {ranks[0]} and {ranks[-2]}"
        )
    if gradient == "feature_wise":
        return (
            "gradient must be None, 'exact' or 'straight_through' for mosaic_gpu, "
            "got 'feature_wise'"
        )
    if sparsity == "2:4-soft" and gradient == "exact":
        return (
            "gradient must be None or 'straight_through' for mosaic_gpu and "
            "sparsity='2:4-soft', got 'exact'"
        )
    return None


def choose_swiglu(
    op: str,
    x: jax.Array,
    w_gate: jax.Array,
    w_down: jax.Array,
    implementation: Implementation | None,
) -> Implementation:
    """Of full rank: what runs it, as `choose` does."""
    tokens = math.prod(x.shape[:-1])
    sizes = tokens, *w_gate.shape, w_down.shape[1]
    d_in, hidden = w_gate.shape
    layer = Layer(tokens, d_in, hidden, w_down.shape[1], products=2)
    faster = implementation is None and cost.beats_xla(layer, "matmul")
    unsupported = partial(matmul_frame.unsupported, sizes, x.dtype)
    return dispatch.choose(op, implementation, (x, w_gate, w_down), unsupported, faster)


def run_swiglu(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    """As a low-rank one whose core is the input."""
    y = fused.gated_mlp(x.reshape(-1, x.shape[-1]), w_gate, w_up, w_down)
    return y.reshape(*x.shape[:-1], -1)


def run(
    kernel: Kernel,
    x: jax.Array,
    ups: Sequence[Pair],
    down: Pair,
    sparsity: str | None = None,
    gradient: str | None = None,
) -> jax.Array:
    """The MLP, gated if there are two `ups`, else with ReLU²."""
    # Both first factors in one matmul.
    first = jnp.concatenate([up[0] for up in ups], axis=1)
    core = matmul(x.reshape(-1, x.shape[-1]), first)
    seconds = [up[1] for up in ups]
    match kernel:
        case "flash_mlp":
            weights = tuple(w[None] for w in seconds)
            activation = "silu" if len(ups) == 2 else "relu2"
            between = partial(flash.mlp, activation=activation)
            core = between(core[None], weights, down[0][None])[0]
        case "matmul" if len(ups) == 2:
            core = fused.gated_mlp(core, seconds[0], seconds[1], down[0])
        case "matmul":
            core = fused.relu2_mlp(core, seconds[0], down[0])
        case "sparse":
            shrink = sparsity == "2:4-soft"
            exact = gradient != "straight_through" and not shrink
            core = sparse.relu2_mlp(core, seconds[0], down[0], shrink, exact)
    return matmul(core, down[1]).reshape(*x.shape[:-1], -1)
