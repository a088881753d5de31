"""What the Mosaic GPU kernels share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from .._core.activations import ACTIVATIONS, Activation

# The types that JAX declares for it lack some of its names.
plgpu: Any = mosaic_gpu

# Of one block on Hopper.
SMEM_BYTES = 232448
# exp(x) = exp2(LOG2_E x): the chip has an instruction for exp2.
LOG2_E = math.log2(math.e)


def swizzle_of(features: int, itemsize: int) -> int:
    """The widest swizzle whose rows tile the features; 0 if there is none."""
    row = features * itemsize
    return next((s for s in (128, 64, 32) if row % s == 0), 0)


def tiled_layout(dtype: jnp.dtype, swizzle: int):
    """The layout of SMEM that TMA writes and wgmma reads."""
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)


def buffer(dtype, *shape: int, swizzle: int = 128):
    """Of shared memory, in tiles that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=tiled_layout(jnp.dtype(dtype), swizzle))


def round_up(size: int, step: int) -> int:
    """The least multiple of `step` that is no less."""
    return pl.cdiv(size, step) * step


def pad_to(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """`a` with zeros at the end of its last two axes, up to these sizes."""
    missing = rows - a.shape[-2], columns - a.shape[-1]
    before = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*before, *((0, n) for n in missing)]) if any(missing) else a


def slot(i: jax.Array, slots: int) -> jax.Array:
    """Where step `i` lies in a ring of SMEM buffers."""
    return lax.rem(i, jnp.array(slots, i.dtype))


def dots(*pairs):
    """`a @ b` of each pair, all awaited together; `a` in SMEM or registers."""

    def multiply(*accumulators):
        for acc, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(acc, a, b)
        return [acc[...] for acc in accumulators]

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(multiply, *[plgpu.ACC(s, jnp.float32) for s in shapes])


def add_dots(acc, *pairs):
    """`acc` and `a @ b` of each pair, awaited; `a` in SMEM or registers."""

    def multiply(ref):
        for a, b in pairs:
            plgpu.wgmma(ref, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def zeros(rows: int, columns: int):
    """Accumulators to start from."""
    return plgpu.layout_cast(
        jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA
    )


def _sigmoid(z):
    # One special function operation; as exp and reciprocal there would be two.
    return 0.5 * jnp.tanh(0.5 * z) + 0.5


def _silu(z):
    half = 0.5 * z
    return half * jnp.tanh(half) + half


def _silu_derivative(z):
    gate = _sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _sigmoid_derivative(z):
    gate = _sigmoid(z)
    return gate * (1 - gate)


def _relu(z):
    return jnp.maximum(z, 0)


# jax.nn's own relu has a derivative of its own, which kernels of jax 0.11 do not take.
IN_KERNEL = ACTIVATIONS | {
    "relu": Activation(_relu, ACTIVATIONS["relu"].derivative),
    "relu2": Activation(lambda z: jnp.square(_relu(z)), lambda z: 2 * _relu(z)),
    "silu": Activation(_silu, _silu_derivative),
    "sigmoid": Activation(_sigmoid, _sigmoid_derivative),
}
