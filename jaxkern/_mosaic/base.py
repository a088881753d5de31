"""Shared memory, tensor cores and activations, as all Mosaic GPU kernels use them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from .._core.activations import ACTIVATIONS, Activation

# JAX's type declarations lack some names of this module.
plgpu: Any = mosaic_gpu

# Shared memory in bytes that one block can have on Hopper: 227 KiB.
SMEM_BYTES = 232448
# exp(x) = exp2(LOG2_E * x): the chip has an instruction for exp2, none for exp.
LOG2_E = math.log2(math.e)


def swizzle_of(features: int, itemsize: int) -> int:
    """Return the widest swizzle, in bytes, that divides a row, or 0 if none does."""
    row = features * itemsize
    return next((s for s in (128, 64, 32) if row % s == 0), 0)


def tiled_layout(dtype: jnp.dtype, swizzle: int):
    """Return the transforms of shared memory that TMA writes and wgmma reads.

    A tile is 8 rows of `swizzle` bytes. TMA stores its 16-byte units permuted by row,
    so that the 8 rows of a column lie in different banks.
    """
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)


def buffer(dtype, *shape: int, swizzle: int = 128):
    """Return a buffer of shared memory in `tiled_layout`."""
    return plgpu.SMEM(shape, dtype, transforms=tiled_layout(jnp.dtype(dtype), swizzle))


def round_up(size: int, step: int) -> int:
    """Return the least multiple of `step` that is at least `size`."""
    return pl.cdiv(size, step) * step


def pad_to(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Pad the last two axes of `a` with zeros at their end, up to these sizes."""
    missing = rows - a.shape[-2], columns - a.shape[-1]
    before = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*before, *((0, n) for n in missing)]) if any(missing) else a


def slot(i: jax.Array, slots: int) -> jax.Array:
    """Return which slot of a ring holds step `i`."""
    return lax.rem(i, jnp.array(slots, i.dtype))


def dots(*pairs):
    """Return `a @ b` of each pair in float32.

    All products are issued before any is awaited. `a` lies in shared memory or in
    registers, `b` in shared memory.
    """

    def multiply(*accumulators):
        for acc, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(acc, a, b)
        return [acc[...] for acc in accumulators]

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(multiply, *[plgpu.ACC(s, jnp.float32) for s in shapes])


def add_dots(acc, *pairs):
    """Return `acc` plus `a @ b` of each pair, once all of the products are done.

    `a` lies in shared memory or in registers, `b` in shared memory.
    """

    def multiply(ref):
        for a, b in pairs:
            plgpu.wgmma(ref, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def zeros(rows: int, columns: int):
    """Return accumulators of wgmma, float32 zeros in registers."""
    return plgpu.layout_cast(
        jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA
    )


def _sigmoid(z):
    # tanh is one operation of the special function units (MUFU). An exponential and a
    # reciprocal would be two.
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


# The activations as kernels compute them. `jax.nn.relu` is a `custom_jvp`, which
# kernels of jax 0.11 do not take.
IN_KERNEL = ACTIVATIONS | {
    "relu": Activation(_relu, ACTIVATIONS["relu"].derivative),
    "relu2": Activation(lambda z: jnp.square(_relu(z)), lambda z: 2 * _relu(z)),
    "silu": Activation(_silu, _silu_derivative),
    "sigmoid": Activation(_sigmoid, _sigmoid_derivative),
}
