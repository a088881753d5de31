"""Products with masked weights on Hopper: masks are applied on the way to wgmma.

Arithmetic for the published layer, 512 x 2048 and 256 tokens a sample, in bfloat16 with
float32 logits, at batch 1 / 16 on an H200 (989 TFLOP/s, 4.8 TB/s). A product: 0.54 /
8.6 GFLOP, 0.5 / 8.7 us of the tensor cores; arguments and result 7.6 / 90 MB, 1.6 / 19
us, of which the logits are 4.2 / 67 MB (half in 16 bits; packed 0.1 / 2.1, which is all
that a backward reads of them). Storing the masked weights for a batched product writes
and reads 4.2 / 67 MB more.

Memory is the limit at batch 16: at 70 % of its rate 27 us, as long as a product takes.
With bits it is shared memory: a step of 256 tokens writes and reads 150 KB of it, 1200
clocks.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._core import device
from ..._core.precision import add
from ..._core.sharding import vary_alike
from ..._mosaic.base import pad_to, round_up
from ..._mosaic.launch import COLUMN_STEP, ROW_STEP
from .gradients import Wanted, gradients_kernel
from .product import WORD, Kind, by_threshold, product_kernel


def unsupported(dtype: Any, mask_dtypes: Sequence[Any]) -> str | None:
    """Why the kernels cannot run this, or None if they can."""
    if reason := device.unsupported_dtype(dtype):
        return reason
    for wide in mask_dtypes:
        if jnp.dtype(wide).itemsize > 4:
            return f"logits must have at most 32 bits for mosaic_gpu, got {wide}"
    return device.miscompiled()


def multiply(x, w, mask, *, kind: Kind):
    """x_b (W * m_b); differentiable, but for bits.

    x: (batch, seq, d_in).
    w: (d_in, d_out), of numbers that the dtype of x has.
    mask: (batch, d_in, d_out), or without the batch for all samples; of bits, words
        (..., d_in / 32, d_out).
    """
    batch, seq, d_in = x.shape
    w = w.astype(x.dtype)
    if mask.ndim == 2:
        x, mask = x.reshape(1, -1, d_in), mask[None]
    if kind == "bits":
        mask = lax.bitcast_convert_type(mask, jnp.int32)
    rows = round_up(d_in, COLUMN_STEP)
    columns = round_up(w.shape[1], COLUMN_STEP)
    tokens = round_up(x.shape[1], ROW_STEP)
    # Zeros at the end add nothing to any result.
    arrays = (
        pad_to(x, tokens, rows),
        pad_to(w[None], rows, columns),
        pad_to(mask, rows // WORD if kind == "bits" else rows, columns),
    )
    y = _multiply(*vary_alike(*arrays), kind)[:, : x.shape[1], : w.shape[1]]
    return y.reshape(batch, seq, -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(x, w, mask, kind):
    return product_kernel(kind)(x, w, mask)[0]


def _multiply_fwd(x, w, mask, kind):
    wanted = Wanted(x.perturbed, w.perturbed, mask.perturbed, mask.value.dtype)
    x, w, mask = x.value, w.value, mask.value
    pack = by_threshold(kind) and (wanted.x or wanted.w)
    y, *bits = product_kernel(kind, pack=pack)(x, w, mask)
    # A slope is one of logits; straight-through has none.
    sloped = wanted.mask and kind != "straight_through"
    return y, ((x, w, mask if sloped or not pack else None, bits), wanted)


def _multiply_bwd(kind, saved, dy):
    (x, w, mask, bits), wanted = saved
    of_product, masks = ("bits", *bits) if bits else (kind, mask)
    dx = None
    if wanted.x:
        dx, *_ = product_kernel(of_product, transposed=True)(dy, w, masks)
    wanted = dataclasses.replace(wanted, mask=wanted.mask and kind != "bits")
    found = {}
    if wanted.names:
        of, masks = (of_product, masks) if mask is None else (kind, mask)
        found = gradients_kernel(of, wanted)(x, dy, w, masks)
    return dx, found.get("w"), found.get("mask")


_multiply.defvjp(_multiply_fwd, _multiply_bwd, symbolic_zeros=True)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """`add`, of y (batch, seq, features), with a gradient that a GPU makes faster."""
    return _add_bias(*vary_alike(y, bias))


@jax.custom_vjp
def _add_bias(y, bias):
    return add(y, bias)


def _add_bias_fwd(y, bias):
    return _add_bias(y, bias), bias


def _add_bias_bwd(bias, dy):
    # In two steps, of which XLA makes programs of their own: 5 us where one takes 20.
    batch, seq, features = dy.shape
    group = math.gcd(seq, 16)
    parts = dy.astype(jnp.float32).reshape(batch, -1, group, features).sum(2)
    return dy, lax.optimization_barrier(parts).sum((0, 1)).astype(bias.dtype)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)
