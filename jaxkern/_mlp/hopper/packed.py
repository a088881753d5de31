"""The low-rank ReLU² MLP of packed weights on Hopper: four sparse products."""

import jax
import jax.numpy as jnp

from ..._mosaic.base import pad_to
from ..._mosaic.launch import COLUMN_STEP
from ..._mosaic.matmul import round_up
from ..._sparsity.hopper.product import product
from ..._sparsity.packed import Packed24


def relu2_mlp(
    x: jax.Array,
    up_in: Packed24,
    up_out: Packed24,
    down_in: Packed24,
    down_out: Packed24,
) -> jax.Array:
    """max(x up_in^T up_out^T, 0)^2 down_in^T down_out^T, of x (tokens, features).

    The weight is the left factor, so from the first product on features are the rows,
    as tokens are of x.
    """
    tokens, features = x.shape
    y = pad_to(x, round_up(tokens, COLUMN_STEP), features)
    y = product(up_in.values, up_in.indices, y, transposed=True)
    y = product(up_out.values, up_out.indices, y, activation="relu2")
    y = product(down_in.values, down_in.indices, y)
    y = product(down_out.values, down_out.indices, y)
    return jnp.transpose(y)[:tokens]
