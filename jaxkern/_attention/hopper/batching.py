"""The rule of `vmap` for attention kernels."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..block_mask.predicates import asks_for_batch


def over_batch(launch):
    """`launch(*arrays, mask=mask)` as a function of the mask and the arrays.

    Under `vmap` the new axis joins the batch, unless `mask_fn` must know it.
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
    """The new axis into the batch; what is the same for all may stay so."""
    if not (always or is_batched or a.shape[0] > 1):
        return a
    a = _repeat(size, is_batched, a)
    return jnp.broadcast_to(a, (size, batch, *a.shape[2:])).reshape(-1, *a.shape[2:])


def _fold_mask(fold, is_batched, mask):
    """Traced lists all have the same batch; the predicate's data each their own.

    Lists in NumPy have no leaves and stay: a schedule repeats them.
    """
    lists = mask.kv, mask.full_kv, mask.q, mask.full_q
    batched = is_batched.kv, is_batched.full_kv, is_batched.q, is_batched.full_q
    always = any(jax.tree.leaves(batched)) or mask.shape[0] > 1
    kv, full_kv, q, full_q = jax.tree.map(partial(fold, always), batched, lists)
    fn = jax.tree.map(partial(fold, False), is_batched.mask_fn, mask.mask_fn)
    return replace(mask, kv=kv, full_kv=full_kv, q=q, full_q=full_q, mask_fn=fn)
