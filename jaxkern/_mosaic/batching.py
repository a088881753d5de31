"""The rule by which `vmap` batches a kernel: the new axis joins the heads."""

import jax
import jax.numpy as jnp


def over_heads(kernel):
    """Return `kernel` with a `vmap` that folds the new axis into the first axis.

    The first axis of every argument and result counts heads (or samples), which the
    kernel treats alike. Arguments that are not batched are repeated.
    """
    kernel = jax.custom_batching.custom_vmap(kernel)

    @kernel.def_vmap
    def fold(size, is_batched, *args):
        args = [
            a if batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, batched in zip(args, is_batched, strict=True)
        ]
        outs = kernel(*(a.reshape(-1, *a.shape[2:]) for a in args))
        outs = jax.tree.map(lambda o: o.reshape(size, -1, *o.shape[1:]), outs)
        return outs, jax.tree.map(lambda _: True, outs)

    return kernel
