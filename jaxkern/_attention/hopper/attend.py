"""Block-sparse attention on Hopper, with its gradients.

The arrays are padded to what TMA and wgmma take, and the forward keeps the log-sum-exp
for the backward. `kernels.py` has the kernels, and `walk.py` the frame of all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._core import device
from ..._core.precision import widen
from ..._core.sharding import vary_alike
from ..._mosaic.base import LOG2_E, round_up
from ..._mosaic.launch import CONTRACTED_STEP, ROW_STEP
from ..block_mask.checks import has_values
from ..block_mask.mask import BlockMask
from ..block_mask.runs import BlockLists, KnownLists
from ..dilation import HeadStride
from ..tiles import cotangents_of, sees
from .batching import over_batch
from .kernels import ROWS, backward_kv, backward_q, forward, kv_launches
from .predicates import unreadable
from .tokens import tokens_of

# The largest dim and dim_v that the kernels take.
MAX_DIM = 256
# The mask's block_size must be a multiple of this many tokens.
BLOCK_STEP = 64


def unsupported(
    query: jax.Array | jax.ShapeDtypeStruct,
    value: jax.Array | jax.ShapeDtypeStruct,
    mask: BlockMask | None,
) -> str | None:
    """Return why the kernel cannot run this, or None if it can.

    A mask of None stands for dense attention.
    """
    dim = query.shape[-1]
    if reason := device.unsupported_dtype(query.dtype):
        return reason
    if not query.shape[0]:
        return f"batch must not be empty for mosaic_gpu, got {query.shape}"
    if max(dim, value.shape[-1]) > MAX_DIM:
        return (
            f"dim and dim_v must be at most {MAX_DIM} for mosaic_gpu, "
            f"got {dim} and {value.shape[-1]}"
        )
    if mask is not None and mask.block_size % BLOCK_STEP:
        return (
            f"block_size must be a multiple of {BLOCK_STEP} for mosaic_gpu, "
            f"got {mask.block_size}"
        )
    if mask is not None and (reason := unreadable(mask.mask_fn)):
        return reason
    return device.miscompiled()


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
    dilation: HeadStride | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to the pairs of a mask, in the kernels.

    All arguments but the mask have gradients.

    Args:
        dilation: which vector of each row a head of `query` takes. The arrays are then
            (batch, seq, rate * heads, dim), and TMA loads a head's own vectors only.

    Returns:
        (out, lse), with lse (batch, seq, heads) in base e.
    """
    seq_q, dim = query.shape[1], value.shape[3]
    query, scale = _positive(query, scale)
    (query, key, value), mask = _prepare(mask, query, key, value)
    out, lse = _attend(query, key, value, mask, scale, dilation)
    return out[:, :seq_q, :, :dim], lse[:, :seq_q]


def _positive(query: jax.Array, scale: float) -> tuple[jax.Array, float]:
    """Return a query and a positive scale that give the same logits.

    The kernels take the maximum of the logits before they multiply by the scale.
    """
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (0 * query, 1.0)


def _prepare(
    mask: BlockMask, *arrays: jax.Array
) -> tuple[Sequence[jax.Array], BlockMask]:
    """Pad the arrays with zeros to what TMA and wgmma take, and keep known lists known.

    Lists with values stay on the host, so that their schedule is a constant of the
    program.
    """
    dim = round_up(max(x.shape[3] for x in arrays), CONTRACTED_STEP)

    def pad(x):
        missing = -x.shape[1] % ROW_STEP, dim - x.shape[3]
        return jnp.pad(x, [(0, 0), (0, missing[0]), (0, 0), (0, missing[1])])

    names = "kv", "full_kv", "q", "full_q"
    lists = {name: _known(getattr(mask, name)) for name in names}
    leaves, tree = jax.tree.flatten(replace(mask, **lists))
    alike = vary_alike(*map(pad, arrays), *map(jnp.asarray, leaves))
    n = len(arrays)
    return alike[:n], jax.tree.unflatten(tree, alike[n:])


def _known(lists: BlockLists) -> BlockLists:
    if all(map(has_values, lists.arrays)):
        return KnownLists(*map(np.asarray, lists.arrays))
    return lists


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, scale, dilation):
    kernel = partial(forward, scale=scale, exact=False, dilation=dilation)
    out, lse2 = over_batch(kernel)(mask, query, key, value)
    return out, lse2[:, :, 0].mT / LOG2_E


def _attend_forward(query, key, value, mask, scale, dilation):
    kernel = partial(forward, scale=scale, exact=True, dilation=dilation)
    out, lse2, low = over_batch(kernel)(mask, query, key, value)
    lse2 = lse2[:, :, 0]
    return (out, lse2.mT / LOG2_E), (query, key, value, mask, (out, low), lse2)


def _attend_backward(scale, dilation, saved, cotangents):
    query, key, value, mask, outs, lse2 = saved
    d_out, d_lse = cotangents
    d_out, delta = cotangents_of(_sum(outs), lse2.mT, d_out, d_lse, query.dtype)
    gradients = _gradients(
        *(query, key, value, d_out, lse2, delta.mT),
        mask=mask,
        scale=scale,
        dilation=dilation,
    )
    tokens = tokens_of(dilation, query, key, value)
    spread = [of.spread(x) for of, x in zip(tokens, gradients, strict=True)]
    return *spread, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_part(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attend to some of the keys, for a caller that merges parts.

    Returns:
        (out, lse), both in float32.
    """
    seq_q, dim = query.shape[1], value.shape[3]
    query, scale = _positive(query, scale)
    arrays, mask = _prepare(mask, query, key, value)
    kernel = partial(forward, scale=scale, exact=True)
    out, lse2, low = over_batch(kernel)(mask, *arrays)
    lse = lse2[:, :, 0].mT / LOG2_E
    return _sum([out, low])[:, :seq_q, :, :dim], lse[:, :seq_q]


def part_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what some of the keys add to the gradients of query, key and value.

    The results are float32, but the kernels round them to the dtype of the arguments.
    All parts' roundings together are as large as one rounding of the sum. The kernel of
    keys and values has no registers left to return the rounding errors too, as the
    forward does for `out`.

    Args:
        lse: over all keys, (batch, seq, heads).
        delta: sum(d_out * out) - d_lse over all keys, (batch, seq, heads).
    """
    scaled, factor = _positive(query, scale)
    arrays, mask = _prepare(mask, scaled, key, value, d_out)
    missing = -lse.shape[1] % ROW_STEP
    lse2, delta = (
        jnp.pad(x.mT, [(0, 0), (0, 0), (0, missing)]) for x in (lse * LOG2_E, delta)
    )
    scaled, keys, values, d_out = arrays
    gradients = _gradients(
        scaled, keys, values, d_out, lse2, delta, mask=mask, scale=factor
    )
    d_query, d_key, d_value = (
        gradient[:, : x.shape[1], :, : x.shape[3]].astype(jnp.float32)
        for x, gradient in zip((query, key, value), gradients, strict=True)
    )
    # From the gradient of `scaled` to that of `query`.
    return d_query * (scale / factor), d_key, d_value


def _sum(parts):
    return reduce(jnp.add, (x.astype(jnp.float32) for x in parts))


def _gradients(query, key, value, d_out, lse2, delta, *, mask, scale, dilation=None):
    """Return the gradients of query, key and value.

    With a dilation they have one vector a head, and not the vectors that no head takes.

    Args:
        lse2: the log-sum-exp in base 2, (batch, heads, seq).
        delta: (batch, heads, seq).
    """
    factors = ()
    if query.dtype == jnp.float16:
        d_out, delta, *factors = _enlarged(value, d_out, delta)
    # In a row that sees no key, exp2(logit - inf) = 0 makes all weights 0.
    lse2 = jnp.where(sees(lse2), lse2, jnp.inf)
    # The numbers fill whole tiles. Rows past the end get weights of 0 too, whatever a
    # copy brings there.
    end = [(0, 0), (0, 0), (0, -lse2.shape[2] % math.lcm(mask.block_size, 2 * ROWS))]
    lse2 = jnp.pad(lse2, end, constant_values=jnp.inf)
    numbers = jnp.stack([lse2, jnp.pad(delta, end)], 2)
    arrays = query, key, value, d_out, numbers, *factors
    kernel = partial(backward_q, scale=scale, dilation=dilation)
    gradients = [*over_batch(kernel)(mask, *arrays)]
    for wanted in kv_launches(query.shape[3]):
        kernel = partial(backward_kv, wanted=wanted, scale=scale, dilation=dilation)
        gradients += over_batch(kernel)(mask, *arrays)
    return gradients


def _enlarged(
    value: jax.Array, d_out: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Multiply `d_out` and `delta` by a power of two that float16 needs.

    The kernels round the gradients of logits, which would underflow in float16 where
    cotangents are small or sequences long. They cannot overflow: the gradient of a
    logit is at most the product of the norms of its rows of `d_out` and `value`, plus
    `delta`. A batch with a NaN or an infinity is not multiplied.

    Returns:
        `d_out`, `delta`, and the inverse of the power for each batch, (batch,).
    """

    def largest(x: jax.Array) -> jax.Array:
        return jnp.abs(x).max(tuple(range(1, x.ndim)), initial=0)

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(widen(x)).sum(-1))

    rows = largest(norm(d_out))
    bound = jnp.maximum(rows, rows * largest(norm(value)) + largest(delta))
    usable = (bound > 0) & jnp.isfinite(bound)
    power = jnp.minimum(2**14 / jnp.where(usable, bound, 2**14), 2.0**64)
    # This leaves a power of two, at most 4/3 of its argument, so that all stays below
    # 2**15, half of the largest float16. XLA computes exp2 by exp, which is not exact:
    # `delta` would no longer fit the `d_out` that is rounded to float16.
    power = lax.reduce_precision(power, exponent_bits=8, mantissa_bits=0)
    d_out = widen(d_out) * power[:, None, None, None]
    return d_out.astype(value.dtype), delta * power[:, None, None], 1 / power
