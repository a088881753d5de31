"""The low-rank ReLU² MLP of packed weights on Hopper: four sparse products.

Each product is a launch of the kernel drawn in `_sparsity.hopper.product`, with the
packed weight as its left factor and tokens as columns:

    x --> up_in x^T --> max(up_out ., 0)^2 --> down_in . --> down_out . --> y^T

The activation is the second product's epilogue; x is read transposed, and XLA
transposes the result.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from ..._core.sharding import vary_alike
from ..._mosaic.base import pad_to, round_up
from ..._mosaic.launch import COLUMN_STEP
from ..._sparsity.hopper.product import product
from ..._sparsity.packed import Packed24

Reference = Callable[[jax.Array, Sequence[Packed24]], jax.Array]


def packed_relu2_mlp(
    x: jax.Array, factors: Sequence[Packed24], reference: Reference
) -> jax.Array:
    """Return max(x up_in^T up_out^T, 0)^2 down_in^T down_out^T.

    x: (tokens, features).
    factors: up_in, up_out, down_in and down_out.
    reference: the same function in XLA, whose gradients are taken for the kernels'.
    """
    count = len(factors)
    x, *leaves = vary_alike(
        x, *(one.values for one in factors), *(one.indices for one in factors)
    )
    features = tuple(one.features for one in factors)
    return _mlp(x, leaves[:count], leaves[count:], features, reference)


def _packed(
    values: Sequence[jax.Array], indices: Sequence[jax.Array], features: Sequence[int]
) -> list[Packed24]:
    return [Packed24(*one) for one in zip(values, indices, features, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _mlp(x, values, indices, features, reference):
    """Compute the four products with features as rows and tokens as columns.

    A packed weight must be the left factor, so all results are transposed.
    """
    del reference
    tokens = x.shape[0]
    up_in, up_out, down_in, down_out = _packed(values, indices, features)
    y = pad_to(x, round_up(tokens, COLUMN_STEP), x.shape[1])
    y = product(up_in.values, up_in.indices, y, transposed=True)
    y = product(up_out.values, up_out.indices, y, activation="relu2")
    y = product(down_in.values, down_in.indices, y)
    y = product(down_out.values, down_out.indices, y)
    return jnp.transpose(y)[:tokens]


def _mlp_fwd(x, values, indices, features, reference):
    y = _mlp(x, values, indices, features, reference)
    return y, (x, values, indices)


def _mlp_bwd(features, reference, saved, dy):
    x, values, indices = saved

    def unpacked(x, values):
        return reference(x, _packed(values, indices, features))

    # Positions are integers, which have no gradients.
    return *jax.vjp(unpacked, x, values)[1](dy), None


_mlp.defvjp(_mlp_fwd, _mlp_bwd)
