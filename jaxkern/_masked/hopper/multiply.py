"""Products with masked weights on Hopper: masks are applied on the way to wgmma.

The forward is one launch of `product`, the backward one of `product` and one of
`gradients`, whose pipelines are drawn there:

    x, W, mask --[product]--> y, mask as bits
    dy, W, bits --[product, transposed]--> dx
    x, dy, W, bits or logits --[gradients]--> dW, dmask

What limits them, by arithmetic for the published layer: 512 x 2048, 256 tokens a
sample, bfloat16 with float32 logits, on an H200 (989 TFLOP/s, 4.8 TB/s at peak).

    of a product                   batch 1            batch 16
    multiply-adds                  0.54 GFLOP, 0.5 us 8.6 GFLOP, 8.7 us
    arguments and result           7.6 MB, 1.6 us     90 MB, 19 us
    of these the float32 logits    4.2 MB             67 MB
    the same mask as bits          0.1 MB             2.1 MB

Storing the masked weights for a batched product would write and read 4.2 or 67 MB more.
At batch 16 memory is the limit: 90 MB take 27 us at 70 % of its rate, and the product
took 26.9 us (`launches.json`: `product b16 256/1 N logits float32`). With bits the
limit is shared memory: a step of 256 tokens writes and reads 150 KB of it (loads, W to
registers, tokens to either warpgroup's wgmma, and an eighth of the result), which are
1200 clocks at 128 bytes each.
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
from .masks import Kind, by_threshold
from .product import WORD, product_kernel


def unsupported(dtype: Any, mask_dtypes: Sequence[Any]) -> str | None:
    """Return why the kernels cannot run this, or None if they can."""
    if reason := device.unsupported_dtype(dtype):
        return reason
    for wide in mask_dtypes:
        if jnp.dtype(wide).itemsize > 4:
            return f"logits must have at most 32 bits for mosaic_gpu, got {wide}"
    return device.miscompiled()


def multiply(x, w, mask, *, kind: Kind):
    """Return x_b (W * m_b), with derivatives of all arrays but bits.

    x: (batch, seq, d_in).
    w: (d_in, d_out). It is rounded to the dtype of x.
    mask: (batch, d_in, d_out), or (d_in, d_out) for all samples. Bits come in words of
        32 rows, (..., d_in / 32, d_out).
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
    # The backward needs the mask itself, beside the bits, where the estimator's slope
    # depends on logits. Straight-through has the slope 1.
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
    """Return y + bias, for y (batch, seq, features), with a fast gradient on a GPU."""
    return _add_bias(*vary_alike(y, bias))


@jax.custom_vjp
def _add_bias(y, bias):
    return add(y, bias)


def _add_bias_fwd(y, bias):
    return _add_bias(y, bias), bias


def _add_bias_bwd(bias, dy):
    # XLA makes a program of each of two sums: 5.2 us on an H200, where one sum takes
    # 17.5 (`launches.json`: `bias two sums`, `bias sum`).
    batch, seq, features = dy.shape
    group = math.gcd(seq, 16)
    parts = dy.astype(jnp.float32).reshape(batch, -1, group, features).sum(2)
    return dy, lax.optimization_barrier(parts).sum((0, 1)).astype(bias.dtype)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)
