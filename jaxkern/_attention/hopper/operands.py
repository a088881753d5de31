"""From arrays and a block mask to what the frame of the attention kernels takes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ..._core.sharding import vary_alike
from ..._mosaic.launch import CONTRACTED_STEP, ROW_STEP, WalkTiles
from ..block_mask.checks import has_values
from ..block_mask.mask import BlockMask
from ..block_mask.runs import BlockLists, KnownLists
from ..dilation import Dilation
from .predicates import make_predicate
from .tokens import Tokens
from .walk import Walk


def prepare(mask: BlockMask, *arrays: jax.Array):
    """The arrays padded with zeros at the end, to what tiles are made of, and the mask.

    Its lists stay on the host if they have values, so that their schedule is constant.
    """
    dim = pl.cdiv(max(x.shape[3] for x in arrays), CONTRACTED_STEP) * CONTRACTED_STEP

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


def tokens_of(dilation: Dilation | None, query, key, value) -> list[Tokens]:
    if dilation is None:
        return [Tokens(x) for x in (query, key, value)]
    of_keys = dilation.of_keys(key.shape[2] // dilation.rate)
    each = (query, dilation), (key, of_keys), (value, of_keys)
    return [Tokens(x, dilation=of) for x, of in each]


def walk_of(
    mask: BlockMask, side: str, query: Tokens, key: Tokens, config: WalkTiles
) -> Walk:
    groups, q_axis = query.heads // key.heads, ("kv", "q").index(side)
    predicate = make_predicate(mask, q_axis)
    return Walk(
        (getattr(mask, side), getattr(mask, f"full_{side}")),
        mask.block_size,
        partial(predicate.visible, (config.rows, config.columns)),
        predicate.data,
        heads=groups if q_axis else 1,
        share=1 if q_axis else groups,
    )
