"""Two definitions of masked products: float64 NumPy by hand, and the plain form."""

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, to_float64

from jaxkern import masked_bilinear, masked_matmul, reinmax, straight_through
from jaxkern._masked.forms import Method
from jaxkern.testing import plain as definitions

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
METHODS = get_args(Method)
KEY = jax.random.key(7)
one_plus_sigmoid = partial(straight_through, derivative="one_plus_sigmoid")
# (batch, seq, d_in, d_out or hidden, d_out)
SIZES = [(3, 5, 7, 11, 4), (1, 1, 1, 1, 1), (5, 2, 8, 3, 6)]
# The derivative of a mask by its logits, for each estimator without a key.
SLOPES = {
    straight_through: definitions.SLOPES["straight_through"],
    one_plus_sigmoid: definitions.SLOPES["one_plus_sigmoid"],
    reinmax: definitions.SLOPES["reinmax"],
}


def matmul_args(size, dtype=jnp.float32, shared=False) -> tuple[Any, Any]:
    batch, seq, d_in, d_out, *_ = size
    x = normal(0, (batch, seq, d_in), dtype)
    w = normal(1, (d_in, d_out), dtype, d_in**-0.5)
    logits = normal(2, w.shape if shared else (batch, *w.shape), dtype)
    return (x, w, logits), normal(3, (batch, seq, d_out), dtype)


def bilinear_args(size, dtype=jnp.float32, shared=False) -> tuple[Any, Any]:
    """(h, weights, mask_logits, biases) and the result's cotangent."""
    batch, seq, d_in, hidden, d_out = size
    shapes = [(d_in, hidden), (d_in, hidden), (hidden, d_out)]
    weights = tuple(
        normal(i, s, dtype, s[0] ** -0.5) for i, s in enumerate(shapes, start=1)
    )
    lead = () if shared else (batch,)
    logits = tuple(normal(i, (*lead, *s), dtype) for i, s in enumerate(shapes, 4))
    biases = tuple(normal(i, s[1:], dtype) for i, s in enumerate(shapes, start=7))
    args = normal(0, (batch, seq, d_in), dtype), weights, logits, biases
    return args, normal(10, (batch, seq, d_out), dtype)


def apply_matmul(x, w, logits, **options):
    return masked_matmul(x, w, logits, **options)


def apply_bilinear(h, weights, logits, biases, **options):
    return masked_bilinear(h, weights, logits, biases=biases, **options)


# `masked_bilinear` is made of the same products, so one method is enough for it.
EACH_METHOD_ONCE: list[Any] = [
    (apply_matmul, matmul_args, method) for method in METHODS
]
EACH_METHOD_ONCE.append((apply_bilinear, bilinear_args, "fused"))
each_method = pytest.mark.parametrize("method", METHODS)
each_method_once = pytest.mark.parametrize(
    "op, make, method", EACH_METHOD_ONCE, ids=[*METHODS, "bilinear"]
)


def matmul_float64(x, w, logits, g, slope) -> Any:
    """Return values and gradients sample by sample; logits (batch, d_in, d_out)."""
    y, d_x, d_logits = np.zeros(g.shape), np.zeros(x.shape), np.zeros(logits.shape)
    d_w = np.zeros(w.shape)
    for b in range(len(x)):
        mask = logits[b] > 0
        y[b] = x[b] @ (w * mask)
        d_x[b] = g[b] @ (w * mask).T
        d_masked = x[b].T @ g[b]
        d_w += d_masked * mask
        d_logits[b] = d_masked * w * slope(logits[b])
    return y, (d_x, d_w, d_logits)


def bilinear_float64(h, weights, logits, biases, g, slope) -> Any:
    none = np.zeros((len(h), h.shape[1], weights[0].shape[1]))
    z1, z2 = (
        matmul_float64(h, weights[i], logits[i], none, slope)[0] + biases[i]
        for i in (0, 1)
    )
    y, (d_p, d_w3, d_l3) = matmul_float64(z1 * z2, weights[2], logits[2], g, slope)
    d_z = d_p * z2, d_p * z1
    (d_h1, d_w1, d_l1), (d_h2, d_w2, d_l2) = (
        matmul_float64(h, weights[i], logits[i], d_z[i], slope)[1] for i in (0, 1)
    )
    d_biases = tuple(d.sum((0, 1)) for d in (*d_z, g))
    gradients = d_h1 + d_h2, (d_w1, d_w2, d_w3), (d_l1, d_l2, d_l3), d_biases
    return y + biases[2], gradients


FLOAT64 = {apply_matmul: matmul_float64, apply_bilinear: bilinear_float64}


def plain_bilinear(h, weights, logits, biases):
    masks = [straight_through(one) for one in logits]
    return definitions.masked_bilinear(h, weights, masks, biases)


def kernel_args(size, dtype=BF16, logits_dtype=None, shared=False) -> Any:
    """Return (x, w, logits) and a cotangent, in dtypes that the Hopper kernels take."""
    (x, w, logits), g = matmul_args(size, dtype, shared)
    return (x, w, logits.astype(logits_dtype or dtype)), g


def exact_matmul(args, g, slope=np.ones_like) -> Any:
    """`matmul_float64` for logits of each sample or logits that all samples share."""
    x, w, logits, g = to_float64((*args, g))
    if logits.ndim == 3:
        return matmul_float64(x, w, logits, g, slope)
    each = np.stack([logits] * len(x))
    y, (d_x, d_w, d_logits) = matmul_float64(x, w, each, g, slope)
    return y, (d_x, d_w, d_logits.sum(0))
