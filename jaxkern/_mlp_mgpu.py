"""MLPs in kernels: which of them, and the matmuls before and after.

- `flash_mlp`'s, for equal ranks that it takes: hidden features never reach memory;
- matmuls with fused activations, for all other ranks (`_matmul_mgpu`);
- the same with 2:4 selection and a product on sparse tensor cores (`_sparsity_mgpu`).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from . import _flash_mlp_mgpu, _matmul_mgpu, _sparsity_mgpu
from ._checks import Implementation
from ._flash_mlp import select as select_flash_mlp
from ._matmul import matmul
from ._mesh import settle
from ._mgpu import on_hopper

Pair = tuple[jax.Array, jax.Array]
Kernel = Literal["flash_mlp", "matmul", "sparse"]


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
    if (reason := _unfit(ranks, sparsity, gradient)) is not None:
        settle(op, implementation, reason)
        return None
    kernel = kernel_of(core, seconds, ranks, sparsity)
    if kernel == "flash_mlp":
        runs = select_flash_mlp(op, core, seconds, implementation)
        return kernel if runs == "mosaic_gpu" else None
    sizes = tokens, *ranks, hidden
    reason = _matmul_mgpu.unsupported(sizes, x.dtype, on_hopper=on_hopper())
    runs = settle(op, implementation, reason)
    # The sparse ones are not verified on hardware: only for who asks.
    if runs is None and kernel == "matmul":
        gates = len(ups)
        faster = _matmul_mgpu.predicted_faster(tokens, ranks[-2:], hidden, gates, gates)
        runs = "mosaic_gpu" if faster else "xla"
    return kernel if runs == "mosaic_gpu" else None


def kernel_of(
    core: jax.ShapeDtypeStruct,
    seconds: Sequence[jax.ShapeDtypeStruct],
    ranks: Sequence[int],
    sparsity: str | None,
) -> Kernel:
    """Which kernel takes these shapes, on a device that has it.

    core: the input of the factors `seconds`, both with an axis of one head.
    """
    if sparsity in ("2:4", "2:4-soft"):
        return "sparse"
    fits = _flash_mlp_mgpu.unsupported(core, seconds, on_hopper=True) is None
    return "flash_mlp" if fits and len(set(ranks)) == 1 else "matmul"


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
    reason = _matmul_mgpu.unsupported(sizes, x.dtype, on_hopper=on_hopper())
    if (chosen := settle(op, implementation, reason)) is not None:
        return chosen
    ranks = w_gate.shape[0], w_down.shape[1]
    faster = _matmul_mgpu.predicted_faster(tokens, ranks, w_gate.shape[1], 2)
    return "mosaic_gpu" if faster else "xla"


def run_swiglu(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    """As a low-rank one whose core is the input."""
    y = _matmul_mgpu.gated_mlp(x.reshape(-1, x.shape[-1]), w_gate, w_up, w_down)
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
            between = partial(_flash_mlp_mgpu.mlp, activation=activation)
            core = between(core[None], weights, down[0][None])[0]
        case "matmul" if len(ups) == 2:
            core = _matmul_mgpu.gated_mlp(core, seconds[0], seconds[1], down[0])
        case "matmul":
            core = _matmul_mgpu.relu2_mlp(core, seconds[0], down[0])
        case "sparse":
            shrink = sparsity == "2:4-soft"
            exact = gradient != "straight_through" and not shrink
            core = _sparsity_mgpu.relu2_mlp(core, seconds[0], down[0], shrink, exact)
    return matmul(core, down[1]).reshape(*x.shape[:-1], -1)
