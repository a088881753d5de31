"""The `vmap` rule of the attention kernels."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..block_mask.predicates import asks_for_batch


def over_batch(launch):
    """Return `launch(*arrays, mask=mask)` as a function of the mask and the arrays.

    Under `vmap` the mapped axis joins the batch, and there is one launch for all. If
    the predicate depends on the batch this cannot be, and a loop launches each.
    """

    @jax.custom_batching.custom_vmap
    def kernel(mask, *arrays):
        return launch(*arrays, mask=mask)

    @kernel.def_vmap
    def rule(size, is_batched, mask, *args):
        is_batched = tuple(is_batched)
        if asks_for_batch(mask.mask_fn):
            each = jax.tree.map(partial(_repeat, size), is_batched, (mask, *args))
            outs = lax.map(lambda args: kernel(*args), each)
        else:
            fold = partial(_fold, size, args[0].shape[is_batched[1]])
            args = jax.tree.map(partial(fold, True), is_batched[1:], args)
            outs = kernel(_fold_mask(fold, is_batched[0], mask), *args)
            outs = jax.tree.map(lambda o: o.reshape(size, -1, *o.shape[1:]), outs)
        return outs, jax.tree.map(lambda _: True, outs)

    return kernel


def _repeat(size, is_batched, a):
    return a if is_batched else jnp.broadcast_to(a, (size, *jnp.shape(a)))


def _fold(size, batch, always, is_batched, a):
    """Fold the mapped axis into the batch axis.

    Without `always`, an array that is neither mapped nor differs between batches keeps
    its batch of 1.
    """
    if not (always or is_batched or a.shape[0] > 1):
        return a
    a = _repeat(size, is_batched, a)
    return jnp.broadcast_to(a, (size, batch, *a.shape[2:])).reshape(-1, *a.shape[2:])


def _fold_mask(fold, is_batched, mask):
    """Fold the mapped axis into the batch of a mask.

    Traced lists must all have the same batch, and each array of the predicate may have
    its own. Lists in NumPy have no leaves and stay as they are: a schedule repeats
    them.
    """
    lists = mask.kv, mask.full_kv, mask.q, mask.full_q
    batched = is_batched.kv, is_batched.full_kv, is_batched.q, is_batched.full_q
    always = any(jax.tree.leaves(batched)) or mask.shape[0] > 1
    kv, full_kv, q, full_q = jax.tree.map(partial(fold, always), batched, lists)
    fn = jax.tree.map(partial(fold, False), is_batched.mask_fn, mask.mask_fn)
    return replace(mask, kv=kv, full_kv=full_kv, q=q, full_q=full_q, mask_fn=fn)
