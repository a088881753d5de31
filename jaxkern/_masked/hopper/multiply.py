"""Products with masked weights on Hopper: masks are applied on the way to wgmma.

Arithmetic for the published layer, 512 x 2048 and 256 tokens a sample, in bfloat16 with
float32 logits, at batch 1 / 16 on an H200 (989 TFLOP/s, 4.8 TB/s). A product: 0.54 /
8.6 GFLOP, 0.5 / 8.7 us of the tensor cores; arguments and result 7.6 / 90 MB, 1.6 / 19
us, of which the logits are 4.2 / 67 MB (half in 16 bits; packed 0.1 / 2.1, which is all
that a backward reads of them). Storing the masked weights for a batched product writes
and reads 4.2 / 67 MB more.

Memory is the limit at batch 16: at 70 % of its rate 27 us, as long as a product takes.
With bits it is shared memory: a step of 256 tokens writes and reads 150 KB of it, 1200
clocks. See `predicted_us`, and `_mgpu_masks` for what the kernels do.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device, h200
from ..._core.precision import add
from ..._core.sharding import vary_alike
from ..._mosaic.batching import over_heads
from ..._mosaic.launch import COMPUTE
from ..hopper import gradients as _mgpu_mask_gradients
from ..hopper import product as _mgpu_masks
from .gradients import TOKENS, Wanted
from .product import (
    DEPTH,
    FEATURE_STEP,
    FEATURES,
    PIECE,
    ROW_STEP,
    WORD,
    Kind,
    MaskedTiles,
    by_threshold,
    bytes_of,
)

# wgmma takes float32 only as tf32, and not from the transposed views of these tiles.
DTYPES = ("bfloat16", "float16")
TILES, SPLITS = (256, 128, 64), (1, 2, 4, 8)
# What an H200 took: clocks of a step, with logits and with bits, for each token more,
# and for each of a tile. Steps wait for shared memory, not for the tensor cores.
STEP_CLOCKS, BITS_CLOCKS, TOKEN_CLOCKS, TILE_CLOCKS = 1250.0, 950.0, 2.5, 8.0


def choose(
    samples: int, seq: int, contracted: int, features: int, mask_bytes: float
) -> MaskedTiles:
    """The tiles, and parts of the contracted axis, that are predicted to be fastest."""
    steps = pl.cdiv(contracted, DEPTH)
    valid = [
        MaskedTiles(tokens, splits)
        for splits in SPLITS
        if steps % splits == 0
        for tokens in TILES
    ]
    sizes = samples, seq, contracted, features, mask_bytes
    return min(valid, key=lambda config: predicted_us(*sizes, config))


def gradient_columns(want_mask: bool) -> int:
    """Of the tiles of gradients.

    With 128 those of masks and W together spill registers, and those of masks alone
    took 43 us on an H200 where with 64 they take 35.
    """
    return 64 if want_mask else 128


def predicted_us(
    samples: int,
    seq: int,
    contracted: int,
    features: int,
    mask_bytes: float,
    config: MaskedTiles | None = None,
) -> float:
    """Time of a product on an H200, by what its steps have taken there.

    Tiles take turns on the multiprocessors, and all together no less than every array
    takes to and from memory.
    """
    config = config or choose(samples, seq, contracted, features, mask_bytes)
    tokens, splits = config.tokens, config.splits
    tiles = splits * samples * pl.cdiv(seq, tokens) * pl.cdiv(features, FEATURES)
    step = (STEP_CLOCKS if mask_bytes >= 1 else BITS_CLOCKS) + TOKEN_CLOCKS * tokens
    clocks = config.count(contracted) * step + TILE_CLOCKS * tokens
    clocks *= pl.cdiv(tiles, device.multiprocessors())
    weights = contracted * features * (2 + samples * mask_bytes)
    moved = 2 * samples * seq * (contracted + features) + weights
    from_memory = moved / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE
    us = h200.LAUNCH_US + max(clocks / h200.CLOCKS_PER_US, from_memory)
    if splits == 1:
        return us
    # Parts in float32 are written and read, and are in L2 then.
    parts = 8 * splits * samples * seq * features
    return us + h200.LAUNCH_US + parts / h200.L2_BYTES_PER_US


def predicted_gradients_us(
    samples: int, seq: int, d_in: int, d_out: int, mask_bytes: float, want_w: bool
) -> float:
    """As `predicted_us`, of the launch that makes d_mask and maybe dW.

    mask_bytes: of the mask and of its gradient, for each number of W.
    """
    walks, rows = 1 if want_w else samples, COMPUTE * PIECE
    columns = gradient_columns(True)
    blocks = walks * pl.cdiv(d_in, rows) * pl.cdiv(d_out, columns)
    tile, tokens = rows * columns, pl.cdiv(seq, TOKENS) * TOKENS
    turns = pl.cdiv(blocks, device.multiprocessors()) * samples / walks
    computed = (
        turns
        * tile
        * tokens
        / h200.MACS_PER_CLOCK
        / h200.CLOCKS_PER_US
        / h200.MATMUL_SHARE
    )
    masks = samples * d_in * d_out * mask_bytes
    loaded = blocks * samples / walks * 2 * tokens * (rows + columns)
    from_l2 = (loaded + masks) / h200.L2_BYTES_PER_US
    moved = 2 * samples * seq * (d_in + d_out) + masks + 2 * (1 + want_w) * d_in * d_out
    return h200.LAUNCH_US + max(
        computed, from_l2, moved / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE
    )


def predicted_faster(
    shapes: Sequence[tuple[int, int, int, int]], mask_bytes: float
) -> bool:
    """Whether products (samples, seq, d_in, d_out) are predicted to beat XLA's.

    XLA masks the weights of one sample, and multiplies, before the next one.
    """
    ours = theirs = 0.0
    rate = h200.MEMORY_BYTES_PER_US * h200.MEMORY_SHARE
    for samples, seq, d_in, d_out in shapes:
        tokens, weights = 2 * seq * (d_in + d_out), d_in * d_out
        flops_us = (
            seq
            * weights
            / (
                h200.MACS_PER_CLOCK
                * device.multiprocessors()
                * h200.CLOCKS_PER_US
                * h200.MATMUL_SHARE
            )
        )
        matmul = max(flops_us, (tokens + 2 * weights) / rate)
        theirs += samples * (
            (4 + mask_bytes) * weights / rate + matmul + 2 * h200.LAUNCH_US
        )
        ours += predicted_us(samples, seq, d_in, d_out, mask_bytes)
        if seq % ROW_STEP or d_in % FEATURE_STEP or d_out % FEATURE_STEP:
            # Each array is read and written once more.
            moved = samples * (tokens + mask_bytes * weights) + 2 * weights
            ours += 2 * moved / rate + 4 * h200.LAUNCH_US
    return ours < theirs


def unsupported(dtype: Any, mask_bytes: float) -> str | None:
    """Why the kernels cannot run this, or None if they can."""
    if str(dtype) not in DTYPES:
        return f"dtype must be {' or '.join(DTYPES)} for mosaic_gpu, got {dtype}"
    if mask_bytes > 4:
        return "logits must have at most 32 bits for mosaic_gpu, got float64"
    return device.miscompiled()


def multiply(kind: Kind, x, w, mask):
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
    rows = pl.cdiv(d_in, FEATURE_STEP) * FEATURE_STEP
    columns = pl.cdiv(w.shape[1], FEATURE_STEP) * FEATURE_STEP
    tokens = pl.cdiv(x.shape[1], ROW_STEP) * ROW_STEP
    arrays = (
        _pad(x, tokens, rows),
        _pad(w[None], rows, columns),
        _pad(mask, rows // WORD if kind == "bits" else rows, columns),
    )
    y = _multiply(*vary_alike(*arrays), kind)[:, : x.shape[1], : w.shape[1]]
    return y.reshape(batch, seq, -1)


def _pad(a, rows: int, columns: int):
    """With zeros at the end, which add nothing to any result."""
    missing = rows - a.shape[1], columns - a.shape[2]
    return jnp.pad(a, [(0, 0), (0, missing[0]), (0, missing[1])]) if any(missing) else a


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(x, w, mask, kind):
    return product(kind)(x, w, mask)[0]


def _multiply_fwd(x, w, mask, kind):
    wanted = Wanted(x.perturbed, w.perturbed, mask.perturbed, mask.value.dtype)
    x, w, mask = x.value, w.value, mask.value
    pack = by_threshold(kind) and (wanted.x or wanted.w)
    y, *bits = product(kind, pack=pack)(x, w, mask)
    # A slope is one of logits; straight-through has none.
    sloped = wanted.mask and kind != "straight_through"
    return y, ((x, w, mask if sloped or not pack else None, bits), wanted)


def _multiply_bwd(kind, saved, dy):
    (x, w, mask, bits), wanted = saved
    packed = ("bits", *bits) if bits else (kind, mask)
    of, masks = packed
    dx = product(of, transposed=True)(dy, w, masks)[0] if wanted.x else None
    wanted = dataclasses.replace(wanted, mask=wanted.mask and kind != "bits")
    found = iter(())
    if wanted.mask or wanted.w:
        of, masks = packed if mask is None else (kind, mask)
        found = iter(gradients(of, wanted)(x, dy, w, masks))
    d_mask = next(found) if wanted.mask else None
    return dx, next(found) if wanted.w else None, d_mask


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


def product(
    kind: Kind,
    transposed: bool = False,
    config: MaskedTiles | None = None,
    pack: bool = False,
):
    """The kernel of (x, w, mask), or of (dy, w, mask) if transposed.

    pack: its results are the product and the bits of the mask that is made of logits,
        else the product alone.
    """

    def run(x, w, mask):
        samples, seq, contracted = x.shape
        features, mask_bytes = (
            w.shape[1 if transposed else 2],
            bytes_of(kind, mask.dtype),
        )
        sizes = samples, seq, contracted, features, mask_bytes
        chosen = config or choose(*sizes)
        y, *bits = _mgpu_masks.product(kind, transposed, chosen, pack, x, w, mask)
        if chosen.splits > 1:
            y = y.reshape(samples, chosen.splits, seq, features)
            y = y.sum(1).astype(x.dtype)
        return y, *bits

    return over_heads(run)


def gradients(kind: Kind, wanted: Wanted):
    """The kernel of (x, dy, w, mask): gradients of the mask and of w, if wanted."""

    def run(x, dy, w, mask):
        columns = gradient_columns(wanted.mask)
        return _mgpu_mask_gradients.gradients(kind, wanted, columns, x, dy, w, mask)

    return over_heads(run)
