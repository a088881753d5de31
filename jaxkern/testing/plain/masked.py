"""Products of weights with a mask for each sample, and slopes of the masks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


# The derivative of a mask by its logits, in NumPy, by the name of the estimator.
SLOPES: dict[str, Callable[[Any], Any]] = {
    "straight_through": np.ones_like,
    "one_plus_sigmoid": lambda x: 1 + _sigmoid(x) * _sigmoid(-x),
    "reinmax": lambda x: _sigmoid(-abs(x)) / 2,
}


def masked_matmul(x, w, mask):
    r"""Multiply by masked weights: $y_b = x_b (w \odot m_b)$.

    Args:
        x: (batch, seq, d_in).
        w: (d_in, d_out).
        mask: (batch, d_in, d_out), or (1, d_in, d_out) for all samples together.
    """
    return jnp.einsum("bsd,bdm->bsm", x, w[None] * mask)


def masked_bilinear(x, weights, masks, biases):
    r"""A bilinear layer of masked weights and biases.

    $$y = (z_1 \odot z_2)\, W_3 + b_3, \quad z_i = x\, W_i + b_i$$

    where $W_i = w_i \odot m_i$ as in `masked_matmul`.
    """

    def affine(features, i):
        return masked_matmul(features, weights[i], masks[i]) + biases[i][None, None]

    return affine(affine(x, 0) * affine(x, 1), 2)
